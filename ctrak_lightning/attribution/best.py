"""The best scores among many that come in blocks."""

import torch
from torch import Tensor

from ctrak_lightning.processes import Processes

MOST_SAMPLES = 2**32
"""A position takes half of a key; see :func:`_keys`."""
_LOW = MOST_SAMPLES - 1


class Best:
    """Keeps the ``n`` best of scores that come some samples at a time; ties go to the lower
    position.

    Args:
        n: how many to keep for each question.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._keys: Tensor | None = None
        self._floor: Tensor | None = None

    def add(self, scores: Tensor, positions: Tensor) -> None:
        """Take in the scores [Q, b] of the samples at ``positions`` [b]; each position once in
        all."""
        scores = scores.float()
        if self._floor is not None:
            # Of a large store most samples are below the n-th best of those before, for every
            # question.
            hopeful = (scores >= self._floor).any(0)
            scores, positions = scores[:, hopeful], positions[hopeful]
        keys = _keys(scores, positions)
        if self._keys is not None:
            keys = torch.cat([self._keys, keys], 1)
        self._keys = (
            keys if keys.shape[1] <= self._n else keys.topk(self._n, 1, sorted=False).values
        )
        if self._keys.shape[1] == self._n:
            self._floor = _scores(self._keys.amin(1, keepdim=True))

    def over(self, processes: Processes) -> "Best":
        """The best of what all processes have taken in, who call it together."""
        each = [keys for keys in processes.gather(self._keys) if keys is not None]
        if each:
            joined = torch.cat(each, 1)
            self._keys = joined.topk(min(self._n, joined.shape[1]), 1, sorted=False).values
        return self

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Positions [Q, n], int64, and scores [Q, n], float32, best first; fewer where fewer were
        added."""
        if self._keys is None:
            raise ValueError("Best.sorted(): expected scores; add() was never called.")
        keys = self._keys.sort(1, descending=True).values
        return _LOW - (keys & _LOW), _scores(keys)


def _keys(scores: Tensor, positions: Tensor) -> Tensor:
    """int64 [Q, b] whose order is that of the scores, then of the positions, descending: no two are
    equal."""
    # Adding zero makes -0.0 the 0.0 that it equals. IEEE 754 floats order like integers once
    # negative ones are mirrored.
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LOW - positions)


def _scores(keys: Tensor) -> Tensor:
    """The scores of keys, float32."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.int().view(torch.float32)
