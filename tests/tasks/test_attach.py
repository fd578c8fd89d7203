"""A module that knows nothing of this library is traced by the names of its attributes, and stays
as it is."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from ctrak_lightning import (
    Attributor,
    Concept,
    DiffusersTask,
    GradientTracer,
    NoiseSchedule,
    Projection,
    Sampler,
    TraceStore,
    methods,
)
from ctrak_lightning.callbacks import ConceptMonitor, ConceptTracer, ProvenanceRecorder
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.cli import main
from ctrak_lightning.cli.question import tracer_task
from ctrak_lightning.errors import TaskError
from ctrak_lightning.provenance import Ledger
from tests.gradients.zoo import TOLERANCE, row_error
from tests.tasks.test_fine_tune import FineTune, Samples
from tests.tasks.theirs import BATCH, SAMPLES, TheirData, TheirDataModule, TheirModule
from tests.tasks.tiny import (
    CAPTIONS,
    SIZE,
    TOKENS,
    add_lora,
    batch,
    build,
    task_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
    # A model of random weights hardly knows its concepts.
    pytest.mark.filterwarnings("ignore:The concept direction"),
]
METHOD = methods.concept_trak_norm(timesteps=2, damping=1.0)
NAMED = DiffusersTask(
    unet="unet",
    vae="vae",
    text_encoder="text_encoder",
    tokenizer="tokenizer",
    scheduler="noise_scheduler",
    batch=BATCH,
)
ROOT = Path(__file__).parents[2]


def fit(
    module: L.LightningModule, *callbacks: L.Callback, data: L.LightningDataModule | None = None
) -> None:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data or TheirDataModule())


def tracer(path: Path, task: DiffusersTask | None = NAMED) -> ConceptTracer:
    return ConceptTracer(str(path), METHOD, task=task, every_n_train_steps=1, rank=4, dim=128)


def what_a_module_is(module: nn.Module) -> dict[str, Any]:
    return {
        "modules": {name: inner.training for name, inner in module.named_modules()},
        "parameters": {name: value.requires_grad for name, value in module.named_parameters()},
        "state": list(module.state_dict()),
        "scheduler": dict(module.noise_scheduler.config),
    }


def test_a_module_is_traced_by_names_and_stays_as_it_is(tmp_path: Path) -> None:
    plain, module = TheirModule(), TheirModule()
    module.vae.eval()
    plain.vae.eval()
    fit(plain)
    fit(module, tracer(tmp_path))
    assert what_a_module_is(module) == what_a_module_is(plain)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True)
    )

    store = TraceStore(tmp_path)
    assert store.samples.sample_ids == [
        "0",
        "1",
        "2",
        "3",
    ]  # positions in the data set, though training shuffles
    assert all(
        name.startswith("unet.") and "lora" in name for name in store.checkpoints[-1].weights()
    )

    # The traces are those that the same weights give as a pipeline with captions.
    pipeline = build("sd1")
    pipeline.unet, pipeline.vae, pipeline.text_encoder = (
        module.unet,
        module.vae,
        module.text_encoder,
    )
    whole = DiffusersTask.from_pipeline(pipeline).eval()
    rows = {
        "image": TheirData().images,
        "caption": list(CAPTIONS),
        "sample_id": ["0", "1", "2", "3"],
    }
    loop = GradientTracer(module.unet, Projection(rank=4, dim=128), engine="loop")
    by_loop = trace_batch(whole, loop, METHOD, whole.encode(rows), 0)
    assert row_error(store.checkpoints[-1].features(), by_loop.features) < TOLERANCE

    cat = Concept("cat", present="a cat by x", absent="a picture by x")
    result = Attributor(
        store, module, task=NAMED, sampler=Sampler(steps=3, guidance=2.0)
    ).attribute(cat)
    assert result.scores.std() > 0
    assert result.image is not None
    disputed = Concept("cat", "a cat by x", "a picture by x", image=TheirData().images[0])
    attributor = Attributor(store, module, task=NAMED, sampler=Sampler(steps=4, guidance=1.0))
    assert attributor.attribute(disputed).scores.isfinite().all()
    with pytest.raises(TaskError, match="no DiffusionTask.*task=DiffusersTask"):
        Attributor(store, module)


# Their batches have no ids.
@pytest.mark.filterwarnings("ignore:.*often.* trained on:UserWarning")
@pytest.mark.filterwarnings("ignore:.ConceptTracer.. how often each sample")
def test_from_yaml_and_for_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that the documentation names, on a module of which it knows nothing."""
    monkeypatch.chdir(tmp_path)
    attached = ROOT / "callbacks" / "concept_tracer_diffusers.yaml"
    run = tmp_path / "run.yaml"
    trainer = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    run.write_text(
        yaml.safe_dump(
            {
                "seed_everything": 0,
                "trainer": trainer,
                "model": {"class_path": "tests.tasks.theirs.TheirModule"},
                "data": {"class_path": "tests.tasks.theirs.TheirDataModule"},
            }
        )
    )
    monkeypatch.setattr(
        "sys.argv", ["ctrak", "fit", "--config", str(run), "--config", str(attached)]
    )
    cli = LightningCLI()
    assert TraceStore("runs/traces").samples.sample_ids == ["0", "1", "2", "3"]
    task = tracer_task(attached)
    assert repr(task) == repr(NAMED)
    assert tracer_task(run) is None
    attributor = Attributor("runs/traces", cli.model, task=task)
    assert attributor.task.resolution == (2 * SIZE, 2 * SIZE)

    facts = yaml.safe_load(attached.read_text())
    whole = yaml.safe_load(run.read_text())
    whole["trainer"]["callbacks"] = facts["trainer"]["callbacks+"]
    merged = tmp_path / "config.yaml"
    merged.write_text(yaml.safe_dump(whole))
    asked = [
        "attribute",
        "runs/traces",
        "--config",
        str(merged),
        "--present",
        "a cat by x",
        "--absent",
    ]
    with warnings.catch_warnings():
        # Its batches have no ids, so that nobody knows how often each image was trained on.
        warnings.filterwarnings("ignore", "influence multiplies a sample's score")
        main(
            [
                *asked,
                "a picture by x",
                "--steps",
                "10",
                "--csv",
                "cat.csv",
                "--device",
                "cpu",
                "--precision",
                "true",
            ]
        )
    assert len(Path("cat.csv").read_text().splitlines()) == 1 + SAMPLES
    [first] = facts["trainer"]["callbacks+"]
    second = {"class_path": "ConceptTracer", "init_args": {"task": {"class_path": "DiffusersTask"}}}
    run.write_text(yaml.safe_dump({"trainer": {"callbacks": [first, second]}}))
    with pytest.raises(ValueError, match="different tasks.*HINT"):
        tracer_task(run)


