"""The speed benchmark's pieces of work do the same work."""

from dataclasses import replace

import pytest
import torch

from ctrak_lightning import GradientTracer, Projection
from recipes.benchmarks import speed


@pytest.fixture(scope="module")
def subject() -> speed.Subject:
    torch.manual_seed(0)
    return speed.lora()


def test_the_reference_pipeline_and_a_trace_have_the_same_inner_products(
    subject: speed.Subject,
) -> None:
    whole = speed.functional(subject)
    exact = GradientTracer(subject.denoiser, Projection(rank=10**6, dim=None))
    plain = replace(speed.POSTERIOR, normalisation="none")
    ours = speed.traced(subject, exact, plain).features
    assert whole.shape == ours.shape
    gram = whole @ whole.T
    assert (gram - ours @ ours.T).norm() <= 1e-4 * gram.norm()


def test_rows_name_what_they_trace(subject: speed.Subject) -> None:
    names = list(speed.rows(subject))
    assert names == [f"LoRA, {r}x{r}, {s}" for r in (8, 16, 32) for s in ("to 2048", "no sketch")]


def test_each_measurement_follows_one_of_the_floor() -> None:
    done: list[str] = []
    work = {name: lambda name=name: done.append(name) for name in ("floor", "ours")}
    pairs = speed.measured(work, 2)
    assert done == ["floor", "floor", "floor", "ours"] * 3
    assert [len(each) for each in pairs.values()] == [2, 2]


def test_ratios_are_to_the_floor_beside_them_so_a_slower_machine_does_not_matter() -> None:
    # The machine is ten times slower while "ours" is measured.
    pairs = {
        "forward pass": [(1.0, 4.0), (1.0, 4.0), (2.0, 4.0)],
        "training step": [(2.0, 4.0)] * 3,
        "ours": [(50.0, 40.0), (50.0, 40.0), (40.0, 40.0)],
    }
    found = speed.summary(pairs)
    assert found["ours"]["floor"] == 1.25
    assert found["ours"]["forward pass"] == 5.0
    assert found["ours"]["training step"] == 2.5
    assert found["ours"]["floor_quartiles"] == [1.0, 1.25]


def test_the_table_of_a_network_has_memory_beside_a_training_steps() -> None:
    row = {
        "floor": 1.5,
        "floor_quartiles": [1.4, 1.65],
        "forward pass": 4.0,
        "training step": 2.0,
        "peak_mib": 50.0,
    }
    rows = {
        "training step": row | {"peak_mib": 100.0},
        "ours": row,
        "p": row | {"peak_mib": None},
    }
    lines = speed.section("net", (1000, 10), rows)
    assert "### net (1,000 parameters, 10 trained)" in lines
    assert "| ours | 1.50 (1.40-1.65) | 4.00 | 2.00 | 50 | 0.50 |" in lines
    assert "| p | 1.50 (1.40-1.65) | 4.00 | 2.00 |  |  |" in lines
