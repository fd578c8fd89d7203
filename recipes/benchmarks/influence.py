"""Does a score predict what retraining does, beyond label and likeness? Judged on subsets in which
the number of an object's images says nothing.

python -m recipes.benchmarks.retrain runs/emoji/labelled --plan full --seeds 0 1
python -m recipes.benchmarks.retrain runs/emoji/labelled --plan fixed    # hours; goes on where it was
python -m recipes.benchmarks.influence                                   # results/influence.md

Every subset has exactly 2, or exactly 3, of the 7 images of every object. Of each object's question
the rank correlation, over the subsets of one count, between the summed contributions of the images
that a model saw and what it has of the object; the mean of both counts. *label and*: of the images of
the object alone. Asked about the real drawing, and
about the image that the traced model generated, which is judged by itself. The first 32 subsets are
for choosing (``--subsets first``), the others for reporting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning.attribution.baselines import random_order
from ctrak_lightning.attribution.scoring import soft_thresholded, standardised
from ctrak_lightning.metrics.functional import spearman

from ..emoji_artists.data import EmojiArtists
from ..emoji_artists.evaluate import Question, questions
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from . import ekfac, emoji, retrain
from .compare import Case, Variant, answers, answers_folder
from .likeness import likenesses, within
from .outcomes import Outcomes, generated_images, judged
from .tables import command_of, grid, machine, parser_of, publish
from .variants import table_variants

STEPS = (100, 200, 300)
CHOSEN_ON = 32
"""The first subsets, on which settings may be chosen."""
DRAWS = 1000
THRESHOLD = emoji.THRESHOLD
SEARCH = "concept_trak"
"""The search by concept that every row is held against, beside the best one without gradients."""
JOINED = ("label and grey-level correlation", SEARCH)
"""Rows that `influence` is also shown with, each in units of its deviation, :data:`SHARE` of it. By
the first a gradient adds to the best search without one, or does not."""
SHARE = 0.5
"""Of one half and one, on the subsets for choosing."""
METHODS = (
    *("influence", "influence_condition", "influence_null", "random_probe"),
    *("concept_trak", "concept_trak_norm", "concept_trak_published", "trak", "d_trak"),
    *ekfac.ROWS,
)
TWINS = {
    "emojione": "emojione-monotone",
    "fluent-emoji-flat": "fluent-emoji-high-contrast",
}
"""The same outline in another style: mostly these are found."""
JUDGES = (
    *("real drawing", "real drawing, by a classifier's odds", "real drawing, by likeness"),
    *("generated image", "generated image, by drift"),
)
"""By the loss, where nothing else is said: that is what :func:`~ctrak_lightning.methods.influence` is
a derivative of, and the others are not."""


@dataclass(frozen=True)
class Judge:
    """What S retrained models have of each of Q questions.

    Args:
        kept: which images each model saw, bool [S, N].
        counts: of an object's images that each model saw [S].
        strengths: of what is asked for, by the traced seed [T, Q, S].
    """

    kept: Tensor
    counts: Tensor
    strengths: Tensor


def judges(outcomes: Outcomes, seeds: Sequence[int]) -> dict[str, Judge]:
    """Each judge of the 64 questions about objects, from the runs with fixed counts: how much the
    object's name lowers the loss on the real drawing; what an independent classifier sees of the
    object in generated images, and how like the real drawing these are; how much the name lowers the
    loss on the image that each traced model generated; and how near the image that a model generates
    from the same noise is to that one."""
    counts = outcomes.kept.sum(1) // 64
    asked = outcomes.asked_losses.double()[:, list(seeds)]  # [S, T, Q, 4]
    real = [
        outcomes.strength("object", measure).double().T.expand(len(seeds), -1, -1)  # [T, Q, S]
        for measure in ("loss", "judge", "likeness")
    ]
    strengths = (
        *real,
        (asked[..., 1] - asked[..., 0]).permute(1, 2, 0),
        -outcomes.drift.double()[:, list(seeds)].permute(1, 2, 0),
    )
    each = zip(JUDGES, strengths, strict=True)
    return {name: Judge(outcomes.kept, counts, values) for name, values in each}


def correlations(scores: Tensor, judge: Judge, seed: int, subsets: Tensor | None = None) -> Tensor:
    """Spearman's correlation [Q] over the subsets of one count, averaged over the counts.

    Args:
        scores: of the images [Q, N].
        judge: of the questions.
        seed: the place of the traced run.
        subsets: which of them, positions [n], some several times; all by default.
    """
    each = torch.arange(len(judge.counts)) if subsets is None else subsets
    predicted = scores.double() @ judge.kept[each].double().T  # [Q, n]
    found = []
    for count in judge.counts.unique():
        own = judge.counts[each] == count
        found.append(spearman(predicted[:, own], judge.strengths[seed][:, each[own]]))
    return torch.stack(found).nanmean(0)


def crossed(rows: Mapping[str, Tensor], judge: Judge, draws: int = DRAWS) -> dict[str, Tensor]:
    """Mean correlations of each row [draws], all at the same draws of questions, subsets and traced
    runs: what differences are paired over. Rows are scores [T, Q, N]."""
    generator = torch.Generator().manual_seed(0)
    traced, asked, _ = next(iter(rows.values())).shape
    found: dict[str, list[Tensor]] = {name: [] for name in rows}
    strata = [(judge.counts == count).nonzero().flatten() for count in judge.counts.unique()]

    def drawn(size: int) -> Tensor:
        return torch.randint(size, (size,), generator=generator)

    for _ in range(draws):
        subsets = torch.cat([own[drawn(len(own))] for own in strata])
        runs, objects = drawn(traced), drawn(asked)
        for name, scores in rows.items():
            each = [
                correlations(scores[run], judge, run, subsets)[objects] for run in runs.tolist()
            ]
            found[name].append(torch.stack(each).nanmean())
    return {name: torch.stack(values) for name, values in found.items()}


def crossed_objects(values: Tensor, draws: int = DRAWS) -> tuple[float, float]:
    """95 % interval of the mean of one value per fine-tune and question [T, Q], both drawn."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(draws):
        rows, columns = (torch.randint(n, (n,), generator=generator) for n in values.shape)
        means.append(values[rows][:, columns].mean())
    drawn = torch.stack(means).double()
    return float(drawn.quantile(0.025)), float(drawn.quantile(0.975))


