"""Numbers at their edges: what scores are where rows are equal, dependent, huge, few, or in another
order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrak_lightning.attribution.checkpoint_model import latent_shape
from ctrak_lightning.attribution.scoring import (
    checkpoint_scores,
    chosen_scores,
    ensemble,
    soft_thresholded,
    spreads,
    standardised,
    units,
)
from ctrak_lightning.attribution.search import top_scores
from ctrak_lightning.errors import CorruptStoreError, GradientError
from ctrak_lightning.methods.damping import Agreement, DampingRule, Fixed
from ctrak_lightning.methods.moments import Moments
from ctrak_lightning.store import SampleTable, StoreHeader, TraceStore, TraceWriter

DTYPES = {"float32": 1e-5, "float16": 5e-3, "int8": 3e-2}
"""How far scores may be from those of the exact rows, relative to the largest: what a row of each
kind is rounded to."""


def store_of(path: Path, *checkpoints: Tensor, dtype: Any = "float32") -> TraceStore:
    n, k = checkpoints[0].shape
    facts: dict[str, Any] = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": n}}
    writer = TraceWriter(path, StoreHeader(**facts, dim=k, dtype=dtype))
    writer.write_samples(SampleTable([f"s{i}" for i in range(n)], [""] * n, {}))
    for step, rows in enumerate(checkpoints, start=1):
        with writer.begin_checkpoint(step, epoch=0) as checkpoint:
            checkpoint.append(torch.arange(n), rows, torch.zeros(n))
            checkpoint.seal()
    return TraceStore(path)


def dense(phi: Tensor, queries: Tensor, damping: float) -> np.ndarray[Any, Any]:
    """``q (K + lambda I)^-1 Phi^T`` with the inverse formed outright."""
    a, q = phi.double().numpy(), queries.double().numpy()
    ridge = damping * np.trace(a.T @ a) / min(a.shape)
    scores: np.ndarray[Any, Any] = q @ np.linalg.inv(a.T @ a + ridge * np.eye(a.shape[1])) @ a.T
    return scores


def drawn(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(10, 4), (4, 10)])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_gram_matrix_without_full_rank(tmp_path: Path, shape: tuple[int, int], rank: int) -> None:
    n, k = shape
    phi = drawn(n, rank) @ drawn(rank, k, 1)
    found = checkpoint_scores(drawn(3, k, 2), store_of(tmp_path, phi).checkpoints[0], 0.1)
    expected = dense(phi, drawn(3, k, 2), 0.1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sample_with_a_gradient_a_million_times_the_others(tmp_path: Path, dtype: str) -> None:
    """It decides the kernel, as it would decide a gradient step; nobody's score overflows or turns
    into noise of its own."""
    phi = drawn(9, 5)
    phi[4] *= 1e6
    queries = drawn(2, 5, 1)
    found = checkpoint_scores(queries, store_of(tmp_path, phi, dtype=dtype).checkpoints[0], None)
    expected = queries.double() @ phi.double().T
    relative = (found - expected).abs() / (
        queries.double().norm(dim=1)[:, None] * phi.double().norm(dim=1)
    )
    assert float(relative.max()) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6, 1e18])
def test_scores_do_not_depend_on_the_scale_of_gradients(
    tmp_path: Path, dtype: str, scale: float
) -> None:
    """float16 ends at 65504; norms are kept apart, in float32."""
    phi, queries = drawn(12, 6), drawn(2, 6, 1)
    found = checkpoint_scores(
        queries, store_of(tmp_path, phi * scale, dtype=dtype).checkpoints[0], 1.0
    )
    expected = dense(phi, queries, 1.0) / scale
    np.testing.assert_allclose(found.numpy(), expected, atol=DTYPES[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("rows", [float("nan"), float("inf"), 0.0])
def test_rows_that_say_nothing_are_refused_and_named(tmp_path: Path, rows: float) -> None:
    phi = drawn(4, 3)
    phi[2] = rows
    with pytest.raises(GradientError, match=r"'s2'.*HINT"):
        store_of(tmp_path, phi)


def test_one_sample_and_one_number(tmp_path: Path) -> None:
    """By hand: phi = 3, q = 2, lambda = damping * 9, so 2 * 3 / (9 + 9) with damping 1."""
    checkpoint = store_of(tmp_path, torch.tensor([[3.0]])).checkpoints[0]
    assert float(checkpoint_scores(torch.tensor([[2.0]]), checkpoint, 1.0)) == pytest.approx(6 / 18)
    assert float(checkpoint_scores(torch.tensor([[2.0]]), checkpoint, None)) == pytest.approx(6)


def test_one_sample_has_a_score_and_no_spread_to_be_measured_in(tmp_path: Path) -> None:
    store = store_of(tmp_path, torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    scores, _ = chosen_scores(torch.ones(2, 1, 2), store.checkpoints, Fixed(1.0))
    joined = ensemble(scores)
    assert joined.shape == (1, 1)
    assert bool(torch.isfinite(joined).all())


@pytest.mark.parametrize("rule", [Fixed(1.0), Agreement((0.1, 1.0, 10.0, None))])
@pytest.mark.parametrize("shape", [(11, 4), (4, 11)])
def test_another_order_of_samples_gives_each_its_own_score(
    tmp_path: Path, shape: tuple[int, int], rule: DampingRule
) -> None:
    first, second, queries = drawn(*shape), drawn(*shape, 1), drawn(2, shape[1], 2).expand(2, 2, -1)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    plain = store_of(tmp_path / "plain", first, second).checkpoints
    moved = store_of(tmp_path / "moved", first[order], second[order]).checkpoints
    ours, theirs = chosen_scores(queries, plain, rule), chosen_scores(queries, moved, rule)
    assert ours[1] == theirs[1]
    torch.testing.assert_close(ours[0][..., order], theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_samples_have_equal_scores(tmp_path: Path, dtype: str) -> None:
    phi = drawn(6, 4)
    phi[5] = phi[1]
    scores = checkpoint_scores(
        drawn(3, 4, 1), store_of(tmp_path, phi, dtype=dtype).checkpoints[0], 0.1
    )
    torch.testing.assert_close(scores[:, 5], scores[:, 1], rtol=1e-6, atol=1e-12)


def test_the_number_of_threads_changes_nothing_but_rounding(tmp_path: Path) -> None:
    phi, queries = drawn(200, 64), drawn(3, 64, 1)
    checkpoint = store_of(tmp_path, phi).checkpoints[0]
    several = checkpoint_scores(queries, checkpoint, 0.3)
    present = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.testing.assert_close(
            several, checkpoint_scores(queries, checkpoint, 0.3), rtol=1e-9, atol=1e-12
        )
    finally:
        torch.set_num_threads(present)


def test_a_checkpoint_whose_scores_are_all_equal_is_no_division_by_zero(tmp_path: Path) -> None:
    equal = torch.ones(5, 3)
    store = store_of(tmp_path, equal, drawn(5, 3))
    scores, dampings = chosen_scores(
        torch.ones(2, 1, 3), store.checkpoints, Agreement((0.1, 1.0, None))
    )
    assert bool(torch.isfinite(ensemble(scores)).all())
    assert len(dampings) == 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("damping", [0.1, 1.0, None])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_a_checkpoint_whose_scores_are_equal_up_to_rounding_does_not_rank(
    tmp_path: Path, shape: tuple[int, int], damping: float | None, scale: float
) -> None:
    """One and the same gradient of all samples, as of a model that has learnt nothing, whose
    products differ in their last digits."""
    equal = scale * drawn(1, shape[1], 5).repeat(shape[0], 1)
    store = store_of(tmp_path, equal, drawn(*shape))
    queries = drawn(2, shape[1], 7).unsqueeze(1)
    scores, _ = chosen_scores(queries, store.checkpoints, Fixed(damping))
    alone = standardised(scores[1:])[0, 0]
    joined = ensemble(scores)[0]
    offset = (2 * joined - alone).mean()
    # Divided by the deviation, which is rounding, it would be some ten thousand.
    assert abs(float(offset)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(2 * joined - offset, alone, rtol=0, atol=1e-3)
    found = top_scores(queries, store.checkpoints, shape[0], Fixed(damping))
    assert (
        found.positions[0].tolist() == torch.argsort(joined, descending=True, stable=True).tolist()
    )
    torch.testing.assert_close(
        found.scores[0].double(), joined[found.positions[0]], rtol=1e-3, atol=1e-3
    )


def test_scores_that_are_all_equal_up_to_rounding_share_out_nothing(tmp_path: Path) -> None:
    equal = drawn(1, 12, 5).repeat(30, 1)
    scores, _ = chosen_scores(
        drawn(2, 12, 7).unsqueeze(1), store_of(tmp_path, equal, equal).checkpoints, Fixed(1.0)
    )
    joined = ensemble(scores)[0]
    assert float(joined.abs().max()) < 1 + 1e-3
    assert float(soft_thresholded(joined, 0.0).abs().max()) < 1e-3
    assert float(soft_thresholded(joined, 2.0).abs().max()) == 0
    moments = Moments()
    moments.add(scores.movedim(0, -2))
    assert float(moments.agreement().abs().max()) == 0


def test_scores_are_measured_in_their_deviation_unless_it_is_rounding() -> None:
    noise = drawn(1, 1000).double()
    for mean, spread in ((0.0, 1e-12), (5.0, 5e-3), (-1e6, 1e4)):
        scores = mean + spread * noise
        assert float(spreads(scores)) == pytest.approx(float(scores.std(correction=0)))
        moments = Moments()
        moments.add(scores.unsqueeze(-2))
        assert float(units(moments.deviation(), moments.mean())) == pytest.approx(
            float(spreads(scores))
        )
    assert float(spreads(5 + 5e-6 * noise)) == pytest.approx(5, rel=1e-4)
    assert float(spreads(0 * noise)) == 1
    # One sample that is a million times the others is no rounding of theirs.
    one = torch.zeros(10**6, dtype=torch.float64)
    one[3] = 1e6
    assert float(spreads(one)) == pytest.approx(1e3, rel=1e-3)


@pytest.mark.parametrize("dataset", [{}, {"latent_shape": None}, {"latent_shape": ["x"]}])
def test_a_manifest_without_the_shape_of_latents_is_damaged(
    tmp_path: Path, dataset: dict[str, Any]
) -> None:
    store = store_of(tmp_path, drawn(2, 3))
    object.__setattr__(store.header, "dataset", dataset)
    with pytest.raises(CorruptStoreError, match="describes no shape of latents.*HINT"):
        latent_shape(store)
