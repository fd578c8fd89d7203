"""Noise schedules, from any diffusers scheduler, and what a network predicts under them."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ctrak_lightning.errors import MethodError

FOLLOWED = frozenset(
    {
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
        "snr_shift_scale", "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample",
        "clip_sample_range",
    }
)  # fmt: skip
"""Options of the DDPM family that decide noise levels, timesteps or the meaning of the output, and
are read."""
FLOW_FOLLOWED = frozenset(
    {
        "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
        "max_image_seq_len", "time_shift_type",
    }
)  # fmt: skip
"""The same of ``FlowMatchEulerDiscreteScheduler``."""
_OF_A_SOLVER = frozenset(
    {
        "variance_type", "eta", "solver_order", "solver_type", "solver_p", "algorithm_type", "predictor_order",
        "corrector_order", "tau_func", "lower_order_final", "euler_at_final", "predict_x0", "disable_corrector",
        "skip_prk_steps",
    }
)  # fmt: skip
"""How other samplers go from one level to the next: not read, for sampling is DDIM's step."""
_PARTS = frozenset(
    {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}
)
"""Details of options (``thresholding``, ``use_flow_sigmas``, ``use_dynamic_shifting``) that are
refused themselves."""
_OFF: Mapping[str, Any] = {
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
}
"""What options that are not followed are where they change nothing; None or False, unless they
stand here."""


def refuse_unfollowed(scheduler: Any, followed: Collection[str]) -> None:
    """Refuses a scheduler with an option that would change noise levels or timesteps and is not
    followed.

    Options that its class does not have, such as are carried along by ``from_config``, mean nothing
    to it and nothing here. Options that are not known here, of other versions and of derived
    classes, must be as they are by default.

    Args:
        scheduler: a diffusers scheduler.
        followed: the options that the caller reads.

    Raises:
        ValueError: such an option is on; the message names it.
    """
    defaults = _options(type(scheduler))
    changed = {}
    for name, value in scheduler.config.items():
        # Dynamic thresholding would be DDIM's too, made from this configuration.
        if (
            name in followed
            or name in _OF_A_SOLVER | _PARTS
            or not (name in defaults or name == "thresholding")
        ):
            continue
        off = _OFF.get(name)
        if value is None or value is False or value == off:
            continue
        if name in _KNOWN or value != defaults[name]:
            changed[name] = value
    if changed:
        given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        raise ValueError(
            f"NoiseSchedule.from_scheduler({type(scheduler).__name__}({given})): expected a "
            f"scheduler without {'this option' if len(changed) == 1 else 'these options'}, which "
            "would change which noise levels and timesteps are used, or what the output stands "
            f"for, in a way that is not followed here. HINT: {_hint(scheduler, changed)}."
        )


def _hint(scheduler: Any, changed: Collection[str]) -> str:
    if hasattr(scheduler, "alphas_cumprod") and set(changed) - {"thresholding", "use_flow_sigmas"}:
        return (
            "`DDIMScheduler.from_config(scheduler.config)` has the same training levels, "
            "without them"
        )
    return (
        f"`{type(scheduler).__name__}.from_config(scheduler.config, ...)` with "
        f"{', '.join(changed)} off"
    )


def _options(scheduler: type) -> dict[str, Any]:
    """The options of a scheduler's class and its bases, with their defaults."""
    found: dict[str, Any] = {}
    for base in reversed(scheduler.__mro__[:-1]):
        if "__init__" in vars(base):
            _, *options = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= {
                each.name: each.default for each in options if each.kind is not each.VAR_KEYWORD
            }
    return found


