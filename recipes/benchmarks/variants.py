"""The rows of the benchmark tables that take gradients."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ctrak_lightning import Method, methods
from ctrak_lightning.methods.objectives import Denoising, MeanOutput, contrast
from ctrak_lightning.methods.trajectories import Inverted, Noised

from .compare import Variant

CROSS_ATTENTION = ("*attn2*",)
LAYERS = {
    "without_keys_and_values": (
        ("*attn1*", "*attn2.to_q*", "*attn2.to_out*"),
        ("concept_trak_norm", "contrastive_trak", "mean_output"),
    ),
    "cross_attention": (CROSS_ATTENTION, ("concept_trak", "concept_trak_norm", "mean_output")),
}
"""Layers that rows of their own trace, and which methods have such a row."""
PUBLISHED = "concept_trak_published"
"""Concept-TRAK (arXiv 2507.06547) at the cost its authors run it at."""
PUBLISHED_STATES = Inverted(steps=50, guidance=7.5, timesteps=9)
# All other rows are also asked about given images.
GENERATED_ALONE = ("contrastive", "journey", "tracin", "retrac")


def table_variants(
    timesteps: int,
    steps: Sequence[int],
    only: Sequence[str] | None = None,
    *,
    scopes: Sequence[str] = ("local", "global", "given"),
) -> list[Variant]:
    """The methods of the tables; damping by agreement for contrastive queries, else 1, or none
    where the method has none: fixed beforehand, without labels.

    ``concept_trak_paper`` is Concept-TRAK at a cost like the other rows';
    ``concept_trak_published`` (:func:`published`) is what its authors run.

    Args:
        timesteps: states per sample and query.
        steps: the checkpoints of the ensemble.
        only: names of the rows wanted; all by default.
        scopes: of the rows; without ``"given"`` where all images asked about are generated.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    # As the tables here were made: the preset is damped by agreement now.
    paper = methods.concept_trak_paper(timesteps, 2 * timesteps, damping=1.0)
    ours, norm = methods.concept_trak(timesteps), methods.concept_trak_norm(timesteps)
    output, denoising = MeanOutput(), Denoising()
    asked: dict[str, Any] = {"query": contrast(denoising)}
    asked["query_trajectory"] = Noised(timesteps=timesteps)
    chosen: dict[str, Method] = {
        "concept_trak": ours,
        "concept_trak_norm": norm,
        "concept_trak_norm_per_sample": replace(norm, normalisation="sample"),
        "mean_output": replace(ours, name="mean_output", training=output, query=contrast(output)),
        # Every image was trained on as often as every other, but for chance.
        "influence": methods.influence(per_exposure=False),
        "influence_condition": methods.influence("condition", per_exposure=False),
        "influence_null": methods.influence("null", per_exposure=False),
        "random_probe": methods.random_probe(),
        "concept_trak_paper": paper,
        "contrastive_trak": replace(
            ours, name="contrastive_trak", normalisation="sample", training=denoising, **asked
        ),
        "contrastive_dps": replace(paper, name="contrastive_dps", damping="agreement", **asked),
        "trak": methods.trak(timesteps),
        "d_trak": methods.d_trak(timesteps),
        "das": methods.das(timesteps),
        "journey_trak": methods.journey_trak(timesteps),
        "tracin": methods.tracin(timesteps),
        "retrac": methods.retrac(timesteps),
    }
    rows = [
        Variant(name=name, method=method, steps=tuple(steps)) for name, method in chosen.items()
    ]
    rows.append(published(steps))
    of_layers = [
        replace(row, name=f"{row.name}_{suffix}", layers=layers)
        for suffix, (layers, names) in LAYERS.items()
        for row in rows
        if row.name in names
    ]
    overall = [
        replace(row, name=f"{row.name}_global", scope="global")
        for row in rows
        if row.name in ("trak", "d_trak")
    ]
    given = [
        about_given(row) for row in (*rows, *of_layers) if not row.name.startswith(GENERATED_ALONE)
    ]
    everything = [row for row in (*rows, *of_layers, *overall, *given) if row.scope in scopes]
    known = [row.name for row in everything]
    if unknown := sorted(set(only or []) - set(known)):
        shown = ", ".join(known)
        raise ValueError(f"table_variants(only={only}): unknown {unknown}. Known: {shown}.")
    return [row for row in everything if only is None or row.name in only]


def published(steps: Sequence[int]) -> Variant:
    """Concept-TRAK as its authors run it, whatever the table's states and checkpoints are: nine
    states of 50 steps of DDIM inversion under guidance 7.5, cross-attention alone, the last
    checkpoint alone.

    It has no kernel: with one checkpoint no other is there to agree with, and the authors pick the
    damping by the benchmark's labels. Their queries take every gradient in a generation of its own
    (eta 0.1), which the library cannot: it takes the states of the one that made the image.
    """
    method = methods.concept_trak_paper(
        timesteps=PUBLISHED_STATES.timesteps or PUBLISHED_STATES.steps,
        inversion_steps=PUBLISHED_STATES.steps,
        guidance=PUBLISHED_STATES.guidance,
        damping=None,
    )
    return Variant(
        name=PUBLISHED,
        method=replace(method, name=PUBLISHED),
        layers=CROSS_ATTENTION,
        steps=(steps[-1],),
    )


def about_given(row: Variant) -> Variant:
    """A row that is asked about given images. The published method inverts these as it does the
    training images; what else looks at a generation has noised ones."""
    method = row.method
    if row.name == PUBLISHED:
        method = replace(method, query_trajectory=PUBLISHED_STATES)
    return replace(row, name=f"{row.name}_given", method=method, scope="given")


def swapped(rows: Sequence[Variant]) -> list[Variant]:
    """The rows that look at the counter-condition, asked against a case's ``"swapped"`` one."""
    seeing = [row for row in rows if row.method.sees_absent]
    return [replace(row, name=f"{row.name}, swapped", counters=("swapped",)) for row in seeing]
