"""Shares of groups of samples, and their bootstrap intervals."""

from collections.abc import Callable

import torch
from torch import Tensor

_DRAWS_AT_ONCE = 2**24  # sample positions drawn, 128 MiB


def group_shares(positive: Tensor, membership: Tensor, groups: int) -> Tensor:
    """Each group's share [G] of what the samples add [N], float64; all zero where nothing is added.

    Args:
        positive: what each sample adds [N], 0 or more.
        membership: the group of each sample [N], int64.
        groups: their number, G.
    """
    totals = torch.zeros(groups, dtype=torch.float64).index_add_(0, membership, positive)
    return totals / totals.sum().clamp(min=torch.finfo(torch.float64).tiny)


def bootstrapped_shares(
    positive: Callable[[Tensor], Tensor],
    checkpoints: int,
    membership: Tensor,
    groups: int,
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Low [G] and high [G] of the percentile bootstrap over checkpoints and samples (Efron 1979).

    Args:
        positive: what each sample adds [N], for checkpoints that were drawn so many times each [M].
        checkpoints: their number, M; of a single one only the samples are drawn.
        membership: the group of each sample [N].
        groups: their number, G.
        confidence: of the interval.
        resamples: how many.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = len(membership)
    drawn = torch.randint(checkpoints, (resamples, checkpoints), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=checkpoints) for row in drawn]).double()
    # Few checkpoints can be drawn in few ways only, and what each way gives is computed once.
    ways, which = torch.unique(counts, dim=0, return_inverse=True)
    shares = torch.zeros(resamples, groups, dtype=torch.float64)
    for way, pattern in enumerate(ways):
        adds = positive(pattern)
        rows = (which == way).nonzero().flatten()
        for part in rows.split(max(1, _DRAWS_AT_ONCE // samples)):
            draws = torch.randint(samples, (len(part), samples), generator=generator)
            sums = torch.zeros(len(part), groups, dtype=torch.float64)
            sums.scatter_add_(1, membership[draws], adds[draws])
            shares[part] = sums / sums.sum(1, keepdim=True).clamp(
                min=torch.finfo(torch.float64).tiny
            )
    tail = (1 - confidence) / 2
    low, high = torch.quantile(shares, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high
