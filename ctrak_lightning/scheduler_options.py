"""Which options of diffusers' schedulers are followed, and the refusal of those that are not."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

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
