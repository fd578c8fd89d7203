"""Owners' shares: does the artist who is asked for get the largest, and what are the intervals
worth?

python -m recipes.benchmarks.owners      # after `emoji`, whose fine-tunes it traces

Asks who taught the artist of every held-out pair, on three fine-tunes that differ in their seed
alone. An interval is good if the share that another fine-tune gives lies in it.
"""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import torch

from ctrak_lightning import Attribution
from ctrak_lightning.attribution.result import Share

from ..emoji_artists.data import NEW_ARTISTS, EmojiArtists
from ..emoji_artists.evaluate import Question, questions
from . import emoji
from .compare import answers
from .tables import command_of, grid, machine, parser_of, publish

METHODS = ("concept_trak_given", "concept_trak_norm_given")
THRESHOLDS: tuple[float | None, ...] = (None, 2.0)
SEEDS = (0, 1, 2)
COLUMN = "artist"


def shares(results: Sequence[Attribution], threshold: float | None) -> list[dict[str, Share]]:
    """Every question's shares by artist."""
    found = (result.by_group(COLUMN, threshold=threshold) for result in results)
    return [{share.group: share for share in each} for each in found]


def figures(
    per_run: Sequence[Sequence[dict[str, Share]]], asked: Sequence[Question]
) -> dict[str, float]:
    """How often the true artist has the largest share, that share's mean, and the intervals'
    coverage and width, from the shares of every question in at least two runs."""
    every = [(found, q) for run in per_run for found, q in zip(run, asked, strict=True)]
    largest = [
        (max(found.values(), key=lambda share: share.share).group == q.value, q.value)
        for found, q in every
    ]
    new = [hit for hit, artist in largest if artist in NEW_ARTISTS]
    pairs = [
        (mine[i][artist], other[i][artist].share, artist == q.value)
        for mine, other in permutations(per_run, 2)
        for i, q in enumerate(asked)
        for artist in mine[i]
    ]

    def covered(wanted: bool) -> float:
        own = [(mine, other) for mine, other, is_true in pairs if is_true == wanted]
        return sum(mine.low <= other <= mine.high for mine, other in own) / len(own)

    widths = [mine.high - mine.low for mine, _, is_true in pairs if is_true]
    return {
        "true artist has the largest share": sum(hit for hit, _ in largest) / len(largest),
        "of the two new artists": sum(new) / max(1, len(new)),
        "mean share of the true artist": float(
            torch.tensor([found[q.value].share for found, q in every]).mean()
        ),
        "width of its interval": sum(widths) / len(widths),
        "coverage, true artist": covered(True),
        "coverage, other artists": covered(False),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.owners", __doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    folder = args.runs / "labelled"
    data = EmojiArtists("new")
    every = questions(data.held_out)
    positions = [i for i, q in enumerate(every) if q.kind == COLUMN]
    found: dict[str, list[list[dict[str, Share]]]] = {}
    for seed in SEEDS:
        case = emoji.case(folder / f"full-seed{seed}", data, every)
        chosen, out = emoji.variants(args.methods), folder / "scores" / f"seed{seed}"
        for variant, attributor, query in answers(case, chosen, out):
            results = attributor.score(query)
            wanted = [results[i] for i in positions]
            for threshold in THRESHOLDS:
                title = f"{variant.name}, {threshold or 'all positive scores'}"
                found.setdefault(title, []).append(shares(wanted, threshold))
    asked = [every[i] for i in positions]
    rows = {title: figures(runs, asked) for title, runs in found.items()}
    cells = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in rows.items()]
    lines = [
        f"`{command_of(parser, args)}`; {machine()}; {len(SEEDS) * len(asked)} questions, eight "
        "artists with an eighth of the images each.",
        "",
        "Coverage: how often the share that a fine-tune with another seed gives lies in the 95 % "
        "interval of the first.",
        "",
        *grid(["method, threshold", *next(iter(rows.values()))], cells),
    ]
    publish(args.results / "owners.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
