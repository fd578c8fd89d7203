"""The arithmetic of large runs, and that the page says what the script printed."""

from pathlib import Path

import pytest

from recipes.benchmarks import plan

ROOT = Path(__file__).parent.parent.parent
MEASURED = plan.Constants(
    steps_per_state={"net: all": 0.9},
    seal_s_per_product=1e-10,
    read_gb_s=2.0,
    table_bytes=300.0,
    table_memory=500.0,
)


def test_costs_by_hand() -> None:
    asked = plan.Plan(images=1_000_000, processes=4, dim=972, checkpoints=3, states=5)
    cost = asked.cost(MEASURED)
    assert cost["rows_gb"] == pytest.approx(3.0)  # 10^6 x 3 x (972 + 28) bytes
    assert cost["table_gb"] == pytest.approx(0.3)
    assert cost["table_memory_gb"] == pytest.approx(0.5)
    assert cost["seal_h"] * 3600 == pytest.approx(1e-10 * 1e6 * 972**2 * 3 / 4)
    assert cost["search_h"] * 3600 == pytest.approx(3.0 / 2.0 / 4)
    assert cost["shards"] == 3 * 64
    assert cost["manifest_written_gb"] == pytest.approx(192 * 192 * 215 / 2 / 1e9)


def test_the_page_quotes_the_committed_results() -> None:
    results = (ROOT / "recipes" / "benchmarks" / "results" / "plan.md").read_text("utf-8")
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    tables = [line for line in results.splitlines() if line.startswith("|")]
    assert len(tables) > 20
    assert [line for line in tables if line not in page] == []


def test_constants_are_read_off_the_committed_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "sample_table_bytes", lambda rows: (295.97696, 582.61504))
    results = ROOT / "recipes" / "benchmarks" / "results"
    measured = plan.constants(results)
    assert len(measured.steps_per_state) == 8
    plans = [
        plan.Plan(images=images, processes=processes, dim=2048, checkpoints=3, states=5)
        for images in plan.IMAGES
        for processes in plan.PROCESSES
    ]
    committed = (results / "plan.md").read_text("utf-8")
    assert plan.page(committed.splitlines()[0], measured, plans) == committed


@pytest.mark.parametrize(
    ("gb", "hours", "shown"),
    [
        (1500, 72, ("1.5 TB", "3 days")),
        (2, 2, ("2.0 GB", "2.0 h")),
        (1e-5, 1 / 3600, ("10 KB", "1.0 s")),
    ],
)
def test_units(gb: float, hours: float, shown: tuple[str, str]) -> None:
    assert (plan._bytes(gb), plan._time(hours)) == shown
