"""Sums over the samples of checkpoints' scores: what units, damping rules and searches need of
them, whether all scores are held at once or come in blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrak_lightning.utilities.processes import Processes

ROUNDING = 1e-4
"""Scores that differ by less, relative to their size, are equal: they hold to this
(docs/reliability.md)."""


def units(deviation: Tensor, mean: Tensor) -> Tensor:
    """What scores of this deviation and mean are measured in, all of one shape: their deviation; of
    scores that are equal up to rounding their size, so that rounding stays small beside other
    checkpoints' scores; 1 of scores that are all zero."""
    size = torch.hypot(deviation, mean)
    found = torch.where(differ(deviation, mean), deviation, size)
    return torch.where(
        found > 0, found.clamp(min=torch.finfo(found.dtype).tiny), torch.ones_like(found)
    )


def differ(deviation: Tensor, mean: Tensor) -> Tensor:
    """Whether scores of this deviation and mean differ by more than rounding."""
    return deviation > ROUNDING * torch.hypot(deviation, mean)


class Moments:
    """Sums over the samples of the scores of M checkpoints and of their products, in float64."""

    def __init__(self) -> None:
        self.count: int | Tensor = 0
        """Samples taken in; of each checkpoint [M], where some were passed over."""
        self._shift: Tensor | None = None
        self._sums = torch.zeros(())
        self._products = torch.zeros(())

    def add(self, scores: Tensor, exposed: Tensor | None = None) -> None:
        """Take in the scores [..., M, b] of b samples more.

        Args:
            scores: of all checkpoints.
            exposed: bool [M, b]; scores where it is False are passed over. Means and deviations
                alone can be asked of such sums.
        """
        if not scores.shape[-1]:
            return
        wide = scores.double()
        if self._shift is None:
            # Sums of squares cancel where the mean is far from zero: all are taken around the first
            # block's mean.
            self._shift = wide.mean(-1, keepdim=True)
        wide = wide - self._shift
        if exposed is None:
            self.count = self.count + wide.shape[-1]
        else:
            self.count = self.count + exposed.sum(-1)
            wide = wide * exposed
        self._sums = self._sums + wide.sum(-1)
        self._products = self._products + wide @ wide.mT  # [..., M, b] x [..., b, M] -> [..., M, M]

    @classmethod
    def stacked(cls, several: Sequence["Moments"]) -> "Moments":
        """Several of the same samples as one, in a new first dimension."""
        whole, shifts = cls(), [one._shift for one in several if one._shift is not None]
        whole.count = several[0].count
        whole._shift = torch.stack(shifts) if shifts else None
        whole._sums = torch.stack([one._sums for one in several])
        whole._products = torch.stack([one._products for one in several])
        return whole

    def over(self, processes: Processes) -> "Moments":
        """The sums over the samples of all processes, who call it together."""
        whole = Moments()
        for other in processes.gather(self):
            whole._join(other)
        return whole

    def deviation(self) -> Tensor:
        """Standard deviation over the samples [..., M]."""
        return self._covariances().diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    def mean(self) -> Tensor:
        """Mean over the samples [..., M]."""
        mean = self._sums / self.count
        return mean if self._shift is None else mean + self._shift.squeeze(-1)

    def agreement(self) -> Tensor:
        """Mean Pearson correlation over the pairs of two checkpoints or more [...]; 0 for those
        whose scores are equal up to rounding."""
        spread = self.deviation()
        spread = torch.where(differ(spread, self.mean()), spread, 0.0)
        both = spread.unsqueeze(-1) * spread.unsqueeze(-2)
        tiny = torch.finfo(torch.float64).tiny
        correlations = torch.where(both > 0, self._covariances() / both.clamp(min=tiny), 0.0)
        count = spread.shape[-1]
        pairs = 1 - torch.eye(count, dtype=torch.float64)
        return (correlations * pairs).sum((-2, -1)) / (count * (count - 1))

    def _join(self, other: "Moments") -> None:
        if other._shift is None:
            return
        if self._shift is None:
            self._shift = other._shift
        # sum (x + d) and sum (x + d)(x + d)^T, for x around the other's shift and d from mine to it
        d = (other._shift - self._shift).squeeze(-1)
        cross = other._sums.unsqueeze(-1) * d.unsqueeze(-2)
        outer = d.unsqueeze(-1) * d.unsqueeze(-2)
        self._products = (
            self._products + other._products + cross + cross.mT + _rows(other.count) * outer
        )
        self._sums = self._sums + other._sums + other.count * d
        self.count = self.count + other.count

    def _covariances(self) -> Tensor:
        means = self._sums / self.count
        return self._products / _rows(self.count) - means.unsqueeze(-1) * means.unsqueeze(-2)


def _rows(count: int | Tensor) -> int | Tensor:
    """Counts [M] for the rows of matrices [..., M, M]."""
    return count.unsqueeze(-1) if isinstance(count, Tensor) else count
