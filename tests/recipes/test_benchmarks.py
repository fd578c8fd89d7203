"""The benchmarks' own arithmetic, on rankings and outcomes whose figures are known beforehand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from ctrak_lightning import Concept, Projection, Sampler, methods
from ctrak_lightning.methods.trajectories import Generated
from recipes.benchmarks import counterfactual, groups
from recipes.benchmarks.ablations import (
    COLUMNS,
    MOST,
    POINTS,
    Point,
    counters,
    curve,
    effective_damping,
    variants,
    without_the_other,
)
from recipes.benchmarks.compare import Case, Variant, answers, compare
from recipes.benchmarks.counterfactual import Part, blamed, drops, figures_of, page, parts
from recipes.benchmarks.emoji import baselines, ceilings, image_datamodeling, measured, odd_recall
from recipes.benchmarks.groups import Effect, effects, lines_of
from recipes.benchmarks.outcomes import Outcomes, judged
from recipes.benchmarks.replay import SaveTrained, load_trained, save_trained, saved_steps
from recipes.benchmarks.retrain import half
from recipes.benchmarks.tables import RESULTS, markdown, summarised
from recipes.benchmarks.variants import table_variants
from recipes.emoji_artists.data import KINDS, EmojiArtists
from recipes.emoji_artists.evaluate import questions

from ..toy import ToyData, ToyDiffusion


def outcomes(data: EmojiArtists, rule: str) -> Outcomes:
    """Twelve halves, two seeds each; strength follows how many images of it a model saw."""
    asked = questions(data.held_out)
    masks = torch.zeros(12, 448, dtype=torch.bool)
    for i in range(12):
        masks[i, half(i, 448)] = True
    shown = data.train_set.pairs
    counts = (
        torch.tensor([[p[KINDS.index(q.kind)] == q.value for p in shown] for q in asked]).float()
        @ masks.float().T
    )
    odds = torch.stack([counts[0::2].T, counts[1::2].T], 2)  # [R, 64, 2]
    generator = torch.Generator().manual_seed(0)
    if rule == "noise":
        odds = torch.rand(odds.shape, generator=generator)
    losses = torch.stack(
        [torch.zeros_like(odds[..., 0]), -odds[..., 1], -odds[..., 0], torch.zeros(12, 64)], 2
    )
    losses = torch.where(torch.tensor([True, False, False, True]), losses, -losses)
    losses[:, :, 1], losses[:, :, 2] = (
        odds[..., 0],
        odds[..., 1],
    )  # loss without the name is higher by its strength
    names = [f"half-{i:02d}-seed{seed}" for seed in (0, 1) for i in range(12)]
    values = (odds.repeat(2, 1, 1), losses.repeat(2, 1, 1), odds[..., 0].repeat(2, 1))
    return Outcomes(names, masks.repeat(2, 1), *values)


def test_a_ranking_by_the_truth_predicts_outcomes_that_follow_the_truth() -> None:
    data = EmojiArtists("new")
    asked = questions(data.held_out)
    truth = baselines(asked, data, torch.rand(128, 3, 32, 32))["label_search"]
    found = measured(asked, truth, data, outcomes(data, "counts"), [0, 1])
    for kind in KINDS:
        assert float(found[f"R-precision, {kind}"].mean()) == 1
        for measure in ("judge", "loss"):
            for title in ("object",) if kind == "object" else ("new artist", "known artist"):
                assert float(found[f"scores, half by {measure}, {title}"].min()) == pytest.approx(1)
    assert len(found["scores, half by judge, object"]) == 64
    assert len(found["scores, half by judge, new artist"]) == 2
    assert len(found["scores, half by judge, known artist"]) == 6
    assert ceilings(asked, outcomes(data, "counts"))["half by judge, object"] == pytest.approx(1)
    noise = measured(asked, truth, data, outcomes(data, "noise"), [0, 1])
    assert abs(float(noise["scores, half by judge, object"].mean())) < 0.2


def test_datamodeling_is_spearmans_correlation_of_summed_scores() -> None:
    data = EmojiArtists("new")
    asked = questions(data.held_out)
    scores = torch.randn(128, 448, generator=torch.Generator().manual_seed(1))
    known = outcomes(data, "noise")
    found = measured(asked, scores, data, known, [0])["scores, half by judge, object"]
    i = sorted({q.object for q in asked}).index(asked[10].object)
    expected = spearmanr(scores[10] @ known.kept[:12].float().T, known.odds[:12, 5, 0]).statistic
    assert float(found[i]) == pytest.approx(expected, abs=1e-6)


def test_a_whole_image_is_held_against_the_loss_under_both_names() -> None:
    data = EmojiArtists("new")
    asked = questions(data.held_out)
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(64, 448, generator=generator)
    known = outcomes(data, "noise").of("half-", [0])
    losses = torch.rand(12, 64, 4, generator=generator)
    known = replace(known, losses=losses)
    found = image_datamodeling(asked, whole.repeat_interleave(2, 0), known)
    assert found.shape == (64,)
    expected = spearmanr(whole[7] @ known.kept.float().T, -losses[:, 7, 0]).statistic
    assert float(found[7]) == pytest.approx(expected, abs=1e-6)


def test_recall_of_hidden_and_wrong_images_by_hand() -> None:
    for setting, name in (("hidden", "hidden"), ("mislabelled", "wrong")):
        data = EmojiArtists("new", setting=setting)  # type: ignore[arg-type]
        asked = questions(data.held_out)[:2]
        shown, told = data.train_set.pairs, data.train_set.told
        best, worst = torch.zeros(2, 448), torch.zeros(2, 448)
        expected = 0
        for row, question in enumerate(asked):
            axis = KINDS.index(question.kind)
            for i in range(448):
                shows, says = shown[i][axis] == question.value, told[i][axis] == question.value
                odd = (shows and not says) if name == "hidden" else (says and not shows)
                expected += odd
                best[row, i] = odd + 1e-3 * i / 448
                worst[row, i] = -float(odd) + 1e-3 * i / 448
        assert expected
        for scores, recall in ((best, 1), (worst, 0)):
            found = [
                r for values in odd_recall(asked, scores, data).values() for r in values.values()
            ]
            assert found
            assert all(float(r) == recall for each in found for r in each)
    assert odd_recall(asked, best, EmojiArtists("new")) == {}


def test_the_effect_of_a_group_is_held_against_the_runs_that_saw_it() -> None:
    pairs = [("cat", "noto"), ("dog", "noto"), ("cat", "twemoji")]
    kept = torch.ones(5, 6, dtype=torch.bool)
    kept[2, [0, 1]] = False  # without cat
    kept[3, 1] = False  # saw only a part of the cats
    kept[4] = False  # a half, of no use here
    strength = torch.tensor([4.0, 6.0, 1.0, 100.0, -50.0])
    odds = torch.zeros(5, 3, 2)
    odds[:, 0, 0] = odds[:, 2, 0] = strength
    names = [
        "full-seed0",
        "full-seed1",
        "without-object-cat-seed0",
        "without-artist-noto-seed0",
        "half-00-seed0",
    ]
    found = effects(Outcomes(names, kept, odds, torch.zeros(5, 3, 4), torch.zeros(5, 3)), pairs)
    found = [each for each in found if each.measure == "judge"]
    cat = next(each for each in found if each.value == "cat")
    assert (cat.kind, cat.images, cat.effect) == ("object", 2, 5 - 1)
    assert cat.noise == pytest.approx(2**0.5)
    assert cat.is_real
    noto = next(each for each in found if each.value == "noto")
    assert noto.effect == 0  # nothing was judged of the artist
    assert not noto.is_real


def test_outcomes_survive_their_file_and_take_finished_runs_only(tmp_path: Path) -> None:
    data = EmojiArtists("new")
    for name in ("half-00-seed0", "half-01-seed0"):
        (tmp_path / name).mkdir()
        images = (
            (data.held_out_set.images + 1)
            .mul(127.5)
            .round()
            .byte()
            .permute(0, 2, 3, 1)
            .repeat_interleave(2, 0)
        )
        losses = torch.arange(256.0).view(64, 4)
        save_file(
            {"images": images.contiguous(), "losses": losses},
            tmp_path / name / "evidence.safetensors",
        )
    facts = {"kept": [0, 5], "seed": 0}
    (tmp_path / "half-01-seed0" / "facts.json").write_text(json.dumps(facts))
    found = judged(tmp_path, Outcomes.load("none", tmp_path))
    assert found.names == ["half-01-seed0"]
    assert found.kept.nonzero()[:, 1].tolist() == [0, 5]
    assert (found.odds[0, :, 0] > 0).float().mean() > 0.95  # the real drawings
    assert torch.equal(found.strength("object", "loss")[0], torch.ones(64))
    assert torch.equal(found.strength("artist", "loss")[0], torch.full((64,), 2.0))
    torch.testing.assert_close(found.strength("artist", "likeness"), torch.ones(1, 64))
    found.save("none", tmp_path)
    again = judged(tmp_path, Outcomes.load("none", tmp_path))
    assert again.names == found.names
    assert torch.equal(again.odds, found.odds)
    assert again.of("half-", [0]).names == ["half-01"]
    assert again.of("half-", [1]).names == []
    twice = Outcomes(
        ["half-01-seed0", "half-01-seed1"],
        *(
            torch.cat([x, x + 2])
            for x in (again.kept.int(), again.odds, again.losses, again.likeness)
        ),
    )
    torch.testing.assert_close(twice.of("half-", [0, 1]).odds, again.odds + 1)
    torch.testing.assert_close(twice.of("half-", [1]).odds, again.odds + 2)


def test_a_summary_averages_seeds_and_shows_the_oracle() -> None:
    a, b = {"x": torch.tensor([0.0, 1.0])}, {"x": torch.tensor([1.0, 1.0])}
    better = {"x": torch.tensor([1.0, 1.0])}
    found = summarised([a, b], [{"1.0": a, "None": better}, {"1.0": b, "None": b}])["x"]
    assert found["by_damping"] == {"1.0": 0.75, "None": 1.0}
    assert (found["mean"], found["oracle"]) == (0.75, 1.0)
    assert 0.5 <= found["low"] <= 0.75 <= found["high"] <= 1
    assert markdown({"m": {"x": found}}, ["x"])[-1] == "| m | 0.75 [0.50, 1.00] (1.00) |"


def test_the_blamed_images_are_the_best_ranked_of_every_concept() -> None:
    data = EmojiArtists("new")
    asked = questions(data.held_out)
    truth = baselines(asked, data, torch.rand(128, 3, 32, 32))["label_search"]
    one, *_, last = parts(data)
    assert (one.count(448), last.count(448)) == (4, 45)
    shown = data.train_set.pairs
    left_out = blamed(truth, asked, one)
    assert len(left_out) == 16 * 4
    for value in one.values:
        assert sum(shown[i][0] == value for i in left_out) == 4
    assert [last.kind, *last.values] == ["artist", "twemoji", "emojione-monotone"]
    by_artist = [
        sum(shown[i][1] == value for i in blamed(truth, asked, last)) for value in last.values
    ]
    assert by_artist == [45, 45]
    # equal scores are not in the order of the table
    assert [shown[i] for i in sorted(left_out)] != [
        pair for value in one.values for pair in [p for p in shown if p[0] == value][:4]
    ]
    with_more = Part("object", 5, one.values[:1])
    assert {i for i, (name, _) in enumerate(shown) if name == one.values[0]} < blamed(
        truth, asked, with_more
    )


def test_a_drop_is_what_the_full_models_have_more() -> None:
    data = EmojiArtists("new")
    asked = questions(data.held_out)
    objects = tuple(name for name, _ in data.held_out[:4])
    part = Part("object", 5, objects)
    odds = torch.zeros(4, 64, 2)
    odds[0], odds[1], odds[2] = 1.0, 3.0, 5.0  # full: 3 on average
    odds[3, :4, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    names = ["full-seed0", "full-seed1", "full-seed2", f"{part.name('label_search')}-seed0"]
    outcomes = Outcomes(
        names, torch.ones(4, 448).bool(), odds, torch.zeros(4, 64, 4), torch.zeros(4, 64)
    )
    found = drops(outcomes, asked, [part, Part("artist", 10, ("noto",))], "label_search", [0])
    assert found["object, 5 %, judge"].tolist() == [3, 2, 1, 0]
    assert "known artist, 10 %, judge" not in found  # not retrained
    other = {key: values - 1 for key, values in found.items()}
    rows = figures_of({"label_search": found, "random": other})
    assert rows["random"]["object, 5 %, judge"]["mean"] == 0.5
    assert rows["random"]["object, 5 %, judge"]["less label search"] == [-1, -1, -1]
    text = "\n".join(page(rows))
    assert "| random | 0.50 [" in text
    assert "| random | object, 5 %, judge | -1.00 [-1.00, -1.00] |" in text
    assert "| random | object, 5 %, loss | -1000.00 [" in text  # in thousandths


def test_every_variant_is_compared_and_what_is_finished_is_not_repeated(tmp_path: Path) -> None:
    module, data = ToyDiffusion(), ToyData()
    save_trained(module, tmp_path, 3)
    with torch.no_grad():
        module.embedding.weight.mul_(1.1)
    save_trained(module, tmp_path, 6)
    case = Case(
        folder=tmp_path,
        module=module.eval(),
        batches=torch.utils.data.DataLoader(data.toys, 4),
        concepts=[Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})],
        seeds=[1],
        sampler=Sampler(steps=6, guidance=2.0),
        given=torch.randn(1, 3, 8, 8),
    )
    rows = table_variants(2, (3, 6))
    small = [
        Variant(
            name=row.name,
            method=row.method,
            layers=row.layers,
            steps=row.steps,
            scope=row.scope,
            projection=Projection(rank=2, dim=32),
        )
        for row in rows
        if row.name
        in (
            "trak",
            "trak_given",
            "tracin",
            "trak_global",
            "contrastive_trak_without_keys_and_values",
        )
    ]
    with pytest.raises(ValueError, match="'trak_given'.*the case has none"):
        compare(replace(case, given=None), small, tmp_path / "out")
    found, images = compare(case, small, tmp_path / "out")
    assert images.shape == (1, 3, 8, 8)
    given = [
        row for row in small if row.scope == "given"
    ]  # the images are made where no row asks about them
    assert torch.equal(compare(case, given, tmp_path / "given")[1], images)
    assert set(found) == {row.name for row in small}
    assert all(scores.shape == (1, 12) for grid in found.values() for scores in grid.values())
    assert set(found["trak"]) == {"None", "100.0", "10.0", "1.0", "0.1", "0.01", "agreement"}

    def differ(a: Tensor, b: Tensor) -> bool:
        return not torch.allclose(a, b, rtol=1e-3)

    assert differ(found["trak"]["None"], found["trak_global"]["None"])
    assert differ(found["trak"]["None"], found["trak_given"]["None"])
    stores = {row.store_name() for row in small}
    assert len(stores) == 2  # trak, tracin and trak_global share their traces
    assert {path.name for path in (tmp_path / "out" / "traces").iterdir()} == stores
    (tmp_path / "step-00000003.safetensors").unlink()
    again, _ = compare(case, small, tmp_path / "out")
    assert torch.equal(again["trak"]["1.0"], found["trak"]["1.0"])


def test_queries_against_several_counter_conditions_are_averaged(tmp_path: Path) -> None:
    module, data = ToyDiffusion(), ToyData()
    save_trained(module, tmp_path, 3)
    red = Concept("red", {"colour": "red", "shape": "bar"}, {"shape": "bar"})
    case = Case(
        folder=tmp_path,
        module=module.eval(),
        batches=torch.utils.data.DataLoader(data.toys, 4),
        concepts=[red],
        seeds=[1],
        sampler=Sampler(steps=6, guidance=2.0),
        counters={
            "nothing": [replace(red, absent={})],
            "blue": [replace(red, absent={"colour": "blue"})],
        },
    )
    row = Variant(
        name="both",
        method=methods.concept_trak(2),
        steps=(3,),
        projection=Projection(rank=2, dim=32),
    )
    wordings: list[tuple[str, ...]] = [("nothing",), ("blue",), ("nothing", "blue"), ()]
    rows = [replace(row, name=f"row {i}", counters=names) for i, names in enumerate(wordings)]
    nothing, blue, both, own = (
        query.features for _, _, query in answers(case, rows, tmp_path / "out")
    )
    torch.testing.assert_close(both, (nothing + blue) / 2)
    assert not torch.allclose(nothing, blue, rtol=1e-2)
    assert not torch.allclose(own, nothing, rtol=1e-2)
    # A row that came to ask another question under its old name is asked anew.
    changed = replace(rows[0], counters=("blue",))
    ((_, _, query),) = answers(case, [changed], tmp_path / "out")
    torch.testing.assert_close(query.features, blue)
    other_damping = replace(rows[0], method=replace(row.method, damping=3.0))
    assert other_damping.query_name() == rows[0].query_name()


def test_ablations_change_what_they_say() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 6, 20, generator=generator)
    left = without_the_other(queries)
    for m in range(2):
        for i in range(0, 6, 2):
            assert float(left[m, i] @ queries[m, i + 1].double()) == pytest.approx(0, abs=1e-9)
            assert float(left[m, i + 1] @ queries[m, i].double()) == pytest.approx(0, abs=1e-9)
    traces = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    gram = traces @ traces.T
    ridge = effective_damping(traces, 0.25) * gram.diagonal().mean()
    dimension = torch.trace(
        gram @ torch.linalg.inv(gram + ridge * torch.eye(9, dtype=torch.float64))
    )
    assert float(dimension) == pytest.approx(9 / 4, rel=1e-6)
    names = [row.name for row in variants()]
    assert len(set(names)) == len(names)
    asked = questions(EmojiArtists("new").held_out)[:2]
    known = {kind: ["a", q.value, "b"] for kind, q in zip(KINDS, asked, strict=True)}
    swapped = counters(asked, known)["swapped"]
    absent: list[Any] = [concept.absent for concept in swapped]
    assert [each[kind] for each, kind in zip(absent, KINDS, strict=True)] == ["b", "b"]
    assert [s.present for s in swapped] == [q.concept().present for q in asked]


def test_the_table_has_every_preset() -> None:
    names = {row.method.name for row in table_variants(2, (1,))}
    # Its traces come from training itself, not from a capture that the table's methods share.
    assert set(methods.PRESETS) - {"inline_trak"} <= names
    assert [row.name for row in table_variants(2, (1,), ["trak", "das"])] == ["trak", "das"]
    with pytest.raises(ValueError, match=r"unknown \['trakk'\]. Known: concept_trak, "):
        table_variants(2, (1,), ["trakk"])


def test_the_published_row_is_what_its_authors_run() -> None:
    names = ["concept_trak_published", "concept_trak_published_given"]
    row, given = table_variants(5, (3, 6, 9), names)
    assert [row.name, given.name] == names
    for each in (row, given):
        # Nothing of the table's states and checkpoints but the last of these.
        assert each.steps == (9,)
        assert each.layers == ("*attn2*",)
        assert each.damping == "None"
        assert each.method.normalisation == "sample"
        inverted = each.method.training_dict()["trajectory"]
        assert inverted["class"] == "Inverted"
        assert (inverted["steps"], inverted["guidance"], inverted["timesteps"]) == (50, 7.5, 9)
    assert row.method.query_trajectory == Generated(timesteps=9)
    assert given.method.query_trajectory == given.method.training_trajectory
    assert given.store_name() == row.store_name()
    (cheap,) = table_variants(5, (3, 6, 9), ["concept_trak_paper"])
    assert cheap.steps == (3, 6, 9)
    assert cheap.layers is None
    assert cheap.store_name() != row.store_name()
    with pytest.raises(ValueError, match="unknown.*concept_trak_publishd.*concept_trak_published"):
        table_variants(5, (9,), ["concept_trak_publishd"])


def test_trained_weights_are_saved_after_the_chosen_steps(tmp_path: Path) -> None:
    module = ToyDiffusion()
    module.denoiser.conv_in.requires_grad_(False)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[SaveTrained(tmp_path, [1, 3])], **quiet
    )  # type: ignore[arg-type]
    trainer.fit(module, datamodule=ToyData())
    assert saved_steps(tmp_path) == [1, 3]
    last = load_file(tmp_path / "step-00000003.safetensors")
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    assert last.keys() == trained.keys()
    assert all(torch.equal(last[name], value) for name, value in trained.items())
    load_trained(module, tmp_path, 1)
    assert not torch.equal(module.embedding.weight, last["embedding.weight"])


def test_the_groups_table_is_in_standard_deviations_and_names_what_is_real() -> None:
    def effect(value: str, size: float) -> Effect:
        return Effect("without-artist", "artist", value, 56, "loss", size, 0.5)

    lines = lines_of([effect("ann", 2.0), effect("bo", -0.5)])
    [row] = [line for line in lines if line.startswith("| artist, artists | loss | 2 |")]
    assert "+1.50 [" in row  # the mean of +4 and -1
    assert row.endswith("| 1 | ann (+4.0) |")


def test_forward_passes_are_counted_for_images_and_questions() -> None:
    point = Point("a row", timesteps=5, checkpoints=3)
    assert point.per_image == 15
    assert point.per_query == 130  # 50 steps with guidance, then 15 states under two conditions


def test_the_curve_tells_how_many_standard_errors_a_setting_is_below_the_most_expensive() -> None:
    def row(mean: float) -> dict[str, dict[str, float]]:
        figure = {"mean": mean, "low": mean - 0.196, "high": mean + 0.196}
        return dict.fromkeys(COLUMNS, figure)

    rows = {point.row: row(0.5) for point in POINTS} | {MOST: row(0.8), "1 timestep": row(0.9)}
    lines = curve(rows)
    [one] = [line for line in lines if line.startswith("| 1 timesteps")]
    assert one.split(" | ")[1:4] == ["3", "106", "0.90 (-1.0)"]
    [default] = [line for line in lines if line.startswith("| 5 timesteps x 3")]
    assert "0.50 (+3.0)" in default
    [most] = [line for line in lines if "16,384 numbers" in line and line.startswith("|")]
    assert "0.80 |" in most
    assert "(" not in most
    assert curve({MOST: row(0.8)}) == []


def test_the_committed_pages_are_what_the_committed_outcomes_say(tmp_path: Path) -> None:
    for name in ("counterfactual.md", "emoji_labelled.md", "retrained.safetensors"):
        (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    options = ["--results", str(tmp_path), "--runs", str(tmp_path / "none")]
    counterfactual.main(options)
    counterfactual.main(
        [*options, "--methods", *counterfactual.METHODS[:2], "label_search", "--seeds", "0", "1"]
    )
    groups.main(["--results", str(tmp_path)])
    for name in ("counterfactual.md", "emoji_labelled.md"):
        said, committed = ((folder / name).read_text() for folder in (tmp_path, RESULTS))
        assert [line for line in said.splitlines() if line.startswith("|")] == [
            line for line in committed.splitlines() if line.startswith("|")
        ]
