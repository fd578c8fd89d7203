"""The judges of influence: subsets in which counts say nothing, and interventions whose answer is
known."""

from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor

from ctrak_lightning.attribution.scoring import soft_thresholded
from recipes.benchmarks import own_images
from recipes.benchmarks.influence import (
    Judge,
    baselines,
    correlations,
    crossed,
    crossed_objects,
    judges,
    summed,
    table,
)
from recipes.benchmarks.interventions import COPY, PARTS, Design, Shown, WeightedDiffusion, aucs
from recipes.benchmarks.outcomes import Outcomes
from recipes.benchmarks.retrain import plan
from recipes.emoji_artists.data import EmojiArtists
from recipes.emoji_artists.evaluate import questions


@pytest.fixture(scope="module")
def data() -> EmojiArtists:
    return EmojiArtists("new")


def kept_of(data: EmojiArtists, subsets: int) -> Tensor:
    kept = torch.zeros(subsets, len(data.train_set), dtype=torch.bool)
    for row, run in zip(kept, plan("fixed", data), strict=False):
        row[run.kept] = True
    return kept


def test_subsets_have_as_many_images_of_every_object(data: EmojiArtists) -> None:
    kept = kept_of(data, 128)
    names = [name for name, _ in data.train_set.pairs]
    for name in set(names):
        own = torch.tensor([each == name for each in names])
        counts = (kept & own).sum(1)
        assert counts[::2].tolist() == [2] * 64
        assert counts[1::2].tolist() == [3] * 64
    assert len({tuple(row.tolist()) for row in kept}) == 128


