"""Samples that were not trained on: as if the data set were without them, and told apart
everywhere."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrak_lightning.attribution import Attribution, Concept
from ctrak_lightning.attribution.attributions import Attributions
from ctrak_lightning.attribution.result import NEVER
from ctrak_lightning.attribution.scoring import (
    chosen_scores,
    ensemble,
    exposed_at,
    exposures_at,
    factors_of,
    soft_thresholded,
    spreads,
)
from ctrak_lightning.attribution.search import top_scores
from ctrak_lightning.methods.damping import Agreement, DampingRule, Fixed
from ctrak_lightning.provenance.forgetting import forget
from ctrak_lightning.store import SampleTable, StoreHeader, TraceStore, TraceWriter, stored_rows

from .test_top import traces


def store_of(
    path: Path, phi: list[Tensor], exposures: list[Tensor | None], dtype: Any = "float32"
) -> TraceStore:
    """A store of features [n, k] at each checkpoint, of samples that were trained on so often
    [n]."""
    n, k = phi[0].shape
    facts: dict[str, Any] = {"method": {}, "projection": {}, "model": {}, "dataset": {"size": n}}
    writer = TraceWriter(path, StoreHeader(**facts, dim=k, dtype=dtype), shard_rows=50)
    owners = {"owner": [f"owner {i % 3}" for i in range(n)]}
    writer.write_samples(SampleTable([f"s{i}" for i in range(n)], [""] * n, owners))
    for step, (rows, counts) in enumerate(zip(phi, exposures, strict=True)):
        with writer.begin_checkpoint(step, epoch=0, exposures=counts) as checkpoint:
            checkpoint.append(torch.arange(n), rows, torch.linspace(0.5, 3 + step, n))
            checkpoint.seal()
    return TraceStore(path)


SHAPES = pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [(150, 24, "int8"), (150, 24, "float32"), (20, 60, "float16"), (30, 24, "float32")],
)


@SHAPES
@pytest.mark.parametrize("rule", [Fixed(1.0), Agreement()], ids=["1", "agreement"])
def test_scores_are_those_of_a_store_without_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, k: int, dtype: str, rule: DampingRule
) -> None:
    """30 of 24 features, of which 18 were trained on: the store is primal, the one without the
    others dual."""
    monkeypatch.setattr(stored_rows, "BLOCK_BYTES", 24 * 30)
    phi, queries = traces(n, k, 3)
    kept = torch.arange(n) % 5 < 3
    store = store_of(tmp_path / "all", phi, [kept.long() * i for i in (1, 2, 3)], dtype)
    alone = store_of(tmp_path / "kept", [rows[kept] for rows in phi], [None] * 3, dtype)
    assert store.verify() == []
    scores, dampings = chosen_scores(queries, store.checkpoints, rule)
    expected, of_alone = chosen_scores(queries, alone.checkpoints, rule)
    assert dampings == of_alone
    torch.testing.assert_close(
        scores[..., kept], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
    )
    assert bool((scores[..., ~kept] == 0).all())
    joined = ensemble(scores, None, exposed_at(store.checkpoints))
    torch.testing.assert_close(joined[:, kept], ensemble(expected), rtol=1e-3, atol=1e-4)
    found = top_scores(queries, store.checkpoints, n, rule)
    wanted = top_scores(queries, alone.checkpoints, n, rule)
    assert found.dampings == wanted.dampings
    places = kept.nonzero().flatten()
    assert found.positions.shape == (4, int(kept.sum()))
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.positions[:, :5], places[wanted.positions[:, :5]])


@SHAPES
def test_scores_per_exposure_are_multiplied_by_the_exposures(
    tmp_path: Path, n: int, k: int, dtype: str
) -> None:
    phi, queries = traces(n, k, 3)
    seeded = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (3, n), generator=seeded).cumsum(0)  # some samples 0 for a while
    store = store_of(tmp_path, phi, list(counts), dtype)
    factors = factors_of(False, True, store.checkpoints)
    assert factors == ("exposures",)
    assert factors_of(True, True, store.checkpoints) == ("loss", "exposures")
    plain, _ = chosen_scores(queries, store.checkpoints, Fixed(1.0))
    scores, _ = chosen_scores(queries, store.checkpoints, Fixed(1.0), factors=factors)
    for m, each in enumerate(counts):
        torch.testing.assert_close(scores[m], plain[m] * each)
    joined = ensemble(scores, None, exposed_at(store.checkpoints))[:, counts[2] > 0]
    found = top_scores(queries, store.checkpoints, 5, Fixed(1.0), factors=factors)
    torch.testing.assert_close(found.scores, joined.float().topk(5, 1).values, rtol=1e-3, atol=1e-4)
    unknown = store_of(tmp_path / "unknown", phi, [counts[0], counts[1], None], dtype)
    assert factors_of(True, True, unknown.checkpoints) == ("loss",)


@SHAPES
@pytest.mark.parametrize("per_exposure", [False, True])
def test_what_is_known_later_bounds_what_was_not_known_before(
    tmp_path: Path, n: int, k: int, dtype: str, per_exposure: bool
) -> None:
    """A sample that was not trained on at a later checkpoint was not at an earlier one either."""
    phi, queries = traces(n, k, 3)
    counts = (torch.arange(n) % 4).long()  # every fourth sample 0
    later = counts + (torch.arange(n) % 8 == 0).long()
    store = store_of(tmp_path, phi, [None, counts, later], dtype)
    factors = factors_of(False, per_exposure, store.checkpoints)
    assert factors == (("exposures",) if per_exposure else ())
    scores, _ = chosen_scores(queries, store.checkpoints, Fixed(1.0), factors=factors)
    plain, _ = chosen_scores(queries[:1], store.checkpoints[:1], Fixed(1.0))
    torch.testing.assert_close(scores[0], plain[0] * (counts if per_exposure else counts > 0))
    exposed = exposed_at(store.checkpoints)
    assert exposed is not None
    assert torch.equal(exposed, torch.stack([counts > 0, counts > 0, later > 0]))
    joined = ensemble(scores, None, exposed)[:, later > 0]
    found = top_scores(queries, store.checkpoints, 5, Fixed(1.0), factors=factors)
    torch.testing.assert_close(found.scores, joined.float().topk(5, 1).values, rtol=1e-3, atol=1e-4)


@SHAPES
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_trained_on_later_counts_from_then_on(
    tmp_path: Path, n: int, k: int, dtype: str, residual: bool
) -> None:
    phi, queries = traces(n, k, 3)
    i = torch.arange(n)
    masks = torch.stack([i % 4 == 0, i % 4 < 2, i % 4 < 3])
    store = store_of(tmp_path, phi, [mask.long() for mask in masks], dtype)
    scores, dampings = chosen_scores(
        queries, store.checkpoints, Agreement(), factors=("loss",) if residual else ()
    )
    for m in range(3):
        assert torch.equal((scores[m] != 0).any(0), masks[m])
    joined = ensemble(scores, None, masks)
    by_hand = (
        sum(
            scores[m] / scores[m][:, masks[m]].std(-1, keepdim=True, correction=0) for m in range(3)
        )
        / 3
    )
    torch.testing.assert_close(joined, by_hand)
    found = top_scores(
        queries, store.checkpoints, n, Agreement(), factors=("loss",) if residual else ()
    )
    assert found.dampings == dampings
    trained = joined.float()[:, masks[2]]
    torch.testing.assert_close(
        found.scores, trained.sort(1, descending=True).values, rtol=1e-3, atol=1e-4
    )
    assert set(found.positions[0].tolist()) == set(masks[2].nonzero().flatten().tolist())


def test_spreads_and_thresholds_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0, 0.0, 5.0], [2.0, 0.0, 0.0, 8.0]], dtype=torch.float64)
    exposed = torch.tensor([[True, True, False, True], [True, False, False, True]])
    expected = torch.tensor([[(8 / 3) ** 0.5], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(spreads(scores, exposed), expected)
    torch.testing.assert_close(spreads(scores[:, None], exposed), expected[:, None])
    shifted = soft_thresholded(scores[0], 0.5, exposed[0])
    unit = 2 / (8 / 3) ** 0.5 - 0.5
    torch.testing.assert_close(shifted, torch.tensor([-unit, 0, 0, unit], dtype=torch.float64))


def result_of(tmp_path: Path, last: list[int]) -> Attribution:
    samples = SampleTable(
        [f"s{i}" for i in range(5)], [""] * 5, {"owner": ["ann", "bo", "ann", "cy", "bo"]}
    )
    exposures = torch.tensor([[2, 0, 1, 0, 0], last])
    scores = torch.tensor([[-2.0, 0, 1, 0, 0], [-3.0, 2, 4, 0, -1]]) * (exposures != 0)
    return Attribution(
        concept=Concept("cat", present={"a": "cat"}, absent={}),
        seed=0,
        checkpoint_scores=scores,
        steps=[1, 2],
        samples=samples,
        method={"name": "test"},
        strength=1.0,
        exposures=exposures,
    )


def test_they_are_told_apart_in_rankings_and_files(tmp_path: Path) -> None:
    result = result_of(tmp_path, [3, 1, 2, 0, 1])
    assert result.untrained.tolist() == [False, False, False, True, False]
    assert [record.sample_id for record in result.top(5)] == ["s2", "s1", "s4", "s0"]
    assert [(record.rank, record.exposures) for record in result.top(5)] == [
        (1, 2),
        (2, 1),
        (3, 1),
        (4, 3),
    ]
    assert [(record.sample_id, record.rank) for record in result.bottom(2)] == [
        ("s0", 4),
        ("s4", 3),
    ]
    assert result.order().tolist() == [2, 1, 4, 0, 3]
    assert float(result.scores[3]) == float(result.contributions(0)[3]) == 0
    assert result.timeline()[:, 3].tolist() == [0, 0]
    shares = {
        share.group: share.share for share in result.by_group("owner", threshold=0, resamples=10)
    }
    assert shares["cy"] == 0

    both = Attributions([result, result], torch.eye(2))
    assert {sample.sample_id for sample in both.shared(5)} == {"s0", "s1", "s2", "s4"}

    result.to_csv(tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["sample_id"], row["exposures"], row["remark"]) for row in rows] == [
        ("s2", "2", ""),
        ("s1", "1", ""),
        ("s4", "1", ""),
        ("s0", "3", ""),
        ("s3", "0", NEVER),
    ]
    result.to_json(tmp_path / "r.json")
    samples = json.loads((tmp_path / "r.json").read_text())["samples"]
    assert [sample["exposures"] for sample in samples] == [2, 1, 1, 3, 0]
    # Not known at the last checkpoint: nothing is said, and no sample is left out.
    unknown = result_of(tmp_path, [-1] * 5)
    assert len(unknown.top(9)) == 5
    assert {record.exposures for record in unknown.top(5)} == {None}


def test_a_store_keeps_them_through_forgetting_and_damage(tmp_path: Path) -> None:
    phi, queries = traces(20, 8, 1)
    counts = torch.arange(20) % 4
    store = store_of(tmp_path, phi, [counts])
    assert torch.equal(exposures_at(store.checkpoints)[0], counts)  # type: ignore[index]
    with pytest.raises(ValueError, match="exposures of 3 samples"):
        TraceWriter(tmp_path, store.header).begin_checkpoint(1, epoch=0, exposures=torch.ones(3))
    forget(tmp_path, ["s1", "s4"])
    store = TraceStore(tmp_path)
    kept = [i for i in range(20) if i not in (1, 4)]
    assert torch.equal(exposures_at(store.checkpoints)[0], counts[kept])  # type: ignore[index]
    assert store.verify() == []
    chosen_scores(queries, store.checkpoints, Fixed(1.0))


def test_a_checkpoint_that_was_begun_with_other_exposures_is_begun_anew(tmp_path: Path) -> None:
    phi, _ = traces(20, 8, 1)
    store = store_of(tmp_path, phi, [torch.ones(20, dtype=torch.int64)])
    for counts, done in ((2, 0), (2, 10), (3, 0)):
        writer = TraceWriter(tmp_path, store.header, shard_rows=10)
        writer.write_samples(store.samples)
        with writer.begin_checkpoint(5, epoch=1, exposures=torch.full((20,), counts)) as checkpoint:
            assert checkpoint.rows_done == done
            rows = torch.arange(done, done + 10)
            checkpoint.append(rows, phi[0][rows], torch.zeros(10))
            checkpoint.flush()
        writer.close()
