"""What several benchmarks share: tables, pages, folders, and what a run says of itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.benchmarks.compare import answers_folder
from recipes.benchmarks.replay import evenly, finished, record
from recipes.benchmarks.tables import RETRIEVAL, Table, command_of, parser_of, publish


def test_a_table_takes_its_figures_at_the_honest_damping_and_averages_seeds() -> None:
    def grid(honest: float, best: float) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "1.0": {"P@10": torch.tensor([honest, honest]), "mAP": torch.tensor([0.0, 1.0])},
            "None": {"P@10": torch.tensor([best, best]), "mAP": torch.tensor([0.0, 1.0])},
        }

    table = Table(["P@10"])
    table.add("trak", grid(0.2, 0.9), "1.0")
    table.add("trak", grid(0.4, 0.7), "1.0")
    text = table.page("Head.")
    assert text.startswith("Head.\n")
    assert text.endswith("| method | P@10 |\n|---|---|\n| trak | 0.30 [0.30, 0.30] (0.80) |\n")
    assert table.rows()["trak"]["mAP"]["mean"] == 0.5  # known, but not shown


def test_a_page_has_one_section_for_each_command(tmp_path: Path) -> None:
    parser = parser_of("recipes.x", "What it does.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", nargs="+", default=None)
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    said = [["--runs", "elsewhere"], ["--seeds", "0", "1", "--rows", "a b", "c", "--inline"]]
    plain, full = (command_of(parser, parser.parse_args(each)) for each in said)
    assert plain == "python -m recipes.x"
    assert full == "python -m recipes.x --seeds 0 1 --rows 'a b' c --inline"
    path = tmp_path / "results" / "x.md"
    for text in (
        f"`{plain}`; one.\n\n| a |\n",
        f"`{full}`; two.\n",
        f"`{plain}`; three.\n\n| b |\n",
    ):
        publish(path, text)
    assert path.read_text() == f"`{plain}`; three.\n\n| b |\n\n`{full}`; two.\n"


def test_the_retrieval_metrics_of_the_tables_by_hand() -> None:
    scores = torch.arange(20.0).flip(0)
    relevant = torch.zeros(20, dtype=torch.bool)
    relevant[[0, 3, 19]] = True  # ranks 1, 4 and 20
    found = {name: float(metric(scores, relevant)) for name, metric in RETRIEVAL.items()}
    assert found["P@10"] == pytest.approx(0.2)
    assert found["R-precision"] == pytest.approx(1 / 3)
    assert found["mAP"] == pytest.approx((1 + 2 / 4 + 3 / 20) / 3)
    assert found["AUROC"] == pytest.approx((17 + 15 + 0) / 51)


def test_other_questions_and_other_samples_have_another_folder(tmp_path: Path) -> None:
    facts: list[Any] = [["a.jpg", "b.jpg"], [("Male", 0)]]
    first = answers_folder(tmp_path, *facts)
    assert first.parent == tmp_path
    assert answers_folder(tmp_path, *facts) == first
    assert answers_folder(tmp_path, ["a.jpg", "c.jpg"], facts[1]) != first
    assert answers_folder(tmp_path, facts[0], [("Male", 1)]) != first


def test_a_run_is_over_once_its_facts_are_written_and_is_of_its_arguments(tmp_path: Path) -> None:
    assert finished(tmp_path, {"seed": 0}) is None
    assert record(tmp_path, {"arguments": {"seed": 0}, "loss": 1.0}) == finished(
        tmp_path, {"seed": 0}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    with pytest.raises(
        ValueError, match=r"holds a run with \{'seed': 0\}.*HINT: name a new folder"
    ):
        finished(tmp_path, {"seed": 1})
    assert evenly(300, 3) == [100, 200, 300]
    assert evenly(8, 3) == [2, 5, 8]
