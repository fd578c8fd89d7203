"""Per-sample gradients by hooks equal a plain loop over the samples, in every family of pipelines."""

import warnings
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from ctrak_lightning import DiffusersTask, GradientTracer, Projection
from ctrak_lightning.gradients import SlowParameterWarning
from ctrak_lightning.task import select
from tests.gradients.zoo import TOLERANCE, row_error, weighted
from tests.task.tiny import PIPELINES, batch, task_of

SAMPLES = 3
ATTENTION = ["*to_q", "*to_k", "*to_v", "*to_out.0"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = ["add_q_proj", "add_k_proj", "add_v_proj"]
"""The text's side of joint attention; SD3 and Flux fine-tunes train it too."""


def add_lora(task: DiffusersTask, use_dora: bool = False) -> None:
    """LoRA on the attention, with weights off their initial zeros."""
    joint = JOINT if any(name.endswith(JOINT[0]) for name, _ in task.denoiser.named_modules()) else []
    task.denoiser.requires_grad_(False)
    # Not every denoiser of diffusers has `add_adapter`, which does the same.
    config = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS + joint, use_dora=use_dora)
    inject_adapter_in_model(config, task.denoiser)
    generator = torch.Generator().manual_seed(5)
    for parameter in task.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def features(task: DiffusersTask, engine: str, layers: Sequence[str] | None = None) -> Tensor:
    """Features [SAMPLES, k] of a batch, each sample at a timestep of its own."""
    encoded = task.encode(batch(SAMPLES))
    schedule = task.noise_schedule
    t = torch.tensor(schedule.even_timesteps(SAMPLES))
    noise = torch.randn(encoded.latents.shape, generator=torch.Generator().manual_seed(4))
    x_t = schedule.add_noise(encoded.latents, noise, t)

    def forward(rows: Tensor) -> Tensor:
        x, at = x_t[rows], t[rows]
        return schedule.epsilon(task.predict(x, at, select(encoded.condition, rows)), x, at)

    tracer = GradientTracer(task.denoiser, Projection(rank=4, dim=None), layers=layers, engine=engine)  # type: ignore[arg-type]
    return tracer.vjps(forward, [weighted], SAMPLES)[0]


@pytest.mark.parametrize("name", PIPELINES)
def test_lora(name: str) -> None:
    task = task_of(name)
    add_lora(task)
    assert row_error(features(task, "hooks"), features(task, "loop")) < TOLERANCE


@pytest.mark.parametrize("name", PIPELINES)
def test_full_fine_tuning_and_its_attention(name: str) -> None:
    """The attention's columns of all parameters' features are the attention's own features."""
    task = task_of(name)
    assert row_error(features(task, "hooks", ATTENTION), features(task, "loop", ATTENTION)) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowParameterWarning)  # PixArt's and Flux's bare parameters
        assert row_error(features(task, "auto"), features(task, "loop")) < TOLERANCE


def test_dora_goes_through_the_loop_with_a_warning_that_names_it() -> None:
    task = task_of("sd1")
    add_lora(task, use_dora=True)
    with pytest.warns(SlowParameterWarning, match=r"pass per sample.*lora_magnitude_vector.*HINT") as caught:
        ours = features(task, "auto")
    assert "lora_A" not in str(caught[0].message)
    loop = features(task, "loop")
    assert row_error(ours, loop) < TOLERANCE
    magnitudes = [n for n, p in task.denoiser.named_parameters() if "magnitude" in n and p.requires_grad]
    assert len(magnitudes) == 2 * 2 * 2 * 4  # blocks with attention x (self, cross) x (q, k, v, out)
