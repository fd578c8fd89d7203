"""The rows of the benchmark tables that take gradients."""

from collections.abc import Sequence
from dataclasses import replace

from ctrak_lightning import Method, methods
from ctrak_lightning.methods.objectives import (
    ChannelProbe,
    Denoising,
    Joint,
    MeanOutput,
    SquaredNorm,
    contrast,
)
from ctrak_lightning.methods.trajectories import Noised
from recipes.benchmarks.compare import Variant

WITHOUT_KEYS_AND_VALUES = ("*attn1*", "*attn2.to_q*", "*attn2.to_out*")
CROSS_ATTENTION = ("*attn2*",)

# Rows that are also asked about given images.
GIVEN = (
    "concept_trak",
    "concept_trak_cross_attention",
    "concept_trak_with_norm",
    "concept_trak_with_norm_cross_attention",
    "concept_trak_norm",
    "concept_trak_norm_per_sample",
    "concept_trak_norm_without_keys_and_values",
    "concept_trak_norm_cross_attention",
    "norm_and_mean_output",
    "mean_output",
    "mean_output_cross_attention",
    "mean_output_without_keys_and_values",
    "concept_trak_paper",
    "trak",
    "d_trak",
    "das",
)


def table_variants(
    timesteps: int, steps: tuple[int, ...], only: Sequence[str] | None = None
) -> list[Variant]:
    """The methods of the tables; damping by agreement for contrastive queries, else 1, or none where the
    method has none: fixed beforehand, without labels.

    Args:
        timesteps: states per sample and query.
        steps: the checkpoints of the ensemble.
        only: names of the rows wanted; all by default.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    paper = methods.concept_trak_paper(timesteps, 2 * timesteps)
    ours, norm = methods.concept_trak(timesteps), methods.concept_trak_norm(timesteps)
    noised = Noised(timesteps=timesteps)
    with_norm = Joint(SquaredNorm(), *ours.training.parts)
    two = Joint(SquaredNorm(), MeanOutput())
    nine = Joint(MeanOutput(), *(ChannelProbe(seed) for seed in range(8)))
    chosen: dict[str, Method] = {
        "concept_trak": ours,
        "concept_trak_with_norm": replace(
            ours, name="concept_trak_with_norm", training=with_norm, query=contrast(with_norm)
        ),
        "concept_trak_norm": norm,
        "concept_trak_norm_per_sample": replace(norm, normalisation="sample"),
        "mean_output": replace(ours, name="mean_output", training=MeanOutput(), query=contrast(MeanOutput())),
        "norm_and_mean_output": replace(ours, name="norm_and_mean_output", training=two, query=contrast(two)),
        "nine_probes": replace(ours, name="nine_probes", training=nine, query=contrast(nine)),
        "concept_trak_paper": paper,
        "contrastive_trak": replace(
            ours,
            name="contrastive_trak",
            normalisation="sample",
            training=Denoising(),
            query=contrast(Denoising()),
            query_trajectory=noised,
        ),
        "contrastive_dps": replace(
            paper,
            name="contrastive_dps",
            query=contrast(Denoising()),
            query_trajectory=noised,
            damping="agreement",
        ),
        "trak": methods.trak(timesteps),
        "d_trak": methods.d_trak(timesteps),
        "das": methods.das(timesteps),
        "journey_trak": methods.journey_trak(timesteps),
        "tracin": methods.tracin(timesteps),
        "retrac": methods.retrac(timesteps),
    }
    rows = [Variant(name=name, method=method, steps=steps) for name, method in chosen.items()]
    without = [
        replace(row, name=f"{row.name}_without_keys_and_values", layers=WITHOUT_KEYS_AND_VALUES)
        for row in rows
        if row.name in ("concept_trak_norm", "contrastive_trak", "mean_output")
    ]
    across = [
        replace(row, name=f"{row.name}_cross_attention", layers=CROSS_ATTENTION)
        for row in rows
        if row.name
        in (
            "concept_trak",
            "concept_trak_with_norm",
            "concept_trak_norm",
            "mean_output",
            "norm_and_mean_output",
            "nine_probes",
        )
    ]
    overall = [
        replace(row, name=f"{row.name}_global", scope="global")
        for row in rows
        if row.name in ("trak", "d_trak")
    ]
    given = [
        replace(row, name=f"{row.name}_given", scope="given")
        for row in (*rows, *without, *across)
        if row.name in GIVEN
    ]
    everything = [*rows, *without, *across, *overall, *given]
    known = [row.name for row in everything]
    if unknown := sorted(set(only or []) - set(known)):
        raise ValueError(f"table_variants(only={only}): unknown {unknown}. Known: {', '.join(known)}.")
    return [row for row in everything if only is None or row.name in only]