def baselines(asked: Sequence[Question], images: Tensor, data: EmojiArtists) -> dict[str, Tensor]:
    """Rankings without gradients [Q, N], about images [Q, 3, 32, 32] in [0, 1]: by what they show
    alone, and within the images of the object that is asked for."""
    shown = (data.train_set.images + 1) / 2
    label = torch.tensor([[q.object == name for name, _ in data.train_set.pairs] for q in asked])
    alike = likenesses(images, shown)
    found = {f"label and {name}": within(label, each) for name, each in alike.items()}
    found |= {f"{name} alone": within(torch.ones(()), each) for name, each in alike.items()}
    count = label.float()
    return found | {"label": count, "random": random_order(len(asked), len(shown))}


def variants(names: Sequence[str]) -> list[Variant]:
    """The gradient methods, asked about given images; not those of :mod:`.ekfac`, which have a
    kernel of their own."""
    return table_variants(5, STEPS, [f"{name}_given" for name in names])


def scores_of(folder: Path, case: Case, rows: Sequence[Variant], what: str) -> dict[str, Tensor]:
    """Scores [Q, N] of each row at its own damping; finished answers are read from ``folder``."""
    found = {}
    out = answers_folder(folder, what)
    for variant, attributor, query in answers(case, rows, out, folder / "traces"):
        scores = torch.stack([result.scores for result in attributor.score(query)])
        found[variant.name.removesuffix("_given")] = scores.double()
    return found


def object_questions(data: EmojiArtists) -> list[Question]:
    """The questions about the objects of the held-out pairs."""
    return [question for question in questions(data.held_out) if question.kind == "object"]


def all_scores(
    folder: Path, data: EmojiArtists, seed: int, what: str, shown: Tensor, methods: Sequence[str]
) -> dict[str, Tensor]:
    """Scores [Q, N] of every row about images [Q, 3, 32, 32] in [-1, 1], by one traced run."""
    asked = object_questions(data)
    case = Case(
        folder=folder / f"full-seed{seed}",
        module=EmojiDiffusion("lora").eval(),
        batches=data.trace_dataloader(),
        concepts=[question.concept() for question in asked],
        seeds=[0] * len(asked),
        sampler=emoji.SAMPLER,
        given=patchify(shown),
    )
    out = folder / "influence" / f"seed{seed}"
    solved = [name for name in ekfac.ROWS if name in methods]
    rows = variants([name for name in methods if name not in solved])
    return {
        **scores_of(out, case, rows, what),
        **ekfac.scores_of(out, case, solved, STEPS, what),
        **baselines(asked, (shown + 1) / 2, data),
    }


def drawing_scores(
    folder: Path, data: EmojiArtists, seed: int, methods: Sequence[str]
) -> dict[str, Tensor]:
    """:func:`all_scores` about the real drawings; ``methods`` that are none are passed over."""
    rows = [name for name in METHODS if name in methods]
    return all_scores(folder, data, seed, JUDGES[0], data.held_out_set.images, rows)


