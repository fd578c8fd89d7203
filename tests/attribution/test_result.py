import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrak_lightning import Attribution, Concept, methods
from ctrak_lightning.attribution.diagnostics import NOT_SHOWN
from ctrak_lightning.errors import ConceptError
from ctrak_lightning.store import SampleTable

CONCEPT = Concept("owl", {"object": "owl", "artist": "noto"}, {"artist": "noto"})


def result_of(scores: torch.Tensor, owners: list[str]) -> Attribution:
    n = scores.shape[1]
    table = SampleTable([f"s{i}" for i in range(n)], [""] * n, {"owner": owners})
    return Attribution(
        concept=CONCEPT,
        seed=3,
        checkpoint_scores=scores,
        steps=[10 * (i + 1) for i in range(len(scores))],
        samples=table,
        method=methods.concept_trak().to_dict(),
        strength=float("nan"),
    )


def test_top_ranks_by_the_ensemble_and_breaks_ties_by_position() -> None:
    scores = torch.tensor([[1.0, 5.0, -2.0, 5.0], [100.0, 500.0, -200.0, 500.0]])
    result = result_of(scores, ["a", "b", "a", "b"])
    spread = float(np.std([1.0, 5.0, -2.0, 5.0]))
    np.testing.assert_allclose(
        result.scores.numpy(), np.array([1.0, 5.0, -2.0, 5.0]) / spread, rtol=1e-6
    )
    top = result.top(3)
    assert [(r.sample_id, r.rank) for r in top] == [("s1", 1), ("s3", 2), ("s0", 3)]
    assert top[0].metadata == {"owner": "b"}
    assert result.timeline().shape == (2, 4)
    torch.testing.assert_close(result.timeline().mean(0), result.scores)
    assert len(result.top(100)) == 4
    with pytest.raises(ValueError, match="at least 1"):
        result.top(0)


def test_shown_it_is_a_short_table() -> None:
    result = result_of(torch.tensor([[3.0, -7.0, 1.5]]), ["x", "<b>y\x1b[2J", "z"])
    table = replace(result.samples, thumbnails=torch.zeros(3, 4, 4, 3, dtype=torch.uint8))
    result = replace(result, samples=table, image=torch.rand(3, 4, 4))
    scores = [f"{score:.3f}" for score in sorted(result.scores.tolist(), reverse=True)]
    assert repr(result).splitlines() == [
        "Attribution of 'owl': 3 samples, checkpoints at steps [10], method 'concept_trak'",
        "Look at the generated image and at `.confidence` first: if the concept is not learnt, "
        "the ranking says nothing.",
        "rank   score  sample_id  owner",
        f"   1   {scores[0]}  s0         x",
        f"   2   {scores[1]}  s2         z",
        f"   3  {scores[2]}  s1         <b>y\\x1b[2J",
    ]
    page = result._repr_html_()
    assert page.count('<img src="data:image/png;base64,') == 4
    assert "<td>&lt;b&gt;y\\x1b[2J</td>" in page
    assert "<b>y" not in page
    many = result_of(torch.arange(30.0)[None], ["x"] * 30)
    assert len(repr(many).splitlines()) == 13
    vars(many)["confidence"] = replace(many.confidence, unshown=["It is noise."])
    assert NOT_SHOWN in repr(many)
    assert NOT_SHOWN in many._repr_html_()


def test_by_group_shares_are_those_of_the_positive_scores() -> None:
    result = result_of(torch.tensor([[3.0, -7.0, 1.0, 4.0, 0.0]]), ["x", "x", "y", "y", "z"])
    shares = result.by_group("owner")
    assert [(s.group, s.samples) for s in shares] == [("y", 2), ("x", 2), ("z", 1)]
    np.testing.assert_allclose([s.share for s in shares], [5 / 8, 3 / 8, 0], rtol=1e-6)
    for share in shares:
        assert 0 <= share.low <= share.share <= share.high <= 1
    assert shares == result.by_group("owner")
    with pytest.raises(ValueError, match=r"by_group\('licence'\).*The store has: owner"):
        result.by_group("licence")
    with pytest.raises(ValueError, match="no sample has a positive score"):
        result_of(torch.tensor([[-1.0, -2.0]]), ["x", "y"]).by_group("owner")


