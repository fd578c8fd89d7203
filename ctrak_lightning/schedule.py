"""Schedule: what a network's noise levels are and what its output stands for."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Schedule(ABC):
    """The noise levels ``(a, s)`` of a process ``x_t = a x0 + s eps`` and the meaning of its
    network's output."""

    __slots__ = ()

    clip: float | None
    """Range to which a sampler clips ``x0_hat``, or None."""

    @abstractmethod
    def __len__(self) -> int:
        """The number T of training timesteps."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What a store records of the schedule: JSON values only."""

    @abstractmethod
    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, s)`` at timesteps ``t`` [B], each [B] float64 on the CPU."""

    @abstractmethod
    def epsilon(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise prediction ``e`` [B, ...] that a network's output stands for; differentiable in
        both."""

    @abstractmethod
    def x0_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a network's output stands for [B, ...]; differentiable in both."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output [B, ...] of a network that knows ``x0`` and ``noise``: what training regresses
        on."""

    @property
    @abstractmethod
    def final_level(self) -> tuple[float, float]:
        """``(a, s)`` after the last sampling step."""

    @abstractmethod
    def sampling_timesteps(self, steps: int) -> Sequence[float]:
        """The timesteps of a sampler of ``steps`` steps, most noise first, spaced as the scheduler
        spaces them.

        Raises:
            ValueError: ``steps`` outside [1, T].
        """

    def sampling_levels(self, steps: int) -> list[tuple[float, float]]:
        """``(a, s)`` that each step of a sampler ends at, in the order of
        :meth:`sampling_timesteps`: the level of the next timestep, and at last ``final_level``."""
        return [*(self.level(t) for t in self.sampling_timesteps(steps)[1:]), self.final_level]

    @abstractmethod
    def _timesteps_at(self, shares: Tensor) -> Tensor:
        """The timesteps at these shares [n] (float64, in [0, 1)) of the training distribution, 0
        being no noise."""

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``(a, s)`` at timesteps ``t`` [B], shaped to broadcast over ``like`` [B, ...]."""
        a, s = (
            level.view(-1, *[1] * (like.ndim - 1)).to(like) for level in self.signal_and_noise(t)
        )
        return a, s

    def level(self, timestep: float) -> tuple[float, float]:
        """``(a, s)`` at one timestep."""
        a, s = self.signal_and_noise(torch.tensor([timestep]))
        return float(a), float(s)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = a x0 + s eps``, all [B, ...]."""
        a, s = self.levels(t, x0)
        return a * x0 + s * noise

    def random_timesteps(self, count: int) -> Tensor:
        """Timesteps [count] for a training step: uniform over the training distribution, from
        torch's own generator."""
        return self._timesteps_at(torch.rand(count, dtype=torch.float64))

    def even_timesteps(self, count: int, start: float = 0.0, end: float = 1.0) -> list[Any]:
        """``count`` timesteps in the middles of equal parts of [start T, end T), least noise first:
        never quite clean or quite noise. (Of a flow that favours some noise levels in training: of
        equal parts of that training distribution.)

        Raises:
            ValueError: ``count`` outside [1, T], or not 0 <= start < end <= 1.
        """
        if not 1 <= count <= len(self):
            raise ValueError(
                f"even_timesteps({count}): expected between 1 and {len(self)} timesteps."
            )
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"even_timesteps({count}, start={start}, end={end}): expected 0 <= start < end <= "
                "1."
            )
        shares = [start + (i + 0.5) * (end - start) / count for i in range(count)]
        return self._timesteps_at(torch.tensor(shares, dtype=torch.float64)).tolist()

    def _check_steps(self, steps: int) -> None:
        if not 1 <= steps <= len(self):
            raise ValueError(
                f"sampling_timesteps({steps}): expected between 1 and {len(self)} steps."
            )
