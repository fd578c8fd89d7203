"""Trajectories: the states at which gradients are taken, how images are generated, and the states
through which a sampler would have gone to make an image."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.errors import InversionError, MethodError
from ctrak_lightning.methods.numbers import check_boolean, check_integer, check_number
from ctrak_lightning.methods.recorded import Recorded
from ctrak_lightning.schedules import Schedule
from ctrak_lightning.tasks import Condition, DiffusionTask, condition_of
from ctrak_lightning.utilities.rng import seeded_noise


@dataclass(frozen=True, slots=True)
class State:
    """Noisy latents ``x_t`` [B, ...] and the timestep ``t`` [B] (int64; float32 of a flow) they are
    at.

    ``x0`` [B, ...] is the clean latent that the state is taken to be a noising of, where that is
    not the finished image.
    """

    x_t: Tensor
    t: Tensor
    x0: Tensor | None = None

    def rows(self, rows: Tensor) -> "State":
        """The same of some rows [b] only."""
        return State(self.x_t[rows], self.t[rows], None if self.x0 is None else self.x0[rows])


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation: its ``states``, most noise first, each with the ``x0`` predicted
    there, and the clean ``latents`` [B, ...]."""

    states: list[State]
    latents: Tensor

    def rows(self, rows: Tensor) -> "Generation":
        """The same of some rows [b] only."""
        return Generation([state.rows(rows) for state in self.states], self.latents[rows])


