"""Inversion: the states through which a sampler would have gone to make an image."""

from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.errors import InversionError
from ctrak_lightning.task import Condition
from ctrak_lightning.trajectory import Generation, Sampler, State, guided_output, repeated

ITERATIONS = 4
"""Evaluations of the network per step."""


@torch.no_grad()
def inverted(
    sampler: Sampler, task: Any, latents: Tensor, condition: Condition, null: Condition | None
) -> Generation:
    """Runs a sampler backwards: DDIM inversion (eta = 0; Song et al. 2021, arXiv 2010.02502), of a
    flow Euler's method backwards, on the sampler's own timesteps and under its guidance.

    A step of the sampler from ``(x, t)`` to the level ``(a', s')`` it ends at is ``x' = a'
    x0_hat(x) + s' e(x)``, so that ``x = a / a' (x' - s' e(x)) + s e(x)``. The equation is solved by
    iterating it (as Pan et al. 2023, arXiv 2309.04907), each time with the timestep ``t`` of the
    state that is sought; plain DDIM inversion is one iteration from ``x'``. States without any
    signal are left out, since they say nothing of an image.

    Args:
        sampler: steps and guidance.
        task: a DiffusionTask.
        latents: clean latents [B, ...].
        condition: what the images show.
        null: the unconditional side of the guidance, if there is any.

    Raises:
        InversionError: the schedule cannot be inverted, or the states are no finite numbers.
    """
    schedule = task.noise_schedule
    grid = schedule.sampling_timesteps(sampler.steps)
    _check(schedule, grid)
    x, e, states = latents, None, list[State]()
    ends = schedule.sampling_levels(sampler.steps)
    for timestep, (before, noise_before) in zip(reversed(grid), reversed(ends), strict=True):
        a, s = schedule.level(timestep)
        if a == 0:
            break
        t, clean = repeated(timestep, x), x
        if e is not None:
            x = a / before * (clean - noise_before * e) + s * e
        for _ in range(ITERATIONS):
            output = guided_output(task, x, t, condition, null, sampler.guidance)
            e = schedule.epsilon(output, x, t)
            x = a / before * (clean - noise_before * e) + s * e
        if not bool(x.isfinite().all()):
            raise InversionError(
                f"The inversion of an image gives no finite numbers at timestep {timestep}. HINT: "
                "Sampler(guidance=1.0), more steps, or Attributor(..., given='noised')."
            )
        states.append(State(x, t, (x - s * e) / a))
    return Generation(states[::-1], latents)


def _check(schedule: Any, grid: list[Any]) -> None:
    kind = f"{type(schedule).__name__}({schedule.to_dict()['prediction_type']})"
    if schedule.clip is not None:
        raise InversionError(
            f"{kind} clips the predicted clean image to {schedule.clip:g}, which loses what was "
            "clipped: expected a schedule that can be inverted. HINT: a scheduler with "
            "clip_sample=False, or Attributor(..., given='noised')."
        )
    if grid[-1] < 0:
        raise InversionError(
            f"{kind}: DDIM's last timestep of {len(grid)} is {grid[-1]}, by a fault of rounding, "
            "and its image is noise: expected timesteps from 0 on. HINT: another number of steps."
        )
    blind = [timestep for timestep in grid if schedule.level(timestep)[0] == 0]
    if blind and schedule.to_dict()["prediction_type"] == "epsilon":
        raise InversionError(
            f"{kind} has no signal at timestep {blind[0]} (zero terminal SNR), where a noise "
            "prediction says nothing of the image: expected a schedule that can be inverted. "
            "HINT: prediction_type='v_prediction', timestep_spacing='leading', or Attributor(..., "
            "given='noised')."
        )
