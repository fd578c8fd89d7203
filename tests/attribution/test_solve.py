"""Scores against a dense numpy reference that forms the inverse outright."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ctrak_lightning.attribution.scoring import (
    checkpoint_scores,
    ensemble,
    scores_by_damping,
    standardised,
)
from ctrak_lightning.methods.moments import Moments
from ctrak_lightning.store import SampleTable, StoreHeader, TraceStore, TraceWriter
from ctrak_lightning.store.kernel import gram_of_rows, kernel_of_columns


def store_of(path: Path, phi: torch.Tensor, shard_rows: int = 4) -> TraceStore:
    n, k = phi.shape
    facts = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": n}}
    writer = TraceWriter(path, StoreHeader(**facts, dim=k, dtype="float32"), shard_rows=shard_rows)  # type: ignore[arg-type]
    writer.write_samples(SampleTable([f"s{i}" for i in range(n)], [""] * n, {}))
    order = torch.randperm(
        n, generator=torch.Generator().manual_seed(3)
    )  # rows need not come in table order
    with writer.begin_checkpoint(1, epoch=0) as checkpoint:
        checkpoint.append(order, phi[order], torch.zeros(n))
        checkpoint.seal()
    return TraceStore(path)


@pytest.mark.parametrize(("n", "k"), [(12, 5), (5, 12), (8, 8), (1, 3), (6, 1)])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 30.0, None])
def test_scores_equal_the_dense_inverse(
    tmp_path: Path, n: int, k: int, damping: float | None
) -> None:
    generator = torch.Generator().manual_seed(n * 100 + k)
    phi = torch.randn(n, k, generator=generator) * torch.linspace(0.1, 50, n)[:, None]
    queries = torch.randn(3, k, generator=generator)
    found = checkpoint_scores(queries, store_of(tmp_path / "s", phi).checkpoints[0], damping)
    a, q = phi.double().numpy(), queries.double().numpy()
    if damping is None:
        expected = q @ a.T
    else:
        ridge = damping * np.trace(a.T @ a) / min(n, k)
        expected = q @ np.linalg.inv(a.T @ a + ridge * np.eye(k)) @ a.T
    # The store keeps the Gram matrix in float32.
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def test_primal_and_dual_agree(tmp_path: Path) -> None:
    """The same samples, once with columns of zeros to spare: n > k solves the primal form, n < k
    the dual."""
    generator = torch.Generator().manual_seed(0)
    phi, queries = torch.randn(9, 6, generator=generator), torch.randn(2, 6, generator=generator)
    primal = store_of(tmp_path / "primal", phi).checkpoints[0]
    dual = store_of(tmp_path / "dual", torch.cat([phi, torch.zeros(9, 14)], 1)).checkpoints[0]
    assert (primal.kernel().side, dual.kernel().side) == ("primal", "dual")
    # lambda is relative to tr(K) / min(n, k): 6 and 9 here, so the same lambda takes another ratio.
    a = checkpoint_scores(queries, primal, 1.0)
    b = checkpoint_scores(torch.cat([queries, torch.zeros(2, 14)], 1), dual, 9 / 6)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_strong_damping_tends_to_no_kernel(tmp_path: Path) -> None:
    phi, queries = torch.randn(7, 4), torch.randn(2, 4)
    checkpoint = store_of(tmp_path / "s", phi).checkpoints[0]
    strong = checkpoint_scores(queries, checkpoint, 1e9)
    none = checkpoint_scores(queries, checkpoint, None)
    torch.testing.assert_close(strong / strong.norm(), none / none.norm(), rtol=1e-5, atol=1e-8)


def test_a_duplicate_gets_its_twins_score(tmp_path: Path) -> None:
    phi = torch.randn(6, 4)
    phi[5] = phi[2]
    scores = checkpoint_scores(torch.randn(3, 4), store_of(tmp_path / "s", phi).checkpoints[0], 0.5)
    torch.testing.assert_close(scores[:, 5], scores[:, 2], rtol=1e-6, atol=1e-9)


def test_ensemble_weighs_checkpoints_alike() -> None:
    first = torch.tensor([3.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    second = torch.tensor([0.0, 1.0, 5.0, 2.0], dtype=torch.float64)
    expected = (first / first.numpy().std() + second / second.numpy().std()) / 2
    torch.testing.assert_close(ensemble(torch.stack([1000 * first, 1e-3 * second])), expected)
    assert torch.equal(standardised(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_many_dampings_in_one_pass_are_those_of_single_ones(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    checkpoint = store_of(tmp_path / "s", torch.randn(shape)).checkpoints[0]
    queries, dampings = torch.randn(3, shape[1]), (0.1, None, 7.0)
    found = scores_by_damping(queries, checkpoint, dampings)
    for row, damping in zip(found, dampings, strict=True):
        torch.testing.assert_close(
            row, checkpoint_scores(queries, checkpoint, damping), rtol=1e-6, atol=1e-6
        )


def test_agreement_is_the_mean_correlation_of_pairs_of_checkpoints() -> None:
    scores = (
        torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    )
    scores[:, 2] = (
        scores[:1, 2] * torch.tensor([[1.0], [2.0], [3.0], [4.0]]) - 7
    )  # the same up to scale and shift
    found = moments_of(scores).agreement()
    for q in range(3):
        r = np.corrcoef(scores[:, q].numpy())
        np.testing.assert_allclose(float(found[q]), r[np.triu_indices(4, 1)].mean(), atol=1e-12)
    assert float(found[2]) == pytest.approx(1)
    assert float(moments_of(torch.ones(2, 5)).agreement()) == 0


def moments_of(scores: torch.Tensor) -> Moments:
    """Of scores [M, ..., N]."""
    moments = Moments()
    moments.add(scores.movedim(0, -2))
    return moments


def test_a_damping_is_relative_to_the_mean_eigenvalue() -> None:
    """Of traces whose kernel can be worked out by hand."""
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    primal = gram_of_rows([rows], 2).kernel()  # eigenvalues 9 and 16
    assert primal.mean_eigenvalue == 12.5
    [solved] = primal.solve(torch.eye(2), [2.0])
    expected = torch.diag(torch.tensor([1 / (9 + 25), 1 / (16 + 25)], dtype=torch.float64))
    torch.testing.assert_close(solved, expected)
    # One of the three had been trained on: its kernel has one eigenvalue of its own, which is 9.
    alone = gram_of_rows([rows * torch.tensor([[1.0], [0.0], [0.0]])], 2).kernel()
    assert replace(alone, exposed=1).mean_eigenvalue == 9.0
    assert kernel_of_columns([torch.ones(2, 4)], 2, 4).mean_eigenvalue == 4.0  # eigenvalues 0, 8
