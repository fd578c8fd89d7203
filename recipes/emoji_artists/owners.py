"""Owners' shares: does the artist who is asked for get the largest, and what are the intervals worth?

python -m recipes.emoji_artists.owners      # after `benchmark`, whose fine-tunes it traces; writes results/owners.json and .md

Asks who taught the artist of every held-out pair, on three fine-tunes that differ in their seed alone. An interval is good if the share
that another fine-tune gives lies in it.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from ctrak_lightning import Attribution
from ctrak_lightning.attribution.result import Share
from recipes.benchmarks.compare import answers
from recipes.emoji_artists import benchmark
from recipes.emoji_artists.data import NEW_ARTISTS, EmojiArtists
from recipes.emoji_artists.evaluate import Question, questions
from recipes.emoji_artists.outcomes import RESULTS

METHODS = ("concept_trak_given", "concept_trak_norm_given")
THRESHOLDS: tuple[float | None, ...] = (None, 2.0)
SEEDS = (0, 1, 2)
COLUMN = "artist"


def shares(results: Sequence[Attribution], threshold: float | None) -> list[dict[str, Share]]:
    """Every question's shares by artist."""
    return [{share.group: share for share in r.by_group(COLUMN, threshold=threshold)} for r in results]


def figures(per_run: Sequence[Sequence[dict[str, Share]]], asked: Sequence[Question]) -> dict[str, Any]:
    """How often the true artist has the largest share, that share's mean, and the intervals' coverage and width.

    Args:
        per_run: the shares of every question, for each of at least two runs.
        asked: the questions.
    """
    largest = [
        (max(found.values(), key=lambda share: share.share).group == q.value, q.value in NEW_ARTISTS)
        for run in per_run
        for found, q in zip(run, asked, strict=True)
    ]
    true = torch.tensor(
        [found[q.value].share for run in per_run for found, q in zip(run, asked, strict=True)]
    )
    pairs = [
        (mine[i][artist], other[i][artist].share, artist == q.value)
        for mine, other in permutations(per_run, 2)
        for i, q in enumerate(asked)
        for artist in mine[i]
    ]

    def covered(wanted: bool) -> float:
        inside = [mine.low <= other <= mine.high for mine, other, is_true in pairs if is_true == wanted]
        return sum(inside) / len(inside)

    widths = [mine.high - mine.low for mine, _, is_true in pairs if is_true]
    return {
        "questions": len(largest),
        "true artist has the largest share": sum(hit for hit, _ in largest) / len(largest),
        "of the two new artists": sum(hit for hit, is_new in largest if is_new)
        / max(1, sum(is_new for _, is_new in largest)),
        "mean share of the true artist": float(true.mean()),
        "width of its interval": sum(widths) / len(widths),
        "coverage, true artist": covered(True),
        "coverage, other artists": covered(False),
    }


def page(facts: dict[str, Any]) -> str:
    rows = facts["rows"]
    keys = [key for key in next(iter(rows.values())) if key != "questions"]
    lines = [
        f"`{facts['command']}`; {facts['machine']}; {next(iter(rows.values()))['questions']} questions, eight artists with an "
        "eighth of the images each.",
        "",
        "Coverage: how often the share that a fine-tune with another seed gives lies in the 95 % interval of the first.",
        "",
        f"| method, threshold | {' | '.join(keys)} |",
        "|---" * (len(keys) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(f'{row[key]:.2f}' for key in keys)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    folder = args.runs / "labelled"
    data = EmojiArtists("new")
    asked = questions(data.held_out)
    rows_asked = [i for i, q in enumerate(asked) if q.kind == COLUMN]
    found: dict[str, list[list[dict[str, Share]]]] = {}
    for seed in SEEDS:
        case = benchmark.case(folder / f"full-seed{seed}", data, asked)
        chosen = benchmark.variants(args.methods)
        for variant, attributor, query in answers(case, chosen, folder / "scores" / f"seed{seed}"):
            results = attributor.score(query)
            wanted = [results[i] for i in rows_asked]
            for threshold in THRESHOLDS:
                title = f"{variant.name}, {'all positive scores' if threshold is None else threshold}"
                found.setdefault(title, []).append(shares(wanted, threshold))
    options = "" if args.methods == list(METHODS) else f" --methods {' '.join(args.methods)}"
    facts: dict[str, Any] = {
        "command": f"python -m recipes.emoji_artists.owners{options}",
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "rows": {title: figures(runs, [asked[i] for i in rows_asked]) for title, runs in found.items()},
    }
    (args.results / "owners.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    text = page(facts)
    (args.results / "owners.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
