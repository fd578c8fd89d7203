"""In which precision networks are traced and asked, and what that costs in digits."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ctrak_lightning import (
    Attributor,
    Capture,
    Concept,
    DiffusionTask,
    Encoded,
    GradientTracer,
    NoiseSchedule,
    Projection,
    Sampler,
    TraceStore,
    methods,
)
from ctrak_lightning.callbacks import ConceptTracer
from ctrak_lightning.capture.trace import trace_batch
from ctrak_lightning.errors import MethodError, StoreMismatchError
from ctrak_lightning.methods.objectives import Denoising, MeanOutput, Prediction
from ctrak_lightning.methods.trajectories import Noised
from ctrak_lightning.utilities.dtypes import computation_dtype
from tests.tasks import tiny
from tests.toy import QuickDiffusion, ToyData, Toys, scheduler

METHOD = methods.influence("condition", timesteps=2)
PROJECTION = Projection(rank=4, dim=64)
RED = Concept("red", {"colour": "red", "shape": "dot"}, {"shape": "dot"})


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


class Wide(DiffusionTask, nn.Module):
    """One layer over D numbers, so that every gradient can be written down."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser = nn.Conv1d(1, 1, 1, bias=False).to(dtype)
        self.noise_schedule = NoiseSchedule.from_scheduler(scheduler())
        self.size, self.dtype = size, dtype

    def encode(self, batch: Any) -> Encoded:
        return Encoded(
            latents=batch.to(self.dtype),
            condition={},
            sample_ids=[str(i) for i in range(len(batch))],
        )

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        return {}

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert x_t.dtype == self.dtype
        output: Tensor = self.denoiser(x_t)
        return output


def traced(task: Wide, batch: Tensor, method: Any) -> Tensor:
    tracer = GradientTracer(task.denoiser, Projection(rank=1, dim=None))
    return trace_batch(task, tracer, method, task.encode(batch), 0).features


@pytest.mark.parametrize("size", [20_000, 300_000])
def test_a_cotangent_of_one_over_d_keeps_its_digits_in_float16(size: int) -> None:
    """1/D is 5e-5 and 3e-6, among the numbers of which float16 has few digits (powers of two are exact)."""
    batch = torch.rand(3, 1, size, generator=torch.Generator().manual_seed(0))
    method = methods.d_trak(1)
    method = type(method)(
        name="mean",
        training=MeanOutput(),
        training_trajectory=Noised(timesteps=1),
        query=method.query,
        query_trajectory=method.query_trajectory,
        normalisation="none",
    )
    halves, exact = Wide(size, torch.float16), Wide(size, torch.float32)
    exact.load_state_dict({name: value.float() for name, value in halves.state_dict().items()})
    assert relative(traced(halves, batch, method), traced(exact, batch, method)) < 1e-3


def test_the_noise_of_a_state_is_known_to_float32s_digits_under_bfloat16_latents() -> None:
    """With little noise, ``(x_t - a x0) / s`` of bfloat16 numbers is wrong by percents."""
    seen = []

    class Watching(Denoising):
        def cotangent(self, prediction: Prediction) -> Tensor:
            seen.append(prediction)
            return super().cotangent(prediction)

    task = Wide(64, torch.bfloat16)
    batch = torch.rand(3, 1, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    task.encode(batch)
    method = methods.trak(1)
    watched = type(method)(
        name="watched",
        training=Watching(),
        training_trajectory=Noised(timesteps=1, end=0.01),
        query=method.query,
        query_trajectory=method.query_trajectory,
    )
    traced(task, batch, watched)
    [one] = seen
    assert one.x_t.dtype == one.x0.dtype == torch.float32
    a, s = one.schedule.levels(one.t, one.x_t)
    noise = (one.x_t - a * one.x0) / s
    again = one.schedule.add_noise(one.x0, noise, one.t)
    assert relative(again, one.x_t) < 1e-6
    # The latents are the task's own, and the states are no rounded ones.
    assert torch.equal(one.x0, batch.bfloat16().float())
    assert not torch.equal(one.x_t, one.x_t.bfloat16().float())


def run(path: Path, **options: Any) -> QuickDiffusion:
    L.seed_everything(0, verbose=False)
    module = QuickDiffusion()
    callback = ConceptTracer(str(path), METHOD, rank=4, dim=64, on_error="raise", **options)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="bf16-mixed",
        callbacks=[callback],
    )
    trainer.fit(module, datamodule=ToyData())
    return module


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuickDiffusion]:
    path = tmp_path_factory.mktemp("mixed") / "traces"
    return path, run(path)


