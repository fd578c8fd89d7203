"""The scale benchmark at a size that takes no time."""

from pathlib import Path

import pytest

from ctrak_lightning.store import TraceStore
from recipes.benchmarks import scale


@pytest.mark.parametrize(("rows", "dim"), [(300, 32), (20, 48)])
def test_it_measures_the_store_that_it_builds(tmp_path: Path, rows: int, dim: int) -> None:
    built = scale.build(tmp_path, rows, dim)
    (checkpoint,) = TraceStore(tmp_path).checkpoints
    assert (checkpoint.rows, checkpoint.features().shape[1]) == (rows, dim)
    found = scale.measure(tmp_path, 3)
    assert found["bytes"] >= rows * dim
    case = {"rows": rows, "dim": dim, "built": built, "measured": [found]}
    text = scale.page(scale.head_of("c", dropped=False), [case])
    assert text.startswith("`c` on ")
    assert f"| {rows} x {dim} | 3 |" in text
