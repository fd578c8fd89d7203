"""Scores of one checkpoint: ``q (K + lambda I)^-1 Phi^T`` with ``K = Phi^T Phi`` (TRAK, arXiv 2303.14186, eq. 13)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrak_lightning.traces import Checkpoint


def checkpoint_scores(queries: Tensor, checkpoint: Checkpoint, damping: float | None) -> Tensor:
    """Scores [Q, N] of queries [Q, k] against a checkpoint's traces, in float64.

    The smaller of the two equal forms is solved, ``(Phi^T Phi + lambda I)^-1 Phi^T = Phi^T (Phi Phi^T + lambda I)^-1``,
    with ``lambda = damping * tr(K) / min(N, k)``; for the query alone, never as an inverse of the store's size.

    Args:
        queries: projected gradients of the queries [Q, k].
        checkpoint: a sealed checkpoint of a store.
        damping: relative to the mean eigenvalue; None leaves the kernel out.
    """
    q = queries.double()
    if damping is None:
        return _dots(q, checkpoint)
    kernel = checkpoint.kernel()
    gram = kernel.gram.double()
    ridge = damping * float(gram.diagonal().sum()) / len(gram)
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    if kernel.side == "primal":
        return _dots(torch.cholesky_solve(q.T, factor).T, checkpoint)
    return torch.cholesky_solve(_dots(q, checkpoint).T, factor).T


def ensemble(per_checkpoint: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Checkpoints' scores [M, ..., N] as one [..., N].

    Without weights, the mean of the checkpoints, each scaled by its own standard deviation over the samples first.
    (Gradients shrink as training proceeds; without the scaling the first checkpoint would decide alone.) With weights, the
    weighted sum of the scores as they are.
    """
    if weights is None:
        return standardised(per_checkpoint).mean(0)
    return sum(
        (w * scores for w, scores in zip(weights, per_checkpoint, strict=True)), per_checkpoint.new_zeros(())
    )


def standardised(scores: Tensor) -> Tensor:
    """Scores [..., N] in units of their own standard deviation over the samples; not centred, so signs keep their meaning."""
    spread = scores.std(-1, keepdim=True, correction=0)
    return torch.where(spread > 0, scores / spread.clamp(min=torch.finfo(scores.dtype).tiny), scores)


def soft_thresholded(scores: Tensor, threshold: float) -> Tensor:
    """Scores [..., N] in units of their own standard deviation around their median, moved towards zero by ``threshold``; what
    lies within it becomes zero. (TRAK, arXiv 2303.14186, sec. 3.2, sparsifies so too.)"""
    centred = scores - scores.median(-1, keepdim=True).values
    units = standardised(centred)
    return units.sign() * (units.abs() - threshold).clamp(min=0)


def _dots(q: Tensor, checkpoint: Checkpoint) -> Tensor:
    scores = torch.empty(len(q), checkpoint.rows, dtype=torch.float64)
    for index, features in checkpoint.shards():
        scores[:, index] = q @ features.double().T
    return scores
