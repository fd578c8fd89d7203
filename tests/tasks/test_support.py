"""The table of what is supported is what the tests are made of."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.tasks import tiny
from tests.tasks.support import BEGIN, CHECKS, END, PAGE, PIPELINES, with_table


def run_by_tests() -> dict[str, set[str]]:
    """The pipelines that each check's tests run, read off the tests."""
    found: dict[str, list[set[str]]] = {check: [] for check in CHECKS}
    for path in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f"tests.tasks.{path.stem}")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            checks = [
                check
                for decorator in node.decorator_list
                for check in re.findall(r"pipelines_of\('([a-z ]+)'", ast.unparse(decorator))
            ]
            marks = getattr(getattr(module, node.name), "pytestmark", [])
            names = {
                values[0]
                for mark in marks
                if mark.name == "parametrize"
                for each in mark.args[1]
                if isinstance(values := getattr(each, "values", None), tuple)
                and values[0] in PIPELINES
            }
            for check in checks:
                found[check].append(names)
    return {check: set.union(*names) if names else set() for check, names in found.items()}


def test_the_page_shows_the_table_of_the_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "python -m tests.tasks.support"
    with pytest.raises(ValueError, match="markers"):
        with_table("# without")


def test_every_pipeline_that_can_be_built_has_a_row() -> None:
    assert set(PIPELINES) == set(tiny.PIPELINES)
    for check in CHECKS.values():
        assert set(check.slow) <= set(check.pipelines) <= set(PIPELINES)


def test_the_page_says_yes_where_a_test_runs_the_pipeline_and_nowhere_else() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    titles = {check.title: name for name, check in CHECKS.items()}
    pipelines = {title: name for name, title in PIPELINES.items()}
    run = run_by_tests()
    assert [row[0] for row in rows] == list(pipelines)
    for title, *cells in rows:
        for head, cell in zip(heads[1:], cells, strict=True):
            assert cell in ("yes", "-")
            assert (cell == "yes") == (pipelines[title] in run[titles[head]]), (title, head)
