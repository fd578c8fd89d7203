from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrak_lightning import NoiseSchedule
from ctrak_lightning import schedules as options_module

KINDS = ("epsilon", "v_prediction", "sample")


def outputs(
    x0: torch.Tensor, noise: torch.Tensor, a: torch.Tensor, s: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a perfect network of each kind returns, from the definitions (v: Salimans & Ho 2022,
    arXiv 2202.00512)."""
    return {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    t=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    ddpm=st.booleans(),
)
def test_every_parameterization_recovers_the_same_clean_latents_and_noise(
    seed: int, t: int, kind: str, ddpm: bool
) -> None:
    cls = DDPMScheduler if ddpm else DDIMScheduler
    scheduler = cls(prediction_type=kind, beta_schedule="squaredcos_cap_v2")
    schedule = NoiseSchedule.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    timesteps = torch.full((2,), t)
    a = scheduler.alphas_cumprod[t].double().sqrt()
    s = (1 - scheduler.alphas_cumprod[t].double()).sqrt()
    x_t = schedule.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-5)
    output = outputs(x0, noise, a, s)[kind]
    torch.testing.assert_close(schedule.target(x0, noise, timesteps), output, rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 / float(min(a, s))
    torch.testing.assert_close(schedule.x0_hat(output, x_t, timesteps), x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        schedule.epsilon(output, x_t, timesteps), noise, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_signal_is_exact(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, noise = torch.randn(2, 2, 3, 4, 4)
    t = torch.tensor([999, 999])
    a, s = schedule.levels(t, x0)
    assert float(a.abs().max()) == 0.0
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), noise)
    output = outputs(x0, noise, a, s)[kind]
    torch.testing.assert_close(schedule.x0_hat(output, noise, t), x0)
    torch.testing.assert_close(schedule.epsilon(output, noise, t), noise)


def test_noise_prediction_without_signal_is_refused() -> None:
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="zero terminal SNR.*HINT"):
        schedule.x0_hat(x, x, torch.tensor([999]))


def ends_of_diffusers_steps(scheduler: DDIMScheduler) -> list[float]:
    """Signal power that each step of diffusers' DDIM ends at, read off its own step: of a network
    without noise, sqrt(power)."""
    one, found = torch.ones(1, dtype=torch.float64), []
    for t in scheduler.timesteps:
        x = one * scheduler.alphas_cumprod[t].sqrt().double()
        found.append(float(scheduler.step(0 * one, t, x).prev_sample) ** 2)
    return found


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_and_levels_are_those_of_diffusers_for_every_number_of_steps(
    spacing: str, offset: int
) -> None:
    total = 40
    options = {
        "clip_sample": False,
        "set_alpha_to_one": offset == 0,
        "beta_schedule": "scaled_linear",
    }
    scheduler = DDIMScheduler(
        num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset, **options
    )
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for steps in range(1, total + 1):
        scheduler.set_timesteps(steps)
        if (
            int(scheduler.timesteps[0]) == total
        ):  # one beyond the last level, where diffusers' step fails
            assert (spacing, offset, steps) == ("leading", 1, total)
            with pytest.raises(ValueError, match="steps_offset=1 .* at timestep 40.*HINT: fewer"):
                schedule.sampling_timesteps(steps)
            continue
        assert schedule.sampling_timesteps(steps) == scheduler.timesteps.tolist()
        found = [a**2 for a, _ in schedule.sampling_levels(steps)]
        assert found == pytest.approx(ends_of_diffusers_steps(scheduler), rel=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps_of_a_thousand(
    spacing: str,
) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        assert schedule.sampling_timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "cls", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDPMScheduler]
)
def test_other_schedulers_of_pipelines_stand_for_the_same_levels(cls: type) -> None:
    config = {
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "steps_offset": 1,
    }
    expected = NoiseSchedule.from_scheduler(DDIMScheduler(timestep_spacing="leading", **config))
    schedule = NoiseSchedule.from_scheduler(
        cls.from_config(DDIMScheduler(timestep_spacing="leading", **config).config)
    )
    assert schedule.to_dict() == expected.to_dict()
    assert schedule.sampling_timesteps(25) == expected.sampling_timesteps(25)
    t = torch.tensor([0, 500, 999])
    for ours, theirs in zip(
        schedule.signal_and_noise(t), expected.signal_and_noise(t), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_even_timesteps_are_the_middles_of_equal_parts() -> None:
    schedule = NoiseSchedule.from_scheduler(DDIMScheduler())
    assert schedule.even_timesteps(4) == [125, 375, 625, 875]
    assert schedule.even_timesteps(1) == [500]
    assert schedule.even_timesteps(2, 0.5, 0.9) == [600, 800]
    with pytest.raises(ValueError, match="start < end"):
        schedule.even_timesteps(2, 0.5, 0.5)
    with pytest.raises(ValueError, match="between 1 and 1000"):
        schedule.even_timesteps(0)


def test_bad_schedulers_are_refused() -> None:
    with pytest.raises(TypeError, match="FlowMatchHeunDiscreteScheduler.*alphas_cumprod"):
        NoiseSchedule.from_scheduler(FlowMatchHeunDiscreteScheduler())
    with pytest.raises(ValueError, match="num_train_timesteps=1000.*levels, 2"):
        NoiseSchedule.from_scheduler(DDIMScheduler(trained_betas=[0.1, 0.2]))
    with pytest.raises(ValueError, match="prediction_type='vv'"):
        NoiseSchedule(alpha_bar=torch.tensor([0.9, 0.5]), prediction_type="vv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha_bar"):
        NoiseSchedule(alpha_bar=torch.tensor([1.5]))


REFUSED = [
    (DDIMScheduler, {"thresholding": True}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
    (EulerDiscreteScheduler, {"use_beta_sigmas": True}),
    (EulerDiscreteScheduler, {"timestep_type": "continuous"}),
    (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}),
    (EulerDiscreteScheduler, {"sigma_min": 0.1}),
    (EulerDiscreteScheduler, {"final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    (DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}),
    (DPMSolverMultistepScheduler, {"use_flow_sigmas": True}),
    (UniPCMultistepScheduler, {"sigma_max": 80.0}),
    (LCMScheduler, {"original_inference_steps": 50}),
]


@pytest.mark.parametrize(
    ("cls", "options"), REFUSED, ids=lambda each: str(getattr(each, "__name__", each))
)
def test_options_that_would_change_levels_are_refused_by_name(
    cls: Any, options: dict[str, Any]
) -> None:
    [(name, value)] = options.items()
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}\(.*{name}={value}|{name}='{value}'.*HINT"
    ):
        NoiseSchedule.from_scheduler(cls(**options))


def test_every_option_of_diffusers_schedulers_is_followed_refused_or_of_another_sampler() -> None:
    """Whatever a scheduler's option does, its being set is no news to us: none is passed over
    unknown."""
    known = (
        options_module.FOLLOWED
        | options_module._KNOWN
        | options_module._OF_A_SOLVER
        | options_module._PARTS
    )
    seen = 0
    for name in dir(diffusers.schedulers):
        cls = getattr(diffusers.schedulers, name)
        if not name.endswith("Scheduler") or not isinstance(cls, type) or "Dummy" in str(type(cls)):
            continue
        try:
            made = cls()
        except (
            Exception
        ):  # one that needs arguments or packages; none of these has `alphas_cumprod`
            continue
        if hasattr(made, "alphas_cumprod"):
            seen += 1
            assert options_module._options(cls).keys() <= known, name
    assert seen > 15
    flow = options_module._options(diffusers.FlowMatchEulerDiscreteScheduler).keys()
    assert flow <= options_module.FLOW_FOLLOWED | options_module._KNOWN


def test_options_of_other_classes_that_a_configuration_carries_along_mean_nothing() -> None:
    karras = EulerDiscreteScheduler(use_karras_sigmas=True)
    ddim = DDIMScheduler.from_config(karras.config, clip_sample=False)
    assert ddim.config.use_karras_sigmas  # diffusers keeps it, and its DDIM does not look at it
    schedule = NoiseSchedule.from_scheduler(ddim)
    ddim.set_timesteps(7)
    assert schedule.sampling_timesteps(7) == ddim.timesteps.tolist()


def test_options_of_derived_schedulers_must_be_as_by_default() -> None:
    class Own(DDIMScheduler):
        @register_to_config
        def __init__(self, warp: float = 1.0, num_train_timesteps: int = 1000) -> None:
            super().__init__(num_train_timesteps=num_train_timesteps)

    assert len(NoiseSchedule.from_scheduler(Own())) == 1000
    with pytest.raises(ValueError, match=r"Own\(warp=2.0\).*HINT: `DDIMScheduler.from_config"):
        NoiseSchedule.from_scheduler(Own(warp=2.0))


def test_the_last_level_is_the_schedulers_own() -> None:
    """Where a sampling step ends: at no noise, or at the first timestep's level where the scheduler
    says so."""
    ddpm = NoiseSchedule.from_scheduler(DDPMScheduler())
    assert ddpm.final_level == (1.0, 0.0)
    assert NoiseSchedule.from_scheduler(DDIMScheduler(set_alpha_to_one=True)).final_level == (
        1.0,
        0.0,
    )
    scheduler = DDIMScheduler(set_alpha_to_one=False)
    first = float(scheduler.alphas_cumprod[0])
    found = NoiseSchedule.from_scheduler(scheduler).final_level
    assert found == pytest.approx((first**0.5, (1 - first) ** 0.5), rel=1e-6)
    assert found[1] > 0
