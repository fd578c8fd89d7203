"""Inner products with stored rows against float64, for every dtype of a store and with and without
integer products."""

import numpy as np
import pytest
import torch

from ctrak_lightning.attribution import scoring as dots
from ctrak_lightning.attribution.scoring import Dots, has_integer_products
from ctrak_lightning.store.formats import stored_unit
from ctrak_lightning.store.shards import Rows


def rows_of(features: torch.Tensor, dtype: str) -> Rows:
    wide = features.double()
    norm = wide.norm(dim=1).float()
    unit, scale = stored_unit(wide / norm.double()[:, None], dtype)
    n = len(features)
    return Rows(index=torch.arange(n), unit=unit, scale=scale, norm=norm, loss=torch.zeros(n))


def random(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("n", "k", "c"), [(300, 257, 5), (1, 1, 1), (130, 64, 33)])
def test_products_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: str, n: int, k: int, c: int, integers: bool
) -> None:
    if not integers:
        monkeypatch.setattr(dots, "has_integer_products", lambda: False)
    rows = rows_of(random(n, k, 0) * torch.logspace(-15, 15, n)[:, None], dtype)
    directions = random(c, k, 1).double() * torch.logspace(-60, 60, c, dtype=torch.float64)[:, None]
    directions[0, 0] *= 50  # a large entry must not cost the others their digits
    found = Dots(directions)(rows)
    stored = rows.unit.double() * (rows.scale.double() * rows.norm.double())[:, None]
    expected = directions @ stored.T
    bound = directions.norm(dim=1)[:, None] * stored.norm(dim=1)
    assert (found - expected).abs().div(bound).max() < 1e-6
    assert found.dtype == torch.float64
    assert found.shape == (c, n)


def test_a_product_computed_by_hand() -> None:
    rows = rows_of(torch.tensor([[3.0, 4.0]]), "float32")
    np.testing.assert_allclose(
        Dots(torch.tensor([[1.0, 0.5], [0.0, -2.0]]))(rows), [[5], [-8]], rtol=1e-6
    )


def test_directions_of_zero_give_zero() -> None:
    for dtype in ("float32", "int8"):
        assert Dots(torch.zeros(2, 8))(rows_of(random(3, 8, 0), dtype)).abs().max() == 0


@pytest.mark.skipif(not has_integer_products(), reason="needs a processor with VNNI")
def test_equal_rows_score_the_same_to_the_bit_wherever_they_stand() -> None:
    features = random(301, 999, 0)
    features[[7, 130, 300]] = features[0].clone()
    found = Dots(random(6, 999, 1))(rows_of(features, "int8"))
    for i in (7, 130, 300):
        assert torch.equal(found[:, i], found[:, 0])


@pytest.mark.skipif(not has_integer_products(), reason="needs a processor with VNNI")
def test_sums_at_the_ends_of_the_range_do_not_saturate() -> None:
    ones = torch.ones(2, 100_000)
    ones[1] *= -1
    rows = rows_of(ones, "int8")
    expected = 100_000 * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(Dots(torch.ones(1, 100_000))(rows), expected, rtol=1e-6, atol=0)
    assert Dots(torch.ones(1, 200_000))._digits is None, "int32 would overflow"
