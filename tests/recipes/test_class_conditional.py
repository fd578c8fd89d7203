"""The class-conditional recipe's evaluation: who is misnamed, and what is counted."""

import json
from pathlib import Path

import pytest
import torch

from recipes import emoji_folder
from recipes.benchmarks.class_labels import figures, misname
from recipes.benchmarks.tables import RESULTS
from recipes.images import FILE


def test_a_share_of_the_images_is_told_to_be_anothers(tmp_path: Path) -> None:
    emoji_folder.write(tmp_path, objects=10)
    before = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    misname(tmp_path, 0.2, seed=0)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "told"} for line in lines] == before
    assert sum(line["told"] != line["artist"] for line in lines) == 14  # a fifth of 70
    assert {line["told"] for line in lines} <= {line["artist"] for line in lines}


def test_the_figures_by_hand() -> None:
    told = ["a", "a", "a", "b", "b"]
    drawn = ["a", "a", "b", "b", "a"]
    # For a, from the best: 0, 4, 2, 1, 3. Told a are 0, 1, 2; drawn by a are 0, 1, 4.
    scores = torch.tensor([5.0, 2.0, 3.0, 1.0, 4.0])
    # Told b are 3 and 4; drawn by b are 2 and 3. A name counts once, however often it is asked for.
    found = figures([scores, scores, scores], ["a", "b", "b"], told, drawn)
    assert found["told"]["mean"] == pytest.approx(
        (2 / 3 + 1 / 2) / 2, abs=1e-4
    )  # 0, 2 of the best three; 4 of two
    assert found["drawn"]["mean"] == pytest.approx(
        (2 / 3 + 0) / 2, abs=1e-4
    )  # 0 and 4 of the best three
    # Of 0, 1, 2, told a: 0 is above 2, which is not a's, and 1 below it. Of 3, 4, told b: 4 is not
    # b's and stands higher.
    of_told = found["drawn, of those told"]
    assert of_told == {"mean": (0.5 + 0.0) / 2, "low": 0.0, "high": 0.5}


def test_the_readme_gives_the_committed_figures() -> None:
    page = (RESULTS / "class_labels.md").read_text()
    readme = (Path(__file__).parents[2] / "recipes" / "class_conditional" / "README.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "[" in line]
    assert len(rows) == 4
    for row in rows:
        assert row.replace("concept_trak()", "`concept_trak()`") in readme
