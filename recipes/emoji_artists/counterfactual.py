"""The counterfactual: leave out the images a method blames for a concept, fine-tune again, and see how much of it is gone.

python -m recipes.emoji_artists.counterfactual                       # after `benchmark`, whose traces it asks
python -m recipes.emoji_artists.counterfactual --methods concept_trak label_search random

Concepts share fine-tunes: a run leaves out the best-ranked images of several of them (`parts`). That is the same for every
method, and costs every method the same number of images. Everything is resumable.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import standardised
from ctrak_lightning.metrics import bootstrap_difference, bootstrap_interval, functional
from recipes.benchmarks.compare import compare
from recipes.benchmarks.plots import bars
from recipes.emoji_artists import benchmark, retrain
from recipes.emoji_artists.data import KINDS, NEW_ARTISTS, EmojiArtists
from recipes.emoji_artists.evaluate import Question, questions
from recipes.emoji_artists.outcomes import MEASURES, RESULTS, Outcomes, judged

METHODS = (
    "concept_trak_given",
    "concept_trak_norm_given",
    "label_search",
    "random",
    "judge_features_given",
    "d_trak_given",
    "concept_trak_norm_per_sample",
)
REFERENCES = (
    "label_search",
    "pixel_similarity",
    "pixel_similarity_given",
    "judge_features",
    "judge_features_given",
)
TRACED_SEED = 1
FULL_SEEDS = (0, 1, 2)
FEWEST = 4  # concepts; an interval over fewer would say nothing


@dataclass(frozen=True)
class Part:
    """One fine-tune per method: the concepts whose best-ranked images it leaves out, and how many of each.

    Args:
        kind: of the concepts.
        percent: of the training set, left out for each concept.
        values: the concepts.
    """

    kind: str
    percent: int
    values: tuple[str, ...]

    def name(self, method: str) -> str:
        return f"drop-{method}-{self.kind}-{self.percent:02d}-{self.values[0]}"

    def count(self, size: int) -> int:
        return round(self.percent / 100 * size)


def parts(data: EmojiArtists) -> list[Part]:
    """Objects (7 images each, 1.6 % of all): 1 % for sixteen of them at once, 5 % for four at once; artists (56 images
    each, 12.5 %): 10 % for a new and a known one at once."""
    objects = sorted({name for name, _ in data.train_set.pairs})[::4]
    artists = sorted({artist for _, artist in data.train_set.pairs})
    known = [artist for artist in artists if artist not in NEW_ARTISTS]
    pairs = list(zip(sorted(NEW_ARTISTS), known, strict=False))
    return [
        Part("object", 1, tuple(objects)),
        *(Part("object", 5, tuple(objects[i : i + 4])) for i in (0, 4, 8, 12)),
        *(Part("artist", 10, pair) for pair in pairs),
    ]


def blamed(scores: Tensor, asked: Sequence[Question], part: Part) -> set[int]:
    """The positions a part leaves out: the best-ranked images of each of its concepts. An artist's scores are the mean of
    the standardised scores of its questions; equal scores are in a random order.

    Args:
        scores: of all questions [Q, N].
        asked: the questions.
        part: of which concepts, and how many images.
    """
    found: set[int] = set()
    for value in part.values:
        rows = [i for i, q in enumerate(asked) if (q.kind, q.value) == (part.kind, value)]
        row = standardised(scores[rows].double()).mean(0)
        order = torch.randperm(len(row), generator=torch.Generator().manual_seed(20254))
        best = order[row[order].argsort(descending=True, stable=True)]
        found |= set(best[: part.count(len(row))].tolist())
    return found


def rankings(
    folder: Path, data: EmojiArtists, asked: Sequence[Question], names: Sequence[str]
) -> dict[str, Tensor]:
    """Scores [Q, N] of the methods asked, from the traces of one full fine-tune; nothing is traced where none is asked.

    Raises:
        ValueError: an unknown method; the message lists the known ones.
    """
    others = (*REFERENCES, "random")
    rows = {row.name: row for row in benchmark.variants()}
    if unknown := sorted(set(names) - set(rows) - set(others)):
        raise ValueError(
            f"counterfactual(methods={list(names)}): unknown {unknown}. Known: {', '.join([*rows, *others])}."
        )
    if not names:
        return {}
    case = benchmark.case(folder / f"full-seed{TRACED_SEED}", data, list(asked))
    wanted = {*names, "concept_trak"}  # one that asks of generated images, for the references
    chosen = [row for name, row in rows.items() if name in wanted]
    found, images = compare(case, chosen, folder / "scores" / f"seed{TRACED_SEED}")
    scores = {row.name: found[row.name][str(row.method.damping)] for row in chosen}
    scores |= benchmark.references(list(asked), data, images)
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
    """By measure, kind and percent: the strength of each concept in the full models (mean over their seeds) less that in
    the model without its blamed images [concepts]; an artist's is the mean over its eight pairs."""
    full = outcomes.of("full", FULL_SEEDS)
    result: dict[str, list[Tensor]] = {}
    for part in planned:
        left = outcomes.of(part.name(method), seeds)
        if not left.names:
            continue
        pairs = [q for q in asked if q.kind == KINDS[0]]  # one question of every held-out pair
        for value in part.values:
            columns = [i for i, q in enumerate(pairs) if value in (q.object, q.artist)]
            for measure in MEASURES:
                before, after = (
                    each.strength(part.kind, measure)[0, columns].mean() for each in (full, left)
                )
                drop = functional.counterfactual_drop(before[None], after[None])[0]
                title = part.kind if part.kind == "object" else f"{_age(value)} artist"
                result.setdefault(f"{title}, {part.percent} %, {measure}", []).append(drop.double())
    return {key: torch.stack(values) for key, values in result.items()}


