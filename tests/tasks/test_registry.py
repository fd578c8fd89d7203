"""A family of pipelines from outside the library, and what registering refuses."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, FluxPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ctrak_lightning import (
    Attributor,
    Concept,
    DiffusersTask,
    GradientTracer,
    PipelineTask,
    Projection,
    Sampler,
    TraceStore,
    methods,
    register_family,
)
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.errors import TaskError
from ctrak_lightning.tasks.registry import FAMILIES
from ctrak_lightning.tasks.text import PromptTask
from tests.gradients.zoo import TOLERANCE, row_error
from tests.tasks.support import PIPELINES
from tests.tasks.tiny import build

METHOD = methods.concept_trak(timesteps=2, channel_probes=1)


class ToneNet(ModelMixin, ConfigMixin):
    """A network of a class that the library does not know."""

    @register_to_config
    def __init__(self, sample_size: int = 6, in_channels: int = 3, out_channels: int = 3) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 5, 3, padding=1)
        self.tones = nn.Embedding(4, 5)
        self.conv_out = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, *, tone: Tensor) -> Tensor:
        told = self.tones(tone)[:, :, None, None] * (1 + timestep.view(-1, 1, 1, 1) / 1000)
        return self.conv_out(torch.tanh(self.conv_in(sample) + told))


class TonePipeline(DiffusionPipeline):
    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


class ToneTask(PipelineTask):
    """What a user writes."""

    pipelines: ClassVar[tuple[str | type, ...]] = (TonePipeline,)
    denoisers: ClassVar[tuple[str, ...]] = ("ToneNet",)
    denoiser_part: ClassVar[str] = "unet"
    frozen_parts: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]] = (*PipelineTask.fields, "tone")

    def batch_condition(self, batch: Any) -> dict[str, Tensor]:
        return {"tone": self.column(batch, "tone")}

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        return {"tone": torch.full((n,), int(spec.get("tone", 0)))}

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.denoiser(x_t, t, tone=condition["tone"])
        return output

    def latents(self, images: Tensor) -> Tensor:
        return images


class Tones(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(i)
        image = torch.randn(3, 6, 6, generator=generator)
        return {"pixels": image, "tone": i % 4, "sample_id": f"tone-{i}"}


class TheirModule(L.LightningModule):
    """Knows nothing of the library."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet, self.noise_scheduler = ToneNet(), DDIMScheduler(clip_sample=False)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        t = torch.randint(0, 1000, (len(batch["tone"]),))
        noise = torch.randn_like(batch["pixels"])
        noised = self.noise_scheduler.add_noise(batch["pixels"], noise, t)
        return (self.unet(noised, t, tone=batch["tone"]) - noise).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.fixture
def registered() -> Iterator[type[PipelineTask]]:
    known = dict(FAMILIES)
    yield register_family(ToneTask)
    FAMILIES.clear()
    FAMILIES.update(known)


@pytest.mark.usefixtures("registered")
def test_a_family_from_outside_is_recognised_traced_and_asked(tmp_path: Path) -> None:
    module, named = TheirModule(), DiffusersTask(batch={"pixels": "image"})
    tracer = ConceptTracer(
        str(tmp_path), METHOD, task=named, every_n_epochs=1, rank=3, dim=64, layers=None
    )
    L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[tracer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(Tones(), 2))

    pipeline = TonePipeline(module.unet, module.noise_scheduler)
    task = DiffusersTask.from_pipeline(pipeline, batch={"pixels": "image"})
    assert isinstance(task, ToneTask)
    loop = GradientTracer(module.unet, Projection(rank=3, dim=64), engine="loop")
    rows = next(iter(DataLoader(Tones(), 4)))
    by_loop = trace_batch(task, loop, METHOD, task.encode(rows), 0)
    checkpoint = TraceStore(tmp_path).checkpoints[-1]
    assert row_error(checkpoint.features(), by_loop.features) < TOLERANCE

    concept = Concept("two", present={"tone": "2"}, absent={})
    result = Attributor(
        tmp_path, module, task=named, sampler=Sampler(steps=3, guidance=1.0)
    ).attribute(concept)
    assert result.scores.std() > 0
    assert isinstance(DiffusersTask(pipeline="TonePipeline").bind(module), ToneTask)
    register_family(ToneTask)


class TwoTone(ToneTask):
    """Another family with the same denoiser."""

    pipelines: ClassVar[tuple[str | type, ...]] = ("TwoTonePipeline",)


def test_a_denoiser_of_two_families_is_asked_for_by_name(registered: type[PipelineTask]) -> None:
    register_family(TwoTone)
    told = "ToneNet, which TonePipeline, TwoTonePipeline may have.*pipeline='TonePipeline'"
    with pytest.raises(TaskError, match=told):
        DiffusersTask().bind(TheirModule())


