import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from ctrak_lightning import NoiseSchedule, Sampler
from ctrak_lightning.methods.trajectories import Generated, Inverted, Noised, State

from ..toy import ToyDiffusion, Toys


class Recorder(ToyDiffusion):
    """Remembers every timestep that the network was told, and how noisy the state then was."""

    def __init__(self, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.noise_schedule = NoiseSchedule.from_scheduler(scheduler)
        self.told: list[int] = []

    def predict(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.told.append(int(t[0]))
        return super().predict(x_t, t, condition)


def setup(
    kind: str, **kwargs: object
) -> tuple[Recorder, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    task = Recorder(DDIMScheduler(num_train_timesteps=100, prediction_type=kind, **kwargs))  # type: ignore[arg-type]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    return (
        task.eval(),
        x,
        task.condition({"colour": "red", "shape": "dot"}, 2),
        task.condition({}, 2),
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "clip", "spacing", "steps"),
    [
        ("epsilon", True, "trailing", 10),
        ("epsilon", False, "linspace", 7),
        ("v_prediction", False, "trailing", 7),
        ("v_prediction", True, "leading", 7),
        ("sample", False, "linspace", 9),
        ("sample", True, "leading", 9),
    ],
)
def test_sampler_equals_diffusers_ddim(kind: str, clip: bool, spacing: str, steps: int) -> None:
    task, x, condition, null = setup(
        kind, clip_sample=clip, timestep_spacing=spacing, steps_offset=1
    )
    generation = Sampler(steps=steps, guidance=2.5).run(task, x, condition, null)
    scheduler = task.scheduler
    scheduler.set_timesteps(steps)
    expected = x
    for state, t in zip(generation.states, scheduler.timesteps, strict=True):
        assert float((state.x_t - expected).norm() / expected.norm()) < 1e-5
        assert state.t.tolist() == [int(t)] * 2
        with_concept, without = (task.predict(expected, t.repeat(2), c) for c in (condition, null))
        expected = scheduler.step(without + 2.5 * (with_concept - without), t, expected).prev_sample
    assert float((generation.latents - expected).norm() / expected.norm()) < 1e-5
    assert task.told[: 2 * steps : 2] == scheduler.timesteps.tolist()


def test_a_number_of_steps_at_which_diffusers_places_one_too_many_is_told() -> None:
    task, x, condition, _ = setup("epsilon", timestep_spacing="trailing", clip_sample=False)
    with pytest.warns(UserWarning, match=r"steps=29.*takes 30 steps .*timestep -1.*HINT"):
        generation = Sampler(steps=29, guidance=1.0).run(task, x, condition, None)
    task.scheduler.set_timesteps(29)
    assert [int(state.t[0]) for state in generation.states] == task.scheduler.timesteps.tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_inversion_equals_diffusers_inverse_scheduler_with_the_states_own_timestep(
    kind: str, guidance: float
) -> None:
    task, x, condition, null = setup(kind, clip_sample=False)
    steps = 10
    states = list(
        Inverted(steps=steps, guidance=guidance).states(task, x, condition, ["a", "b"], 0)
    )
    told = task.told
    grid = [5 + 10 * i for i in range(steps)]
    assert [int(state.t[0]) for state in states] == grid
    # The network hears of the state it is given: the clean image (timestep 0), then each state's
    # own timestep.
    assert told[:: 1 if guidance == 1.0 else 2] == [0, *grid[:-1]]
    inverse = DDIMInverseScheduler.from_config(task.scheduler.config)
    inverse.set_timesteps(steps)
    expected = x
    for i, state in enumerate(states):
        t = torch.full((2,), 0 if i == 0 else grid[i - 1])
        with_concept, without = (task.predict(expected, t, c) for c in (condition, null))
        output = without + guidance * (with_concept - without)
        # diffusers' step moves from timestep - T / steps to timestep; at the first, the clean image
        # counts as no noise.
        if i == 0:
            x0_hat = expected
            e = task.noise_schedule.epsilon(output, expected, t)
            power = inverse.alphas_cumprod[grid[0]]
            expected = power.sqrt() * x0_hat + (1 - power).sqrt() * e
        else:
            expected = inverse.step(output, grid[i], expected).prev_sample
        torch.testing.assert_close(state.x_t, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_inversion_then_sampling_returns_to_the_image() -> None:
    """With many steps DDIM is a reversible flow; a sign or a timestep error would not come back."""
    task, _, condition, null = setup(
        "epsilon", clip_sample=False, timestep_spacing="leading", steps_offset=0
    )
    for parameter in task.denoiser.conv_out.parameters():
        parameter.mul_(0.3)
    x0 = torch.stack([Toys()[i]["image"] for i in range(2)])
    *_, last = Inverted(steps=100).states(task, x0, condition, ["a", "b"], 0)
    generation = Sampler(steps=100, guidance=1.0).run(task, last.x_t, condition, null)
    error = (generation.latents - x0).norm() / x0.norm()
    assert error < 0.02, float(error)


def test_noise_depends_on_seed_timestep_and_sample_only() -> None:
    task = ToyDiffusion()
    x = torch.randn(4, 3, 8, 8)
    ids = ["a", "b", "c", "d"]

    def noise(trajectory: Noised, rows: list[int], seed: int = 0) -> Tensor:
        states = trajectory.states(task, x[rows], {}, [ids[i] for i in rows], seed)
        parts = []
        for state in states:
            a, s = task.noise_schedule.levels(state.t, state.x_t)
            parts.append((state.x_t - a * x[rows]) / s)
        return torch.stack(parts, 1)  # [B, timesteps, ...]

    shared, own = Noised(timesteps=3), Noised(timesteps=3, shared_noise=False)
    for trajectory in (shared, own):
        whole = noise(trajectory, [0, 1, 2, 3])
        torch.testing.assert_close(noise(trajectory, [2, 0]), whole[[2, 0]], rtol=1e-3, atol=1e-4)
        assert (noise(trajectory, [0], seed=1) - whole[:1]).abs().max() > 0.1
        assert (whole[:, 0] - whole[:, 1]).abs().max() > 0.1
    torch.testing.assert_close(noise(shared, [0]), noise(shared, [1]), rtol=1e-3, atol=1e-4)
    assert (noise(own, [0]) - noise(own, [1])).abs().max() > 0.1


def test_generated_selects_states_with_signal() -> None:
    task, x, condition, null = setup(
        "sample", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    generation = Sampler(steps=10, guidance=1.0).run(task, x, condition, null)
    assert int(generation.states[0].t[0]) == 99
    chosen = Generated().select(generation, task.noise_schedule)
    assert [int(state.t[0]) for state in chosen] == [89, 79, 69, 59, 49, 39, 29, 19, 9]
    assert [
        int(state.t[0]) for state in Generated(timesteps=3).select(generation, task.noise_schedule)
    ] == [
        79,
        49,
        19,
    ]
    with pytest.raises(ValueError, match="9 usable states.*HINT"):
        Generated(timesteps=10).select(generation, task.noise_schedule)


def test_misuse_is_refused() -> None:
    task, x, condition, _ = setup("epsilon")
    with pytest.raises(TypeError, match="Inverted"):
        Generated().states(task, x, condition, ["a", "b"], 0)
    with pytest.raises(ValueError, match="timesteps=11"):
        Inverted(steps=10, timesteps=11)
    assert isinstance(State(x, torch.zeros(2)), State)
