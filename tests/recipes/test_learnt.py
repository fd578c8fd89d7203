"""The table of which signal tells a learnt concept from another."""

from pathlib import Path
from typing import Any

import pytest

from recipes.benchmarks import learnt
from recipes.benchmarks.tables import RESULTS

SOUND = {
    **dict.fromkeys(learnt.SIGNALS, 0.5),
    **{"strength": 0.1, "self_check": 1.0, "stability": 0.9, "loss": 0.05, "moved": 0.1},
    **{"neighbours": 0.8, "neighbours_of_training": 0.6},
    **{"steps": 3, "worth": 0.05, "worth_z": 5.0, "r_precision": 1.0},
}


def run_of(*rows: dict[str, Any]) -> dict[str, Any]:
    facts = {"subject": "s", "seed": 0, "steps": 3, "machine": "m", "packages": {"torch": "1"}}
    return {**facts, "rows": [SOUND | row for row in rows]}


def test_what_is_learnt_and_what_is_doubted_are_counted() -> None:
    still = {"worth": 0.0, "moved": 0.0}
    missed = {"worth": 0.05, "worth_z": 1.9}  # not sure enough
    noise = {"neighbours": 0.2, "worth": 0.0}
    trained = run_of({}, {"strength": 1e-5}, still, still, missed, noise)
    untrained = run_of({"moved": 0.0}) | {"steps": 0, "seed": 1}
    untrained["rows"] = [row | {"steps": 0} for row in untrained["rows"]]
    text = learnt.page([trained, untrained], "`command`")
    assert "| s, seed 0 | 3 | 2 of 6 | 3 of 4 | 1 of 2 |" in text
    assert (
        "| losses moved by < 0.001 | 0 of 0 | 2 of 4 | 0 of 2 | 1 of 1 | 0 of 0 | 0 of 0 |" in text
    )
    assert "| the image is noise | 0 of 0 | 1 of 4 | 0 of 2 | 0 of 1 |" in text
    assert "| any | 0 of 0 | 3 of 4 | 1 of 2 | 1 of 1 |" in text
    assert learnt.learnt(SOUND | {"worth_z": None})
    assert not learnt.learnt(SOUND | {"steps": 0})


def test_a_signal_that_separates_has_an_area_of_one() -> None:
    rows = run_of({"gain": 0.9}, {"gain": 0.8}, {"gain": 0.1, "worth": -0.1})["rows"]
    assert learnt.separations(rows)["gain"] == pytest.approx(1)
    assert learnt.separations(rows)["strength"] == pytest.approx(0.5)


def test_the_report_quotes_the_committed_table() -> None:
    table = (RESULTS / "learnt.md").read_text("utf-8")
    docs = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
    assert "recipes/benchmarks/results/learnt.md" in docs
    for count in ("44 of 44", "0 of 63", "0 of 97", "0 of 66", "0 of 94"):
        assert f"| {count} " in table
        assert count in docs