def test_by_group_interval_is_the_bootstraps() -> None:
    """Against a plain numpy bootstrap loop with resamples of its own: the bounds agree to Monte
    Carlo error."""
    generator = np.random.default_rng(0)
    values = generator.exponential(size=40)
    owners = ["x" if i % 3 else "y" for i in range(40)]
    shares = {
        s.group: s
        for s in result_of(torch.tensor(values)[None], owners).by_group("owner", resamples=4000)
    }
    is_x = np.array([owner == "x" for owner in owners])
    draws = generator.integers(40, size=(4000, 40))
    sampled = [values[d][is_x[d]].sum() / values[d].sum() for d in draws]
    np.testing.assert_allclose(
        [shares["x"].low, shares["x"].high], np.quantile(sampled, [0.025, 0.975]), atol=0.015
    )


@pytest.mark.parametrize("weights", [None, [1.0, 0.01, 10.0]])
def test_by_group_interval_draws_checkpoints_too(weights: list[float] | None) -> None:
    """Against a plain numpy bootstrap loop over both; checkpoints that disagree make the interval
    wider."""
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(3, 30)) + np.linspace(-1, 1, 30)
    scores *= np.array([[1.0], [10.0], [0.1]])
    owners = ["x" if i % 4 else "y" for i in range(30)]
    result = replace(result_of(torch.tensor(scores), owners), weights=weights)
    share = {s.group: s for s in result.by_group("owner", resamples=4000)}["x"]
    is_x = np.array([owner == "x" for owner in owners])
    sampled = []
    for _ in range(4000):
        drawn = generator.integers(3, size=3)
        if weights is None:
            each = (scores[drawn] / scores[drawn].std(1, keepdims=True)).mean(0)
        else:
            each = (scores[drawn] * np.array(weights)[drawn, None]).sum(0)
        rows = generator.integers(30, size=30)
        adds = np.clip(each, 0, None)[rows]
        sampled.append(adds[is_x[rows]].sum() / adds.sum())
    np.testing.assert_allclose(
        [share.low, share.high], np.quantile(sampled, [0.025, 0.975]), atol=0.03
    )
    agreeing = replace(
        result, checkpoint_scores=result.checkpoint_scores[:1].repeat(3, 1), weights=None
    )
    lone = {s.group: s for s in agreeing.by_group("owner", resamples=4000)}["x"]
    if weights is None:
        assert share.high - share.low > lone.high - lone.low


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}])
def test_by_group_refuses_what_is_no_interval(wrong: dict[str, float]) -> None:
    result = result_of(torch.tensor([[1.0, 2.0]]), ["x", "y"])
    with pytest.raises(ValueError, match="expected a confidence between 0 and 1"):
        result.by_group("owner", **wrong)  # type: ignore[arg-type]


