"""Other people's text does nothing: on a terminal, in a spreadsheet, as a second column of our own
name."""

import csv
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrak_lightning import Attribution, Concept
from ctrak_lightning.attribution.attributions import Attributions
from ctrak_lightning.capture.trace import warn_if_faint
from ctrak_lightning.cli import main
from ctrak_lightning.cli.printing import say
from ctrak_lightning.errors import csv_cell, metadata_heads, visible
from ctrak_lightning.store import SampleTable

from .store.store_builder import Capture

EVIL = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@x",
    "\t=1",
    "\r=1",
    "\n=1",
    "\x1b]0;x\x07",
    "\x9b2J",
    "\uff1d1+1",
    "'=1",
]
PLAIN = ["ok", "a=1", "ünï 猫", " padded", "10 %", ""]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_cell_is_no_formula_and_can_be_read_back(text: str) -> None:
    cell = csv_cell(text)
    assert cell[:1] not in set("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20") | {
        chr(code) for code in range(32)
    }
    assert cell.removeprefix("'") == text


@pytest.mark.parametrize("text", EVIL)
def test_what_a_spreadsheet_would_compute_is_escaped(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", PLAIN)
def test_other_cells_stay(text: str) -> None:
    assert csv_cell(text) == text


@given(st.text())
def test_what_is_shown_is_printable_and_on_one_line(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(text) == text or not text.isprintable()


@given(
    st.lists(
        st.sampled_from(["score", "metadata.score", "metadata.metadata.score", "owner"]),
        unique=True,
    )
)
def test_no_two_columns_have_one_name(columns: list[str]) -> None:
    heads = ["rank", "score", *metadata_heads(columns, ["rank", "score"])]
    assert len({head.lower() for head in heads}) == len(heads)


def answer(name: str = "x", **metadata: list[str]) -> Attribution:
    ids = ["=1+1", "-2", 'a,"b"', "c\nd", "plain"]
    return Attribution(
        concept=Concept(name, present={"a": "1"}, absent={}),
        seed=0,
        checkpoint_scores=torch.tensor([[1.0, -3.0, 2.0, 0.5, -0.5]]),
        steps=[1],
        samples=SampleTable(ids, [""] * 5, metadata),
        method={"name": "m"},
        strength=1.0,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert len(set(head)) == len(head)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_rankings_are_written_without_formulas_and_read_back(tmp_path: Path) -> None:
    owners = ["=HYPERLINK(1)", "anna", "'bo", "@c", "\t"]
    result = answer(owner=owners, score=["9"] * 5, rank=["=0"] * 5, **{"=column": [""] * 5})
    result.to_csv(tmp_path / "one.csv")
    rows = rows_of(tmp_path / "one.csv")
    heads = ["verdict", "rank", "score", "sample_id", "exposures", "remark"]
    heads += ["'=column", "owner", "metadata.rank", "metadata.score"]
    assert list(rows[0]) == heads
    for row, record in zip(rows, result.top(5), strict=True):
        assert (int(row["rank"]), float(row["score"])) == (record.rank, record.score)
        assert row["sample_id"].removeprefix("'") == record.sample_id
        assert row["owner"].removeprefix("'") == record.metadata["owner"]
        assert (row["metadata.rank"], row["metadata.score"]) == ("'=0", "9")
    assert [row["sample_id"] for row in rows][-1] == "'-2"
    assert [row["score"][0] for row in rows][-1] == "-"  # a number stays a number


def test_several_rankings_side_by_side_are_written_so_too(tmp_path: Path) -> None:
    columns = {"owner": ["=x"] * 5, "sample_id": ["+"] * 5, "score owl": ["9"] * 5}
    results = Attributions([answer("owl", **columns), answer("cat", **columns)], torch.eye(2))
    results.to_csv(tmp_path / "two.csv")
    [first, second, *_] = rows_of(tmp_path / "two.csv")
    assert (first["sample_id"], first["owner"], first["metadata.sample_id"]) == (
        "'=1+1",
        "'=x",
        "'+",
    )
    assert (first["metadata.score owl"], float(first["score owl"])) == (
        "9",
        float(results[0].scores[0]),
    )
    assert second["sample_id"] == "'-2"
    assert "c\\nd" in results.table()


def test_no_two_rankings_have_one_name() -> None:
    names = Attributions(
        [answer(name) for name in ("owl", "owl", "owl (1)", "cat")], torch.eye(4)
    ).names
    assert names == ["owl (1) (1)", "owl (2)", "owl (1) (3)", "cat"]


def test_a_warning_shows_a_name_and_does_not_obey_it() -> None:
    with pytest.warns(UserWarning, match=r"owl\\x1b\[2J \(0"):
        warn_if_faint(torch.zeros(1), ["owl\x1b[2J"])


def test_commands_print_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say("cat\x1b[2J", "verified\r\x9b31m\u202e")
    assert capsys.readouterr().out == "cat\\x1b[2J\nverified\\r\\x9b31m\\u202e\n"
    path = Capture(steps=(300,)).run(tmp_path / "store")
    (path / "\x1b[2Jverified").write_text("")
    with pytest.raises(SystemExit):
        main(["verify", str(path)])
    out = capsys.readouterr().out
    assert "\\x1b[2Jverified: not recorded" in out
    assert "\x1b" not in out
    with pytest.raises(SystemExit, match=r"ctrak verify: .*x\\x1b\\r"):
        main(["verify", str(tmp_path / "x\x1b\r")])
