"""A pipeline's fine-tune, traced by the callback and asked afterwards."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ctrak_lightning import (
    Attributor,
    Capture,
    Concept,
    DiffusersTask,
    GradientTracer,
    Method,
    PipelineTask,
    Projection,
    Sampler,
    TraceStore,
    methods,
)
from ctrak_lightning.attribution.scoring import checkpoint_scores
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.trace import trace_batch, trace_query
from ctrak_lightning.errors import StoreMismatchError
from ctrak_lightning.gradients import SlowParameterWarning
from ctrak_lightning.model.function import UnrecordedFunctionWarning
from ctrak_lightning.utilities.rng import isolated_rng
from tests.gradients.zoo import TOLERANCE, row_error
from tests.tasks.support import pipelines_of
from tests.tasks.tiny import add_lora, batch, build, task_of

# The frozen VAE and text encoders are in evaluation mode, as they should be.
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")
SAMPLES = 4
CAT = Concept("cat", present="a cat by x", absent="a picture by x")
FIRST = Concept("first", present={"class": "0"}, absent={"class": "1"})
IMAGE = Concept("image", present={}, absent="")
SAMPLER = Sampler(steps=3, guidance=1.0)


class Samples(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.batch = batch(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.batch.items()}


class FineTune(L.LightningModule):
    """What a user writes."""

    def __init__(self, task: PipelineTask) -> None:
        super().__init__()
        self.task = task

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.task.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fine_tune(
    name: str, *, dora: bool = False, full: bool = False, seed: int = 0, **options: Any
) -> FineTune:
    task = task_of(name, seed=seed, **options)
    if not full:
        add_lora(task.denoiser, use_dora=dora)
    return FineTune(task)


def fit(module: FineTune, path: Path | None, method: Method | None = None) -> None:
    L.seed_everything(0, verbose=False)
    tracer = ConceptTracer(str(path), method, every_n_train_steps=1, rank=4, dim=128, layers=None)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[] if path is None else [tracer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Samples(), 2))


def test_stable_diffusion_with_lora_is_traced_and_asked_by_prompt(tmp_path: Path) -> None:
    plain, module = fine_tune("sd1"), fine_tune("sd1")
    fit(plain, None)
    method = methods.concept_trak(timesteps=2, channel_probes=1)
    fit(module, tmp_path / "traces", method)
    for theirs, ours in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(theirs, ours)
    store = TraceStore(tmp_path / "traces")
    assert store.samples.sample_ids == [f"image-{i}" for i in range(SAMPLES)]
    assert store.samples.metadata["owner"] == [f"owner {i}" for i in range(SAMPLES)]
    assert [checkpoint.step for checkpoint in store.checkpoints] == [1, 2]

    # Training side: the rows of the last checkpoint are a plain loop's under the final weights.
    task = module.task
    loop = GradientTracer(task.denoiser, Projection(rank=4, dim=128), engine="loop")
    by_loop = trace_batch(task, loop, method, task.encode(batch(SAMPLES)), 0)
    assert row_error(store.checkpoints[-1].features(), by_loop.features) < TOLERANCE

    # Query side: the same of the concept, on the states of the generation that the prompt made.
    attributor = Attributor(store, module, sampler=SAMPLER)
    query = attributor.query([CAT], 7)
    generation = attributor.generate(["a cat by x"], [7])
    states = method.query_trajectory.select(generation, task.noise_schedule)  # type: ignore[attr-defined]
    conditions = {
        "present": task.condition("a cat by x", 1),
        "absent": task.condition("a picture by x", 1),
    }
    asked = trace_query(task, loop, method, states, generation.latents, conditions)  # type: ignore[arg-type]
    assert row_error(query.features[-1], asked.features) < TOLERANCE
    result = attributor.score(query)[0]
    assert result.scores.shape == (SAMPLES,)
    assert result.scores.isfinite().all()
    assert {record.sample_id for record in result.top(SAMPLES)} == set(store.samples.sample_ids)
    assert result.image is not None
    assert result.image.shape == (3, 8, 8)


@pytest.mark.parametrize("name", pipelines_of("end to end"))
def test_every_family_is_traced_and_asked(name: str, tmp_path: Path) -> None:
    """By the default method, with two timesteps; of a model without conditions, which has no
    concepts, by D-TRAK. Each stored row is that of its sample alone, and the answer is the rows'
    own, computed anew from the question's gradients."""
    concept = {"ddpm": IMAGE, "ddpm-classes": FIRST, "dit": FIRST}.get(name, CAT)
    module = fine_tune(name, full=name.startswith(("ddpm", "pixart")))
    method = methods.d_trak(timesteps=2) if concept is IMAGE else methods.concept_trak(timesteps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowParameterWarning)  # PixArt's tables
        warnings.simplefilter(
            "ignore", UnrecordedFunctionWarning
        )  # a network of classes without a null class
        fit(module, tmp_path, method)
        attributor = Attributor(tmp_path, module, sampler=SAMPLER)
        result = attributor.attribute(concept, seed=1)
        query = attributor.query([concept], 1)
        tracer = GradientTracer(module.task.denoiser, Projection(rank=4, dim=128), engine="auto")
    last = attributor.store.checkpoints[-1]
    with isolated_rng(0):
        alone = trace_batch(
            module.task, tracer, method, module.task.encode(batch(SAMPLES)).rows(1, 2), 0
        )
    assert row_error(last.features()[1:2], alone.features) < TOLERANCE
    assert [c.step for c in attributor.store.checkpoints] == result.steps == [1, 2]
    scores = checkpoint_scores(query.features[-1], last, result.damping)[0]
    torch.testing.assert_close(result.checkpoint_scores[-1].double(), scores, rtol=1e-3, atol=1e-9)
    assert result.scores.std() > 0


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "adapters.md"
    code = page.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "diffusers.StableDiffusionPipeline.from_pretrained", lambda name: build("sd1")
    )
    monkeypatch.setattr(
        "lightning.Trainer",
        partial(L.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False),
    )
    code = code.replace("max_epochs=30", "max_epochs=2").replace(
        "every_n_epochs=10", "every_n_epochs=1"
    )
    scope: dict[str, Any] = {"loader": DataLoader(Samples(), 2)}
    exec(compile(code, str(page), "exec"), scope)
    result = scope["result"]
    assert result.steps == [2, 4]
    assert result.scores.shape == (SAMPLES,)
    assert result.scores.isfinite().all()
    assert all(
        "lora" in name for name in TraceStore(tmp_path / "runs/x/traces").checkpoints[0].weights()
    )


