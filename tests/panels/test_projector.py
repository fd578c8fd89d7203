"""Points of the Projector: the principal components, and who stands for which point."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from ctrak_lightning import TraceStore, TraceWriter
from ctrak_lightning.panels.drawing import one_line
from ctrak_lightning.panels.projector import embedding, principal_components
from ctrak_lightning.store import SampleTable, StoreHeader

from .answers import result_of, thumbnails


def store_of(
    path: Path, features: Tensor, table: SampleTable, dtype: str = "float32"
) -> TraceStore:
    n, k = features.shape
    facts = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": n}}
    writer = TraceWriter(path, StoreHeader(**facts, dim=k, dtype=dtype))  # type: ignore[arg-type]
    writer.write_samples(table)
    with writer.begin_checkpoint(5, epoch=0) as checkpoint:
        checkpoint.append(torch.arange(n), features, torch.zeros(n))
        checkpoint.seal()
    return TraceStore(path)


@pytest.mark.parametrize(("n", "k"), [(40, 90), (90, 40), (5, 3), (2, 2)])
def test_principal_components_are_scikit_learns(n: int, k: int) -> None:
    rows = torch.randn(n, k, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    points = principal_components(rows, 7)
    count = min(7, n, k)
    assert points.shape == (n, count)
    expected = PCA(count, svd_solver="full").fit_transform(rows.numpy())
    # The last component of as many points as dimensions is rounding.
    count -= count == n
    signs = np.sign((points.numpy() * expected).sum(0))[:count]
    np.testing.assert_allclose(points.numpy()[:, :count] * signs, expected[:, :count], atol=1e-9)
    largest = points.abs().argmax(0)[:count]
    assert (points[largest, torch.arange(count)] > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_points_are_of_unit_rows_and_rows_sprites_and_points_agree(
    tmp_path: Path, dtype: str
) -> None:
    n = 9
    features = (
        torch.randn(n, 30, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, n + 1)[:, None]
    )
    images = thumbnails(n, 12, 16)
    table = SampleTable(
        [f"id\t{i}\n" for i in range(n)],
        [""] * n,
        {"owner": ["ann\tbo"] * n, "caption": ["\r\x0b"] * n},
        images,
    )
    store = store_of(tmp_path, features, table, dtype)
    results = [result_of(torch.randn(n), name="owl\t"), result_of(torch.randn(n), name="猫")]
    found = embedding(store.checkpoints[0], store.samples, results)
    unit = features / features.norm(dim=1, keepdim=True)
    expected = PCA(n, svd_solver="full").fit_transform(unit.double().numpy())
    atol = 1e-6 if dtype == "float32" else 0.02
    distances = torch.cdist(found.points, found.points).numpy()
    np.testing.assert_allclose(
        distances, np.linalg.norm(expected[:, None] - expected[None], axis=-1), atol=2 * atol
    )
    assert found.header == ["sample id", "caption", "owner", "trace norm", "score owl", "score 猫"]
    for i, row in enumerate(found.rows):
        assert row[:3] == [f"id {i}", "", "ann bo"]
        assert float(row[3]) == pytest.approx(float(features[i].norm()), rel=1e-3)
        assert float(row[4]) == pytest.approx(float(results[0].scores[i]), abs=1e-4)
        assert float(row[5]) == pytest.approx(float(results[1].scores[i]), abs=1e-4)
    assert found.sprites is not None
    assert found.sprites.shape == (n, 16, 16, 3)
    assert torch.equal(found.sprites[:, 2:14], images)
    assert (found.sprites[:, :2] == 255).all()
    assert (found.sprites[:, 14:] == 255).all()


def test_of_many_samples_the_extremes_are_kept(tmp_path: Path) -> None:
    n = 500
    features = torch.randn(n, 70, generator=torch.Generator().manual_seed(0))
    table = SampleTable([str(i) for i in range(n)], [""] * n)
    store = store_of(tmp_path, features, table)
    results = [
        result_of(torch.randn(n, generator=torch.Generator().manual_seed(s))) for s in range(3)
    ]
    found = embedding(store.checkpoints[0], store.samples, results, points=120)
    assert found.points.shape == (120, 64)
    assert found.sprites is None
    shown = [int(row[0]) for row in found.rows]
    assert len(set(shown)) == 120
    for result in results:
        order = result.scores.argsort(descending=True).tolist()
        assert {*order[:20], *order[-20:]} <= set(shown)
    assert [
        row[0] for row in embedding(store.checkpoints[0], store.samples, results, points=120).rows
    ] == [row[0] for row in found.rows]


def test_nothing_ends_a_field() -> None:
    text = "".join(chr(i) for i in range(0x3000))
    assert not set(one_line(text)) & set("\t\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
