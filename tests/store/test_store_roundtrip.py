"""What is appended comes back, in the order of the sample table, whatever its scale, batch size and
order."""

import copy
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import Capture, make_header, make_table, make_traces, read_bytes

from ctrak_lightning.errors import CorruptStoreError, StoreError
from ctrak_lightning.store import TraceStore, TraceWriter
from ctrak_lightning.store.kernel import gram_of_rows, kernel_of_columns

FILES = ("kernel.h5", "rank0-00000.h5", "rank0-00001.h5", "rank0-00002.h5", "weights.safetensors")
TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "int8": 1e-2}
"""Of a row's norm; int8 is off by half a step, 1/254 of the largest entry, in every one of k
entries."""


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("k", [6, 16])
def test_features_losses_norms_weights_and_kernel(tmp_path: Path, dtype: str, k: int) -> None:
    capture = Capture(k=k, changes={"dtype": dtype})
    store = TraceStore(capture.run(tmp_path))
    assert (len(store), store.run_id, store.header) == (10, "run", capture.header())
    assert [(c.step, c.epoch, c.learning_rate, c.rows) for c in store.checkpoints] == [
        (300, 3, 0.1, 10),
        (600, 6, 0.1, 10),
    ]
    for checkpoint in store.checkpoints:
        features, loss = (values.double().numpy() for values in capture.traces(checkpoint.step))
        norms = np.linalg.norm(features, axis=1)
        assert norms.max() > 10 * 65504, "the traces must not fit float16 without their norm"
        found = checkpoint.features().double().numpy()
        assert np.all(np.linalg.norm(found - features, axis=1) <= TOLERANCE[dtype] * norms)
        if dtype == "float32":
            np.testing.assert_allclose(found, features, rtol=1e-6)
        np.testing.assert_allclose(checkpoint.norms().numpy(), norms, rtol=1e-6)
        np.testing.assert_array_equal(checkpoint.losses().numpy(), loss.astype(np.float32))

        kernel = checkpoint.kernel()
        expected = found.T @ found if k <= 10 else found @ found.T
        assert (kernel.side, kernel.n, kernel.k) == ("primal" if k <= 10 else "dual", 10, k)
        np.testing.assert_allclose(
            kernel.gram().numpy(), expected, rtol=1e-6, atol=1e-6 * expected.max()
        )
        np.testing.assert_allclose(
            kernel.mean.numpy(), found.mean(0), rtol=1e-9, atol=1e-12 * np.abs(found).max()
        )
        values = np.linalg.eigvalsh(expected)
        np.testing.assert_allclose(
            kernel.eigenvalues.numpy(), values, rtol=1e-9, atol=1e-12 * values[-1]
        )
        assert kernel.trace == pytest.approx(float((found**2).sum()), rel=1e-12)

        weights = checkpoint.weights()
        assert weights["a"].dtype == torch.bfloat16
        assert torch.equal(weights["b"], torch.full((3,), float(checkpoint.step)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_stored_with_unit_norm_whatever_their_scale(tmp_path: Path, dtype: str) -> None:
    scale = torch.tensor([1e-30, 1e-6, 1.0, 1e5, 1e9, 1e18])
    features = (1 + torch.rand(6, 32, generator=torch.Generator().manual_seed(0))) * scale[:, None]
    writer = TraceWriter(tmp_path, make_header(dim=32, dtype=dtype))
    writer.write_samples(make_table(6))
    with writer.begin_checkpoint(1, epoch=0) as checkpoint:
        checkpoint.append(torch.arange(6), features, torch.zeros(6))
        checkpoint.seal()
    with h5py.File(tmp_path / "checkpoint-00000001" / "rank0-00000.h5") as file:
        stored = file["features"]
        assert (stored.dtype, stored.chunks, stored.compression) == (np.dtype(dtype), None, None)
        assert file["norm"].fletcher32
        np.testing.assert_allclose(
            np.linalg.norm(stored[:].astype(float), axis=1), 1, rtol=TOLERANCE[dtype]
        )
    found = TraceStore(tmp_path).checkpoints[0].features()
    np.testing.assert_allclose(
        found.double().numpy(), features.double().numpy(), rtol=TOLERANCE[dtype]
    )


@settings(max_examples=12)
@given(batch=st.integers(1, 11), shard_rows=st.integers(1, 11), seed=st.integers(0, 99))
def test_batch_size_shard_size_and_order_change_no_feature(
    tmp_path_factory: pytest.TempPathFactory, batch: int, shard_rows: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("store")
    features, loss = make_traces(10, 6)
    writer = TraceWriter(path, make_header(), shard_rows=shard_rows)
    writer.write_samples(make_table())
    with writer.begin_checkpoint(7, epoch=0) as checkpoint:
        for rows in torch.randperm(10, generator=torch.Generator().manual_seed(seed)).split(batch):
            checkpoint.append(rows, features[rows], loss[rows])
        checkpoint.seal()
    stored = TraceStore(path).checkpoints[0]
    torch.testing.assert_close(stored.features(), features, rtol=1e-6, atol=0)
    assert torch.equal(stored.losses(), loss)
    assert [len(index) for index, _ in stored.shards()] == [
        min(shard_rows, 10 - start) for start in range(0, 10, shard_rows)
    ]
    for index, values in stored.shards():
        torch.testing.assert_close(values, features[index], rtol=1e-6, atol=0)


def test_equal_captures_give_equal_bytes_and_batches_do_not_matter(
    tmp_path: Path, capture: Capture
) -> None:
    first = read_bytes(capture.run(tmp_path / "a", batch=1))
    assert first == read_bytes(capture.run(tmp_path / "b", batch=10))
    assert sorted(first) == [
        *(f"checkpoint-00000300/{name}" for name in FILES),
        *(f"checkpoint-00000600/{name}" for name in FILES),
        "manifest.json",
        "samples.h5",
    ]
    assert TraceStore(tmp_path / "a").verify() == []


def test_caller_may_reuse_its_tensors(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, make_header())
    writer.write_samples(make_table())
    features, loss = make_traces(10, 6)
    given, given_loss, index = features.clone(), loss.clone(), torch.arange(10)
    checkpoint = writer.begin_checkpoint(1, epoch=0)
    checkpoint.append(index, given, given_loss)
    for tensor in (given, given_loss, index):
        tensor.zero_()
    checkpoint.seal()
    stored = TraceStore(tmp_path).checkpoints[0]
    torch.testing.assert_close(stored.features(), features, rtol=1e-6, atol=0)
    assert torch.equal(stored.losses(), loss)


def test_weights_that_share_memory_are_stored_and_absent_ones_are_an_error(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, make_header())
    writer.write_samples(make_table())
    features, loss = make_traces(10, 6)
    tied = torch.nn.Parameter(torch.rand(3, 4))
    for step, weights in ((1, {"head": tied, "embedding": tied.T}), (2, None)):
        with writer.begin_checkpoint(step, epoch=0, weights=weights) as checkpoint:
            checkpoint.append(torch.arange(10), features, loss)
            checkpoint.seal()
    first, second = TraceStore(tmp_path).checkpoints
    assert torch.equal(first.weights()["embedding"], tied.detach().T)
    assert (first.has_weights, second.has_weights) == (True, False)
    with pytest.raises(StoreError, match="step instead") as caught:
        second.weights()
    assert not isinstance(caught.value, CorruptStoreError)


def test_a_store_holds_no_handles(tmp_path: Path, capture: Capture) -> None:
    store = TraceStore(capture.run(tmp_path))
    next(store.checkpoints[0].shards())
    assert len(store.samples) == store.checkpoints[0].kernel().n
    twin = copy.deepcopy(store)
    assert torch.equal(twin.checkpoints[1].features(), store.checkpoints[1].features())


@pytest.mark.parametrize(("n", "k"), [(7, 3), (3, 7), (5, 5), (1300, 1100), (4, 1300)])
@pytest.mark.parametrize("block", [1, 2, 7, 1250])
def test_kernel_matches_numpy_for_any_blocks(n: int, k: int, block: int) -> None:
    if n * k > 10**4 and block < 7:
        pytest.skip("slow, and no other code runs")
    features = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    wide = features.double().numpy()
    if k <= n:
        kernel, expected = gram_of_rows(features.split(block), k).kernel(), wide.T @ wide
    else:
        kernel, expected = kernel_of_columns(features.split(block, 1), n, k), wide @ wide.T
    assert (kernel.side, kernel.n, kernel.k) == ("primal" if k <= n else "dual", n, k)
    assert kernel.eigenvectors.dtype == torch.float32
    np.testing.assert_allclose(
        kernel.gram().numpy(), expected, rtol=1e-6, atol=1e-6 * expected.max()
    )
    values = np.linalg.eigvalsh(expected)
    np.testing.assert_allclose(
        kernel.eigenvalues.numpy(), values, rtol=1e-9, atol=1e-12 * values[-1]
    )
    assert (np.diff(kernel.eigenvalues.numpy()) >= 0).all()
    np.testing.assert_allclose(kernel.mean.numpy(), wide.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0, 100.0])
def test_solves_are_as_good_as_float64_inverses_at_every_damping(damping: float) -> None:
    """Eigenvalues over twelve orders of magnitude: a Gram matrix rounded to float32 would lose all
    but seven."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 40, generator=generator) * torch.logspace(0, -6, 40)
    rows = features[:3] + torch.randn(3, 40, generator=generator) * torch.logspace(0, -6, 40)
    kernel = gram_of_rows([features], 40).kernel()
    wide = features.double().numpy()
    gram = wide.T @ wide
    inverse = np.linalg.inv(gram + damping * np.trace(gram) / 40 * np.eye(40))
    (found, plain) = kernel.solve(rows, (damping, None))
    scores, expected = found.numpy() @ wide.T, rows.double().numpy() @ inverse @ wide.T
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())
    assert torch.equal(plain, rows.double())


def test_score_moments_are_those_of_the_scores() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    directions = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    scores = (features.double() @ directions.double().T).numpy()
    mean, deviation = gram_of_rows(features.split(7), 6).kernel().score_moments(directions)
    np.testing.assert_allclose(mean.numpy(), scores.mean(0), rtol=1e-9)
    np.testing.assert_allclose(deviation.numpy(), scores.std(0), rtol=1e-6)


def test_gram_accumulates_in_float64() -> None:
    # In float32 the thousand small squares vanish beside the large one.
    features = torch.cat([torch.tensor([[1e4]]), torch.ones(1000, 1)])
    assert gram_of_rows([features], 1).kernel().trace == 1e8 + 1000
    assert kernel_of_columns([features.T], 1, 1001).trace == 1e8 + 1000


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_sums_refuse_other_features(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="gram_of_rows"):
        gram_of_rows([torch.ones(shape)], 4)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4,)])
def test_kernels_refuse_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="kernel_of_columns"):
        kernel_of_columns([torch.ones(shape)], 4, 4)
