"""Projections: unbiased, the same for a block whatever else is traced, and validated."""

from typing import Any

import pytest
import torch
from torch import nn

from ctrak_lightning.gradients import Projection
from ctrak_lightning.gradients.projection import BlockProjector
from tests.gradients.zoo import PROJECTION, SAMPLES, Case, features

CPU = torch.device("cpu")
SEEDS = 1500


@pytest.mark.parametrize(("rank", "dim"), [(3, None), (3, 5), (9, 5)])
def test_inner_products_are_unbiased(rank: int, dim: int | None) -> None:
    shapes = {"a": (6, 9), "b": (2, 7), "c": (5, 1)}
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(2, *shape, generator=generator) + 0.5 for name, shape in shapes.items()
    }
    gradients = {name: g + 0.5 * g[:1] for name, g in gradients.items()}
    exact = sum(float((g[0] * g[1]).sum()) for g in gradients.values())
    products = []
    for seed in range(SEEDS):
        projector = BlockProjector(Projection(rank=rank, dim=dim, seed=seed), shapes)
        blocks = {n: projector.project(n, g) for n, g in gradients.items()}
        first, second = projector.sketch(projector.join(blocks, 2, CPU))
        products.append(float(first @ second))
    mean, deviation = torch.tensor(products).mean(), torch.tensor(products).std()
    assert abs(float(mean) - exact) < 4 * float(deviation) / SEEDS**0.5
    assert 4 * float(deviation) / SEEDS**0.5 < 0.25 * abs(exact)


def test_small_sides_are_not_projected() -> None:
    projector = BlockProjector(Projection(rank=4, dim=None), {"a": (4, 3), "b": (5, 4)})
    left, right = projector.matrices("a", CPU)
    assert torch.equal(left, torch.eye(4))
    assert torch.equal(right, torch.eye(3))
    left, right = projector.matrices("b", CPU)
    assert left.shape == (5, 4)
    assert torch.equal(right, torch.eye(4))
    assert projector.dim == 12 + 16


def test_a_block_does_not_depend_on_the_others() -> None:
    few = BlockProjector(Projection(rank=2, dim=50), {"b": (6, 9)})
    many = BlockProjector(Projection(rank=2, dim=50), {"a": (8, 8), "b": (6, 9), "c": (3, 3)})
    for ours, theirs in zip(few.matrices("b", CPU), many.matrices("b", CPU), strict=True):
        assert torch.equal(ours, theirs)
    block = {"b": torch.randn(2, 4)}
    ours, theirs = (each.sketch(each.join(block, 2, CPU)) for each in (few, many))
    assert torch.equal(ours, theirs)


def test_sides_blocks_and_seeds_differ() -> None:
    projector = BlockProjector(Projection(rank=2), {"a": (9, 9), "b": (9, 9)})
    other = BlockProjector(Projection(rank=2, seed=1), {"a": (9, 9)})
    sides = [
        *projector.matrices("a", CPU),
        *projector.matrices("b", CPU),
        *other.matrices("a", CPU),
    ]
    for i, side in enumerate(sides):
        assert not any(torch.equal(side, another) for another in sides[:i])


def test_numbers_are_pinned() -> None:
    """Stores of earlier versions stay readable only while these stay."""
    projector = BlockProjector(Projection(rank=2, dim=7), {"layer": (3, 4)})
    left, right = projector.matrices("layer", CPU)
    buckets, signs = projector._hash(CPU, 0)
    assert torch.allclose(left[0], torch.tensor(PINNED_LEFT), atol=1e-4)
    assert torch.allclose(right[0], torch.tensor(PINNED_RIGHT), atol=1e-4)
    assert (buckets.tolist(), signs.tolist()) == PINNED_SKETCH


def test_adding_a_layer_keeps_the_blocks_of_the_others() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    x = torch.randn(SAMPLES, 6)
    one = features(Case(nn.ModuleDict({"first": first}), (x,), lambda m, x: second(first(x))))
    two = features(
        Case(nn.ModuleDict({"first": first, "second": second}), (x,), lambda m, x: second(first(x)))
    )
    assert torch.equal(one, two[:, : one.shape[1]])
    assert two.shape[1] == 2 * one.shape[1] == 2 * PROJECTION.rank**2


def test_matrices_are_cached() -> None:
    projector = BlockProjector(Projection(rank=2), {"a": (9, 9)})
    assert projector.matrices("a", CPU)[0] is projector.matrices("a", CPU)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 2.5},
        {"rank": True},
        {"dim": 0},
        {"dim": "all"},
        {"seed": -1},
        {"seed": None},
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any]) -> None:
    [(field, value)] = options.items()
    with pytest.raises(
        ValueError, match=rf"Projection\({field}={value!r}\).*expected an integer.*HINT"
    ):
        Projection(**options)


def test_settings_go_through_json_facts() -> None:
    projection = Projection(rank=3, dim=None, seed=9)
    assert projection.to_dict() == {"rank": 3, "dim": None, "seed": 9}
    assert Projection(**projection.to_dict()) == projection
    assert Projection() == Projection(rank=16, dim=2048, seed=0)


PINNED_LEFT = [-0.55156, -1.05986]
PINNED_RIGHT = [-0.27267, 0.24384]
PINNED_SKETCH = ([2, 2, 0, 4], [1.0, 1.0, -1.0, -1.0])
