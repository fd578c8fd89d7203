"""Per-sample gradients by hooks equal a plain loop over the samples, in every family of
pipelines."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ctrak_lightning import GradientTracer, PipelineTask, Projection
from ctrak_lightning.gradients import SlowParameterWarning
from ctrak_lightning.tasks import select
from tests.gradients.zoo import TOLERANCE, row_error, weighted
from tests.tasks.support import pipelines_of
from tests.tasks.tiny import add_lora, batch, task_of

SAMPLES = 3
ATTENTION = ["*to_q", "*to_k", "*to_v", "*to_out.0"]


def features(task: PipelineTask, engine: str, layers: Sequence[str] | None = None) -> Tensor:
    """Features [SAMPLES, k] of a batch, each sample at a timestep of its own."""
    encoded = task.encode(batch(SAMPLES))
    schedule = task.noise_schedule
    t = torch.tensor(schedule.even_timesteps(SAMPLES))
    noise = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(4))
    x_t = schedule.add_noise(encoded.latents, noise, t)

    def forward(rows: Tensor) -> Tensor:
        x, at = x_t[rows], t[rows]
        return schedule.epsilon(task.predict(x, at, select(encoded.condition, rows)), x, at)

    tracer = GradientTracer(
        task.denoiser, Projection(rank=4, dim=None), layers=layers, engine=engine
    )  # type: ignore[arg-type]
    return tracer.vjps(forward, [weighted], SAMPLES)[0]


@pytest.mark.parametrize("name", pipelines_of("lora"))
def test_lora(name: str) -> None:
    task = task_of(name)
    add_lora(task.denoiser)
    assert row_error(features(task, "hooks"), features(task, "loop")) < TOLERANCE


@pytest.mark.parametrize("name", pipelines_of("attention"))
def test_full_fine_tuning_and_its_attention(name: str) -> None:
    """The attention's columns of all parameters' features are the attention's own features."""
    task = task_of(name)
    assert (
        row_error(features(task, "hooks", ATTENTION), features(task, "loop", ATTENTION)) < TOLERANCE
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowParameterWarning)  # PixArt's and Flux's bare parameters
        assert row_error(features(task, "auto"), features(task, "loop")) < TOLERANCE


def test_dora_goes_through_the_loop_with_a_warning_that_names_it() -> None:
    task = task_of("sd1")
    add_lora(task.denoiser, use_dora=True)
    with pytest.warns(
        SlowParameterWarning, match=r"pass per sample.*lora_magnitude_vector.*HINT"
    ) as caught:
        ours = features(task, "auto")
    assert "lora_A" not in str(caught[0].message)
    loop = features(task, "loop")
    assert row_error(ours, loop) < TOLERANCE
    magnitudes = [
        n for n, p in task.denoiser.named_parameters() if "magnitude" in n and p.requires_grad
    ]
    assert (
        len(magnitudes) == 2 * 2 * 2 * 4
    )  # blocks with attention x (self, cross) x (q, k, v, out)
