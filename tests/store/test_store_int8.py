"""int8 rows: how far they are from what was captured, and that scores hardly notice."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from store_builder import Capture, make_header, make_table, read_bytes

from ctrak_lightning.attribution.scoring import checkpoint_scores
from ctrak_lightning.store import TraceStore, TraceWriter
from ctrak_lightning.store.formats import stored_unit


def write(path: Path, features: torch.Tensor, dtype: str) -> TraceStore:
    n, k = features.shape
    writer = TraceWriter(path, make_header(dim=k, dtype=dtype), shard_rows=1024)
    writer.write_samples(make_table(n, thumbnails=None))
    with writer.begin_checkpoint(1, epoch=0) as checkpoint:
        checkpoint.append(torch.arange(n), features, torch.zeros(n))
        checkpoint.seal()
    return TraceStore(path)


def low_rank(n: int, k: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Rows as gradients are: a decaying spectrum, noise in every direction, and norms that differ
    by far."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.7
    rows = codes @ torch.randn(rank, k, generator=generator) + 0.5 * torch.randn(
        n, k, generator=generator
    )
    return rows * torch.randn(n, 1, generator=generator).exp()


def test_a_row_computed_by_hand(tmp_path: Path) -> None:
    """(3, -4, 0, 12) has norm 13 and largest entry 12: steps of 12/13/127; 3 is 31.75 of them and
    -4 is -42.33."""
    store = write(tmp_path, torch.tensor([[3.0, -4.0, 0.0, 12.0], [0.0, 0.0, -1e-6, 0.0]]), "int8")
    with h5py.File(tmp_path / "checkpoint-00000001" / "rank0-00000.h5") as file:
        assert file["features"].dtype == np.int8
        assert file["features"][:].tolist() == [[32, -42, 0, 127], [0, 0, -127, 0]]
        np.testing.assert_allclose(file["scale"][:], [12 / 13 / 127, 1 / 127], rtol=1e-7)
        np.testing.assert_allclose(file["norm"][:], [13, 1e-6], rtol=1e-7)
    expected = [[32 * 12 / 127, -42 * 12 / 127, 0, 12], [0, 0, -1e-6, 0]]
    np.testing.assert_allclose(store.checkpoints[0].features().numpy(), expected, rtol=1e-6)


def test_no_entry_is_off_by_more_than_half_a_step(tmp_path: Path) -> None:
    features = low_rank(300, 64, 8) * torch.logspace(-12, 9, 300)[:, None]
    checkpoint = write(tmp_path, features, "int8").checkpoints[0]
    step = features.abs().amax(1, keepdim=True) / 127
    error = (checkpoint.features() - features).abs() / step
    assert 0.49 < float(error.max()) < 0.5001
    torch.testing.assert_close(checkpoint.norms(), features.double().norm(dim=1).float())


def test_quantised_rows_reach_both_ends_and_no_further() -> None:
    unit, scale = stored_unit(
        torch.tensor([[1.0, -1.0, 0.5 / 127], [0.1, 0.3, -0.2]]).double(), "int8"
    )
    assert unit[0].tolist() == [127, -127, 0]
    assert unit.abs().amax(1).tolist() == [127, 127]
    assert scale.dtype == torch.float32


def test_a_sample_takes_one_byte_a_feature_and_28_more(tmp_path: Path) -> None:
    write(tmp_path, low_rank(1024, 512, 8), "int8")
    sizes = json.loads((tmp_path / "manifest.json").read_text())["files"]
    shards = sum(known["bytes"] for name, known in sizes.items() if "rank0" in name)
    assert shards / 1024 < 512 + 28 + 16


@pytest.mark.parametrize("batch", [1, 4, 10])
@pytest.mark.parametrize("stop", [0, 5, 8])
def test_interrupted_int8_captures_are_byte_identical(
    tmp_path: Path, stop: int, batch: int
) -> None:
    capture = Capture(changes={"dtype": "int8"})
    whole = read_bytes(capture.run(tmp_path / "whole"))
    writer = capture.open(tmp_path / "stopped")
    writer.write_samples(make_table())
    capture.run_checkpoint(writer, 300, batch, stop=stop)
    writer.close()
    assert read_bytes(capture.run(tmp_path / "stopped", batch)) == whole


@pytest.mark.parametrize(("n", "k"), [(1500, 256), (200, 256)])
@pytest.mark.parametrize("damping", [0.1, 10.0, None])
def test_scores_rank_as_those_of_float32_rows(
    tmp_path: Path, n: int, k: int, damping: float | None
) -> None:
    features, queries = low_rank(n + 4, k, 24).split([n, 4])
    exact, rounded = (
        checkpoint_scores(queries, write(tmp_path / dtype, features, dtype).checkpoints[0], damping)
        for dtype in ("float32", "int8")
    )
    correlations = [spearmanr(a, b).statistic for a, b in zip(exact, rounded, strict=True)]
    assert min(correlations) >= 0.99
    assert not torch.equal(exact, rounded)
