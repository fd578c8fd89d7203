"""Flow matching as noise and clean latents, against hand-written formulas and diffusers' own
scheduler."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from ctrak_lightning import FlowSchedule, NoiseSchedule, Sampler
from ctrak_lightning.methods.trajectories import Generated, Inverted, Noised, Renoised

SHAPE = (2, 3, 4, 4)


class Flow:
    """A task whose network is a function of the state, the time and a condition; it remembers the
    times it was told."""

    def __init__(self, **options: Any) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler(**options)
        self.noise_schedule = NoiseSchedule.from_scheduler(self.scheduler)
        self.told: list[float] = []

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.told.append(float(t[0]))
        time = (t / 1000).view(-1, 1, 1, 1)
        return torch.tanh(0.7 * x_t + time) - 0.3 * x_t + condition["shift"].view(-1, 1, 1, 1)

    def condition(self, spec: Any, n: int) -> dict[str, Tensor]:
        return {"shift": torch.full((n,), 0.4 if spec else 0.0)}


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_velocity_becomes_noise_and_clean_latents() -> None:
    schedule = FlowSchedule()
    t = torch.tensor([250.0, 900.0])
    x0, noise = torch.tensor([[2.0], [4.0]]), torch.tensor([[6.0], [-1.0]])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(
        x_t, torch.tensor([[3.0], [-0.5]])
    )  # 0.75 * 2 + 0.25 * 6 and 0.1 * 4 - 0.9
    velocity = schedule.target(x0, noise, t)
    torch.testing.assert_close(velocity, torch.tensor([[4.0], [-5.0]]))
    torch.testing.assert_close(schedule.epsilon(velocity, x_t, t), noise)
    torch.testing.assert_close(schedule.x0_hat(velocity, x_t, t), x0)
    # A wrong velocity is wrong by (1 - sigma) in the noise and by -sigma in the clean latents.
    torch.testing.assert_close(
        schedule.epsilon(velocity + 1, x_t, t) - noise, torch.tensor([[0.75], [0.1]])
    )
    torch.testing.assert_close(
        schedule.x0_hat(velocity + 1, x_t, t) - x0, torch.tensor([[-0.25], [-0.9]])
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_is_that_of_the_scheduler(shift: float, latents: Tensor) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    x0, noise = latents
    for index in (0, 300, 998):
        t = scheduler.timesteps[index].repeat(2)
        torch.testing.assert_close(
            schedule.add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise)
        )


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_sampling_timesteps_are_those_of_diffusers(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    scheduler.set_timesteps(steps)
    assert schedule.sampling_timesteps(steps) == pytest.approx(
        scheduler.timesteps.tolist(), rel=1e-6
    )


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_shift_by_image_size_is_that_of_diffusers(kind: str, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    schedule = NoiseSchedule.from_scheduler(scheduler, tokens=tokens)
    scheduler.set_timesteps(7, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    assert schedule.sampling_timesteps(7) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)
    scheduler.set_timesteps(
        sigmas=np.linspace(1, 1 / 7, 7).tolist(), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    )
    assert isinstance(schedule, FlowSchedule)
    without_ends = FlowSchedule(shift=schedule.shift)
    assert without_ends.sampling_timesteps(7) == pytest.approx(
        scheduler.timesteps.tolist(), rel=1e-5
    )


def test_even_and_random_timesteps_follow_the_shift() -> None:
    schedule = FlowSchedule(shift=3.0)
    # u = 1/4 and 3/4: 3 u / (1 + 2 u).
    assert schedule.even_timesteps(2) == pytest.approx([500.0, 900.0])
    assert schedule.even_timesteps(1, 0.0, 0.5) == pytest.approx([500.0])
    assert FlowSchedule().even_timesteps(2) == pytest.approx([250.0, 750.0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = schedule.random_timesteps(20_000)
    assert drawn.dtype == torch.float32
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1000
    # The median of u is 1/2, which the shift moves to 3/4.
    assert float(drawn.median()) == pytest.approx(750, abs=5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampler_equals_the_schedulers_own_steps(
    shift: float, guidance: float, latents: Tensor
) -> None:
    task = Flow(shift=shift)
    condition, null = task.condition("a cat", 2), task.condition({}, 2)
    generation = Sampler(steps=9, guidance=guidance).run(task, latents[0], condition, null)
    told = task.told[:: 1 if guidance == 1.0 else 2]
    task.scheduler.set_timesteps(9)
    expected = latents[0]
    for state, t in zip(generation.states, task.scheduler.timesteps, strict=True):
        torch.testing.assert_close(state.x_t, expected, rtol=1e-5, atol=1e-5)
        output = task.predict(expected, t.repeat(2), null)
        output = output + guidance * (task.predict(expected, t.repeat(2), condition) - output)
        expected = task.scheduler.step(output, t, expected).prev_sample
    torch.testing.assert_close(generation.latents, expected, rtol=1e-5, atol=1e-5)
    assert told == pytest.approx(task.scheduler.timesteps.tolist(), rel=1e-6)


def test_inversion_is_euler_backwards_with_the_states_own_time(latents: Tensor) -> None:
    task = Flow()
    condition = task.condition("a cat", 2)
    states = list(Inverted(steps=5).states(task, latents[0], condition, ["a", "b"], 0))
    grid = [100.0, 300.0, 500.0, 700.0, 900.0]
    assert task.told == pytest.approx([0.0, *grid[:-1]])
    assert [float(state.t[0]) for state in states] == pytest.approx(grid)
    x, at = latents[0], 0.0
    for state, t in zip(states, grid, strict=True):
        x = x + (t - at) / 1000 * task.predict(x, torch.full((2,), at), condition)
        at = t
        torch.testing.assert_close(state.x_t, x, rtol=1e-5, atol=1e-5)


def test_inversion_then_sampling_returns_to_the_image(latents: Tensor) -> None:
    task = Flow(num_train_timesteps=1000)
    condition = task.condition("a cat", 2)
    *_, last = Inverted(steps=400).states(task, latents[0], condition, ["a", "b"], 0)
    generation = Sampler(steps=400, guidance=1.0).run(task, last.x_t, condition, None)
    assert float((generation.latents - latents[0]).norm() / latents[0].norm()) < 0.01


def test_trajectories_take_real_timesteps(latents: Tensor) -> None:
    task = Flow(shift=3.0)
    condition = task.condition("a cat", 2)
    states = list(Noised(timesteps=2).states(task, latents[0], condition, ["a", "b"], 0))
    assert [state.t.tolist() for state in states] == [
        pytest.approx([500.0] * 2),
        pytest.approx([900.0] * 2),
    ]
    noise = (states[1].x_t - 0.1 * latents[0]) / 0.9
    assert noise.std().item() == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-4, atol=1e-4)  # shared by the samples
    generation = Sampler(steps=5, guidance=1.0).run(task, latents[0], condition, None)
    # The first state is noise alone: e does not depend on the network there.
    assert generation.states[0].t.tolist() == [1000.0] * 2
    chosen = Generated().select(generation, task.noise_schedule)
    assert [state.t[0] for state in chosen] == [state.t[0] for state in generation.states[1:]]
    renoised = Renoised(timesteps=2).select(generation, task.noise_schedule)
    for state in renoised:
        assert state.x0 is not None
        sigma = float(state.t[0]) / 1000
        noise = (state.x_t - (1 - sigma) * state.x0) / sigma
        torch.testing.assert_close(noise[0], noise[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"use_karras_sigmas": True}, None, "use_karras_sigmas=True.*HINT"),
        ({"shift_terminal": 0.02}, None, "shift_terminal=0.02.*HINT"),
        ({"invert_sigmas": True}, None, "invert_sigmas=True.*HINT"),
        ({"use_exponential_sigmas": True}, None, "use_exponential_sigmas=True.*HINT"),
        ({"use_beta_sigmas": True}, None, "use_beta_sigmas=True.*HINT"),
        ({"stochastic_sampling": True}, None, "stochastic_sampling=True.*HINT"),
        ({"use_dynamic_shifting": True}, None, "image's size.*HINT.*tokens"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    options: dict[str, Any], tokens: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(**options), tokens=tokens)


def test_a_flow_needs_a_positive_shift_and_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="shift=0"):
        FlowSchedule(shift=0)
    described = [
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=s)).to_dict()
        for s in (1, 3)
    ]
    assert described[0] == {"timesteps": 1000, "prediction_type": "flow", "shift": 1.0}
    assert described[0] != described[1]
