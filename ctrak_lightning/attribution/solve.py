"""Scores of one checkpoint: ``q (K + lambda I)^-1 Phi^T`` with ``K = Phi^T Phi`` (TRAK, arXiv
2303.14186, eq. 13)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrak_lightning.attribution.dots import Dots
from ctrak_lightning.attribution.moments import Moments, units
from ctrak_lightning.traces import Checkpoint

AGREEMENT_GRID: tuple[float | None, ...] = (
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
    30.0,
    100.0,
    300.0,
    None,
)
"""Dampings among which ``damping="agreement"`` chooses."""
LONE_DAMPING = 10.0
"""What ``damping="agreement"`` uses where there is one checkpoint only, and so nothing to agree
with."""
SCORES_AT_ONCE = 2**27
"""float64 numbers, one gigabyte."""


def checkpoint_scores(queries: Tensor, checkpoint: Checkpoint, damping: float | None) -> Tensor:
    """Scores [Q, N] of queries [Q, k] against a checkpoint's traces, in float64; see
    :func:`scores_by_damping`."""
    return scores_by_damping(queries, checkpoint, [damping])[0]


def scores_by_damping(
    queries: Tensor, checkpoint: Checkpoint, dampings: Sequence[float | None]
) -> Tensor:
    """Scores [D, Q, N] of queries [Q, k] at several dampings, in float64, in one pass over a
    checkpoint's traces.

    The smaller of the two equal forms is solved, ``(Phi^T Phi + lambda I)^-1 Phi^T = Phi^T (Phi
    Phi^T + lambda I)^-1``, with ``lambda = damping * tr(K) / min(N, k)``; for the query alone,
    never as an inverse of the store's size.

    Args:
        queries: projected gradients of the queries [Q, k].
        checkpoint: a sealed checkpoint of a store.
        dampings: relative to the mean eigenvalue; None leaves the kernel out.
    """
    if all(damping is None for damping in dampings):
        return _dots(queries, checkpoint).expand(len(dampings), -1, -1)
    kernel = checkpoint.kernel()
    if kernel.side == "dual":
        return kernel.solve(_dots(queries, checkpoint), dampings)
    solved = kernel.solve(queries, dampings)  # [D, Q, k]
    return _dots(solved.flatten(0, 1), checkpoint).view(len(dampings), len(queries), -1)


def chosen_scores(
    queries: Tensor,
    checkpoints: Sequence[Checkpoint],
    grid: Sequence[float | None],
    *,
    residual: bool = False,
) -> tuple[Tensor, list[float | None]]:
    """Scores [M, Q, N] of queries [M, Q, k] at every checkpoint, and the damping used for each
    query. A sample that had not been trained on at a checkpoint scores 0 there.

    Args:
        queries: projected gradients of the queries, for each of the M checkpoints.
        checkpoints: sealed checkpoints of one store.
        grid: the damping; of several, each query uses the one at which the checkpoints agree most
            (:func:`agreement`).
        residual: multiply the scores, once the damping is chosen, by the samples' losses (DAS).
    """
    parts, chosen = [], []
    exposed = exposed_at(checkpoints)
    room = max(1, SCORES_AT_ONCE // (len(grid) * len(checkpoints) * checkpoints[0].rows))
    for part in queries.split(room, 1):
        each = [scores_by_damping(rows, c, grid) for rows, c in zip(part, checkpoints, strict=True)]
        scores = torch.stack(each, 1)  # [D, M, Q, N]
        best = torch.zeros(part.shape[1], dtype=torch.long)
        if len(grid) > 1:
            best = torch.stack([agreement(at_one, exposed) for at_one in scores]).argmax(0)
        parts.append(torch.stack([scores[d, :, i] for i, d in enumerate(best.tolist())], 1))
        chosen += [grid[d] for d in best.tolist()]
    scores = torch.cat(parts, 1)
    if residual:
        scores = scores * torch.stack([c.losses().double() for c in checkpoints]).unsqueeze(1)
    if exposed is not None:  # the dual form leaves what rounding makes of 0
        scores = scores * exposed.unsqueeze(1)
    return scores, chosen


def exposed_at(checkpoints: Sequence[Checkpoint]) -> Tensor | None:
    """Which samples had been trained on at each checkpoint, bool [M, N]; None where all had, as far
    as is known."""
    each = [checkpoint.exposed() for checkpoint in checkpoints]
    if all(one is None for one in each):
        return None
    every = torch.ones(checkpoints[0].rows, dtype=torch.bool)
    return torch.stack([every if one is None else one for one in each])


def exposures_at(checkpoints: Sequence[Checkpoint]) -> Tensor | None:
    """How often each sample had entered an optimizer step at each checkpoint, int64 [M, N]; -1 at
    one where that is not known, None where it is at none."""
    each = [checkpoint.exposures() for checkpoint in checkpoints]
    if all(one is None for one in each):
        return None
    unknown = torch.full((checkpoints[0].rows,), -1, dtype=torch.int64)
    return torch.stack([unknown if one is None else one for one in each])


def compared(exposed: Tensor) -> Tensor:
    """Over which samples checkpoints are compared, bool [N]: those that had been trained on at all
    of them, ``exposed`` [M, N]; all samples, if there are not two of these."""
    both = exposed.all(0)
    return both if int(both.sum()) > 1 else torch.ones_like(both)


def agreement(scores: Tensor, exposed: Tensor | None = None) -> Tensor:
    """How much checkpoints agree: the mean Pearson correlation over pairs of them, of scores [M,
    ..., N] over the samples [...].

    It needs no label. What a concept owes its samples is the same at every checkpoint of a run that
    has learnt it; the noise that a kernel's inverse amplifies is not. Checkpoints whose scores are
    equal up to rounding agree with nothing (0).

    Args:
        scores: of the checkpoints.
        exposed: as :func:`exposed_at` gives it; the samples that are :func:`compared` count.

    Raises:
        ValueError: fewer than two checkpoints.
    """
    count = len(scores)
    if count < 2:
        raise ValueError(
            f"agreement(scores {list(scores.shape)}): expected two checkpoints or more."
        )
    moments = Moments()
    moments.add((scores if exposed is None else scores[..., compared(exposed)]).movedim(0, -2))
    return moments.agreement()


def ensemble(
    per_checkpoint: Tensor, weights: Sequence[float] | None = None, exposed: Tensor | None = None
) -> Tensor:
    """Checkpoints' scores [M, ..., N] as one [..., N].

    Without weights, the mean of the checkpoints, each scaled by its own standard deviation over the
    samples first. (Gradients shrink as training proceeds; without the scaling the first checkpoint
    would decide alone.) With weights, the weighted sum of the scores as they are. ``exposed`` [M,
    N]: whose scores count for the deviations.
    """
    if weights is None:
        return standardised(per_checkpoint, exposed).mean(0)
    return sum(
        (w * scores for w, scores in zip(weights, per_checkpoint, strict=True)),
        per_checkpoint.new_zeros(()),
    )


def drawn_ensemble(
    per_checkpoint: Tensor,
    drawn: Tensor,
    weights: Sequence[float] | None = None,
    exposed: Tensor | None = None,
) -> Tensor:
    """:func:`ensemble` of checkpoints' scores [M, N] of which each was drawn so many times [M], as
    in a bootstrap over checkpoints."""
    if weights is None:
        return (drawn.unsqueeze(1) * standardised(per_checkpoint, exposed)).sum(0) / drawn.sum()
    return ((drawn * torch.tensor(weights, dtype=drawn.dtype)).unsqueeze(1) * per_checkpoint).sum(0)


def standardised(scores: Tensor, exposed: Tensor | None = None) -> Tensor:
    """Scores [..., N] in units of their own standard deviation over the samples (:func:`spreads`);
    not centred, so signs keep their meaning."""
    return scores / spreads(scores, exposed)


def spreads(scores: Tensor, exposed: Tensor | None = None) -> Tensor:
    """The standard deviation over the samples of scores [..., N], as [..., 1]; where they are equal
    up to rounding, their size (:func:`~ctrak_lightning.attribution.moments.units`). ``exposed`` [M,
    N] leaves samples out of scores [M, ..., N]."""
    if exposed is None:
        return units(scores.std(-1, keepdim=True, correction=0), scores.mean(-1, keepdim=True))
    while exposed.dim() < scores.dim():  # [M, N] of scores [M, ..., N]
        exposed = exposed.unsqueeze(-2)
    count = exposed.sum(-1, keepdim=True).clamp(min=1)
    mean = (scores * exposed).sum(-1, keepdim=True) / count
    deviation = (((scores - mean) * exposed).square().sum(-1, keepdim=True) / count).sqrt()
    return units(deviation, mean)


def soft_thresholded(scores: Tensor, threshold: float, exposed: Tensor | None = None) -> Tensor:
    """Scores [..., N] in units of their own standard deviation around their median, moved towards
    zero by ``threshold``; what lies within it becomes zero. (TRAK, arXiv 2303.14186, sec. 3.2,
    sparsifies so too.)

    Args:
        scores: of the samples.
        threshold: in standard deviations.
        exposed: bool [N]; median and deviation are over these samples, and the others become zero.
    """
    known = scores if exposed is None else scores[..., exposed]
    shifted = (scores - known.median(-1, keepdim=True).values) / spreads(known)
    if exposed is not None:
        shifted = shifted * exposed
    return shifted.sign() * (shifted.abs() - threshold).clamp(min=0)


def _dots(directions: Tensor, checkpoint: Checkpoint) -> Tensor:
    dots = Dots(directions)
    scores = torch.empty(len(directions), checkpoint.rows, dtype=torch.float64)
    for rows in checkpoint.blocks():
        scores[:, rows.index] = dots(rows)
    return scores
