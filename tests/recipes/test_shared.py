"""What several recipes share: tables as they come in, folders for answers, and a loss curve that outlives a cut."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes.benchmarks.compare import answers_folder
from recipes.benchmarks.tables import RETRIEVAL, Table
from recipes.synthetic.recording import LossCurve


def test_a_table_takes_its_figures_at_the_honest_damping_and_averages_seeds(tmp_path: Path) -> None:
    def grid(honest: float, best: float) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "1.0": {"P@10": torch.tensor([honest, honest]), "mAP": torch.tensor([0.0, 1.0])},
            "None": {"P@10": torch.tensor([best, best]), "mAP": torch.tensor([0.0, 1.0])},
        }

    table = Table(["P@10"])
    table.add("trak", grid(0.2, 0.9), "1.0")
    table.add("trak", grid(0.4, 0.7), "1.0")
    text = table.write(tmp_path / "results" / "benchmark", {"seed": 0}, "Head.")
    assert text == (tmp_path / "results" / "benchmark.md").read_text()
    assert text.startswith("Head.\n")
    assert text.endswith("| method | P@10 |\n|---|---|\n| trak | 0.30 [0.30, 0.30] (0.80) |\n")
    facts = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert facts["seed"] == 0
    assert facts["rows"]["trak"]["P@10"]["per_seed"] == pytest.approx([0.2, 0.4])
    assert facts["rows"]["trak"]["mAP"]["mean"] == 0.5  # in the JSON, not in the Markdown


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


def test_a_loss_curve_goes_on_after_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.synthetic.recording.EVERY", 2)

    def watched(curve: LossCurve, losses: dict[int, float]) -> None:
        for step, loss in losses.items():
            trainer: Any = SimpleNamespace(global_step=step, max_steps=5)
            curve.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]

    first = LossCurve()
    watched(first, {1: 4.0, 2: 2.0})
    second = LossCurve()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    watched(second, {3: 2.0, 4: 1.0, 5: 1.0})
    assert second.means == [(2, 3.0), (4, 1.5), (5, 1.0)]
