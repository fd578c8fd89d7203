"""The EmojiArtists benchmark: does a ranking find what shares the concept, and does it predict what
retraining does?

python -m recipes.benchmarks.emoji                             # labelled, one training seed
python -m recipes.benchmarks.emoji --setting hidden --seeds 0 1 2

Fine-tunes what is missing (`retrain.py`), traces and asks every method (`compare.py`), and writes
`results/emoji_<setting>.md`. Everything is resumable.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning.attribution.baselines import image_similarity, label_search
from ctrak_lightning.attribution.scoring import soft_thresholded, standardised
from ctrak_lightning.metrics import bootstrap_difference, datamodeling_correlations, functional
from ctrak_lightning.metrics import noise_ceiling as ceiling

from ..emoji_artists.data import KINDS, NEW_ARTISTS, SETTINGS, EmojiArtists
from ..emoji_artists.evaluate import Question, questions
from ..emoji_artists.module import EmojiDiffusion
from ..emoji_artists.network import patchify
from . import retrain, tables
from .compare import Case, Variant, compare
from .groups import effects, lines_of
from .judge import SAMPLER, EmojiJudge
from .likeness import likenesses, within
from .outcomes import STRENGTHS, Outcomes, judged
from .tables import (
    NOTE,
    Figures,
    Table,
    command_of,
    grid,
    machine,
    markdown,
    parser_of,
    publish,
)
from .variants import table_variants

TIMESTEPS = 5
STEPS = (100, 200, 300)
# The retrained subsets, and the kinds of concept whose presence differs enough between them.
PLANS = {"half": KINDS, "artist-half": ("artist",)}
LEAST_SUBSETS = 8
CEILING_SEEDS = (0, 1)
# A retraining seed on which nothing was chosen: differences to label search are shown on it too.
SECOND = 1
# Rows that are also shown with the runs of all seeds joined: the mean of their standardised scores.
JOINED = ("concept_trak", "concept_trak_norm", "d_trak")
# The images whose token does not say what they show, by setting.
ODD: dict[str, str | None] = {"labelled": None, "hidden": "hidden", "mislabelled": "wrong"}
THRESHOLD = 2.0
REFERENCE = "label_search"
LIKENESS = ("pixel_similarity", "judge_features")
WITHIN = ("pixels", "grey-level correlation", "judge's features", "base denoiser's activations")
BASELINES = (
    *(REFERENCE, *LIKENESS, *(f"{name}_given" for name in LIKENESS)),
    *(f"label and {name}, given" for name in WITHIN),
)


def variants(only: Sequence[str] | None = None) -> list[Variant]:
    """The gradient methods of the table."""
    return table_variants(TIMESTEPS, STEPS, only)


def case(folder: Path, data: EmojiArtists, asked: list[Question]) -> Case:
    """A finished fine-tune and the questions about its held-out pairs."""
    return Case(
        folder=folder,
        module=EmojiDiffusion("lora").eval(),
        batches=data.trace_dataloader(),
        concepts=[q.concept() for q in asked],
        seeds=[i // len(KINDS) for i in range(len(asked))],
        sampler=SAMPLER,
        given=patchify(data.held_out_set.images).repeat_interleave(len(KINDS), 0),
    )


def baselines(asked: list[Question], data: EmojiArtists, images: Tensor) -> dict[str, Tensor]:
    """Rankings without gradients [Q, N]: by the tokens that training showed, by pixels, by the
    judge's features; by likeness within the label; ``_given`` compares with the pair's real drawing
    instead of the generated one, ``images`` [Q, 3, 32, 32] in [0, 1]."""
    told = dict(zip(KINDS, zip(*data.train_set.told, strict=True), strict=True))
    shown = (data.train_set.images + 1) / 2
    given = ((data.held_out_set.images + 1) / 2).repeat_interleave(len(KINDS), 0)
    features = EmojiJudge.trained().features
    rankings = {REFERENCE: label_search([q.concept() for q in asked], told)}
    for suffix, queries in (("", images), ("_given", given)):
        rankings[f"pixel_similarity{suffix}"] = image_similarity(queries, shown)
        rankings[f"judge_features{suffix}"] = image_similarity(queries, shown, features)
    alike = likenesses(given, shown)
    for name in WITHIN:
        rankings[f"label and {name}, given"] = within(rankings[REFERENCE], alike[name])
    return rankings


def relevance(asked: Sequence[Question], pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Which training images show what is asked for, bool [Q, N]; truth, not what they are told."""
    return torch.tensor([[pair[KINDS.index(q.kind)] == q.value for pair in pairs] for q in asked])


