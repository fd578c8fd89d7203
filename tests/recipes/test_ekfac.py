"""EK-FAC beside dense matrices: Kronecker products written out, and inverted whole."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrak_lightning import Concept, DiffusionTask, Encoded, GradientTracer, NoiseSchedule, Sampler
from ctrak_lightning.attribution.scoring import ensemble
from recipes.benchmarks import ekfac, influence
from recipes.benchmarks.compare import Case
from recipes.benchmarks.ekfac import WHOLE, Curvature, States, curvatures, scores, split
from recipes.benchmarks.replay import save_trained
from tests.toy import scheduler

POSITIONS, CHANNELS, WIDTH, NAMES = 3, 2, 4, 3


class TinyNetwork(nn.Module):
    """Two linear layers with an embedding between them; the inputs have positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, CHANNELS)
        self.names = nn.Embedding(NAMES, WIDTH)

    def forward(
        self, x: Tensor, t: Tensor, name: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.last(torch.tanh(self.first(x) + self.names(name)[:, None])),)


class TinyDiffusion(DiffusionTask, nn.Module):
    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.denoiser = network or TinyNetwork()
        self.noise_schedule = NoiseSchedule.from_scheduler(scheduler("sample"))

    def encode(self, batch: dict[str, Any]) -> Encoded:
        return Encoded(
            latents=batch["x"], condition={"name": batch["name"]}, sample_ids=batch["sample_id"]
        )

    def condition(self, spec: Mapping[str, str] | str, n: int) -> dict[str, Tensor]:
        assert not isinstance(spec, str)
        return {"name": torch.full((n,), int(spec.get("name", 0)))}

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 3, 2, 2)


def batch_of(count: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(count, POSITIONS, CHANNELS, generator=generator),
        # Each name another number of times: factors with equal eigenvalues have no one eigenbasis.
        "name": torch.tensor([0, 1, 1, 2, 2, 2])[:count],
        "sample_id": [f"{i}" for i in range(count)],
    }


def states_of_batch() -> States:
    batch = batch_of()
    return States(batch["x"], torch.full((6,), 40), {"name": batch["name"]})


def factors_of(
    network: TinyNetwork, x: Tensor, name: Tensor, v: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """One sample's output gradients and inputs of each layer, both by position, by hand."""
    hidden = torch.tanh(x @ network.first.weight.T + network.names.weight[name])
    before = (v @ network.last.weight) * (1 - hidden.square())
    one_hot = nn.functional.one_hot(name, NAMES).float()
    with_one = torch.cat([hidden, torch.ones(len(x), 1)], 1)
    return {
        "first": (before, x),
        "last": (v, with_one),
        "names": (before.sum(0, keepdim=True), one_hot[None]),
    }


def dense_blocks(
    network: TinyNetwork, state: States, draws: int, damping: float
) -> dict[str, Tensor]:
    """Each layer's damped block, as a matrix over the entries of a gradient, row by row."""
    generator = torch.Generator().manual_seed(0)
    elements = POSITIONS * CHANNELS

    def each() -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        for _ in range(draws):
            v = torch.randn(state.x_t.shape, generator=generator) * (2 / elements) ** 0.5
            for i in range(len(state.x_t)):
                yield factors_of(network, state.x_t[i], state.condition["name"][i], v[i])

    first, second = list(each()), list(each())
    blocks = {}
    for layer in first[0]:
        left = torch.linalg.eigh(sum(one[layer][0].T @ one[layer][0] for one in first))[1]
        right = torch.linalg.eigh(sum(one[layer][1].T @ one[layer][1] for one in first))[1]
        basis = torch.kron(left, right)
        gradients = torch.stack([(one[layer][0].T @ one[layer][1]).flatten() for one in second])
        values = (gradients @ basis).square().mean(0)
        ridge = damping * values.mean() * torch.eye(len(values))
        blocks[layer] = basis @ torch.diag(values) @ basis.T + ridge
    return blocks


@torch.no_grad()
def expected_scores(
    network: TinyNetwork, state: States, queries: Tensor, traces: Tensor, draws: int
) -> Tensor:
    """By the dense inverses; rows hold the layers in the order of their names."""
    found, at = torch.zeros(len(queries), len(traces)), 0
    for _, block in sorted(dense_blocks(network, state, draws, ekfac.DAMPING).items()):
        own = slice(at, at + len(block))
        found += queries[:, own] @ torch.linalg.inv(block) @ traces[:, own].T
        at = own.stop
    assert at == queries.shape[1]
    return found


def test_solving_is_multiplying_by_the_dense_inverse() -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (3, 4))
    block = Curvature(left, right, torch.rand(3, 4))
    basis = torch.kron(left, right)
    dense = basis @ torch.diag(block.eigenvalues.flatten()) @ basis.T
    dense += 0.1 * block.eigenvalues.mean() * torch.eye(12)
    gradients = torch.randn(5, 3, 4)
    expected = torch.linalg.solve(dense, gradients.flatten(1).T).T.view(5, 3, 4)
    torch.testing.assert_close(block.solve(gradients), expected)
    nothing = Curvature(left, right, torch.zeros(3, 4))
    assert not nothing.solve(gradients).any()  # and no division by zero