_KNOWN = frozenset(
    {
        "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
        "use_flow_sigmas", "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling",
        "sigma_min", "sigma_max", "original_inference_steps", "timestep_scaling", *_OFF,
    }
)  # fmt: skip
"""Options that are not followed, whatever their default."""


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
        """``(a, s)`` at timesteps ``t`` [B], each [B] float64, where ``t`` is."""

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
            MethodError: ``count`` outside [1, T], or not 0 <= start < end <= 1.
        """
        if not 1 <= count <= len(self):
            raise MethodError(
                f"even_timesteps({count}): expected between 1 and {len(self)} timesteps."
            )
        if not 0 <= start < end <= 1:
            raise MethodError(
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
        """As :meth:`NoiseSchedule.from_scheduler`, of a ``FlowMatchEulerDiscreteScheduler``.

        Raises:
            TypeError: it is another scheduler.
        """
        if not _is_flow(scheduler):
            raise TypeError(
                f"FlowSchedule.from_scheduler({type(scheduler).__name__}): expected a "
                "FlowMatchEulerDiscreteScheduler."
            )
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
        sigma = t.to(_widest(t.device)) / len(self)
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


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _is_flow(scheduler: Any) -> bool:
    # By name, for importing diffusers takes seconds.
    names = (base.__name__ for base in type(scheduler).__mro__)
    return "FlowMatchEulerDiscreteScheduler" in names


def _shift_for(tokens: int, config: Any) -> float:
    """The shift that diffusers' pipelines give images of so many tokens: linear in their number,
    before the exponential."""
    fewest, most = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (most - fewest)
    mu = float(config["base_shift"] + slope * (tokens - fewest))
    return math.exp(mu) if config["time_shift_type"] == "exponential" else mu


PredictionType = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]
PREDICTION_TYPES = get_args(PredictionType)
SPACINGS = get_args(Spacing)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseSchedule(Schedule):
    """The noise levels of a variance-preserving diffusion process and the meaning of its network's
    output.

    Args:
        alpha_bar: cumulative signal power per timestep [T], in [0, 1], decreasing; ``a =
            sqrt(alpha_bar)`` and ``s = sqrt(1 - alpha_bar)``.
        prediction_type: what the network predicts.
        spacing: how DDIM with fewer than T steps places them (diffusers' ``timestep_spacing``).
        steps_offset: added to the timesteps of ``"leading"`` spacing.
        final_alpha_bar: signal power after the last sampling step.
        clip: range to which a sampler clips ``x0_hat``, or None.

    Raises:
        ValueError: an unknown prediction type or spacing, or powers outside [0, 1].
    """

    alpha_bar: Tensor
    prediction_type: PredictionType = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: int = 0
    final_alpha_bar: float = 1.0
    clip: float | None = None
    is_silent: bool = field(init=False, repr=False, compare=False)
    """Whether there is a timestep without signal (zero terminal SNR)."""
    _tables: dict[torch.device, Tensor] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"NoiseSchedule(prediction_type={self.prediction_type!r}): expected one of "
                f"{PREDICTION_TYPES}."
            )
        if self.spacing not in SPACINGS:
            raise ValueError(
                f"NoiseSchedule(spacing={self.spacing!r}): expected one of {SPACINGS}."
            )
        if self.alpha_bar.ndim != 1 or not ((self.alpha_bar >= 0) & (self.alpha_bar < 1)).all():
            raise ValueError(
                "NoiseSchedule(alpha_bar=...): expected a 1-d tensor of values in [0, 1)."
            )
        object.__setattr__(self, "is_silent", bool((self.alpha_bar == 0).any()))

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, *, tokens: int | None = None
    ) -> "NoiseSchedule | FlowSchedule":
        """The schedule of a diffusers scheduler: of the DDPM family (DDPM, DDIM and others with
        ``alphas_cumprod``), or of ``FlowMatchEulerDiscreteScheduler`` (then a
        :class:`FlowSchedule`).

        Args:
            scheduler: the scheduler.
            tokens: how many positions an image has in the network, for a flow whose shift depends
                on it.

        Raises:
            TypeError: the scheduler is neither (sigma-space and other flow schedulers).
            ValueError: it uses an option that cannot be followed here, or needs ``tokens``.
        """
        if _is_flow(scheduler):
            return FlowSchedule.from_scheduler(scheduler, tokens=tokens)
        alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        config = getattr(scheduler, "config", None)
        if alpha_bar is None or config is None:
            raise TypeError(
                f"NoiseSchedule.from_scheduler({type(scheduler).__name__}): expected a diffusers "
                "scheduler with `alphas_cumprod` (DDPMScheduler, DDIMScheduler), or "
                "FlowMatchEulerDiscreteScheduler. HINT: build one with the same betas via "
                "`DDIMScheduler.from_config(scheduler.config)`."
            )
        refuse_unfollowed(scheduler, FOLLOWED)
        if len(alpha_bar) != config["num_train_timesteps"]:
            raise ValueError(
                f"NoiseSchedule.from_scheduler({type(scheduler).__name__}(num_train_timesteps={config['num_train_timesteps']})): "
                f"expected as many timesteps as the scheduler has levels, {len(alpha_bar)}. HINT: "
                "`trained_betas` of that length."
            )
        final = getattr(scheduler, "final_alpha_cumprod", 1.0)
        return cls(
            alpha_bar=alpha_bar.detach().double().cpu(),
            prediction_type=config.get("prediction_type", "epsilon"),
            spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
            final_alpha_bar=float(final),
            clip=float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None,
        )

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def to_dict(self) -> dict[str, Any]:
        return {
            "timesteps": len(self),
            "prediction_type": self.prediction_type,
            "alpha_bar_mean": round(float(self.alpha_bar.mean()), 9),
        }

    @property
    def final_level(self) -> tuple[float, float]:
        return self.final_alpha_bar**0.5, (1 - self.final_alpha_bar) ** 0.5

    def signal_and_noise(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device not in self._tables:
            levels = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
            self._tables[t.device] = levels.to(t.device, _widest(t.device))
        # Indexed where `t` is: a GPU is not waited for.
        a, s = self._tables[t.device][:, t.long()]
        return a, s

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a, s = self.levels(t, x0)
        if self.prediction_type == "epsilon":
            return noise
        return a * noise - s * x0 if self.prediction_type == "v_prediction" else x0

    def epsilon(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        a, s = self.levels(t, x_t)
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            return s * x_t + a * output
        return (x_t - a * output) / s

    def x0_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a network's output stands for [B, ...]; differentiable in both.

        Raises:
            ValueError: a noise prediction at a timestep without signal (zero terminal SNR) says
                nothing of x0.
        """
        a, s = self.levels(t, x_t)
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "v_prediction":
            return a * x_t - s * output
        if self.is_silent and bool((a == 0).any()):
            raise ValueError(
                "NoiseSchedule(prediction_type='epsilon') has a timestep with zero signal (zero "
                "terminal SNR), where x0_hat is undefined. HINT: train with "
                "prediction_type='v_prediction', or without rescale_betas_zero_snr."
            )
        return (x_t - s * output) / a

    def sampling_timesteps(self, steps: int) -> list[int]:
        """The timesteps of diffusers' ``DDIMScheduler``, most noise first.

        Raises:
            ValueError: ``steps`` outside [1, T], or with an offset that leads beyond T.
        """
        self._check_steps(steps)
        scheduler = _ddim(len(self), self.spacing, self.steps_offset)
        scheduler.set_timesteps(steps)
        grid: list[int] = scheduler.timesteps.tolist()
        if grid[0] >= len(self):
            raise ValueError(
                f"sampling_timesteps({steps}): with steps_offset={self.steps_offset} the first of "
                f"so many steps is at timestep {grid[0]}, expected below {len(self)}, the number "
                "of levels. HINT: fewer steps."
            )
        return grid

    def sampling_levels(self, steps: int) -> list[tuple[float, float]]:
        """``(a, s)`` that each step of DDIM ends at: diffusers goes ``T // steps`` timesteps
        further, which is beside the next timestep in ``"linspace"`` spacing and where ``steps``
        does not divide T."""
        grid = self.sampling_timesteps(steps)
        ends = [timestep - len(self) // steps for timestep in grid]
        return [self.level(end) if end >= 0 else self.final_level for end in ends]

    def _timesteps_at(self, shares: Tensor) -> Tensor:
        return (shares * len(self)).long()


def _ddim(timesteps: int, spacing: Spacing, offset: int) -> Any:
    # Here, for importing diffusers takes seconds. Its own places are taken because its rounding is
    # no simple rule (`np.arange` with a step that is no integer, halves to even).
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=timesteps, timestep_spacing=spacing, steps_offset=offset
    )