def retrieval(
    asked: Sequence[Question], scores: Tensor, pairs: Sequence[tuple[str, str]]
) -> dict[str, Tensor]:
    """Every retrieval metric per kind of concept by what images show, one value per question."""
    return tables.retrieval(scores, relevance(asked, pairs), [q.group for q in asked])


def datamodeling(
    asked: list[Question], scores: Tensor, outcomes: Outcomes, measure: str, kind: str
) -> Tensor:
    """Concept datamodeling score by one measure of strength, of one kind: Spearman over retrained
    models between the sum of the scores of what they saw and the strength they show. Objects per
    question [64]; artists per artist [8], the mean of its questions' scores and strengths."""
    rows = [i for i, q in enumerate(asked) if q.kind == kind]
    values = [asked[i].value for i in rows]
    wanted = _grouped(outcomes.strength(kind, measure).double().T, values)  # [groups, R]
    predicted = _grouped(_comparable(scores[rows].double()), values)
    return datamodeling_correlations(predicted, outcomes.kept, wanted)


def image_datamodeling(asked: list[Question], scores: Tensor, outcomes: Outcomes) -> Tensor:
    """Linear datamodeling score of whole images, one per pair [64]: Spearman over retrained models
    between the summed scores of what they saw, both concepts' together, and how well they denoise
    the pair's real image told both names (TRAK, arXiv 2303.14186, definition 2.3). A whole-image
    method has the same scores for both concepts."""
    pairs = _comparable(scores.double()).view(len(asked) // len(KINDS), len(KINDS), -1)
    losses = -outcomes.losses[:, :, 0].double().T
    return datamodeling_correlations(pairs.sum(1), outcomes.kept, losses)


def _comparable(scores: Tensor) -> Tensor:
    spread = scores.std(1, keepdim=True)
    return torch.where(spread > 0, scores / spread.clamp(min=1e-12), scores)


def odd_recall(
    asked: list[Question], scores: Tensor, data: EmojiArtists
) -> dict[str, dict[str, Tensor]]:
    """Among the ``2 R`` best-ranked (R images show the concept): the share of the images that show
    it without its token (``hidden``), and of those that carry its token and show another
    (``wrong``), by kind and value of the concept, where there are such images [its questions]."""
    result: dict[str, dict[str, list[Tensor]]] = {}
    shows = relevance(asked, data.train_set.pairs)
    told = relevance(asked, data.train_set.told)
    odd = {"hidden": shows & ~told, "wrong": told & ~shows}.get(ODD[data.setting] or "")
    for i, question in enumerate(asked if odd is not None else []):
        assert odd is not None
        if odd[i].any():
            # recall_at_k divides by min(k, relevant), and there are never more than 2 R of these.
            recall = functional.recall_at_k(scores[i], odd[i], 2 * int(shows[i].sum()))[0]
            result.setdefault(question.kind, {}).setdefault(question.value, []).append(recall)
    return {
        kind: {value: torch.stack(recalls) for value, recalls in values.items()}
        for kind, values in result.items()
    }


def measured(
    asked: list[Question], scores: Tensor, data: EmojiArtists, outcomes: Outcomes, seeds: list[int]
) -> dict[str, Tensor]:
    """Every figure of a ranking, one value per question (artists' datamodeling: per artist)."""
    figures = retrieval(asked, scores, data.train_set.pairs)
    odd = odd_recall(asked, scores, data)
    left_out = effects(outcomes, data.held_out) if odd else []
    real = {effect.value for effect in left_out if effect.is_real}
    for kind, recalls in odd.items():
        name = f"recall of {ODD[data.setting]} images"
        figures[f"{name}, {kind}"] = torch.cat(list(recalls.values()))
        mattered = [recall for value, found in recalls.items() if value in real for recall in found]
        if len(mattered) > 1:  # one question has no interval
            figures[f"{name} that mattered, {kind}"] = torch.stack(mattered)
    summed = {"scores": scores, "contributions": soft_thresholded(scores.double(), THRESHOLD)}
    for plan, kinds in PLANS.items():
        retrained = outcomes.of(f"{plan}-", seeds)
        if len(retrained.names) < LEAST_SUBSETS:
            continue
        for name, each in summed.items():
            title = f"{name}, {plan}"
            if plan == "half":
                whole = image_datamodeling(asked, each, retrained)
                figures[f"{title} by loss, whole image"] = whole
            for measure in STRENGTHS:
                for kind in kinds:
                    found = datamodeling(asked, each, retrained, measure, kind)
                    for part, values in _split(kind, found, asked).items():
                        figures[f"{title} by {measure}, {part}"] = values
    return figures


def _split(kind: str, values: Tensor, asked: list[Question]) -> dict[str, Tensor]:
    """Artists apart by whether the base model already drew like them: what it knew, the fine-tune
    need not teach."""
    if kind != "artist":
        return {kind: values}
    names = sorted({q.value for q in asked if q.kind == kind})
    is_new = torch.tensor([name in NEW_ARTISTS for name in names])
    return {"new artist": values[is_new], "known artist": values[~is_new]}


def ceilings(asked: list[Question], outcomes: Outcomes) -> dict[str, float]:
    """The best concept datamodeling score within reach, from the agreement of two training seeds on
    the subsets that were retrained with both."""
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
    """Rows [64, ...] averaged over equal values, which are sorted [groups, ...]."""
    names = sorted(set(values))
    groups = torch.tensor([[value == name for value in values] for name in names]).double()
    return (groups / groups.sum(1, keepdim=True)) @ rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.emoji", __doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="labelled")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the traced runs")
    parser.add_argument(
        "--retrain-seeds", nargs="*", type=int, default=[0, 1], help="of the halves"
    )
    parser.add_argument("--methods", nargs="+", default=None, help="rows; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    folder, seeds = args.runs / args.setting, args.retrain_seeds
    data = EmojiArtists("new", setting=args.setting)
    asked = questions(data.held_out)
    for plans, trained in ((["full"], args.seeds), (PLANS, seeds)):
        jobs = [(r, seed) for plan in plans for seed in trained for r in retrain.plan(plan, data)]
        retrain.finish(folder, args.setting, jobs)
    outcomes = judged(folder, Outcomes.load(args.setting, args.results))
    outcomes.save(args.setting, args.results)

    def figures(scores: Tensor) -> Figures:
        return measured(asked, scores, data, outcomes, seeds)

    chosen = variants(args.methods)
    fixed = {variant.name: variant.damping for variant in chosen}
    table = Table()
    again: dict[str, list[Figures]] = {}
    runs: dict[str, dict[str, list[Tensor]]] = {}
    recognised: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for seed in args.seeds:
        one = case(folder / f"full-seed{seed}", data, asked)
        found, images = compare(one, chosen, folder / "scores" / f"seed{seed}")
        for kind, count in EmojiJudge.trained().recognised(images, asked).items():
            recognised[kind].append(count)
        for name in (name for name in found if name.removesuffix("_given") in JOINED):
            for damping, row in found[name].items():
                each = runs.setdefault(name, {}).setdefault(damping, [])
                each.append(standardised(row.double()))
        plain = {name: {"None": row} for name, row in baselines(asked, data, images).items()}
        table.fill(plain | found, figures, fixed)
        for name, scores in (plain | found).items():
            used = scores[fixed.get(name, "None")]
            second = measured(asked, used, data, outcomes, [SECOND])
            again.setdefault(name, []).append(second)
    for name, by_damping in runs.items() if len(args.seeds) > 1 else []:
        joined = {damping: torch.stack(rows).mean(0) for damping, rows in by_damping.items()}
        title = f"{name}, {len(args.seeds)} runs joined"
        table.fill({title: joined}, figures, {title: fixed[name]})
    subsets = len(outcomes.of("half-", [SECOND]).names)
    counts = {kind: ", ".join(map(str, each)) for kind, each in recognised.items()}
    lines = [
        f"`{command_of(parser, args)}`; {machine()}; {len(outcomes.names)} retrained models.",
        NOTE,
        "",
        "Of the 64 images generated for the questions the judge recognises the object in "
        f"{counts['object']}, the artist in {counts['artist']} (one number per traced run). All "
        "are asked about.",
        *sections(table.rows(), fixed),
        *_section("Noise ceilings (from two training seeds)", _listed(ceilings(asked, outcomes))),
    ]
    if left_out := effects(outcomes, data.held_out):
        lines += _section("Groups of images left out, one at a time", lines_of(left_out))
    title = "Contributions, less label search (paired bootstrap over questions)"
    lines += _section(title, differences(table.honest))
    title = f"The same on retraining seed {SECOND} alone ({subsets} halves)"
    lines += _section(title, differences(again))
    publish(args.results / f"emoji_{args.setting}.md", "\n".join(lines) + "\n")


def sections(rows: dict[str, dict[str, Any]], fixed: Mapping[str, str]) -> list[str]:
    """Retrieval; what scores and contributions predict of retrained models; and R-precision at
    every damping."""
    titles = {
        "scores": "Concept datamodeling score",
        "contributions": f"The same of contributions (threshold {THRESHOLD})",
    }
    keys = list(next(iter(rows.values())))
    plain = [key for key in keys if key.split(", ")[0] not in titles]
    lines = _section("Retrieval", markdown(rows, plain))
    for prefix, title in titles.items():
        own = [key for key in keys if key.startswith(prefix)]
        lines += _section(title, markdown(rows, own) if own else [])
    asked = {name: [rows[name][f"R-precision, {kind}"] for kind in KINDS] for name in fixed}
    dampings = list(next(iter(asked.values()))[0]["by_damping"]) if asked else []
    cells = [
        [name, *(" / ".join(f"{each['by_damping'][d]:.2f}" for each in own) for d in dampings)]
        for name, own in asked.items()
    ]
    title = f"R-precision, {' / '.join(KINDS)}, by damping"
    return lines + _section(title, grid(["method", *dampings], cells))


def differences(honest: Mapping[str, Sequence[Figures]]) -> list[str]:
    """Every concept datamodeling score less label search's on the same questions."""
    keys = [key for key in honest[REFERENCE][0] if key.startswith("contributions")]

    def mean(name: str, key: str) -> Tensor:
        return torch.stack([figures[key].double() for figures in honest[name]]).mean(0)

    def cell(name: str, key: str) -> str:
        ours, theirs = mean(name, key), mean(REFERENCE, key)
        low, high = bootstrap_difference(ours, theirs)
        return f"{float((ours - theirs).mean()):+.3f} [{low:+.3f}, {high:+.3f}]"

    names = [name for name in honest if name != REFERENCE]
    rows = [[name, *(cell(name, key) for key in keys)] for name in names]
    return grid(["method", *keys], rows) if keys else []


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"### {title}", "", *lines] if lines else []


def _listed(figures: Mapping[str, float]) -> list[str]:
    return [f"- {key}: {value:.2f}" for key, value in figures.items()]


if __name__ == "__main__":
    main()