def test_scores_are_those_of_dense_blocks() -> None:
    module = TinyDiffusion()
    tracer = GradientTracer(module.denoiser, WHOLE)
    state = states_of_batch()
    blocks = curvatures(module, tracer, lambda: [state], draws=2)
    shapes = {"first": (WIDTH, CHANNELS), "last": (CHANNELS, WIDTH + 1), "names": (WIDTH, NAMES)}
    assert {name: block.shape for name, block in blocks.items()} == shapes
    torch.manual_seed(1)
    queries, traces = torch.randn(2, tracer.dim), torch.randn(5, tracer.dim)
    network = module.denoiser
    assert isinstance(network, TinyNetwork)
    expected = expected_scores(network, state, queries, traces, 2)
    found = scores(queries, traces, blocks)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    rows = split(traces, blocks)["last"]
    assert torch.equal(rows.flatten(1), traces[:, WIDTH * CHANNELS :][:, : CHANNELS * (WIDTH + 1)])


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(CHANNELS, CHANNELS)

    def forward(
        self, x: Tensor, t: Tensor, name: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.last(x),)


def test_of_one_layer_it_is_the_gauss_newton_matrix() -> None:
    """Where the factors hold exactly: one linear layer, one position."""
    module = TinyDiffusion(OneLayer())
    tracer = GradientTracer(module.denoiser, WHOLE)
    torch.manual_seed(2)
    x = torch.randn(8, 1, CHANNELS) @ torch.tensor([[2.0, 0.5], [0.0, 0.3]])
    state = States(x, torch.full((8,), 40), {"name": torch.zeros(8, dtype=torch.long)})
    blocks = curvatures(module, tracer, lambda: [state], draws=3000)
    inputs = torch.cat([x[:, 0], torch.ones(8, 1)], 1)
    exact = torch.kron(2 / CHANNELS * torch.eye(CHANNELS), inputs.T @ inputs / 8)
    exact += 0.1 * exact.diagonal().mean() * torch.eye(len(exact))
    queries, traces = torch.randn(3, tracer.dim), torch.randn(40, tracer.dim)
    expected = queries @ torch.linalg.inv(exact) @ traces.T
    found = scores(queries, traces, blocks).float()
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_other_layers_are_refused() -> None:
    module = TinyDiffusion(nn.Conv2d(1, 1, 1))
    tracer = GradientTracer(module.denoiser, WHOLE)
    with pytest.raises(ValueError, match="no Kronecker factors here, expected nn.Linear and"):
        curvatures(module, tracer, lambda: [])


def test_rows_are_no_variants_that_the_librarys_kernel_could_score() -> None:
    assert set(ekfac.ROWS) < set(influence.METHODS)
    with pytest.raises(ValueError, match="unknown.*ekfac_given"):
        influence.variants(["ekfac"])


def test_rows_ask_what_influence_asks_and_are_kept(tmp_path: Path) -> None:
    module = TinyDiffusion()
    steps = (3, 6)
    for step in steps:
        with torch.no_grad():
            module.denoiser.last.weight.mul_(1.1)  # type: ignore[operator, union-attr]
        save_trained(module, tmp_path, step)
    batch = batch_of()
    case = Case(
        folder=tmp_path,
        module=module,
        batches=[batch],
        concepts=[Concept("one", {"name": "1"}, {"name": "0"})],
        seeds=[0],
        sampler=Sampler(steps=4, guidance=1.0),
        given=torch.randn(1, POSITIONS, CHANNELS),
    )
    found = ekfac.scores_of(tmp_path / "out", case, ekfac.ROWS, steps, "given")
    assert set(found) == set(ekfac.ROWS)
    name = "ekfac_high_noise"
    states = list(ekfac.states_of(module, [batch], ekfac.STATES[name]))
    assert case.given is not None

    def gradients(x0: Tensor, states: list[States], names: Tensor) -> Tensor:
        """Of the mean squared error of the clean image [B, P], added over the states."""
        rows = []
        for i in range(len(x0)):
            loss = torch.zeros(())
            for state in states:
                x_t = state.x_t[i : i + 1]
                (output,) = module.denoiser(x_t, state.t[i : i + 1], names[i : i + 1])
                loss = loss + (output - x0[i : i + 1]).square().mean()
            grads = dict(
                zip(
                    (known for known, _ in module.denoiser.named_parameters()),
                    torch.autograd.grad(loss, list(module.denoiser.parameters())),
                    strict=True,
                )
            )
            last = torch.cat([grads["last.weight"], grads["last.bias"][:, None]], 1)
            parts = [grads["first.weight"], last, grads["names.weight"].T]
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    each = []
    for step in steps:
        ekfac.load_trained(module, tmp_path, step)
        traces = gradients(batch["x"], states, batch["name"])
        noised = ekfac.STATES[name].states(module, case.given, {}, ["any"], 0)
        asked = [States(state.x_t, state.t, {}) for state in noised]
        query = gradients(case.given, asked, torch.tensor([1]))
        query = query - gradients(case.given, asked, torch.tensor([0]))
        tracer = GradientTracer(module.denoiser, WHOLE)
        blocks = curvatures(module, tracer, lambda: states)
        each.append(scores(query, traces, blocks))
    torch.testing.assert_close(found[name], ensemble(torch.stack(each)), rtol=1e-3, atol=1e-4)
    for step in steps:
        (tmp_path / f"step-{step:08d}.safetensors").unlink()
    again = ekfac.scores_of(tmp_path / "out", case, ekfac.ROWS, steps, "given")
    assert all(torch.equal(again[row], found[row]) for row in ekfac.ROWS)
