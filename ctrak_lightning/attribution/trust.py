"""How far a result can be trusted, from the store alone: no label is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning.attribution.solve import (
    SCORES_AT_ONCE,
    chosen_scores,
    compared,
    ensemble,
    exposed_at,
)
from ctrak_lightning.metrics.functional import spearman
from ctrak_lightning.traces import Checkpoint

ASKED = 64


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """How many of the ``asked`` training samples, taken as questions, rank themselves ``first``."""

    first: int
    asked: int


def self_check(
    checkpoints: Sequence[Checkpoint],
    damping: float | None,
    *,
    residual: bool = False,
    weights: Sequence[float] | None = None,
    asked: int = ASKED,
) -> SelfCheck:
    """Does a training sample attribute to itself? Stored traces, taken as queries through the same
    kernel.

    Where few do, the traces hardly tell the samples apart (too few features, or too little
    damping), and no ranking of them says much. Where all do, that alone does not make a ranking
    right.

    Args:
        checkpoints: of one store.
        damping: of the kernel; None leaves it out.
        residual: as in :func:`~ctrak_lightning.attribution.solve.chosen_scores`.
        weights: of the checkpoints, as in :func:`~ctrak_lightning.attribution.solve.ensemble`.
        asked: how many samples to take, evenly spaced over those that were trained on.

    Raises:
        CorruptStoreError: The store is damaged.
    """
    total = checkpoints[0].rows
    exposed = exposed_at(checkpoints)
    usable = torch.arange(total) if exposed is None else compared(exposed).nonzero().flatten()
    count = min(asked, len(usable))
    samples = usable[[i * len(usable) // count for i in range(count)]]
    first = 0
    for part in samples.split(max(1, SCORES_AT_ONCE // (len(checkpoints) * total))):
        queries = torch.stack([checkpoint.rows_of(part).features() for checkpoint in checkpoints])
        scores, _ = chosen_scores(queries, checkpoints, (damping,), residual=residual)  # [M, Q, N]
        joined = ensemble(scores, weights, exposed)  # [Q, N]
        own = joined[torch.arange(len(part)), part].unsqueeze(1)
        first += int((joined <= own).all(1).sum())
    return SelfCheck(first=first, asked=count)


def stability(
    scores: Tensor, weights: Sequence[float] | None = None, exposed: Tensor | None = None
) -> float | None:
    """Spearman's correlation between the rankings of two halves of the checkpoints: every other
    one, and the rest.

    Args:
        scores: of each checkpoint [M, N].
        weights: of the checkpoints, as in :func:`~ctrak_lightning.attribution.solve.ensemble`.
        exposed: which samples had been trained on at each checkpoint, bool [M, N]: those that had
            at all of them are ranked. None ranks all.

    Returns:
        In [-1, 1]; None of fewer than two checkpoints or samples, or where all samples of a half
        score the same.
    """
    ranked = torch.ones(scores.shape[1], dtype=torch.bool) if exposed is None else exposed.all(0)
    if len(scores) < 2 or int(ranked.sum()) < 2:
        return None
    halves = [
        ensemble(
            scores[start::2].double(),
            None if weights is None else weights[start::2],
            None if exposed is None else exposed[start::2],
        )[ranked]
        for start in (0, 1)
    ]
    if any(bool((half == half[0]).all()) for half in halves):
        return None
    return float(spearman(halves[0], halves[1]))