def _age(artist: str) -> str:
    return "new" if artist in NEW_ARTISTS else "known"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="of the fine-tunes without the images"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--suffix", default="", help="of the results' file names, for a table of its own")
    args = parser.parse_args(argv)
    folder = args.runs / "labelled"
    data = EmojiArtists("new")
    asked, planned = questions(data.held_out), parts(data)
    full = [(run, seed) for seed in FULL_SEEDS for run in retrain.plan("full", data)]
    retrain.finish(folder, "labelled", full)
    known = set(judged(folder, Outcomes.load("labelled", args.results)).names)
    missing = [
        (name, part, seed)
        for seed in args.seeds
        for name in args.methods
        for part in planned
        if f"{part.name(name)}-seed{seed}" not in known
    ]
    # Rankings need traces, and are needed only where there is something left to leave out.
    scores = rankings(folder, data, asked, list(dict.fromkeys(name for name, _, _ in missing)))
    everything = set(range(len(data.train_set)))
    jobs = [
        (retrain.Run(part.name(name), sorted(everything - blamed(scores[name], asked, part))), seed)
        for name, part, seed in missing
    ]
    retrain.finish(folder, "labelled", jobs)
    outcomes = judged(folder, Outcomes.load("labelled", args.results))
    outcomes.save("labelled", args.results)
    found = {name: drops(outcomes, asked, planned, name, args.seeds) for name in args.methods}
    suffix = f" --suffix {args.suffix}" if args.suffix else ""
    options = f"--methods {' '.join(args.methods)} --seeds {' '.join(map(str, args.seeds))}{suffix}"
    facts: dict[str, Any] = {
        "command": f"python -m recipes.emoji_artists.counterfactual {options}",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "rows": figures_of(found),
    }
    (args.results / f"counterfactual{args.suffix}.json").write_text(
        json.dumps(facts, indent=1) + "\n", "utf-8"
    )
    keys = [key for key in next(iter(found.values())) if key.endswith("judge")]
    bars(
        args.results / f"counterfactual{args.suffix}.png",
        facts["rows"],
        keys,
        "What is lost without the blamed images (log odds)",
    )
    text = page(facts)
    (args.results / f"counterfactual{args.suffix}.md").write_text(text, "utf-8")
    print(text)


def figures_of(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every mean drop with its interval, and its difference to label search's on the same concepts."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    reference = found.get("label_search", {})
    for name, figures in found.items():
        rows[name] = {}
        for key, values in figures.items():
            row: dict[str, Any] = {"mean": float(values.mean()), "concepts": len(values)}
            enough = len(values) >= FEWEST
            row["low"], row["high"] = bootstrap_interval(values) if enough else (None, None)
            if name != "label_search" and key in reference and enough:
                row["less label search"] = [
                    float((values - reference[key]).mean()),
                    *bootstrap_difference(values, reference[key]),
                ]
            rows[name][key] = row
    return rows


def page(facts: Mapping[str, Any]) -> str:
    """The tables, one per measure."""
    rows = facts["rows"]
    lines = [
        f"`{facts['command']}`; {facts['machine']}.",
        "",
        "How much of a concept is lost when the images that a method blames for it are left out of the fine-tune: mean over "
        "concepts [95 % bootstrap interval over concepts]; higher = the method blamed the right images.",
    ]
    titles = {
        "judge": "Classifier's log odds in generated images",
        "loss": "What the name is worth to the denoising loss (x 1000)",
        "likeness": "Likeness of generated to real images (cosine of the classifier's features)",
    }
    for measure in MEASURES:
        keys = [key for key in next(iter(rows.values())) if key.endswith(measure)]
        scale = 1000 if measure == "loss" else 1
        heads = [
            f"{key.rpartition(', ')[0]} ({next(iter(rows.values()))[key]['concepts']} concepts)"
            for key in keys
        ]
        lines += ["", f"### {titles[measure]}", "", f"| method | {' | '.join(heads)} |"]
        lines.append("|---" * (len(keys) + 1) + "|")
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(_cell(row[key], scale) for key in keys)} |")
    lines += _differences(rows)
    return "\n".join(lines) + "\n"


def _differences(rows: Mapping[str, Any]) -> list[str]:
    """How much more than label search each method takes away, on the same concepts."""
    known = {(name, key): row[key].get("less label search") for name, row in rows.items() for key in row}
    lines = [
        "",
        "### Less label search, paired over concepts",
        "",
        "| method | what | difference |",
        "|---|---|---|",
    ]
    for (name, key), difference in known.items():
        if difference is not None:
            mean, low, high = ((1000 if key.endswith("loss") else 1) * value for value in difference)
            lines.append(f"| {name} | {key} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] |")
    return lines


def _cell(figure: Mapping[str, Any], scale: float) -> str:
    shown = f"{scale * figure['mean']:.2f}"
    if figure["low"] is None:
        return shown
    return f"{shown} [{scale * figure['low']:.2f}, {scale * figure['high']:.2f}]"


if __name__ == "__main__":
    main()
