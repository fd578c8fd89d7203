"""What each part of the default method is worth: one part changed at a time, asked about the real drawings.

python -m recipes.emoji_artists.ablations --seeds 0 1 2     # after `benchmark`; writes results/ablations.json and .md

Layers, timesteps, checkpoints, trajectories, objectives, counter-conditions, normalisation, projection; and, on the default's
own traces, centring, other rules for the damping and other ways to join checkpoints. Resumable.
"""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ctrak_lightning import Attributor, Concept, Method, Projection, methods
from ctrak_lightning.attribution.attributor import Query
from ctrak_lightning.attribution.scoring import ensemble, standardised
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    ConceptDirection,
    Denoising,
    Joint,
    MeanOutput,
    PosteriorSampling,
    SquaredNorm,
    Term,
    contrast,
)
from ctrak_lightning.methods.trajectories import Inverted, Noised
from recipes.benchmarks.compare import Variant, answers
from recipes.benchmarks.tables import Table
from recipes.emoji_artists import benchmark
from recipes.emoji_artists.benchmark import STEPS, TIMESTEPS
from recipes.emoji_artists.data import KINDS, EmojiArtists
from recipes.emoji_artists.evaluate import Question, questions
from recipes.emoji_artists.fidelity import scores
from recipes.emoji_artists.outcomes import RESULTS, Outcomes
from recipes.emoji_artists.retrain import SAVED_STEPS