def test_the_training_steps_own_gradients_of_a_pipeline(tmp_path: Path) -> None:
    module = fine_tune("flux")
    L.seed_everything(0, verbose=False)
    tracer = ConceptTracer(str(tmp_path), mode="inline", every_n_epochs=1, rank=4, dim=128)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[tracer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Samples(), 2))
    (checkpoint,) = TraceStore(tmp_path).checkpoints
    assert checkpoint.features().norm(dim=1).min() > 0
    result = Attributor(
        tmp_path, module, sampler=SAMPLER, method=methods.inline_trak(timesteps=2, damping=1.0)
    )
    assert result.attribute(CAT).scores.isfinite().all()


def test_dora_is_traced_whole_and_asked(tmp_path: Path) -> None:
    module = fine_tune("sd1", dora=True)
    method = methods.concept_trak_norm(timesteps=2, damping=1.0)
    with pytest.warns(SlowParameterWarning, match="lora_magnitude_vector"):
        fit(module, tmp_path, method)
    store = TraceStore(tmp_path)
    assert store.header.projection["parameters_without_hook"] == 32
    loop = GradientTracer(module.task.denoiser, Projection(rank=4, dim=128), engine="loop")
    by_loop = trace_batch(module.task, loop, method, module.task.encode(batch(SAMPLES)), 0)
    assert row_error(store.checkpoints[-1].features(), by_loop.features) < TOLERANCE
    with pytest.warns(SlowParameterWarning, match="lora_magnitude_vector"):
        result = Attributor(store, module, sampler=SAMPLER).attribute(CAT)
    assert result.scores.isfinite().all()


def test_a_store_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    fit(fine_tune("sd1"), tmp_path, methods.concept_trak_norm(timesteps=1, damping=1.0))
    Attributor(tmp_path, fine_tune("sd1"))
    for module, message in (
        (fine_tune("sd1", seed=1), "model.frozen_weights"),
        (fine_tune("sd2"), "model.noise_schedule"),
        (fine_tune("sdxl"), "model.frozen_weights"),
        (fine_tune("dit"), "model.trained_parameters"),
        (fine_tune("sd1", full=True), "model.frozen_weights"),
    ):
        with pytest.raises(StoreMismatchError, match=f"{message}.*HINT"):
            Attributor(tmp_path, module)
    other_text = fine_tune("sd1")
    with torch.no_grad():
        next(other_text.task.text_encoder.parameters()).add_(1e-3)  # type: ignore[union-attr]
    with pytest.raises(StoreMismatchError, match="model.frozen_weights"):
        Attributor(tmp_path, other_text)


def test_flows_of_another_shift_are_refused(tmp_path: Path) -> None:
    fit(fine_tune("sd3"), tmp_path, methods.concept_trak_norm(timesteps=1, damping=1.0))
    pipeline = build("sd3")
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, shift=2.0)
    task = DiffusersTask.from_pipeline(pipeline, max_sequence_length=16)
    add_lora(task.denoiser)
    with pytest.raises(StoreMismatchError, match="model.noise_schedule"):
        Attributor(tmp_path, FineTune(task))


@pytest.mark.parametrize("without", ["", "image", "colour"])
def test_thumbnails_are_the_training_images_or_else_decoded(tmp_path: Path, without: str) -> None:
    module = fine_tune("ddpm" if without == "colour" else "sd1")
    rows = batch(SAMPLES)
    if without == "image":
        rows["latents"] = module.task.encode(rows).latents
    if without == "colour":
        rows["image"] = rows["image"].mean(1, keepdim=True)
        assert module.task.pictures(rows) is None
        return
    columns = [{name: values[i] for name, values in rows.items()} for i in range(SAMPLES)]
    capture = Capture(
        str(tmp_path),
        module,
        module.task,
        DataLoader(columns, 2),  # type: ignore[arg-type]
        method=methods.d_trak(timesteps=1),
        tracer=GradientTracer(module.task.denoiser, Projection(rank=4, dim=64)),
        progress=False,
    )
    capture.run(0, epoch=0)
    with torch.no_grad():
        decoded = module.task.decode(module.task.encode(rows).latents)
    expected = decoded if without == "image" else (rows["image"] + 1) / 2
    found = TraceStore(tmp_path).samples.thumbnails
    assert found is not None
    torch.testing.assert_close(
        found.permute(0, 3, 1, 2).float() / 255, expected, rtol=0, atol=0.5 / 255 + 1e-6
    )
