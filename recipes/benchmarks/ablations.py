"""What each part of the default method is worth: one changed at a time, asked of real drawings.

python -m recipes.benchmarks.ablations            # after `emoji`, whose fine-tune it traces
python -m recipes.benchmarks.ablations --seeds 0 1 2 --rows concept_trak_norm_given

Layers, timesteps, checkpoints, trajectories, objectives, counter-conditions, normalisation,
projection; and, on the default's own traces, centring, other rules for the damping and other ways
to join checkpoints. Resumable.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrak_lightning import Attributor, Concept, Method, Projection, methods
from ctrak_lightning.attribution.attributor import Query
from ctrak_lightning.attribution.scoring import ensemble, standardised
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    ConceptDirection,
    Denoising,
    MeanOutput,
    PosteriorSampling,
    Term,
    contrast,
)
from ctrak_lightning.methods.trajectories import Inverted, Noised

from ..emoji_artists.data import KINDS, EmojiArtists
from ..emoji_artists.evaluate import Question, questions
from . import emoji
from .compare import Variant, answers
from .emoji import STEPS, TIMESTEPS
from .fidelity import scores
from .outcomes import Outcomes
from .retrain import SAVED_STEPS
from .tables import Table, command_of, grid, machine, parser_of, publish
from .variants import CROSS_ATTENTION

REFERENCE = "concept_trak_norm_given"
COLUMNS = (
    "R-precision, object",
    "R-precision, artist",
    "contributions, half by loss, object",
    "contributions, half by judge, object",
    "contributions, artist-half by loss, new artist",
    "contributions, half by loss, whole image",
)
DAMPINGS: tuple[float | None, ...] = (None, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
EFFECTIVE_SHARE = 0.25
PROBE = "channel probe, contrast"
AVERAGED = "average: squared norm, channel probe"
MOST = "10 timesteps, 6 checkpoints, 16,384 numbers"


def variants() -> list[Variant]:
    """The norm's contrast, and the same with one part changed; every row is a :class:`Variant` of
    its own traces or query."""
    plain = Noised(timesteps=TIMESTEPS)
    default = replace(methods.concept_trak_norm(TIMESTEPS), query_trajectory=plain)

    def on(trajectory: Noised | Inverted, query: Noised | None = None) -> Method:
        return replace(default, training_trajectory=trajectory, query_trajectory=query or plain)

    def timed(count: int, start: float = 0.0, end: float = 1.0) -> Method:
        noised = Noised(timesteps=count, start=start, end=end)
        return on(noised, noised)

    def inverted(guidance: float) -> Method:
        return on(Inverted(steps=10, guidance=guidance, timesteps=TIMESTEPS))

    def asked(traces: Any, query: tuple[Term, ...]) -> Method:
        return replace(default, training=traces, query=query)

    def contrasted(objective: Any) -> Method:
        return asked(objective, contrast(objective))

    denoising, posterior = Denoising(), PosteriorSampling()
    direction = (Term(ConceptDirection()),)
    both_sides = (Term(ConceptDirection(), "present"), Term(ConceptDirection(), "absent"))
    own = Noised(timesteps=TIMESTEPS, shared_noise=False)
    probes = replace(methods.concept_trak(TIMESTEPS), query_trajectory=plain)
    changed: dict[str, Method] = {
        REFERENCE: default,
        "1 timestep": timed(1),
        "2 timesteps": timed(2),
        "10 timesteps": timed(10),
        "20 timesteps": timed(20),
        "least noise: first third": timed(TIMESTEPS, 0, 1 / 3),
        "middle third": timed(TIMESTEPS, 1 / 3, 2 / 3),
        "most noise: last third": timed(TIMESTEPS, 2 / 3, 1),
        "noise of each sample's own": on(own, own),
        "inverted, 10 steps, guidance 1": inverted(1.0),
        "inverted, 10 steps, guidance 3": inverted(3.0),
        "norm per sample": replace(default, normalisation="sample"),
        "no norm": replace(default, normalisation="none"),
        "mean output, contrast": contrasted(MeanOutput()),
        PROBE: contrasted(ChannelProbe(0)),
        "joint: mean output, three channel probes": probes,
        "whole image, D-TRAK": methods.d_trak(TIMESTEPS),
        "whole image, TRAK": methods.trak(TIMESTEPS),
        "whole image, DAS": methods.das(TIMESTEPS),
        "denoising, contrast": contrasted(denoising),
        "posterior sampling traces, denoising contrast": asked(posterior, contrast(denoising)),
        "denoising traces, concept direction": asked(denoising, direction),
        "posterior sampling traces, concept direction": asked(posterior, direction),
        "posterior sampling traces, two-sided direction": asked(posterior, both_sides),
        "squared norm traces, two-sided direction": replace(default, query=both_sides),
    }
    rows = [
        Variant(name=name, method=method, steps=STEPS, scope="given")
        for name, method in changed.items()
    ]
    reference = rows[0]
    across = [
        replace(row, name=f"{row.name}, cross-attention only", layers=CROSS_ATTENTION)
        for row in rows
        if row.name in ("mean output, contrast", PROBE)
    ]
    wide = Projection(rank=16, dim=16384)
    all_counters = ("dropped", "nothing", "swapped")
    return [
        *rows,
        replace(reference, name="cross-attention only", layers=CROSS_ATTENTION),
        *across,
        replace(reference, name="self-attention only", layers=("*attn1*",)),
        replace(reference, name="last checkpoint only", steps=STEPS[-1:]),
        replace(reference, name="6 checkpoints", steps=SAVED_STEPS),
        replace(reference, name="512 numbers", projection=Projection(rank=16, dim=512)),
        replace(reference, name="16,384 numbers", projection=wide),
        replace(reference, name="against nothing", counters=("nothing",)),
        replace(reference, name="against another value", counters=("swapped",)),
        replace(reference, name="against all three, averaged", counters=all_counters),
        replace(reference, name=MOST, method=timed(10), steps=SAVED_STEPS, projection=wide),
    ]


def counters(asked: Sequence[Question], known: Mapping[str, list[str]]) -> dict[str, list[Concept]]:
    """The questions against the pair without the name (the default), against nothing, and against
    another name in its place."""
    result: dict[str, list[Concept]] = {"dropped": [], "nothing": [], "swapped": []}
    for question in asked:
        concept, values = question.concept(), known[question.kind]
        other = values[(values.index(question.value) + 1) % len(values)]
        swapped = {"object": question.object, "artist": question.artist, question.kind: other}
        result["dropped"].append(concept)
        result["nothing"].append(replace(concept, absent={}))
        result["swapped"].append(replace(concept, absent=swapped))
    return result


def by_checkpoint(queries: Tensor, traces: Sequence[Tensor], damping: float | None) -> Tensor:
    """Scores [M, Q, N] of queries [M, Q, k] against the traces [N, k] of every checkpoint."""
    return torch.stack([scores(q, phi, damping) for q, phi in zip(queries, traces, strict=True)])


def effective_damping(traces: Tensor, share: float) -> float:
    """The damping at which ``tr(K (K + lambda I)^-1)`` is a share of the number of samples
    (bisection in its logarithm)."""
    values = torch.linalg.eigvalsh(traces @ traces.T).clamp(min=0)
    low, high = -12.0, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        damped = values / (values + 10**middle * values.mean())
        low, high = (middle, high) if float(damped.mean()) > share else (low, middle)
    return float(10**middle)


def without_the_other(queries: Tensor) -> Tensor:
    """Queries [M, 2 P, k], two concepts of an image in turn, each without the other's component."""
    pairs = queries.double().view(len(queries), -1, len(KINDS), queries.shape[-1])
    others = pairs.flip(2)
    along = (pairs * others).sum(-1, keepdim=True) / others.square().sum(-1, keepdim=True)
    return (pairs - along * others).view_as(queries)


