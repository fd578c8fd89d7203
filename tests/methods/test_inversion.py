"""Inversion against the generation itself."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from ctrak_lightning import FlowSchedule, NoiseSchedule, Sampler
from ctrak_lightning.errors import InversionError
from ctrak_lightning.methods.trajectories import inverted
from ctrak_lightning.schedules import Schedule

from ..toy import ToyDiffusion

STEPS = 12
TOLERANCES = {
    "epsilon": 1e-5,
    "epsilon, offset": 1e-5,
    "epsilon, linspace": 1e-4,
    "v, zero terminal SNR": 5e-3,
    "flow": 2e-3,
    "flow, shifted": 2e-3,
}
"""Relative, of every state; plain DDIM inversion, one evaluation per step, misses them by a factor
of 5 to 50."""


def ddim(kind: str, **options: Any) -> Schedule:
    arguments = {
        "num_train_timesteps": 100,
        "prediction_type": kind,
        "clip_sample": False,
    } | options
    return NoiseSchedule.from_scheduler(DDIMScheduler(**arguments))


SCHEDULES = {
    "epsilon": ddim("epsilon"),
    "epsilon, offset": ddim("epsilon", steps_offset=1, set_alpha_to_one=False),
    "epsilon, linspace": ddim("epsilon", timestep_spacing="linspace"),
    "v, zero terminal SNR": ddim(
        "v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "flow": FlowSchedule(timesteps=100),
    "flow, shifted": FlowSchedule(timesteps=100, shift=3.0),
}


def setup(
    schedule: Schedule,
) -> tuple[ToyDiffusion, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    task = ToyDiffusion().eval()
    task.noise_schedule = schedule
    with (
        torch.no_grad()
    ):  # so that the output depends on the timestep as much as a trained network's
        task.denoiser.time_embedding.linear_1.weight.mul_(3)
    return task, task.condition({"colour": "red", "shape": "dot"}, 2), task.condition({}, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "guidance"),
    [*((name, 1.0) for name in SCHEDULES), ("epsilon", 2.0), ("flow, shifted", 2.0)],
)
def test_inversion_recovers_the_states_of_the_generation(name: str, guidance: float) -> None:
    task, condition, null = setup(SCHEDULES[name])
    torch.manual_seed(0)
    sampler = Sampler(steps=STEPS, guidance=guidance)
    generation = sampler.run(task, torch.randn(2, 3, 8, 8), condition, null)
    found = inverted(sampler, task, generation.latents, condition, null)
    expected = [
        state for state in generation.states if task.noise_schedule.level(state.t[0].item())[0] > 0
    ]
    assert len(found.states) == len(expected) >= STEPS - 1
    assert torch.equal(found.latents, generation.latents)
    for mine, theirs in zip(found.states, expected, strict=True):
        assert torch.equal(mine.t, theirs.t)
        assert mine.x0 is not None
        assert theirs.x0 is not None
        assert float((mine.x_t - theirs.x_t).norm() / theirs.x_t.norm()) < TOLERANCES[name]
        # The predicted clean image is what is left when the noise is taken out, and where there is
        # much of it is less certain.
        assert float((mine.x0 - theirs.x0).norm() / theirs.x0.norm()) < 20 * TOLERANCES[name]


@torch.no_grad()
def test_schedules_that_cannot_be_inverted_say_so() -> None:
    latents = torch.randn(2, 3, 8, 8)
    for options, message in (
        (
            {"clip_sample": True},
            r"NoiseSchedule\(epsilon\) clips .* to 1, .*clip_sample=False.*given='noised'",
        ),
        (
            {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
            "no signal at timestep 99 .*HINT: prediction_type='v_prediction'",
        ),
    ):
        task, condition, null = setup(ddim("epsilon", **options))
        with pytest.raises(InversionError, match=message):
            inverted(Sampler(steps=5), task, latents, condition, null)
    task, condition, null = setup(ddim("epsilon", timestep_spacing="trailing"))
    with pytest.raises(InversionError, match="last timestep of 30 is -1.*HINT"):
        inverted(Sampler(steps=29), task, latents, condition, null)
    task, condition, null = setup(ddim("epsilon"))
    with pytest.raises(InversionError, match="no finite numbers at timestep 0"):
        inverted(Sampler(steps=5), task, latents * float("inf"), condition, null)
