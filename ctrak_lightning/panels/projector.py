"""The traces of a checkpoint as points for the Projector dashboard."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning.attribution import Attribution
from ctrak_lightning.errors import metadata_heads
from ctrak_lightning.panels.drawing import one_line, squares
from ctrak_lightning.store import Checkpoint, SampleTable

POINTS, DIMS = 2000, 64
_EXTREMES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """Points [n, d], float32, with a row of ``header``'s columns each, and their ``sprites`` uint8
    [n, s, s, 3] or None."""

    points: Tensor
    header: list[str]
    rows: list[list[str]]
    sprites: Tensor | None


def embedding(
    checkpoint: Checkpoint,
    samples: SampleTable,
    results: Sequence[Attribution],
    *,
    points: int = POINTS,
) -> Embedding:
    """The unit-norm traces of a checkpoint on their principal components, at most 64: near points
    teach alike.

    Of a store with more samples, the proponents and opponents of every concept are kept and the
    rest is drawn at random, with a fixed seed.

    Args:
        checkpoint: whose traces.
        samples: the store's.
        results: of the concepts; each becomes a column of scores.
        points: at most so many.
    """
    positions = _chosen(len(samples), results, points)
    rows = checkpoint.rows_of(positions)
    unit = rows.unit.double() * rows.scale.double().unsqueeze(1)
    chosen = positions.tolist()
    columns = list(samples.metadata)
    scores = [f"score {result.concept.name}" for result in results]
    heads = metadata_heads(columns, ["sample id", "trace norm", *scores])
    header = ["sample id", *heads, "trace norm", *scores]
    values = [
        [samples.sample_ids[i] for i in chosen],
        *([samples.metadata[name][i] for i in chosen] for name in columns),
        [f"{norm:.4g}" for norm in checkpoint.norms()[positions].tolist()],
        *([f"{score:.4f}" for score in result.scores[positions].tolist()] for result in results),
    ]
    thumbnails = samples.thumbnails
    return Embedding(
        points=principal_components(unit, DIMS).float(),
        header=[one_line(name) for name in header],
        rows=[[one_line(value) for value in row] for row in zip(*values, strict=True)],
        sprites=None if thumbnails is None else squares(thumbnails[positions]),
    )


def principal_components(rows: Tensor, dims: int) -> Tensor:
    """Rows [n, k] centred, on their first ``min(dims, n, k)`` principal components [n, d], float64.

    The sign of each is such that its largest coordinate is positive, so that the same rows give the
    same points.
    """
    centred = rows.double() - rows.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    points: Tensor = (u * s)[:, :dims]
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    points *= torch.where(largest < 0, -1.0, 1.0)
    return points


def _chosen(n: int, results: Sequence[Attribution], most: int) -> Tensor:
    """Positions of the samples to show, ascending, int64."""
    if n <= most:
        return torch.arange(n)
    each = min(_EXTREMES, most // (2 * max(1, len(results))))
    kept: set[int] = set()
    for result in results:
        order = result.ranked().tolist()
        kept.update(order[:each] + order[-each:])
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    rest = [i for i in drawn if i not in kept][: most - len(kept)]
    return torch.tensor(sorted([*kept, *rest]))