class Trajectory(Recorded, ABC):
    """A rule that gives the states of a sample. One of your own is a frozen dataclass."""

    @abstractmethod
    def states(
        self,
        task: DiffusionTask,
        latents: Tensor,
        condition: Condition,
        sample_ids: Sequence[str],
        seed: int,
    ) -> Iterator[State]:
        """Yields the states of clean ``latents`` [B, ...] under their own ``condition``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noised(Trajectory):
    """``x_t = a x0 + s eps`` at evenly spaced timesteps.

    Args:
        timesteps: how many.
        shared_noise: draw ``eps`` per timestep, the same for all samples; otherwise per (sample id,
            timestep). Either way it depends on nothing else: not on the batch, its order, or the
            device.
        start: where the timesteps begin, as a share of the schedule; 0 is no noise.
        end: where they end; 1 is all noise.
    """

    timesteps: int = 10
    shared_noise: bool = True
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_integer(self, "timesteps")
        check_boolean(self, "shared_noise")
        check_number(self, "end", "a share of the schedule, from 0 to 1", lambda end: 0 < end <= 1)
        check_number(self, "start", "a share below `end`", lambda start: 0 <= start < self.end)

    def states(
        self,
        task: DiffusionTask,
        latents: Tensor,
        condition: Condition,
        sample_ids: Sequence[str],
        seed: int,
    ) -> Iterator[State]:
        for timestep in task.noise_schedule.even_timesteps(self.timesteps, self.start, self.end):
            keys = [""] if self.shared_noise else sample_ids
            rows = [seeded_noise(latents.shape[1:], seed, timestep, key) for key in keys]
            noise = torch.stack(rows).to(latents).expand_as(latents)
            t = repeated(timestep, latents)
            yield State(task.noise_schedule.add_noise(latents, noise, t), t)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inverted(Trajectory):
    """Deterministic DDIM inversion (eta = 0; Song et al. 2021, arXiv 2010.02502, eq. 14) of the
    clean latents.

    The network is told the timestep of the state it is given; the clean latents count as timestep
    0.

    Args:
        steps: inversion steps, evenly spaced; every step costs one forward pass, with guidance two.
        guidance: classifier-free guidance scale; 1 is none. ``condition({})`` is the unconditional
            side.
        timesteps: how many of the states to use, evenly spaced; None uses all.
    """

    steps: int = 10
    guidance: float = 1.0
    timesteps: int | None = None

    def __post_init__(self) -> None:
        check_integer(self, "steps")
        check_number(self, "guidance")
        check_integer(self, "timesteps", optional=True)
        if self.timesteps is not None and self.timesteps > self.steps:
            raise MethodError(
                f"Inverted(steps={self.steps}, timesteps={self.timesteps}): expected 1 <= "
                "timesteps <= steps. HINT: timesteps=None uses all."
            )

    def states(
        self,
        task: DiffusionTask,
        latents: Tensor,
        condition: Condition,
        sample_ids: Sequence[str],
        seed: int,
    ) -> Iterator[State]:
        grid = task.noise_schedule.even_timesteps(self.steps)
        used = {grid[i] for i in _evenly(self.steps, self.timesteps or self.steps)}
        null = condition_of(task, {}, len(latents)) if self.guidance != 1.0 else None
        schedule = task.noise_schedule
        x, t = latents, repeated(0, latents)
        for i, target in enumerate(grid):
            output = guided_output(task, x, t, condition, null, self.guidance)
            x0_hat = x if i == 0 else schedule.x0_hat(output, x, t)
            a, s = schedule.level(target)
            x = a * x0_hat + s * schedule.epsilon(output, x, t)
            t = repeated(target, x)
            if target in used:
                yield State(x, t)


@dataclass(frozen=True, kw_only=True, slots=True)
class InTraining(Trajectory):
    """The states that the training steps themselves drew, at random and under changing weights
    (training side only).

    A trace is the mean over a sample's training steps since the last checkpoint. The loss is the
    steps' own, with whatever weights and dropout it has, so that ``Denoising()`` stands for it.
    Which timesteps they were, the store says (:meth:`ctrak_lightning.store.Checkpoint.visits`).
    """

    def states(
        self,
        task: DiffusionTask,
        latents: Tensor,
        condition: Condition,
        sample_ids: Sequence[str],
        seed: int,
    ) -> Iterator[State]:
        raise TypeError(
            "InTraining() has no states of its own: they pass by while the model trains. HINT: "
            "ConceptTracer(mode='inline'), or Noised() to make states."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated(Trajectory):
    """The states of the very generation that made an image (queries only), evenly spaced.

    Args:
        timesteps: how many of the generation's states to use; None uses all.
    """

    timesteps: int | None = None

    def __post_init__(self) -> None:
        check_integer(self, "timesteps", optional=True)

    def states(
        self,
        task: DiffusionTask,
        latents: Tensor,
        condition: Condition,
        sample_ids: Sequence[str],
        seed: int,
    ) -> Iterator[State]:
        raise TypeError(
            "Generated() gives the states of a generation; a stored image has none. HINT: use "
            "Inverted() or Noised() for the training side, and Generated() for queries."
        )

    def select(self, generation: Generation, schedule: Any) -> list[State]:
        """The states to use, most noise first. States without any signal are left out: no gradient
        passes there.

        Raises:
            MethodError: the generation has fewer usable states than ``timesteps``.
        """
        return [State(state.x_t, state.t) for state in self._chosen(generation, schedule)]

    def _chosen(self, generation: Generation, schedule: Any) -> list[State]:
        usable = [state for state in generation.states if schedule.level(state.t[0].item())[0] > 0]
        count = self.timesteps or len(usable)
        if count > len(usable):
            raise MethodError(
                f"Generated(timesteps={count}): the generation has {len(usable)} usable states. "
                f"HINT: use Sampler(steps={count + 1}) or more, or fewer timesteps."
            )
        return [usable[i] for i in _evenly(len(usable), count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Renoised(Generated):
    """Journey-TRAK's states (arXiv 2312.06205): at evenly spaced timesteps of the generation, the
    clean latent predicted there is noised again, with noise that the timestep fixes; the loss is
    held against that prediction."""

    def select(self, generation: Generation, schedule: Any) -> list[State]:
        chosen = []
        for state in self._chosen(generation, schedule):
            assert state.x0 is not None
            timestep = state.t[0].item()
            noise = (
                seeded_noise(state.x0.shape[1:], 0, timestep, "renoised")
                .to(state.x0)
                .expand_as(state.x0)
            )
            chosen.append(State(schedule.add_noise(state.x0, noise, state.t), state.t, state.x0))
        return chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """Deterministic DDIM sampling (eta = 0, arXiv 2010.02502), step by step that of diffusers'
    ``DDIMScheduler`` with the scheduler's configuration, whatever number of steps; of a flow,
    Euler's method, which is the same step.

    Args:
        steps: sampling steps.
        guidance: classifier-free guidance scale; 1 is none.
    """

    steps: int = 25
    guidance: float = 2.0

    @torch.no_grad()
    def run(
        self, task: DiffusionTask, noise: Tensor, condition: Condition, null: Condition | None
    ) -> Generation:
        """Denoises ``noise`` [B, ...] under ``condition``; ``null`` is the unconditional side of
        the guidance, if there is any."""
        schedule = task.noise_schedule
        grid = schedule.sampling_timesteps(self.steps)
        if grid[-1] < 0:
            warnings.warn(
                f"{self}: diffusers' DDIM takes {len(grid)} steps for so many with this spacing, "
                f"the last at timestep {grid[-1]}, by a fault of its rounding, and so does this "
                "generation; its images are noise. HINT: another number of steps.",
                UserWarning,
                stacklevel=2,
            )
        x, states = noise, []
        for at, (a, s) in zip(grid, schedule.sampling_levels(self.steps), strict=True):
            t = repeated(at, x)
            output = guided_output(task, x, t, condition, null, self.guidance)
            x0_hat, e = schedule.x0_hat(output, x, t), schedule.epsilon(output, x, t)
            if schedule.clip is not None:
                x0_hat = x0_hat.clamp(-schedule.clip, schedule.clip)
            states.append(State(x, t, x0_hat))
            x = a * x0_hat + s * e
        return Generation(states, x)


def guided_output(
    task: DiffusionTask,
    x: Tensor,
    t: Tensor,
    condition: Condition,
    null: Condition | None,
    guidance: float,
) -> Tensor:
    """The network's output [B, ...] under classifier-free guidance."""
    # Guidance acts on the raw output: every parameterization is affine in it, and at zero signal it
    # is all that is defined.
    output = task.predict(x, t, condition)
    if guidance == 1.0 or null is None:
        return output
    unconditional = task.predict(x, t, null)
    return unconditional + guidance * (output - unconditional)


def repeated(timestep: float, like: Tensor) -> Tensor:
    """A timestep for each row [B] of ``like`` [B, ...]."""
    dtype = torch.long if isinstance(timestep, int) else torch.float32
    return torch.full((len(like),), timestep, dtype=dtype, device=like.device)


def _evenly(total: int, count: int) -> list[int]:
    return [int((i + 0.5) * total / count) for i in range(count)]


ITERATIONS = 4
"""Evaluations of the network per step."""


@torch.no_grad()
def inverted(
    sampler: Sampler,
    task: DiffusionTask,
    latents: Tensor,
    condition: Condition,
    null: Condition | None,
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
    x, e, states = latents, torch.zeros_like(latents), list[State]()
    ends = schedule.sampling_levels(sampler.steps)
    for timestep, (before, noise_before) in zip(reversed(grid), reversed(ends), strict=True):
        a, s = schedule.level(timestep)
        if a == 0:
            break
        t, clean = repeated(timestep, x), x
        if states:
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


def _check(schedule: Schedule, grid: Sequence[float]) -> None:
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
