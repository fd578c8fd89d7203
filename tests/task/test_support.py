"""README's table of what is supported is the one that the tests are parametrised by."""

import re
from pathlib import Path

import pytest

from tests.task import tiny
from tests.task.support import CHECKS, PIPELINES, README, pipelines_of, table, with_table


def test_readme_shows_the_table_of_the_tests() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "python -m tests.task.support"
    with pytest.raises(ValueError, match="markers"):
        with_table("# without")


def test_every_pipeline_has_a_row_and_every_check_a_test() -> None:
    assert list(PIPELINES) == sorted(PIPELINES, key=list(PIPELINES).index)
    assert set(PIPELINES) == set(tiny.PIPELINES)
    for check in CHECKS.values():
        assert set(check.slow) <= set(check.pipelines) <= set(PIPELINES)
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    used = set(re.findall(r'pipelines_of\("([a-z ]+)"', sources))
    assert used == set(CHECKS)


def test_a_cell_is_yes_where_there_is_a_parameter() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table().splitlines()[2:]]
    assert len(rows) == len(PIPELINES)
    for (name, title), row in zip(PIPELINES.items(), rows, strict=True):
        assert row[0] == title
        for check, cell in zip(CHECKS, row[1:], strict=True):
            assert (cell == "yes") == (name in [parameter.values[0] for parameter in pipelines_of(check)])