def summed(rows: Mapping[str, Tensor], methods: Sequence[str]) -> dict[str, Tensor]:
    """What is added up over the images that a model saw, of scores [Q, N] of every row: of a gradient
    method its contributions, for most of a sum of raw scores is noise, and its scores of the images of
    the object alone, as search by label has them."""
    label = rows["label"]
    found = {name: row for name, row in rows.items() if name not in methods}
    for name in methods:
        found[name] = soft_thresholded(rows[name].double(), THRESHOLD)
        found[f"label and {name}"] = label * rows[name]
    for other in JOINED:
        if "influence" in methods and other in rows:
            joint = standardised(rows["influence"].double()) + SHARE * standardised(
                rows[other].double()
            )
            found[f"influence with {other}"] = soft_thresholded(joint, THRESHOLD)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.influence", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the traced runs")
    parser.add_argument("--subsets", choices=("first", "rest"), default="rest")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    folder, data = args.runs / "labelled", EmojiArtists("new")
    retrain.finish(
        folder,
        "labelled",
        [(run, seed) for seed in args.seeds for run in retrain.plan("full", data)],
    )
    outcomes = judged(folder, Outcomes.load("labelled", args.results))
    outcomes.save("labelled", args.results)
    known = outcomes.of("fixed-", [0])
    first = [name for name in known.names if int(name.split("-")[1]) < CHOSEN_ON]
    used = known.only(first if args.subsets == "first" else sorted({*known.names} - {*first}))
    asked = object_questions(data)
    made = generated_images("labelled")
    images = {
        "real drawing": [data.held_out_set.images] * len(args.seeds),
        "generated image": [made[f"full-seed{seed}"] for seed in args.seeds],
    }
    lines = [
        f"`{command_of(parser, args)}`; {machine()}; {len(used.names)} retrained models, traced "
        f"seeds {', '.join(map(str, args.seeds))}. Mean over questions and traced runs [95 % over "
        "questions, subsets and runs, crossed].",
    ]
    scores: dict[str, dict[str, Tensor]] = {}
    for what, each in images.items():
        rows = [
            all_scores(folder, data, seed, what, shown, args.methods)
            for seed, shown in zip(args.seeds, each, strict=True)
        ]
        rows = [summed(row, args.methods) for row in rows]
        scores[what] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    has_twin = torch.tensor([q.artist in {*TWINS, *TWINS.values()} for q in asked])
    for name, judge in judges(used, args.seeds).items():
        found = scores[name.split(",")[0]]
        joint = [f"influence with {each}" for each in JOINED]
        gradients = [*args.methods, *(f"label and {each}" for each in args.methods), *joint]
        lines += ["", f"## Judged by the {name}", "", *table(found, gradients, judge, has_twin)]
    publish(args.results / "influence.md", "\n".join(lines) + "\n")


def table(
    rows: Mapping[str, Tensor], methods: Sequence[str], judge: Judge, has_twin: Tensor
) -> list[str]:
    """A line per row: all questions, those whose drawing has a twin among the training images and
    the others, and the differences to the best row that is none of the gradient ``methods``, and to
    :data:`SEARCH`."""
    draws = crossed(rows, judge)
    per_question = {
        name: torch.stack([correlations(row, judge, i) for i, row in enumerate(scores)]).nanmean(0)
        for name, scores in rows.items()
    }
    mean = {name: float(values.nanmean()) for name, values in per_question.items()}
    best = max((name for name in rows if name not in methods), key=lambda name: mean[name])
    against = [best, *([SEARCH] if SEARCH in rows else [])]
    cells = []
    for name in sorted(rows, key=lambda name: -mean[name]):
        with_twin, without = per_question[name][has_twin], per_question[name][~has_twin]
        ours = [_interval(mean[name], draws[name]), f"{float(with_twin.nanmean()):.2f}"]
        less = [
            ""
            if name == other
            else _interval(mean[name] - mean[other], draws[name] - draws[other], sign=True)
            for other in against
        ]
        cells.append([name, *ours, f"{float(without.nanmean()):.2f}", *less])
    heads = ["method", "all", "twin", "no twin", *(f"less *{other}*" for other in against)]
    return grid(heads, cells)


def _interval(value: float, draws: Tensor, sign: bool = False) -> str:
    low, high = draws.quantile(0.025), draws.quantile(0.975)
    plus = "+" if sign else ""
    return f"{value:{plus}.3f} [{float(low):{plus}.3f}, {float(high):{plus}.3f}]"


if __name__ == "__main__":
    main()