def on_the_same_traces(attributor: Attributor, query: Query) -> dict[str, Tensor]:
    """Scores [Q, N] by other ways to use the default's traces and query."""
    checkpoints = attributor.store.checkpoints
    traces = [checkpoint.features().double() for checkpoint in checkpoints]
    centred = [each - each.mean(0) for each in traces]
    agreed = torch.stack([r.checkpoint_scores for r in attributor.score(query)], 1)  # [M, Q, N]
    every = [ensemble(by_checkpoint(query.features, traces, damping)) for damping in DAMPINGS]
    ranks = [each.argsort(1).argsort(1).double() for each in every]
    effective = [
        scores(q, phi, effective_damping(phi, EFFECTIVE_SHARE))
        for q, phi in zip(query.features, traces, strict=True)
    ]
    alone = by_checkpoint(without_the_other(query.features), traces, 10.0)
    share = f"effective dimension {EFFECTIVE_SHARE:.0%} of the samples"
    return {
        "damping 10": every[DAMPINGS.index(10.0)],
        "damping 10, centred traces": ensemble(by_checkpoint(query.features, centred, 10.0)),
        "no kernel": every[0],
        "ranks averaged over dampings": torch.stack(ranks).mean(0),
        share: ensemble(torch.stack(effective)),
        "without the other concept's component, damping 10": ensemble(alone),
        "checkpoints added as they are": agreed.sum(0),
        **{
            f"step {checkpoint.step} alone": standardised(each)
            for checkpoint, each in zip(checkpoints, agreed, strict=True)
        },
    }