REFERENCE = "concept_trak_norm_given"
COLUMNS = (
    "R-precision, object",
    "R-precision, artist",
    "contributions, half by loss, object",
    "contributions, half by judge, object",
    "contributions, artist-half by loss, new artist",
    "contributions, half by loss, whole image",
)
GRID: tuple[float | None, ...] = (None, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
EFFECTIVE_SHARE = 0.25
CROSS_ATTENTION = ("*attn2*",)
PROBES = ("channel probe, contrast", "another channel probe", "a third channel probe")
EVERY_PROBE = Joint(SquaredNorm(), *methods.concept_trak().training.parts)
TWO = Joint(SquaredNorm(), MeanOutput())
# Rows whose standardised scores are averaged.
AVERAGED = {
    "average: squared norm, channel probe": (REFERENCE, PROBES[0]),
    "average: mean output, channel probe": ("mean output, contrast", PROBES[0]),
    "average: three channel probes": PROBES,
    "average: squared norm, three channel probes": (REFERENCE, *PROBES),
    "average: squared norm, mean output, three channel probes": (
        REFERENCE,
        "mean output, contrast",
        *PROBES,
    ),
}


def variants() -> list[Variant]:
    """The default, and the default with one part changed; every row is a :class:`Variant` of its own traces or query."""
    plain = Noised(timesteps=TIMESTEPS)
    default = replace(methods.concept_trak_norm(TIMESTEPS), query_trajectory=plain)

    def on(trajectory: Noised | Inverted, query: Noised | None = None) -> Method:
        return replace(default, training_trajectory=trajectory, query_trajectory=query or plain)

    def timed(count: int, start: float = 0.0, end: float = 1.0) -> Method:
        noised = Noised(timesteps=count, start=start, end=end)
        return on(noised, noised)

    denoising = replace(default, training=Denoising(), query=contrast(Denoising()))
    direction = (Term(ConceptDirection()),)
    both_sides = (Term(ConceptDirection(), "present"), Term(ConceptDirection(), "absent"))
    own = Noised(timesteps=TIMESTEPS, shared_noise=False)
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
        "inverted, 10 steps, guidance 1": on(Inverted(steps=10, timesteps=TIMESTEPS)),
        "inverted, 10 steps, guidance 3": on(Inverted(steps=10, guidance=3.0, timesteps=TIMESTEPS)),
        "norm per sample": replace(default, normalisation="sample"),
        "no norm": replace(default, normalisation="none"),
        "mean output, contrast": replace(default, training=MeanOutput(), query=contrast(MeanOutput())),
        **{
            name: replace(default, training=ChannelProbe(seed), query=contrast(ChannelProbe(seed)))
            for seed, name in enumerate(PROBES)
        },
        "joint: mean output, three channel probes": replace(
            methods.concept_trak(TIMESTEPS), query_trajectory=plain
        ),
        "joint: squared norm, mean output, three channel probes": replace(
            default, training=EVERY_PROBE, query=contrast(EVERY_PROBE)
        ),
        "joint: squared norm, mean output": replace(default, training=TWO, query=contrast(TWO)),
        "whole image, D-TRAK": methods.d_trak(TIMESTEPS),
        "whole image, TRAK": methods.trak(TIMESTEPS),
        "whole image, DAS": methods.das(TIMESTEPS),
        "denoising, contrast": denoising,
        "posterior sampling traces, denoising contrast": replace(denoising, training=PosteriorSampling()),
        "denoising traces, concept direction": replace(denoising, query=direction),
        "posterior sampling traces, concept direction": replace(
            default, training=PosteriorSampling(), query=direction
        ),
        "posterior sampling traces, two-sided direction": replace(
            default, training=PosteriorSampling(), query=both_sides
        ),
        "squared norm traces, two-sided direction": replace(default, query=both_sides),
    }
    rows = [Variant(name=name, method=method, steps=STEPS, scope="given") for name, method in changed.items()]
    reference = rows[0]
    rows += [
        replace(reference, name="cross-attention only", layers=CROSS_ATTENTION),
        *(
            replace(row, name=f"{row.name}, cross-attention only", layers=CROSS_ATTENTION)
            for row in rows
            if row.name in ("mean output, contrast", PROBES[0]) or row.name.startswith("joint")
        ),
        replace(reference, name="self-attention only", layers=("*attn1*",)),
        replace(reference, name="last checkpoint only", steps=STEPS[-1:]),
        replace(reference, name="6 checkpoints", steps=SAVED_STEPS),
        replace(reference, name="512 numbers", projection=Projection(rank=16, dim=512)),
        replace(reference, name="16,384 numbers", projection=Projection(rank=16, dim=16384)),
        replace(reference, name="against nothing", counters=("nothing",)),
        replace(reference, name="against another value", counters=("swapped",)),
        replace(
            reference,
            name="against all three, averaged",
            counters=("dropped", "nothing", "swapped"),
        ),
        replace(
            reference,
            name="10 timesteps, 6 checkpoints, 16,384 numbers",
            method=timed(10),
            steps=SAVED_STEPS,
            projection=Projection(rank=16, dim=16384),
        ),
    ]
    return rows


def counters(asked: Sequence[Question], known: dict[str, list[str]]) -> dict[str, list[Concept]]:
    """The questions against the pair without the name (the default), against nothing, and against another name in its place."""
    result: dict[str, list[Concept]] = {"dropped": [], "nothing": [], "swapped": []}
    for question in asked:
        concept = question.concept()
        values = known[question.kind]
        other = values[(values.index(question.value) + 1) % len(values)]
        result["dropped"].append(concept)
        result["nothing"].append(replace(concept, absent={}))
        result["swapped"].append(replace(concept, absent={**concept.present, question.kind: other}))  # type: ignore[dict-item]
    return result


def by_checkpoint(queries: Tensor, traces: Sequence[Tensor], damping: float | None) -> Tensor:
    """Scores [M, Q, N] of queries [M, Q, k] against the traces [N, k] of every checkpoint."""
    return torch.stack([scores(q, phi, damping) for q, phi in zip(queries, traces, strict=True)])


def effective_damping(traces: Tensor, share: float) -> float:
    """The damping at which ``tr(K (K + lambda I)^-1)`` is a share of the number of samples (bisection in its logarithm)."""
    values = torch.linalg.eigvalsh(traces @ traces.T).clamp(min=0)
    low, high = -12.0, 12.0
    for _ in range(60):
        middle = (low + high) / 2
        damped = values / (values + 10**middle * values.mean())
        low, high = (middle, high) if float(damped.mean()) > share else (low, middle)
    return float(10**middle)


