"""Which owners get a curve."""

import pytest

from ctrak_lightning.attribution import Share
from ctrak_lightning.panels.tables import ShareCurves


def shares(values: dict[str, float]) -> list[Share]:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    return [Share(name, value, 0.0, 1.0, 1) for name, value in ordered]


def test_few_owners_are_all_shown() -> None:
    values = {f"o{i}": (i + 1) / 55 for i in range(10)}
    assert ShareCurves().values(shares(values)) == (
        dict(sorted(values.items(), key=lambda v: -v[1])),
        None,
    )


def test_of_many_the_largest_of_each_checkpoint_are_shown_and_stay() -> None:
    curves = ShareCurves()
    early = {f"o{i}": 0.01 for i in range(20)} | {f"noise{i}": 0.16 - i * 0.001 for i in range(5)}
    shown, others = curves.values(shares(early))
    assert list(shown) == [f"noise{i}" for i in range(5)]
    assert others == pytest.approx(1 - sum(shown.values()))
    later = dict.fromkeys(early, 0.001) | {f"o{i}": 0.1 for i in range(3)}
    shown, others = curves.values(shares(later))
    assert list(shown) == [f"noise{i}" for i in range(5)] + ["o0", "o1", "o2"] + ["o3", "o4"]
    assert shown["noise4"] == 0.001
    assert others == pytest.approx(1 - 0.3 - 0.007)
    for step in range(30):
        moving = dict.fromkeys(early, 0.001) | {f"o{(3 * step + i) % 20}": 0.1 for i in range(3)}
        shown, _ = curves.values(shares(moving))
        assert len(shown) == 10