@dataclass(frozen=True)
class Point:
    """A row of the ablations, and how often it looks at an image."""

    row: str
    timesteps: int
    checkpoints: int

    @property
    def per_image(self) -> int:
        """Forward passes that trace a training image, at all checkpoints."""
        return self.timesteps * self.checkpoints

    @property
    def per_query(self) -> int:
        """Forward passes of a question about a generated image: its generation, 50 steps with
        guidance, then two conditions everywhere."""
        return 100 + 2 * self.per_image


POINTS = (
    Point("1 timestep", 1, len(STEPS)),
    Point("last checkpoint only", TIMESTEPS, 1),
    Point("2 timesteps", 2, len(STEPS)),
    Point(REFERENCE, TIMESTEPS, len(STEPS)),
    Point("10 timesteps", 10, len(STEPS)),
    Point("6 checkpoints", TIMESTEPS, len(SAVED_STEPS)),
    Point("20 timesteps", 20, len(STEPS)),
    Point(MOST, 10, len(SAVED_STEPS)),
)


def curve(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What precision costs: the points, and how far below the most expensive one each is, in that
    one's standard errors; nothing where a row is missing."""
    if not {point.row for point in POINTS} <= set(rows):
        return []
    names, most = COLUMNS[:4], rows[MOST]
    cells = []
    for point in POINTS:
        title = f"{point.timesteps} timesteps x {point.checkpoints} checkpoints"
        title += ", 16,384 numbers" if point.row == MOST else ""
        row: list[object] = [title, point.per_image, point.per_query]
        for name in names:
            mean, best = rows[point.row][name]["mean"], most[name]
            error = (best["high"] - best["low"]) / (2 * 1.96)  # of a bootstrap interval of 95 %
            below = "" if point.row == MOST else f" ({(best['mean'] - mean) / error:+.1f})"
            row.append(f"{mean:.2f}{below}")
        cells.append(row)
    return [
        "",
        "### Forward passes against precision",
        "",
        "Mean (how many standard errors of the last row below it; negative: above).",
        "",
        *grid(["setting", "forwards, training image", "forwards, query", *names], cells),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of("recipes.benchmarks.ablations", __doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the traced runs")
    parser.add_argument("--rows", nargs="+", default=None, help="names of rows; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    args = parser.parse_args(argv)
    known = {row.name: row for row in variants()}
    if unknown := sorted(set(args.rows or []) - set(known)):
        raise ValueError(f"ablations(--rows): unknown {unknown}. Known: {list(known)}.")
    chosen = [row for name, row in known.items() if args.rows is None or name in args.rows]
    data, outcomes = EmojiArtists("new"), Outcomes.load("labelled", args.results)
    asked = questions(data.held_out)
    table = Table(COLUMNS, oracle=False)

    def add(name: str, rows: Tensor) -> None:
        table.add(name, {"": emoji.measured(asked, rows, data, outcomes, [0, 1])}, "")

    for seed in args.seeds:
        folder = args.runs / "labelled"
        case = emoji.case(folder / f"full-seed{seed}", data, asked)
        case = replace(case, counters=counters(asked, case.module.known_attributes()))
        found: dict[str, Tensor] = {}
        drawings = ((data.held_out_set.images + 1) / 2).repeat_interleave(len(KINDS), 0)
        add(emoji.REFERENCE, emoji.baselines(asked, data, drawings)[emoji.REFERENCE])
        out = folder / "ablations" / f"seed{seed}"
        for variant, attributor, query in answers(case, chosen, out):
            own = torch.stack([each.scores for each in attributor.score(query)])
            found[variant.name] = standardised(own.double())
            add(variant.name, own)
            if variant.name == REFERENCE:
                for name, other in on_the_same_traces(attributor, query).items():
                    add(name, other)
        if {REFERENCE, PROBE} <= set(found):
            add(AVERAGED, (found[REFERENCE] + found[PROBE]) / 2)
    head = f"`{command_of(parser, args)}`; {machine()}; {len(outcomes.names)} retrained models, "
    page = table.page(head + "training seeds 0 and 1 averaged.")
    publish(args.results / "ablations.md", page + "\n".join(curve(table.rows())) + "\n")


if __name__ == "__main__":
    main()