@pytest.mark.filterwarnings("ignore:The rankings of these concepts say nothing")
@pytest.mark.parametrize("name", ["theirs", pytest.param("sd3", marks=pytest.mark.slow)])
def test_the_other_callbacks_follow_the_tracers_task(name: str, tmp_path: Path) -> None:
    """The monitor generates and asks; the recorder notes the base model. A flow has no alpha_bar to
    look at."""
    cat = Concept("cat", present="a cat by x", absent="a picture by x")
    monitor = ConceptMonitor([cat], group=None, sampler=Sampler(steps=4), on_error="raise")
    module = TheirModule() if name == "theirs" else FineTune(task_of(name))
    if name != "theirs":
        add_lora(module.task.denoiser)
    callback = tracer(tmp_path / "traces", NAMED if name == "theirs" else None)
    callback.every_n_train_steps = None
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback, monitor, ProvenanceRecorder()],
        logger=TensorBoardLogger(tmp_path, name="board", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TheirData() if name == "theirs" else Samples(), 2))
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert found.Tags()["images"] == ["ctrak/concept/cat"]
    assert [entry.kind for entry in Ledger(tmp_path / "traces").entries()] == [
        "run_begun",
        "dataset",
        "checkpoint",
        "run_ended",
    ]


def test_networks_made_in_configure_model_are_found(tmp_path: Path) -> None:
    class Late(TheirModule):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)

        def configure_model(self) -> None:
            if not hasattr(self, "unet"):
                made = TheirModule()
                self.unet, self.vae, self.text_encoder = made.unet, made.vae, made.text_encoder
                self.tokenizer, self.noise_scheduler = made.tokenizer, made.noise_scheduler

    fit(Late(), tracer(tmp_path))
    assert len(TraceStore(tmp_path)) == SAMPLES


def test_parts_deeper_in_a_module_and_the_defaults_of_names() -> None:
    theirs = TheirModule()
    deep = SimpleNamespace(model=SimpleNamespace(net=theirs.unet), enc=theirs.text_encoder)
    deep.vae, deep.tokenizer, deep.scheduler = theirs.vae, theirs.tokenizer, theirs.noise_scheduler
    task = DiffusersTask(unet="model.net", text_encoder="enc", batch=BATCH).bind(deep)
    rows = next(iter(TheirDataModule().train_dataloader())) | {"sample_id": ["a", "b"]}
    expected = NAMED.bind(theirs)
    assert torch.equal(task.encode(rows).latents, expected.encode(rows).latents)
    parts = {
        name: getattr(theirs, name)
        for name in ("unet", "vae", "text_encoder", "tokenizer", "noise_scheduler")
    }
    assert torch.equal(
        DiffusersTask(batch=BATCH).bind(parts).encode(rows).latents, task.encode(rows).latents
    )