def without_the_other(queries: Tensor) -> Tensor:
    """Queries [M, 2 P, k], the two concepts of an image in turn, each without its component along the other."""
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
    grid = [ensemble(by_checkpoint(query.features, traces, damping)) for damping in GRID]
    ranks = [each.argsort(1).argsort(1).double() for each in grid]
    effective = [
        scores(q, phi, effective_damping(phi, EFFECTIVE_SHARE))
        for q, phi in zip(query.features, traces, strict=True)
    ]
    result: dict[str, Tensor] = {
        "damping 10": grid[GRID.index(10.0)],
        "damping 10, centred traces": ensemble(by_checkpoint(query.features, centred, 10.0)),
        "no kernel": grid[0],
        "ranks averaged over dampings": torch.stack(ranks).mean(0),
        f"effective dimension {EFFECTIVE_SHARE:.0%} of the samples": ensemble(torch.stack(effective)),
        "without the other concept's component, damping 10": ensemble(
            by_checkpoint(without_the_other(query.features), traces, 10.0)
        ),
        "checkpoints added as they are": agreed.sum(0),
    }
    result |= {
        f"step {checkpoint.step} alone": standardised(each)
        for checkpoint, each in zip(checkpoints, agreed, strict=True)
    }
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the traced fine-tunes")
    parser.add_argument("--rows", nargs="+", default=None, help="names of rows; all by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--suffix", default="", help="of the results' file names, for a table of its own")
    args = parser.parse_args(argv)
    rows = {row.name: row for row in variants()}
    if unknown := sorted(set(args.rows or []) - set(rows)):
        raise ValueError(f"ablations(--rows): unknown {unknown}. Known: {list(rows)}.")
    chosen = [row for name, row in rows.items() if args.rows is None or name in args.rows]
    data, outcomes = EmojiArtists("new"), Outcomes.load("labelled", args.results)
    asked = questions(data.held_out)
    table = Table(COLUMNS, oracle=False)

    def measure(rows: Tensor) -> dict[str, Tensor]:
        return benchmark.measured(asked, rows, data, outcomes, [0, 1])

    for seed in args.seeds:
        folder = args.runs / "labelled"
        case = benchmark.case(folder / f"full-seed{seed}", data, asked)
        case = replace(case, counters=counters(asked, case.module.known_attributes()))
        found: dict[str, Tensor] = {}
        drawings = ((data.held_out_set.images + 1) / 2).repeat_interleave(len(KINDS), 0)
        labels = benchmark.references(asked, data, drawings)[benchmark.REFERENCE]
        table.add(benchmark.REFERENCE, {"": measure(labels)}, "")
        for variant, attributor, query in answers(case, chosen, folder / "ablations" / f"seed{seed}"):
            own = torch.stack([each.scores for each in attributor.score(query)])
            found[variant.name] = standardised(own.double())
            table.add(variant.name, {"": measure(own)}, "")
            if variant.name == REFERENCE:
                for name, other in on_the_same_traces(attributor, query).items():
                    table.add(name, {"": measure(other)}, "")
        for name, parts in AVERAGED.items():
            if set(parts) <= set(found):
                table.add(name, {"": measure(torch.stack([found[part] for part in parts]).mean(0))}, "")
    command = f"python -m recipes.emoji_artists.ablations --seeds {' '.join(map(str, args.seeds))}"
    command += f" --suffix {args.suffix}" if args.suffix else ""
    command += "".join(f' "{row}"' if i else f' --rows "{row}"' for i, row in enumerate(args.rows or []))
    facts = {
        "command": command,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "retrained": len(outcomes.names),
    }
    head = f"`{command}`; {facts['machine']}; {facts['retrained']} retrained models, training seeds 0 and 1 averaged."
    print(table.write(args.results / f"ablations{args.suffix}", facts, head))


if __name__ == "__main__":
    main()
