"""What a network predicts, as the noise ``e`` and the clean latent ``x0_hat`` (METHODS notation:
``x_t = a x0 + s eps``)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ctrak_lightning.flow import FlowSchedule
from ctrak_lightning.schedule import Schedule
from ctrak_lightning.scheduler_options import FOLLOWED, refuse_unfollowed

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")


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

    @classmethod
    def from_scheduler(cls, scheduler: Any, *, tokens: int | None = None) -> Schedule:
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
        if any(
            base.__name__ == "FlowMatchEulerDiscreteScheduler" for base in type(scheduler).__mro__
        ):
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
        power = self.alpha_bar[t.cpu()]
        return power.sqrt(), (1 - power).sqrt()

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
        if bool((a == 0).any()):
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