def test_csv_and_json_hold_the_whole_ranking(tmp_path: Path) -> None:
    result = result_of(
        torch.tensor([[1.0, 2.0, -1.0], [1.0, 0.5, 4.0]]), ['a,"b"\n', "naïve 猫", "=cmd()"]
    )
    vars(result)["confidence"] = replace(result.confidence, unshown=["It is noise."])
    result.to_csv(tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = result.top(3)
    assert next(iter(rows[0])) == "verdict"
    assert {row["verdict"] for row in rows} == {NOT_SHOWN}
    assert [row["sample_id"] for row in rows] == [r.sample_id for r in expected]
    assert [float(row["score"]) for row in rows] == [r.score for r in expected]
    # An apostrophe stands before what a spreadsheet would compute; taking it off gives the text
    # back.
    assert {row["sample_id"]: row["owner"] for row in rows}["s2"] == "'=cmd()"
    assert {row["sample_id"]: row["owner"].removeprefix("'") for row in rows} == dict(
        zip(["s0", "s1", "s2"], ['a,"b"\n', "naïve 猫", "=cmd()"], strict=True)
    )
    result.to_json(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert next(iter(document)) == "confidence"
    assert list(document["confidence"].items())[:2] == [
        ("says_nothing", True),
        ("verdict", NOT_SHOWN),
    ]
    assert document["concept"] == CONCEPT.to_dict()
    assert document["strength"] is None
    assert [s["sample_id"] for s in document["samples"]] == [r.sample_id for r in expected]
    first = document["samples"][0]
    np.testing.assert_allclose(np.mean(first["timeline"]), first["score"], rtol=1e-6)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_top_is_a_sorted_permutation(values: list[float]) -> None:
    result = result_of(torch.tensor([values], dtype=torch.float64), ["x"] * len(values))
    top = result.top(len(values))
    assert sorted(r.sample_id for r in top) == sorted(result.samples.sample_ids)
    scores = [r.score for r in top]
    assert scores == sorted(scores, reverse=True)


def test_a_concept_must_change_something() -> None:
    with pytest.raises(ConceptError, match="present and absent are both.*HINT"):
        Concept("owl", {"object": "owl"}, {"object": "owl"})
    with pytest.raises(ConceptError, match="expected a name"):
        Concept("", {"object": "owl"}, {})


def test_contributions_are_the_soft_thresholded_scores() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 40.0, -50.0, 1.5]])
    result = result_of(scores, ["a"] * 7)
    z = (
        result.scores.double().numpy() - np.median(result.scores.numpy())
    ) / result.scores.double().numpy().std()
    expected = [np.sign(v) * max(abs(v) - 1.0, 0) for v in z]
    np.testing.assert_allclose(result.contributions(1.0).numpy(), expected, rtol=1e-5, atol=1e-7)
    assert result.contributions(1.0).nonzero().flatten().tolist() == [4, 5]
    np.testing.assert_allclose(result.contributions(0).numpy(), z, rtol=1e-5, atol=1e-7)
    assert result_of(torch.ones(1, 4), ["a"] * 4).contributions().tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="threshold=-1"):
        result.contributions(-1)


def test_shares_of_contributions_leave_the_small_scores_out() -> None:
    scores = torch.tensor([[9.0, 7.0, *[0.4] * 10, *[0.0] * 10]])
    result = result_of(scores, ["a", "b", *["c"] * 10, *["d"] * 10])
    assert {share.group: share.share > 0 for share in result.by_group("owner")}["c"]
    shares = {share.group: share.share for share in result.by_group("owner", threshold=2.0)}
    kept = result.contributions(2.0)
    assert shares["a"] == pytest.approx(float(kept[0] / (kept[0] + kept[1])))
    assert shares["c"] == shares["d"] == 0
    with pytest.raises(ValueError, match="threshold=50.*HINT"):
        result.by_group("owner", threshold=50.0)


def test_effective_contributors_is_the_inverse_simpson_index() -> None:
    """By hand: scores around a median of 0 with deviation s, so that contributions are score / s -
    threshold."""
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 1.0, -2.0]])
    spread = float(scores.std(correction=0))
    one = result_of(scores, ["x"] * 8)
    assert one.effective_contributors(threshold=0.0) == pytest.approx((3 + 1) ** 2 / (9 + 1))
    parts = [3 / spread - 0.5, 1 / spread - 0.5]
    expected = sum(parts) ** 2 / sum(part**2 for part in parts)
    assert one.effective_contributors(threshold=0.5) == pytest.approx(expected)
    assert one.effective_contributors() == pytest.approx(1.0)
    assert one.effective_contributors(threshold=50.0) == 0.0
    equal = result_of(torch.tensor([[1.0] * 3 + [0.0] * 9]), ["x"] * 12)
    assert equal.effective_contributors(threshold=0.5) == pytest.approx(3)
    with pytest.raises(ValueError, match="0 or more"):
        one.effective_contributors(threshold=-1.0)


def test_bottom_is_the_end_of_the_ranking_from_the_last_on() -> None:
    result = result_of(torch.tensor([[1.0, 5.0, -2.0, 5.0, -2.0]]), ["a", "b", "c", "d", "e"])
    whole = result.top(5)
    assert result.bottom(2) == [whole[4], whole[3]]
    assert [(r.sample_id, r.rank) for r in result.bottom(3)] == [("s4", 5), ("s2", 4), ("s0", 3)]
    assert result.bottom(99) == whole[::-1]
    with pytest.raises(ValueError, match=r"bottom\(0\)"):
        result.bottom(0)
