"""The EmojiArtists benchmark: does a ranking find what shares the concept, and does it predict what retraining does?

python -m recipes.emoji_artists.benchmark                      # labelled, one training seed
python -m recipes.emoji_artists.benchmark --setting hidden --seeds 0 1 2

Fine-tunes what is missing (`retrain.py`), traces and asks every method (`compare.py`), and writes
`results/benchmark_<setting>.json` and `.md`. Everything is resumable.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.baselines import image_similarity, label_search
from ctrak_lightning.attribution.scoring import soft_thresholded, standardised
from ctrak_lightning.metrics import (
    bootstrap_difference,
    datamodeling_correlations,
    functional,
)
from ctrak_lightning.metrics import noise_ceiling as ceiling
from recipes.benchmarks.compare import DAMPINGS, Case, Variant, compare
from recipes.benchmarks.plots import bars
from recipes.benchmarks.tables import NOTE, RETRIEVAL, markdown, summarised
from recipes.benchmarks.variants import table_variants
from recipes.emoji_artists import retrain
from recipes.emoji_artists.data import KINDS, NEW_ARTISTS, SETTINGS, EmojiArtists
from recipes.emoji_artists.evaluate import Question, questions
from recipes.emoji_artists.groups import effects, lines_of
from recipes.emoji_artists.judge import SAMPLER, EmojiJudge
from recipes.emoji_artists.module import EmojiDiffusion
from recipes.emoji_artists.network import patchify
from recipes.emoji_artists.outcomes import RESULTS, STRENGTHS, Outcomes, judged

TIMESTEPS = 5
STEPS = (100, 200, 300)
# The retrained subsets, and the kinds of concept whose presence differs enough between them to be measured.
PLANS = {"half": KINDS, "artist-half": ("artist",)}
LEAST_SUBSETS = 8
CEILING_SEEDS = (0, 1)
# A retraining seed on which nothing was chosen: the differences to label search are shown on it alone too.
SECOND = 1
# Rows that are also shown with the runs of all seeds joined: the mean of their standardised scores.
JOINED = (
    "concept_trak",
    "concept_trak_given",
    "concept_trak_norm",
    "concept_trak_norm_given",
    "d_trak_given",
)
# The images whose token does not say what they show, by setting.
ODD: dict[str, str | None] = {"labelled": None, "hidden": "hidden", "mislabelled": "wrong"}
THRESHOLD = 2.0
REFERENCE = "label_search"


def variants(only: Sequence[str] | None = None) -> list[Variant]:
    """The gradient methods of the table."""
    return table_variants(TIMESTEPS, STEPS, only)


def references(asked: list[Question], data: EmojiArtists, images: Tensor) -> dict[str, Tensor]:
    """Rankings without gradients [Q, N]: by the tokens that training showed, by pixels, by the judge's features; ``_given``
    compares with the real drawing of the pair instead of the generated one.

    Args:
        asked: the questions.
        data: the data.
        images: what was generated for them [Q, 3, 32, 32] in [0, 1].
    """
    told = dict(zip(KINDS, zip(*data.train_set.told, strict=True), strict=True))
    rankings = {"label_search": label_search([q.concept() for q in asked], told)}
    judge = EmojiJudge.trained()
    shown = (data.train_set.images + 1) / 2
    given = ((data.held_out_set.images + 1) / 2).repeat_interleave(len(KINDS), 0)
    for suffix, queries in (("", images), ("_given", given)):
        rankings[f"pixel_similarity{suffix}"] = image_similarity(queries, shown)
        rankings[f"judge_features{suffix}"] = image_similarity(queries, shown, judge.features)
    return rankings


def recognisable(asked: list[Question], images: Tensor) -> dict[str, int]:
    """In how many of the generated images the judge finds the object, and the artist, they were asked for (odds above 1)."""
    odds = EmojiJudge.trained().log_odds(images, [q.object for q in asked], [q.artist for q in asked])
    return {
        kind: sum(float(row[axis]) > 0 for row, q in zip(odds, asked, strict=True) if q.kind == kind)
        for axis, kind in enumerate(KINDS)
    }


def retrieval(asked: list[Question], scores: Tensor, data: EmojiArtists) -> dict[str, dict[str, Tensor]]:
    """Every retrieval metric per kind of concept, one value per question. What counts is what an image shows."""
    shown = data.train_set.pairs
    relevant = torch.tensor([[pair[KINDS.index(q.kind)] == q.value for pair in shown] for q in asked])
    values = {name: metric(scores, relevant) for name, metric in RETRIEVAL.items()}
    return {
        name: {kind: value[torch.tensor([q.kind == kind for q in asked])] for kind in KINDS}
        for name, value in values.items()
    }


def datamodeling(asked: list[Question], scores: Tensor, outcomes: Outcomes) -> dict[str, dict[str, Tensor]]:
    """Concept datamodeling score per measure of strength and kind: Spearman over retrained models between the sum of the
    scores of what they saw and the strength they show. Objects per question [64]; artists per artist [8], the mean
    of its questions' scores and strengths."""
    result: dict[str, dict[str, Tensor]] = {measure: {} for measure in STRENGTHS}
    for kind in KINDS:
        rows = [i for i, q in enumerate(asked) if q.kind == kind]
        values = [asked[i].value for i in rows]
        predicted = _grouped(_comparable(scores[rows].double()), values)
        for measure in STRENGTHS:
            wanted = _grouped(outcomes.strength(kind, measure).double().T, values)  # [groups, R]
            result[measure][kind] = datamodeling_correlations(predicted, outcomes.kept, wanted)
    return result