def judge_of(data: EmojiArtists, strengths: Tensor, subsets: int = 40) -> Judge:
    kept = kept_of(data, subsets)
    return Judge(kept, kept.sum(1) // 64, strengths)


def test_correlations_are_scipys_within_each_count(data: EmojiArtists) -> None:
    torch.manual_seed(0)
    judge = judge_of(data, torch.randn(1, 64, 40).double())
    scores = torch.randn(64, 448).double()
    found = correlations(scores, judge, 0)
    predicted = scores @ judge.kept.double().T
    for q in (0, 17, 63):
        each = [
            spearmanr(predicted[q, first::2], judge.strengths[0, q, first::2]).statistic
            for first in (0, 1)
        ]
        assert float(found[q]) == pytest.approx(sum(each) / 2)


def test_intervals_are_over_questions_subsets_and_runs_drawn_together(data: EmojiArtists) -> None:
    """Held against a loop that draws the same and asks scipy, without the counts' own function."""
    torch.manual_seed(1)
    judge = judge_of(data, torch.randn(2, 64, 12).double(), subsets=12)
    rows = {name: torch.randn(2, 64, 448).double() for name in ("ours", "theirs")}
    found = crossed(rows, judge, draws=3)
    generator = torch.Generator().manual_seed(0)
    strata = [list(range(0, 12, 2)), list(range(1, 12, 2))]  # of 2 and of 3 images
    for draw in range(3):
        picked = [
            [own[i] for i in torch.randint(6, (6,), generator=generator).tolist()] for own in strata
        ]
        runs = torch.randint(2, (2,), generator=generator).tolist()
        objects = torch.randint(64, (64,), generator=generator).tolist()
        for name, scores in rows.items():
            values = []
            for run in runs:
                predicted = (scores[run] @ judge.kept.double().T).numpy()
                for q in objects:
                    strengths = judge.strengths[run, q].numpy()
                    each = [spearmanr(predicted[q, own], strengths[own])[0] for own in picked]
                    values.append(sum(each) / 2)
            assert float(found[name][draw]) == pytest.approx(sum(values) / len(values))


def test_what_follows_the_truth_is_found_and_a_count_is_not(data: EmojiArtists) -> None:
    asked = [q for q in questions(data.held_out) if q.kind == "object"]
    torch.manual_seed(0)
    worth = torch.rand(64, 448).double()
    own = torch.tensor([[q.object == name for name, _ in data.train_set.pairs] for q in asked])
    judge = judge_of(data, ((worth * own) @ kept_of(data, 40).double().T)[None])
    assert correlations(worth * own, judge, 0).mean() > 0.999
    label = baselines(asked, torch.rand(64, 3, 32, 32), data)["label"]
    assert torch.equal(label, own.float())
    count = correlations(label, judge, 0)  # the same in every subset: no ranking at all
    assert bool((count.isnan() | (count == 0)).all())
    rows = {"truth": (worth * own)[None], "random": torch.rand(1, 64, 448)}
    draws = crossed(rows, judge, draws=50)
    assert float((draws["truth"] - draws["random"]).quantile(0.025)) > 0.7
    [head, _, first, second] = table(rows, ["truth"], judge, torch.arange(64) < 30)
    assert head.endswith("less *random* |")
    assert first.startswith("| truth | 1.000 [1.000, 1.000] | 1.00 | 1.00 | +")
    assert second.startswith("| random | ")
    beside = rows | {"concept_trak": rows["random"]}
    [head, _, first, *_] = table(beside, ["truth", "concept_trak"], judge, torch.arange(64) < 30)
    assert head.endswith("less *random* | less *concept_trak* |")
    to_random, to_search = first.split(" | ")[-2:]
    assert to_search.removesuffix(" |") == to_random


def test_contributions_are_summed_and_scores_within_the_label(data: EmojiArtists) -> None:
    torch.manual_seed(0)
    rows = {"label": (torch.rand(2, 100) < 0.1).float(), "influence": torch.randn(2, 100)}
    rows["influence"][:, 7] = 9.0
    found = summed(rows, ["influence"])
    assert torch.equal(found["label"], rows["label"])
    assert torch.equal(found["label and influence"], rows["label"] * rows["influence"])
    scores = rows["influence"].double()
    units = (scores - scores.median(1, keepdim=True).values) / scores.std(
        1, keepdim=True, correction=0
    )
    expected = units.sign() * (units.abs() - 2).clamp(min=0)
    torch.testing.assert_close(found["influence"], expected)
    assert found["influence"][:, 7].min() > 2
    assert not any(name.startswith("influence with") for name in found)

    rows["concept_trak"] = torch.randn(2, 100) * 40
    joint = summed(rows, ["influence"])["influence with concept_trak"]
    each = [rows[name].double() for name in ("influence", "concept_trak")]
    first, second = (one / one.std(1, keepdim=True, correction=0) for one in each)
    torch.testing.assert_close(joint, soft_thresholded(first + second / 2, 2.0))


def test_a_generated_image_is_judged_by_itself(data: EmojiArtists) -> None:
    kept = kept_of(data, 4)
    losses = torch.rand(4, 64, 4)
    asked = torch.rand(4, 2, 64, 4)
    drift = torch.rand(4, 2, 64)
    names = [f"fixed-{i:03d}" for i in range(4)]
    odds = torch.rand(4, 64, 2)
    outcomes = Outcomes(names, kept, odds, losses, losses[..., 0], asked, drift)
    found = judges(outcomes, [1])
    # columns: told both names, the artist, the object, nothing
    worth = losses[2, 5, 1].double() - losses[2, 5, 0]
    assert found["real drawing"].strengths[0, 5, 2] == pytest.approx(float(worth))
    worth = asked[2, 1, 5, 1].double() - asked[2, 1, 5, 0]
    assert found["generated image"].strengths[0, 5, 2] == pytest.approx(float(worth))
    assert found["generated image, by drift"].strengths[0, 5, 2] == pytest.approx(-drift[2, 1, 5])
    seen = found["real drawing, by a classifier's odds"].strengths[0, 5, 2]
    assert seen == pytest.approx(odds[2, 5, 0])
    like = found["real drawing, by likeness"].strengths[0, 5, 2]
    assert like == pytest.approx(losses[2, 5, 0])
    assert found["real drawing"].counts.tolist() == [2, 3, 2, 3]


def test_outcomes_by_the_images_asked_about_are_kept(data: EmojiArtists, tmp_path: Any) -> None:
    kept = kept_of(data, 3)
    losses = torch.rand(3, 64, 4)
    asked, drift = torch.rand(3, 2, 64, 4), torch.rand(3, 2, 64)
    asked[1], drift[1] = torch.nan, torch.nan
    names = [f"fixed-{i:03d}-seed0" for i in range(3)]
    outcomes = Outcomes(names, kept, torch.zeros(3, 64, 2), losses, losses[..., 0], asked, drift)
    outcomes.save("labelled", tmp_path)
    again = Outcomes.load("labelled", tmp_path)
    torch.testing.assert_close(again.asked_losses, asked, equal_nan=True)
    torch.testing.assert_close(again.drift, drift, equal_nan=True)
    assert torch.equal(again.kept, kept)


def test_an_objects_own_images_are_left_out_best_first(data: EmojiArtists) -> None:
    asked, pairs = own_images.object_questions(data), data.train_set.pairs
    torch.manual_seed(0)
    scores = torch.rand(64, 448)
    found = own_images.left_out(scores, asked, pairs, 2)
    assert len(found) == 128
    for q in (0, 40):
        own = [i for i, (name, _) in enumerate(pairs) if name == asked[q].object]
        best = sorted(own, key=lambda i: -float(scores[q, i]))[:2]
        assert set(best) == found & set(own)
    names = {own_images.name_of(name, 2, 1) for name in own_images.METHODS}
    assert len(names) == len(own_images.METHODS)
    assert all(name.replace("-", "").replace("_", "").isalnum() for name in names)


def test_drops_are_what_is_lost_and_are_paired_with_the_best_without_gradients() -> None:
    losses = torch.zeros(2, 64, 4)
    losses[:, :, 1] = torch.tensor([0.03, 0.01])[:, None]  # told the artist alone
    names = ["full-seed0", f"{own_images.name_of('random', 2, 0)}-seed0"]
    outcomes = Outcomes(
        names, torch.ones(2, 448).bool(), torch.zeros(2, 64, 2), losses, torch.zeros(2, 64)
    )
    lost = own_images.drops(outcomes, "random", 2, 0, 0)
    torch.testing.assert_close(lost["loss"], torch.full((64,), 0.02).double())
    zero = torch.zeros(4, 64).double()
    rows = {
        "influence": {"loss": zero + 0.003, "judge": zero, "likeness": zero},
        "random": {"loss": zero, "judge": zero, "likeness": zero},
        "label and pixels": {"loss": zero + 0.001, "judge": zero, "likeness": zero},
    }
    lines = own_images.table(rows)
    assert lines[0].endswith("loss less *label and pixels* |")
    assert lines[2].startswith("| influence | 3.00 [3.00, 3.00] |")
    assert lines[2].endswith("| +2.00 [+2.00, +2.00] |")


def test_designs_show_what_they_say(data: EmojiArtists) -> None:
    pairs = data.train_set.pairs
    design = Design.drawn(pairs, 0)
    assert design.batches == Design.drawn(pairs, 0).batches
    assert design.parts != Design.drawn(pairs, 1).parts
    for name in {name for name, _ in pairs}:
        own = [design.parts[i] for i, pair in enumerate(pairs) if pair[0] == name]
        assert sorted(own) == sorted(PARTS)
    exposures = design.exposures()
    assert exposures.shape == (3, 448 + 64)
    weightless = [i for i, part in enumerate(design.parts) if part == "weight 0"]
    drawn = sum(i in weightless for batch in design.batches for i in batch)
    assert drawn > 0
    assert exposures[-1].sum() == 300 * 32 - drawn
    assert not exposures[:, weightless].any()

    def mean(part: str, checkpoint: int = -1) -> float:
        places = [i for i, each in enumerate(design.parts) if each == part]
        return float(exposures[checkpoint, places].double().mean())

    assert mean("never") == mean(COPY) == mean("weight 0") == 0
    assert mean("last tenth", 1) == 0
    assert mean("last tenth") > 0
    assert mean("first tenth", 0) == mean("first tenth") > 0
    assert 8 < mean("ten times") / mean("usual") < 12


def test_rankings_by_the_answer_are_right_and_those_by_the_image_are_at_chance(
    data: EmojiArtists,
) -> None:
    asked = [q for q in questions(data.held_out) if q.kind == "object"]
    shown = Shown(data.train_set, Design.drawn(data.train_set.pairs, 0))
    last = shown[448]
    original = data.train_set[shown.design.originals[last["object"]][0]]
    assert torch.equal(last["image"], original["image"])
    assert last["sample_id"] == f"copy/{original['sample_id']}"
    assert last["owner"] != original["owner"]
    effect = shown.design.exposures()[-1].double()
    right = aucs(effect.expand(64, -1), asked, shown)
    assert {name: float(values.mean()) for name, values in right.items()} == {
        name: pytest.approx(1, abs=0.02) for name in right
    }
    even = aucs(torch.zeros(64, 512), asked, shown)
    assert all(bool((values == 0.5).all()) for values in even.values())
    rounded = 1 + 1e-9 * torch.rand(64, 512).double()  # as equal gradients are rounded
    rounded[:, 0] = 0.0
    assert float(aucs(rounded, asked, shown)[f"its original > {COPY}"][5]) == 0.5
    # Of a test with several images on a side, scipy's.
    scores = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    pairs, parts = shown.images.pairs, shown.design.parts
    of_object = [i for i in range(448) if pairs[i][0] == asked[9].object]
    usual, never = (
        [float(scores[9, i]) for i in of_object if parts[i] == part] for part in ("usual", "never")
    )
    expected = mannwhitneyu(usual, never).statistic / (len(usual) * len(never))
    assert float(aucs(scores, asked, shown)["usual > never"][9]) == pytest.approx(expected)
    low, high = crossed_objects(torch.stack(list(right.values())))
    assert 0.9 < low <= high <= 1


def test_a_weight_of_zero_leaves_a_sample_out_of_the_gradient(data: EmojiArtists) -> None:
    module = WeightedDiffusion("lora")
    module.log = lambda *args, **kwargs: None  # type: ignore[assignment]
    items = [data.train_set[i] for i in range(2)]

    def gradient(weights: list[float], images: list[int]) -> Tensor:
        batch = {
            "image": torch.stack([items[i]["image"] for i in images]),
            "artist_token": [items[i]["artist_token"] for i in images],
            "object_token": [items[i]["object_token"] for i in images],
            "weight": torch.tensor(weights),
        }
        module.zero_grad()
        torch.manual_seed(0)
        module.training_step(batch, 0).backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    with_other, without = gradient([1.0, 0.0], [0, 1]), gradient([1.0, 0.0], [0, 0])
    assert without.norm() > 0
    torch.testing.assert_close(with_other, without, rtol=1e-4, atol=1e-7)
    half = gradient([0.5, 0.0], [0, 1])
    torch.testing.assert_close(half, without / 2, rtol=1e-4, atol=1e-7)
