"""The best samples, found block by block, against sorting all scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import (
    chosen_scores,
    ensemble,
)
from ctrak_lightning.attribution.search import Best, top_scores
from ctrak_lightning.methods.damping import Agreement, DampingRule, Fixed
from ctrak_lightning.methods.moments import Moments
from ctrak_lightning.store import SampleTable, StoreHeader, TraceStore, TraceWriter, stored_rows


def store_of(
    path: Path, checkpoints: Sequence[Tensor], orders: Sequence[int], dtype: Any = "float32"
) -> TraceStore:
    """A store of features [n, k] at each checkpoint, captured in an order of its own (a seed)."""
    n, k = checkpoints[0].shape
    facts: dict[str, Any] = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": n}}
    writer = TraceWriter(path, StoreHeader(**facts, dim=k, dtype=dtype), shard_rows=50)
    writer.write_samples(SampleTable([f"s{i}" for i in range(n)], [""] * n, {}))
    for step, (phi, seed) in enumerate(zip(checkpoints, orders, strict=True)):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        with writer.begin_checkpoint(step, epoch=0) as checkpoint:
            checkpoint.append(order, phi[order], torch.linspace(0.5, 3 + step, n)[order])
            checkpoint.seal()
    return TraceStore(path)


def traces(n: int, k: int, m: int) -> tuple[list[Tensor], Tensor]:
    """Features of m checkpoints that have something in common, and queries [m, 4, k]."""
    generator = torch.Generator().manual_seed(n + k)
    common = torch.randn(n, k, generator=generator) * torch.logspace(0, -2, k)
    phi = [common + 0.02 * torch.randn(n, k, generator=generator) for _ in range(m)]
    return phi, torch.randn(1, 4, k, generator=generator) + 0.1 * torch.randn(
        m, 4, k, generator=generator
    )


def dense(
    queries: Tensor, store: TraceStore, n: int, rule: DampingRule, weights: Any, residual: bool
) -> tuple[Tensor, Tensor, list[float | None]]:
    scores, dampings = chosen_scores(queries, store.checkpoints, rule)
    if residual:
        scores = scores * torch.stack([c.losses().double() for c in store.checkpoints]).unsqueeze(1)
    total = ensemble(scores, weights).float()
    order = torch.argsort(total, descending=True, stable=True)[:, :n]
    return order, total.gather(1, order), dampings


@pytest.mark.parametrize(
    "rule", [Fixed(1.0), Fixed(None), Agreement()], ids=["1", "none", "agreement"]
)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weights", [None, (0.1, 2.0, 0.5)])
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(230, 24, "int8"), (230, 24, "float32"), (20, 60, "float32")]
)
def test_the_best_are_those_of_sorting_all_scores(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: DampingRule,
    residual: bool,
    weights: Any,
    n: int,
    k: int,
    dtype: str,
) -> None:
    monkeypatch.setattr(stored_rows, "BLOCK_BYTES", k * 30 * getattr(torch, dtype).itemsize)
    phi, queries = traces(n, k, 3)
    store = store_of(tmp_path, phi, (7, 7, 8), dtype)  # the last checkpoint in another order
    found = top_scores(
        queries, store.checkpoints, 17, rule, weights=weights, factors=("loss",) if residual else ()
    )
    positions, scores, dampings = dense(queries, store, 17, rule, weights, residual)
    assert torch.equal(found.positions, positions)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-6)
    assert found.dampings == dampings


def test_queries_in_parts_are_those_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phi, queries = traces(230, 24, 2)
    store = store_of(tmp_path, phi, (7, 7))
    at_once = top_scores(queries, store.checkpoints, 5, Agreement())
    monkeypatch.setattr("ctrak_lightning.attribution.search._DIRECTIONS_BYTES", 1)
    in_parts = top_scores(queries, store.checkpoints, 5, Agreement())
    assert torch.equal(at_once.positions, in_parts.positions)
    assert at_once.dampings == in_parts.dampings


def test_scores_that_hardly_differ_keep_their_deviation(tmp_path: Path) -> None:
    """The mean is a thousand deviations: the kernel's moments alone would lose the deviation to
    rounding."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.cat([torch.ones(300, 1), 1e-4 * torch.randn(300, 7, generator=generator)], 1)
    store, queries = store_of(tmp_path, [phi], (1,)), torch.ones(1, 1, 8)
    found = top_scores(queries, store.checkpoints, 10, Fixed(None))
    _, scores, _ = dense(queries, store, 10, Fixed(None), None, False)
    torch.testing.assert_close(found.scores, scores, rtol=1e-3, atol=0)


def test_ties_go_to_the_lower_position_and_few_samples_are_all_given(tmp_path: Path) -> None:
    phi = torch.eye(4).repeat(25, 1)  # products with integers are exact
    store = store_of(tmp_path, [phi], (5,))
    queries = torch.tensor([[[1.0, 2.0, 2.0, -1.0], [0.0, 0.0, 0.0, -3.0]]])
    found = top_scores(queries, store.checkpoints, 60, Fixed(None))
    both = [i for i in range(100) if i % 4 in (1, 2)]
    assert found.positions[0, :50].tolist() == both
    assert found.positions[0, 50:].tolist() == list(range(0, 40, 4))
    assert found.positions[1].tolist() == [i for i in range(100) if i % 4 != 3][:60]
    assert top_scores(queries, store.checkpoints, 500, Fixed(None)).positions.shape == (2, 100)


def test_best_orders_negative_scores_and_takes_minus_zero_for_zero() -> None:
    best = Best(4)
    best.add(torch.tensor([[-2.0, -0.0, -1e-40]]), torch.tensor([10, 9, 3]))
    best.add(torch.tensor([[0.0, -float("inf"), 5e-41]]), torch.tensor([2**32 - 1, 0, 7]))
    positions, scores = best.sorted()
    assert positions.tolist() == [[7, 9, 2**32 - 1, 3]]
    assert scores.tolist() == [torch.tensor([5e-41, 0.0, 0.0, -1e-40]).tolist()]
    with pytest.raises(ValueError, match="never called"):
        Best(1).sorted()


def test_a_tie_that_comes_late_goes_to_the_lower_position_all_the_same() -> None:
    best = Best(2)
    for scores, positions in (([3.0, 1.0, 1.0], [8, 5, 9]), ([0.5, 1.0, 0.9], [1, 2, 3])):
        best.add(torch.tensor([scores]), torch.tensor(positions))
    positions, scores = best.sorted()
    assert (positions.tolist(), scores.tolist()) == ([[8, 2]], [[3.0, 1.0]])


@pytest.mark.parametrize("block", [1, 7, 100])
def test_moments_in_blocks_are_those_of_all_scores(block: int) -> None:
    scores = torch.randn(5, 4, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = scores + 3 * scores[:, :1] + 1e6
    scores[4, 3] = 2.0
    moments = Moments()
    for part in scores.split(block, -1):
        moments.add(part)
    assert moments.count == 100
    torch.testing.assert_close(
        moments.deviation(), scores.std(-1, correction=0), rtol=1e-8, atol=1e-12
    )
    whole = Moments()
    whole.add(scores)
    torch.testing.assert_close(moments.agreement(), whole.agreement(), rtol=1e-8, atol=1e-12)
    stacked = Moments.stacked([moments, whole])
    assert torch.equal(stacked.agreement()[0], moments.agreement())
    assert torch.equal(stacked.mean()[1], whole.mean())