def test_what_cannot_be_registered(registered: type[PipelineTask]) -> None:
    class Taking(ToneTask):
        pipelines: ClassVar[tuple[str | type, ...]] = ("TakingPipeline", FluxPipeline)

    class Silent(PromptTask):
        frozen_parts: ClassVar[tuple[str, ...]] = ()

    class Letters(ToneTask):
        pipelines = "LettersPipeline"  # type: ignore[assignment]

    class Numbers(ToneTask):
        pipelines = ("OnePipeline", 1)  # type: ignore[assignment]

    class Lone(ToneTask):
        pipelines: ClassVar[tuple[str | type, ...]] = ("LonePipeline",)
        denoisers = "ToneNet"  # type: ignore[assignment]

    class Few(ToneTask):
        pipelines: ClassVar[tuple[str | type, ...]] = ("FewPipeline",)
        fields: ClassVar[tuple[str, ...]] = ("tone",)

    class Partless(ToneTask):
        pipelines: ClassVar[tuple[str | type, ...]] = ("PartlessPipeline",)
        denoiser_part = None  # type: ignore[assignment]

    before = dict(FAMILIES)
    for family, message in (
        (
            Letters,
            r"Letters\): pipelines = 'LettersPipeline': expected a tuple of classes, or .*HINT",
        ),
        (Numbers, r"Numbers\): pipelines = \('OnePipeline', 1\): expected a tuple"),
        (
            Lone,
            r"denoisers = 'ToneNet': expected a tuple of texts\. HINT: denoisers = \('ToneNet',",
        ),
        (Few, r"fields = \('tone',\): it lacks image, latents, sample_id\. HINT: fields = \(\*Pip"),
        (Partless, r"denoiser_part = None: expected a text\. HINT"),
        (Taking, r"register_family\(Taking\): FluxPipeline is FluxTask's.*HINT: Taking\(pipeline"),
        (Silent, r"register_family\(Silent\): it lacks conditioned, embed, pipelines\. HINT"),
        (ToneNet, r"register_family\('ToneNet'\): expected a subclass of .*PipelineTask"),
        ("flux", r"register_family\('flux'\)"),
    ):
        with pytest.raises(TaskError, match=message):
            register_family(family)  # type: ignore[type-var]
    assert before == FAMILIES
    with pytest.raises(TaskError, match=r"from_pipeline\(object\).*register_family"):
        DiffusersTask.from_pipeline(object())


@pytest.mark.usefixtures("registered")
def test_a_family_that_is_registered_again_serves_what_it_serves_now() -> None:
    changed = type("Changed", (ToneTask,), {"pipelines": ("OldPipeline", "KeptPipeline")})
    register_family(changed)
    again = type("Changed", (ToneTask,), {"pipelines": ("KeptPipeline", "NewPipeline")})
    register_family(again)
    assert {name for name, family in FAMILIES.items() if family.__name__ == "Changed"} == {
        "KeptPipeline",
        "NewPipeline",
    }
    assert FAMILIES["KeptPipeline"] is again
    assert changed not in FAMILIES.values()


@pytest.mark.usefixtures("registered")
def test_what_a_family_lacks_is_named_where_it_is_needed() -> None:
    register_family(TwoTone)
    with pytest.raises(TaskError, match=r"TwoTone names it, and diffusers .* has no such.*HINT"):
        DiffusersTask(pipeline="TwoTonePipeline")

    class Forgetful(ToneTask):
        fields: ClassVar[tuple[str, ...]] = PipelineTask.fields

    scheduler = DDIMScheduler(clip_sample=False)
    task = Forgetful(TonePipeline(ToneNet(), scheduler))
    told = (
        r"Forgetful: 'tone' is none of its columns, \['image'.*HINT: .*PipelineTask\.fields, 'tone"
    )
    with pytest.raises(TaskError, match=told):
        task.batch_condition({"tone": torch.zeros(1)})

    bare = SimpleNamespace(unet=nn.Conv2d(3, 3, 1), scheduler=scheduler)
    with pytest.raises(
        TaskError, match=r"ToneTask: the Conv2d has no `config`, expected a model.*H"
    ):
        ToneTask(bare)
    with pytest.raises(TaskError, match=r"how large images are\. HINT: resolution"):
        ToneTask(TonePipeline(ToneNet(sample_size=None), scheduler))  # type: ignore[arg-type]


def test_every_family_of_the_library_has_rows_in_the_table_of_what_is_supported() -> None:
    built = {base.__name__ for name in PIPELINES for base in type(build(name)).__mro__}
    for family in set(FAMILIES.values()):
        own = [each if isinstance(each, str) else each.__name__ for each in family.pipelines]
        assert built & set(own), f"{family.__name__}: no row in tests/tasks/support.py"