def test_an_outdated_scheduler_stays_as_it_is() -> None:
    """Stable Diffusion's pipeline changes these two settings of the scheduler it gets; what it
    generates with is the changed one."""
    theirs = TheirModule()
    theirs.noise_scheduler = diffusers.DDPMScheduler()
    task = NAMED.bind(theirs)
    assert (
        theirs.noise_scheduler.config.clip_sample,
        theirs.noise_scheduler.config.steps_offset,
    ) == (
        True,
        0,
    )
    assert isinstance(task.noise_schedule, NoiseSchedule)
    assert (task.noise_schedule.clip, task.noise_schedule.steps_offset) == (None, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"unet": "unett"},
            r"unet='unett'.*TheirModule has no attribute 'unett'.*It has: unet, .*HINT",
        ),
        ({"unet": "unet.inner.net"}, r"TheirModule\.unet has no attribute 'inner'"),
        ({"vae": "text_encoder"}, r"vae \(CLIPTextModel\)|CLIPText"),
        ({"scheduler": "tokenizer"}, r"tokenizer|scheduler"),
        (
            {"unet": "vae"},
            r"denoiser is AutoencoderKL: expected one of .*UNet2DConditionModel.*unwrapped",
        ),
        ({"pipeline": "FluxPipeline"}, r"FluxPipeline.*unknown \['unet'\]|lacks|transformer"),
        ({"batch": {"pixel_values": "picture"}}, r"unknown \['picture'\].*'pixel_values': 'image'"),
        ({"batch": {"a": "image", "b": "image"}}, r"two columns under one name"),
    ],
)
def test_what_does_not_fit_is_said(names: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        DiffusersTask(**({"unet": "unet", "scheduler": "noise_scheduler"} | names)).bind(
            TheirModule()
        )


def test_missing_parts_are_named(tmp_path: Path) -> None:
    module = TheirModule()
    del module.vae
    with pytest.raises(TaskError, match=r"bound to TheirModule.*lacks vae.*HINT.*'latents'"):
        NAMED_WITHOUT_VAE.bind(module)
    with pytest.raises(MisconfigurationException, match="`ConceptTracer`.*lacks vae"):
        fit(module, tracer(tmp_path, NAMED_WITHOUT_VAE))
    with pytest.raises(
        TaskError, match=r"pipeline='StableDiffusion4'.*expected one of StableDiffusionPipeline"
    ):
        DiffusersTask(pipeline="StableDiffusion4")
    with pytest.raises(TaskError, match="Alpha and Sigma.*pipeline='PixArtSigmaPipeline'"):
        DiffusersTask().bind(build("pixart").components)
    no_submodule = L.LightningModule()
    no_submodule.pipe = build("sd1")
    with pytest.raises(TaskError, match="no submodule.*self.unet = pipeline.unet"):
        DiffusersTask(
            unet="pipe.unet",
            vae="pipe.vae",
            text_encoder="pipe.text_encoder",
            scheduler="pipe.scheduler",
        ).bind(no_submodule)


NAMED_WITHOUT_VAE = DiffusersTask(batch=BATCH)


@pytest.mark.parametrize(
    "name",
    ["sd1", "sdxl", "sd3", "sd35", "flux", "dit", "ddpm", "ddpm-classes", "pixart", "pixart-sigma"],
)
def test_the_family_is_inferred_from_the_parts(name: str) -> None:
    pipeline = build(name)
    kind = type(pipeline).__name__ if name.startswith("pixart") else None
    options = {"max_sequence_length": TOKENS} if name.startswith(("sd3", "flux", "pixart")) else {}
    if name == "flux":
        options["resolution"] = 2 * SIZE  # type: ignore[assignment]
    parts = {part: value for part, value in pipeline.components.items() if value is not None}
    task = DiffusersTask(pipeline=kind, options=options).bind(parts)
    whole = task_of(name)
    assert type(task) is type(whole)
    assert task.noise_schedule.to_dict() == whole.noise_schedule.to_dict()
    ours, expected = task.encode(batch(2)), whole.encode(batch(2))
    assert torch.equal(ours.latents, expected.latents)
    torch.testing.assert_close(ours.condition, expected.condition)
    assert all(
        p.requires_grad for p in parts.get("vae", task.denoiser).parameters()
    )  # left as they were


def test_a_borrowed_text_encoder_is_asked_in_evaluation_mode() -> None:
    """T5 has dropout, and a module that was never told leaves it in training mode."""
    pipeline = build("pixart")
    pipeline.text_encoder.train()
    task = DiffusersTask(
        pipeline="PixArtAlphaPipeline", options={"max_sequence_length": TOKENS}
    ).bind(pipeline.components)
    expected = task_of("pixart").condition("a cat", 1)["encoder_hidden_states"]
    assert torch.equal(task.condition("a cat", 1)["encoder_hidden_states"], expected)
    assert all(module.training for module in pipeline.text_encoder.modules())


def test_inline_needs_ids(tmp_path: Path) -> None:
    """A training step's batch does not say where in the data set its samples are."""
    callback = ConceptTracer(str(tmp_path), task=NAMED, mode="inline", rank=4, dim=64)
    with pytest.raises(MisconfigurationException, match="asked for 'sample_id'.*HINT"):
        fit(TheirModule(), callback)


def test_adapters_are_found_on_wrapped_networks() -> None:
    import peft

    module = SimpleNamespace(**{k: v for k, v in build("sd1").components.items() if v is not None})
    module.unet = peft.get_peft_model(module.unet, peft.LoraConfig(r=2, target_modules=["to_q"]))
    assert type(DiffusersTask().bind(module)).__name__ == "StableDiffusionTask"
    module.unet = torch.compile(module.unet)
    assert type(DiffusersTask().bind(module)).__name__ == "StableDiffusionTask"