@pytest.mark.filterwarnings("ignore:The concept direction")
def test_questions_have_the_precision_of_the_traces_unless_another_is_asked_for(
    mixed: tuple[Path, QuickDiffusion],
) -> None:
    path, module = mixed
    seen: list[torch.dtype] = []
    handle = module.denoiser.register_forward_hook(lambda m, a, out: seen.append(out[0].dtype))
    options: dict[str, Any] = {"sampler": Sampler(steps=2), "record": False}
    try:
        for precision, dtype in ((None, torch.bfloat16), ("true", torch.float32)):
            seen.clear()
            attributor = Attributor(path, module, precision=precision, **options)
            scores = attributor.attribute(RED).scores
            # The network's function is compared in its own dtypes, whatever it is asked in.
            assert dtype in seen[-3:]
            assert scores.isfinite().all()
    finally:
        handle.remove()
    with pytest.raises(MethodError, match=r"precision='bf16'.*bf16-mixed.*HINT"):
        Attributor(path, module, precision="bf16")  # type: ignore[arg-type]


def test_a_precision_of_ones_own_goes_before_the_trainers(
    mixed: tuple[Path, QuickDiffusion], tmp_path: Path
) -> None:
    module = run(tmp_path / "true", precision="true", attention="math")
    store, other = TraceStore(tmp_path / "true"), TraceStore(mixed[0])
    assert store.header.method["numerics"] == {"attention": "math", "precision": "true"}
    ours, theirs = store.checkpoints[-1].features(), other.checkpoints[-1].features()
    assert 1e-3 < relative(ours, theirs) < 0.3
    assert torch.equal(module.denoiser.conv_in.weight, mixed[1].denoiser.conv_in.weight)


def test_a_run_goes_on_in_the_precision_of_its_store(
    mixed: tuple[Path, QuickDiffusion],
) -> None:
    path, module = mixed
    with pytest.raises(StoreMismatchError, match=r"numerics\.precision.*bf16-mixed.*true"):
        Capture(
            str(path),
            module,
            module,
            DataLoader(Toys(), 4),
            method=METHOD,
            tracer=GradientTracer(module.denoiser, PROJECTION),
            progress=False,
        )


class Quantised(nn.Module):
    """A weight of whole numbers and a scale, as quantising libraries hold one, in front."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randint(0, 255, (4, 4), dtype=torch.uint8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.adapter = nn.Linear(4, 4, dtype=torch.bfloat16)


def test_a_network_of_quantised_weights_is_given_floating_point_numbers() -> None:
    assert computation_dtype(Quantised()) == torch.bfloat16
    cast = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    cast[0].to(torch.float8_e4m3fn)
    assert computation_dtype(cast) == torch.float32


def test_a_vae_that_overflows_in_float16_runs_in_float32_and_stays_as_it_is() -> None:
    task = tiny.task_of("sd1")
    images = torch.rand(1, 3, 2 * tiny.SIZE, 2 * tiny.SIZE) * 2 - 1
    task.vae.half()
    task.vae.register_to_config(force_upcast=False)
    rounded = task.decode(task.latents(images))
    task.vae.register_to_config(force_upcast=True)
    latents = task.latents(images)
    decoded = task.decode(latents)
    assert {value.dtype for value in task.vae.parameters()} == {torch.float16}
    assert not any("wide" in name for name, _ in task.named_parameters())
    task.vae.float()  # the same weights, which float32 holds exactly
    assert torch.equal(latents, task.latents(images))
    assert decoded is not None
    assert torch.equal(decoded, task.decode(latents))
    assert rounded is not None
    assert not torch.equal(decoded, rounded.float())