def image_datamodeling(asked: list[Question], scores: Tensor, outcomes: Outcomes) -> Tensor:
    """Linear datamodeling score of whole images, one per pair [64]: Spearman over retrained models between the summed scores of
    what they saw, both concepts' together, and how well they denoise the pair's real image told both names (TRAK,
    arXiv 2303.14186, definition 2.3). A whole-image method has the same scores for both concepts."""
    joined = _comparable(scores.double()).view(len(asked) // len(KINDS), len(KINDS), -1).sum(1)
    return datamodeling_correlations(joined, outcomes.kept, -outcomes.losses[:, :, 0].double().T)


def _comparable(scores: Tensor) -> Tensor:
    spread = scores.std(1, keepdim=True)
    return torch.where(spread > 0, scores / spread.clamp(min=1e-12), scores)


def case(folder: Path, data: EmojiArtists, asked: list[Question]) -> Case:
    module = EmojiDiffusion("lora").eval()
    return Case(
        folder=folder,
        module=module,
        batches=data.trace_dataloader(),
        concepts=[q.concept() for q in asked],
        seeds=[i // len(KINDS) for i in range(len(asked))],
        sampler=SAMPLER,
        given=patchify(data.held_out_set.images).repeat_interleave(len(KINDS), 0),
    )


def odd_recall(asked: list[Question], scores: Tensor, data: EmojiArtists) -> dict[str, dict[str, Tensor]]:
    """Among the ``2 R`` best-ranked (R images show the concept): the share of the images that show it without its token
    (``hidden``), and of those that carry its token and show another (``wrong``), by kind and value of the concept [its
    questions]; values without such images left out."""
    result: dict[str, dict[str, list[Tensor]]] = {}
    for question, row in zip(asked, scores, strict=True):
        axis = KINDS.index(question.kind)
        shows = torch.tensor([pair[axis] == question.value for pair in data.train_set.pairs])
        told = torch.tensor([pair[axis] == question.value for pair in data.train_set.told])
        for name, wanted in (("hidden", shows & ~told), ("wrong", told & ~shows)):
            if name == ODD[data.setting] and wanted.any():
                top = 2 * int(shows.sum())
                # recall_at_k divides by min(k, relevant), and there are never more than 2 R of these
                recall = functional.recall_at_k(row, wanted, top)[0]
                result.setdefault(question.kind, {}).setdefault(question.value, []).append(recall)
    return {
        kind: {value: torch.stack(recalls) for value, recalls in values.items()}
        for kind, values in result.items()
    }


def measured(
    asked: list[Question], scores: Tensor, data: EmojiArtists, outcomes: Outcomes, seeds: list[int]
) -> dict[str, Tensor]:
    """Every figure of one ranking, one value per question (artists' datamodeling: per artist), by a flat name."""
    figures = {
        f"{metric}, {kind}": values
        for metric, kinds in retrieval(asked, scores, data).items()
        for kind, values in kinds.items()
    }
    odd = odd_recall(asked, scores, data)
    left_out = effects(outcomes, data.held_out, STRENGTHS) if odd else []
    real = {effect.value for effect in left_out if effect.is_real}
    for kind, recalls in odd.items():
        figures[f"recall of {ODD[data.setting]} images, {kind}"] = torch.cat(list(recalls.values()))
        mattered = [recall for value, found in recalls.items() if value in real for recall in found]
        if len(mattered) > 1:  # one question has no interval
            figures[f"recall of {ODD[data.setting]} images that mattered, {kind}"] = torch.stack(mattered)
    summed = {"scores": scores, "contributions": soft_thresholded(scores.double(), THRESHOLD)}
    for plan, kinds in PLANS.items():
        retrained = outcomes.of(f"{plan}-", seeds)
        if len(retrained.names) < LEAST_SUBSETS:
            continue
        for name, each in summed.items():
            found = datamodeling(asked, each, retrained)
            if plan == "half":
                figures[f"{name}, {plan} by loss, whole image"] = image_datamodeling(asked, each, retrained)
            for measure in STRENGTHS:
                for kind in kinds:
                    for title, values in _split(kind, found[measure][kind], asked).items():
                        figures[f"{name}, {plan} by {measure}, {title}"] = values
    return figures


def _split(kind: str, values: Tensor, asked: list[Question]) -> dict[str, Tensor]:
    """Artists apart by whether the base model already drew like them: what it knew, the fine-tune need not teach."""
    if kind != "artist":
        return {kind: values}
    names = sorted({q.value for q in asked if q.kind == kind})
    is_new = torch.tensor([name in NEW_ARTISTS for name in names])
    return {"new artist": values[is_new], "known artist": values[~is_new]}


def ceilings(asked: list[Question], outcomes: Outcomes) -> dict[str, float]:
    """The best concept datamodeling score within reach, from the agreement of two training seeds on the subsets that were
    retrained with both."""
    result = {}
    for plan, kinds in PLANS.items():
        first, second = (outcomes.of(f"{plan}-", [seed]) for seed in CEILING_SEEDS)
        common = [run for run in first.names if run in second.names]
        if len(common) < LEAST_SUBSETS:
            continue
        for measure in STRENGTHS:
            for kind in kinds:
                values = [q.value for q in asked if q.kind == kind]
                a, b = (
                    _grouped(each.only(common).strength(kind, measure).double().T, values)
                    for each in (first, second)
                )
                for title, best in _split(kind, ceiling(a, b), asked).items():
                    result[f"{plan} by {measure}, {title}"] = float(best.mean())
    return result


def _grouped(rows: Tensor, values: list[str]) -> Tensor:
    """Rows [64, ...] averaged over equal values [groups, ...], in the order of the sorted values."""
    groups = torch.tensor([[value == name for value in values] for name in sorted(set(values))]).double()
    return (groups / groups.sum(1, keepdim=True)) @ rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="labelled")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the traced fine-tunes")
    parser.add_argument(
        "--retrain-seeds", nargs="*", type=int, default=[0, 1], help="of the retrained halves"
    )
    parser.add_argument("--methods", nargs="+", default=None, help="rows of the table; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the committed outcomes and the tables"
    )
    parser.add_argument("--suffix", default="", help="of the results' file names, for a table of its own")
    args = parser.parse_args()
    folder = args.runs / args.setting
    for plans, seeds in ((["full"], args.seeds), (PLANS, args.retrain_seeds)):
        if seeds:
            retrain.main(
                [str(folder), "--setting", args.setting, "--plan", *plans, "--seeds", *map(str, seeds)]
            )
    outcomes = judged(folder, Outcomes.load(args.setting, args.results))
    outcomes.save(args.setting, args.results)

    data = EmojiArtists("new", setting=args.setting)
    asked = questions(data.held_out)
    honest: dict[str, list[dict[str, Tensor]]] = {}
    grids: dict[str, list[dict[str, dict[str, Tensor]]]] = {}
    chosen = variants(args.methods)
    fixed = {variant.name: str(variant.method.damping) for variant in chosen}
    again: dict[str, list[dict[str, Tensor]]] = {}
    runs: dict[str, dict[str, list[Tensor]]] = {}
    recognised: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        one = case(folder / f"full-seed{seed}", data, asked)
        found, images = compare(one, chosen, folder / "scores" / f"seed{seed}")
        for kind, count in recognisable(asked, images).items():
            recognised[kind].append(count)
        for name in (name for name in JOINED if name in found):
            for damping, row in found[name].items():
                runs.setdefault(name, {}).setdefault(damping, []).append(standardised(row.double()))
        rankings = {name: {"None": row} for name, row in references(asked, data, images).items()} | found
        for name, scores in rankings.items():
            grid = {
                damping: measured(asked, row, data, outcomes, args.retrain_seeds)
                for damping, row in scores.items()
            }
            used = fixed.get(name, "None")
            honest.setdefault(name, []).append(grid[used])
            again.setdefault(name, []).append(measured(asked, scores[used], data, outcomes, [SECOND]))
            grids.setdefault(name, []).append(grid)
    if len(args.seeds) > 1:
        for name, grid_of_runs in runs.items():
            title = f"{name}, {len(args.seeds)} runs joined"
            grids[title] = [
                {
                    damping: measured(asked, torch.stack(rows).mean(0), data, outcomes, args.retrain_seeds)
                    for damping, rows in grid_of_runs.items()
                }
            ]
            honest[title] = [grids[title][0][fixed[name]]]
    options = f"--setting {args.setting} --seeds {' '.join(map(str, args.seeds))}"
    options += f" --retrain-seeds {' '.join(map(str, args.retrain_seeds))}"
    options += f" --methods {' '.join(args.methods)}" if args.methods else ""
    options += f" --suffix {args.suffix}" if args.suffix else ""
    name = f"benchmark_{args.setting}{args.suffix}"
    rows = {name: summarised(per_seed, grids[name]) for name, per_seed in honest.items()}
    facts: dict[str, Any] = {
        "command": f"python -m recipes.emoji_artists.benchmark {options}",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "retrained": len(outcomes.names),
        "dampings": [str(damping) for damping in DAMPINGS],
        "fixed_damping": fixed,
        "recognised": recognised,
        "rows": rows,
    }
    facts["noise_ceilings"] = ceilings(asked, outcomes)
    facts["groups_left_out"] = [
        asdict(effect) | {"is_real": effect.is_real} for effect in effects(outcomes, data.held_out, STRENGTHS)
    ]
    facts["contributions_less_label_search"] = _against_reference(honest)
    facts["subsets_of_second_retraining"] = len(outcomes.of("half-", [SECOND]).names)
    facts["on_second_retraining"] = _against_reference(again)
    (args.results / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    draw(args.results / f"{name}.png", args.setting, rows)
    text = _page(facts)
    (args.results / f"{name}.md").write_text(text, "utf-8")
    print(text)


def draw(path: Path, setting: str, rows: dict[str, dict[str, Any]]) -> None:
    """The figures that decide, as a picture."""
    wanted = (
        "R-precision, object",
        "R-precision, artist",
        "contributions, half by loss, object",
        "contributions, artist-half by loss, new artist",
        *(key for key in next(iter(rows.values())) if key.startswith("recall of")),
    )
    keys = [key for key in wanted if key in next(iter(rows.values()))]
    bars(
        path,
        rows,
        keys,
        f"EmojiArtists, {setting}: mean, 95 % interval; blue: best damping by the metric itself",
    )


def _against_reference(honest: dict[str, list[dict[str, Tensor]]]) -> dict[str, dict[str, list[float]]]:
    """Every concept datamodeling score less label search's on the same questions: mean, low, high (paired bootstrap)."""
    keys = [key for key in honest[REFERENCE][0] if key.startswith("contributions")]

    def mean(name: str, key: str) -> Tensor:
        return torch.stack([figures[key].double() for figures in honest[name]]).mean(0)

    return {
        name: {
            key: [
                float((mean(name, key) - mean(REFERENCE, key)).mean()),
                *map(float, bootstrap_difference(mean(name, key), mean(REFERENCE, key))),
            ]
            for key in keys
        }
        for name in honest
        if name != REFERENCE
    }


def _page(facts: dict[str, Any]) -> str:
    rows = facts["rows"]
    keys = list(next(iter(rows.values())))
    lines = [f"`{facts['command']}`; {facts['machine']}; {facts['retrained']} retrained models.", NOTE, ""]
    counts = {kind: ", ".join(map(str, each)) for kind, each in facts["recognised"].items()}
    lines.append(
        f"Of the 64 images generated for the questions the judge recognises the object in {counts['object']}, the artist in "
        f"{counts['artist']} (one number per traced run). All are asked about."
    )
    titles = {
        "scores": "Concept datamodeling score",
        "contributions": f"The same of contributions (threshold {THRESHOLD})",
    }
    plain = [key for key in keys if key.split(", ")[0] not in titles]
    lines += ["", "### Retrieval", "", *markdown(rows, plain)]
    for prefix, title in titles.items():
        chosen = [key for key in keys if key.startswith(prefix)]
        if chosen:
            lines += ["", f"### {title}", "", *markdown(rows, chosen)]
    if facts["noise_ceilings"]:
        lines += ["", "### Noise ceilings (from two training seeds)", ""]
        lines += [f"- {key}: {value:.2f}" for key, value in facts["noise_ceilings"].items()]
    if facts["groups_left_out"]:
        lines += [
            "",
            "### Groups of images left out, one at a time",
            "",
            *lines_of(facts["groups_left_out"]),
        ]
    title = "Contributions, less label search (paired bootstrap over questions)"
    lines += _difference_lines(title, facts["contributions_less_label_search"])
    title = f"The same on retraining seed {SECOND} alone ({facts['subsets_of_second_retraining']} halves)"
    lines += _difference_lines(title, facts["on_second_retraining"])
    return "\n".join(lines) + "\n"


def _difference_lines(title: str, differences: dict[str, dict[str, list[float]]]) -> list[str]:
    keys = list(next(iter(differences.values())))
    if not keys:
        return []
    lines = ["", f"### {title}", "", f"| method | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name, row in differences.items():
        cells = [f"{row[key][0]:+.3f} [{row[key][1]:+.3f}, {row[key][2]:+.3f}]" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
