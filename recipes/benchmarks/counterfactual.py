"""The counterfactual: leave out the images that a method blames for a concept, fine-tune again, and
see how much of it is gone.

python -m recipes.benchmarks.counterfactual            # after `emoji`, whose traces it asks
python -m recipes.benchmarks.counterfactual --methods concept_trak label_search --seeds 0 1

Concepts share fine-tunes: a run leaves out the best-ranked images of several of them (`parts`).
That is the same for every method, and costs every method the same number of images. Resumable: what
is committed in `results/retrained.safetensors` is not done again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import standardised
from ctrak_lightning.metrics import bootstrap_difference, bootstrap_interval, functional

from ..emoji_artists.data import KINDS, NEW_ARTISTS, EmojiArtists
from ..emoji_artists.evaluate import Question, questions
from . import emoji, retrain
from .compare import compare
from .outcomes import MEASURES, Outcomes, judged
from .tables import command_of, grid, interval, machine, parser_of, publish

METHODS = (
    "concept_trak_given",
    "concept_trak_norm_given",
    "concept_trak_cross_attention_given",
    "label_search",
    "random",
    "judge_features_given",
    "d_trak_given",
    "concept_trak_norm_per_sample",
)
REFERENCE = "label_search"
TRACED_SEED = 1
FULL_SEEDS = (0, 1, 2)
FEWEST = 4  # concepts; an interval over fewer would say nothing
TITLES = {
    "judge": "Classifier's log odds in generated images",
    "loss": "What the name is worth to the denoising loss (x 1000)",
    "likeness": "Likeness of generated to real images (cosine of the classifier's features)",
}
SCALES = {"judge": 1.0, "loss": 1000.0, "likeness": 1.0}


@dataclass(frozen=True)
class Part:
    """One fine-tune per method: the concepts (``values``) whose best-ranked images it leaves out,
    and how many of each, in per cent of the training set."""

    kind: str
    percent: int
    values: tuple[str, ...]

    def name(self, method: str) -> str:
        return f"drop-{method}-{self.kind}-{self.percent:02d}-{self.values[0]}"

    def count(self, size: int) -> int:
        return round(self.percent / 100 * size)


def parts(data: EmojiArtists) -> list[Part]:
    """Objects (7 images each, 1.6 % of all): 1 % for sixteen of them at once, 5 % for four at once;
    artists (56 images each, 12.5 %): 10 % for a new and a known one at once."""
    objects = sorted({name for name, _ in data.train_set.pairs})[::4]
    artists = sorted({artist for _, artist in data.train_set.pairs})
    known = [artist for artist in artists if artist not in NEW_ARTISTS]
    pairs = list(zip(sorted(NEW_ARTISTS), known, strict=False))
    return [
        Part("object", 1, tuple(objects)),
        *(Part("object", 5, tuple(objects[i : i + 4])) for i in (0, 4, 8, 12)),
        *(Part("artist", 10, pair) for pair in pairs),
    ]


def best_ranked(scores: Tensor, count: int) -> set[int]:
    """The positions of the images that several questions about one concept [n, N] rank highest: by
    their mean standardised scores, ties in a random order."""
    row = standardised(scores.double()).mean(0)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(20254))
    best = order[row[order].argsort(descending=True, stable=True)]
    return set(best[:count].tolist())


def blamed(scores: Tensor, asked: Sequence[Question], part: Part) -> set[int]:
    """The positions a part leaves out: the best-ranked images of each of its concepts."""
    found: set[int] = set()
    for value in part.values:
        rows = [i for i, q in enumerate(asked) if (q.kind, q.value) == (part.kind, value)]
        found |= best_ranked(scores[rows], part.count(scores.shape[1]))
    return found


def rankings(
    folder: Path, data: EmojiArtists, asked: Sequence[Question], names: Sequence[str]
) -> dict[str, Tensor]:
    """Scores [Q, N] of the methods asked, from the traces of one full fine-tune; nothing is traced
    where none is asked.

    Raises:
        ValueError: an unknown method; the message lists the known ones.
    """
    if not names:
        return {}
    rows = {row.name: row for row in emoji.variants()}
    wanted = {*names, "concept_trak"}  # one that asks of generated images, for the baselines
    case = emoji.case(folder / f"full-seed{TRACED_SEED}", data, list(asked))
    chosen = [row for name, row in rows.items() if name in wanted]
    others = (*emoji.BASELINES, "random")
    if unknown := sorted(set(names) - set(rows) - set(others)):
        known = ", ".join([*rows, *others])
        raise ValueError(f"counterfactual({list(names)}): unknown {unknown}. Known: {known}.")
    found, images = compare(case, chosen, folder / "scores" / f"seed{TRACED_SEED}")
    scores = {row.name: found[row.name][row.damping] for row in chosen}
    scores |= emoji.baselines(list(asked), data, images)
    noise = torch.rand(len(data.train_set), generator=torch.Generator().manual_seed(20255))
    shuffles = torch.Generator().manual_seed(20256)
    by_value = {q.value: noise[torch.randperm(len(noise), generator=shuffles)] for q in asked}
    scores["random"] = torch.stack([by_value[q.value] for q in asked])
    return {name: scores[name] for name in names}


def drops(
    outcomes: Outcomes,
    asked: Sequence[Question],
    planned: Sequence[Part],
    method: str,
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """By measure, kind and percent: the strength of each concept in the full models (mean over
    their seeds) less that in the model without its blamed images [concepts]; an artist's is the
    mean over its eight pairs."""
    full = outcomes.of("full", FULL_SEEDS)
    pairs = [q for q in asked if q.kind == KINDS[0]]  # one question of every held-out pair
    result: dict[str, list[Tensor]] = {}
    for part in planned:
        left = outcomes.of(part.name(method), seeds)
        if not left.names:
            continue
        for value in part.values:
            columns = [i for i, q in enumerate(pairs) if value in (q.object, q.artist)]
            age = "" if part.kind == "object" else "new " if value in NEW_ARTISTS else "known "
            for measure in MEASURES:
                before, after = (
                    each.strength(part.kind, measure)[0, columns].mean() for each in (full, left)
                )
                drop = functional.counterfactual_drop(before[None], after[None])[0]
                key = f"{age}{part.kind}, {part.percent} %, {measure}"
                result.setdefault(key, []).append(drop.double())
    return {key: torch.stack(values) for key, values in result.items()}


def figures_of(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every mean drop with its interval, and how it differs from label search's."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    reference = found.get(REFERENCE, {})
    for name, figures in found.items():
        rows[name] = {}
        for key, values in figures.items():
            row: dict[str, Any] = {"mean": float(values.mean()), "concepts": len(values)}
            enough = len(values) >= FEWEST
            row["low"], row["high"] = bootstrap_interval(values) if enough else (None, None)
            if name != REFERENCE and key in reference and enough:
                difference = float((values - reference[key]).mean())
                ends = bootstrap_difference(values, reference[key])
                row["less label search"] = [difference, *ends]
            rows[name][key] = row
    return rows


def page(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The tables, one per measure, and how much more than label search each method takes away."""
    lines = [
        "How much of a concept is lost when the images that a method blames for it are left out of "
        "the fine-tune: mean over concepts [95 % bootstrap interval over concepts]; higher = the "
        "method blamed the right images."
    ]
    first = next(iter(rows.values()))
    for measure, title in TITLES.items():
        keys = [key for key in first if key.endswith(measure)]
        heads = [f"{k.rpartition(', ')[0]} ({first[k]['concepts']} concepts)" for k in keys]
        cells = [
            [name, *(interval(row[key], SCALES[measure]) for key in keys)]
            for name, row in rows.items()
        ]
        lines += ["", f"### {title}", "", *grid(["method", *heads], cells)]
    differences = [
        (name, key, [SCALES[key.rpartition(", ")[2]] * value for value in row["less label search"]])
        for name, figures in rows.items()
        for key, row in figures.items()
        if "less label search" in row
    ]
    lines += ["", "### Less label search, paired over concepts", ""]
    return lines + grid(
        ("method", "what", "difference"),
        [
            (name, key, f"{m:+.2f} [{low:+.2f}, {high:+.2f}]")
            for name, key, (m, low, high) in differences
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.counterfactual", __doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="of the fine-tunes without the images"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    folder = args.runs / "labelled"
    data = EmojiArtists("new")
    asked, planned = questions(data.held_out), parts(data)
    known = judged(folder, Outcomes.load("labelled", args.results))
    missing = [
        (name, part, seed)
        for seed in args.seeds
        for name in args.methods
        for part in planned
        if f"{part.name(name)}-seed{seed}" not in known.names
    ]
    if missing:
        full = [(run, seed) for seed in FULL_SEEDS for run in retrain.plan("full", data)]
        retrain.finish(folder, "labelled", full)
        names = list(dict.fromkeys(name for name, _, _ in missing))
        scores = rankings(folder, data, asked, names)
        everything = set(range(len(data.train_set)))
        jobs = []
        for name, part, seed in missing:
            kept = sorted(everything - blamed(scores[name], asked, part))
            jobs.append((retrain.Run(part.name(name), kept), seed))
        retrain.finish(folder, "labelled", jobs)
        known = judged(folder, known)
        known.save("labelled", args.results)
    found = {name: drops(known, asked, planned, name, args.seeds) for name in args.methods}
    head = f"`{command_of(parser, args)}`; {machine()}."
    lines = [head, "", *page(figures_of(found))]
    publish(args.results / "counterfactual.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
