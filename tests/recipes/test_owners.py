"""What the owners' table counts, on shares made by hand."""

import pytest

from ctrak_lightning.attribution.result import Share
from recipes.benchmarks.owners import figures
from recipes.emoji_artists.evaluate import Question


def shares_of(**each: tuple[float, float, float]) -> dict[str, Share]:
    return {
        name.replace("_", "-"): Share(name.replace("_", "-"), *bounds, 1)
        for name, bounds in each.items()
    }


def test_largest_share_and_coverage_are_counted_per_question_and_run() -> None:
    asked = [
        Question("owl", "twemoji", "artist"),
        Question("cat", "noto", "artist"),
    ]  # one new, one known
    first = [
        shares_of(twemoji=(0.6, 0.5, 0.7), noto=(0.4, 0.3, 0.5)),
        shares_of(twemoji=(0.8, 0.7, 0.9), noto=(0.2, 0.1, 0.3)),
    ]
    second = [
        shares_of(twemoji=(0.55, 0.52, 0.58), noto=(0.45, 0.42, 0.48)),
        shares_of(twemoji=(0.4, 0.3, 0.5), noto=(0.6, 0.5, 0.7)),
    ]
    found = figures([first, second], asked)
    assert found["true artist has the largest share"] == pytest.approx(3 / 4)
    assert found["of the two new artists"] == 1.0
    assert found["mean share of the true artist"] == pytest.approx((0.6 + 0.2 + 0.55 + 0.6) / 4)
    # Of the true artists: the first run's interval has the second's share of twemoji, no other is.
    assert found["coverage, true artist"] == pytest.approx(1 / 4)
    assert found["coverage, other artists"] == pytest.approx(1 / 4)
    assert found["width of its interval"] == pytest.approx((0.2 + 0.2 + 0.06 + 0.2) / 4)
