"""Flow matching as noise ``e`` and clean latent ``x0_hat``."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.schedule import Schedule
from ctrak_lightning.scheduler_options import FLOW_FOLLOWED, refuse_unfollowed


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowSchedule(Schedule):
    """Flow matching (rectified flow; Liu et al. 2023, arXiv 2209.03003): ``x_t = (1 - sigma) x0 +
    sigma eps``, and a network that predicts the velocity ``eps - x0``.

    A timestep is a real number, ``t = T sigma``, as diffusers tells the network. So ``e = x_t + (1
    - sigma) v`` and ``x0_hat = x_t - sigma v``.

    Args:
        timesteps: T.
        shift: S by which levels are moved towards more noise, in training and sampling: ``S u / (1
            + (S - 1) u)`` for evenly spread ``u`` (Esser et al. 2024, arXiv 2403.03206, eq. 23).
        ends: ``u`` of the first and of the last sampling step; None goes from 1 to 1 / steps.

    Raises:
        ValueError: the shift is not positive.
    """

    timesteps: int = 1000
    shift: float = 1.0
    ends: tuple[float, float] | None = None

    clip = None

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"FlowSchedule(shift={self.shift}): expected a positive number.")

    @classmethod
    def from_scheduler(cls, scheduler: Any, *, tokens: int | None = None) -> "FlowSchedule":
        """As :meth:`NoiseSchedule.from_scheduler`, of a ``FlowMatchEulerDiscreteScheduler``."""
        config = scheduler.config
        refuse_unfollowed(scheduler, FLOW_FOLLOWED)
        shift = float(scheduler.shift)
        if config.get("use_dynamic_shifting"):
            if tokens is None:
                raise ValueError(
                    f"NoiseSchedule.from_scheduler({type(scheduler).__name__}(use_dynamic_shifting=True)): "
                    "the shift depends on the image's size. HINT: give `tokens`, the positions an "
                    "image has in the network."
                )
            shift = _shift_for(tokens, config)
        return cls(
            timesteps=config["num_train_timesteps"],
            shift=shift,
            ends=(float(scheduler.sigma_max), float(scheduler.sigma_min)),
        )

    def __len__(self) -> int:
        return self.timesteps

    def to_dict(self) -> dict[str, Any]:
        return {"timesteps": len(self), "prediction_type": "flow", "shift": round(self.shift, 9)}

    @property
    def final_level(self) -> tuple[float, float]:
        return 1.0, 0.0

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.cpu().double() / len(self)
        return 1 - sigma, sigma

    def epsilon(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        a, _ = self.levels(t, x_t)
        return x_t + a * output

    def x0_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        _, s = self.levels(t, x_t)
        return x_t - s * output

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def sampling_timesteps(self, steps: int) -> list[float]:
        self._check_steps(steps)
        first, last = self.ends or (1.0, 1 / steps)
        return self._timesteps_at(torch.linspace(first, last, steps, dtype=torch.float64)).tolist()

    def _timesteps_at(self, shares: Tensor) -> Tensor:
        return (len(self) * self.shift * shares / (1 + (self.shift - 1) * shares)).float()


def _shift_for(tokens: int, config: Any) -> float:
    """The shift that diffusers' pipelines give images of so many tokens: linear in their number,
    before the exponential."""
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (most - fewest)
    mu = float(config["base_shift"] + slope * (tokens - fewest))
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu
