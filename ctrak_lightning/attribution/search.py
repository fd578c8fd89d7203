"""The best samples for each question, from a store of any size: scores are looked at block by block
and never kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrak_lightning.attribution.scoring import (
    Dots,
    Factors,
    chosen_scores,
    compared,
    ensemble,
    exposed_at,
    factor_at,
    known_exposures,
)
from ctrak_lightning.errors import CorruptStoreError
from ctrak_lightning.methods.damping import DampingRule, choice, grid_of
from ctrak_lightning.methods.moments import Moments, units
from ctrak_lightning.store import Checkpoint
from ctrak_lightning.store.shards import Rows
from ctrak_lightning.utilities.processes import ALONE, Processes

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


_DIRECTIONS_BYTES = 2**28
_TRUSTED = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class TopScores:
    """The best samples for each question, best first."""

    positions: Tensor
    """Positions in the sample table, int64 [Q, n]."""
    scores: Tensor
    """Ensembled scores, float32 [Q, n]."""
    dampings: list[float | None]
    """The damping used for each question [Q]."""


def top_scores(
    queries: Tensor,
    checkpoints: Sequence[Checkpoint],
    n: int,
    rule: DampingRule,
    *,
    weights: Sequence[float] | None = None,
    factors: Factors = (),
    processes: Processes = ALONE,
) -> TopScores:
    """The ``n`` best samples for each question, of those that were trained on, as sorting all
    :func:`~ctrak_lightning.attribution.scoring.ensemble` scores would give them (ties by position in
    the data set).

    With no more features than samples, memory does not grow with the samples (but for one bit
    each). The store is read once, or twice where the scores' own deviations must be known first:
    several dampings, ``residual``. With fewer samples than features, all scores are kept, which are
    smaller than the queries.

    Args:
        queries: projected gradients of the queries [M, Q, k], for each of the M checkpoints.
        checkpoints: sealed checkpoints of one store.
        n: how many samples; all of them where the store has fewer.
        rule: of the damping.
        weights: of the checkpoints; without them each is scaled by the deviation of its own scores.
        factors: what the samples' scores are multiplied by.
        processes: those that search together, each its share of the shards; all call this with
            equal arguments, and all get the result. With fewer samples than features each searches
            all.

    Raises:
        ValueError: ``n`` is below 1, or there are more than 2^32 samples.
        CorruptStoreError: the store is damaged.
    """
    if n < 1:
        raise ValueError(f"top_scores(n={n}): expected at least 1.")
    if checkpoints[0].rows > MOST_SAMPLES:
        raise ValueError(
            f"top_scores: the store has {checkpoints[0].rows} samples, expected at most "
            f"{MOST_SAMPLES}. HINT: ask stores of parts of the data set one by one."
        )
    # Rounding differs from one machine to another; scores that are compared with each other must
    # not.
    queries = processes.from_first(queries)
    m, _, k = queries.shape
    streamed = k <= checkpoints[0].rows
    grid = processes.from_first(grid_of(rule, checkpoints))
    room = max(1, _DIRECTIONS_BYTES // (8 * k * len(grid) * m)) if streamed else queries.shape[1]
    parts = []
    for part in queries.split(room, 1):
        if streamed:
            question = _Question(part, checkpoints, rule, grid, weights, factors, processes)
            parts.append((*question.top(n), question.dampings))
        else:
            parts.append(_dense(part, checkpoints, n, rule, weights, factors))
    return TopScores(
        positions=torch.cat([positions for positions, _, _ in parts]),
        scores=torch.cat([scores for _, scores, _ in parts]),
        dampings=[damping for _, _, dampings in parts for damping in dampings],
    )


class _Question:
    """Some queries as directions [M, Q, k] whose products with the rows add up to the ensembled
    scores."""

    def __init__(
        self,
        queries: Tensor,
        checkpoints: Sequence[Checkpoint],
        rule: DampingRule,
        grid: Sequence[float | None],
        weights: Sequence[float] | None,
        factors: Factors,
        processes: Processes,
    ) -> None:
        self._checkpoints = checkpoints
        self._processes = processes
        self._factors = factors
        self._exposed, self._counts = exposed_at(checkpoints), known_exposures(checkpoints)
        solved, known = [], []
        for rows, checkpoint in zip(queries, checkpoints, strict=True):
            kernel = checkpoint.kernel()
            solved.append(kernel.solve(rows, grid))
            known.append(torch.stack(kernel.score_moments(solved[-1].flatten(0, 1))))
        directions = torch.stack(solved)  # [M, D, Q, k]
        mean, deviation = torch.stack(known, 1).unflatten(2, (len(grid), -1))  # [M, D, Q] each
        # A variance that is the small difference of two large numbers is measured rather than
        # computed; so is one that the kernel does not know, which was made of all rows.
        is_kernels = self._exposed is None or all(c.exposures() is not None for c in checkpoints)
        trusted = bool((deviation.square() > _TRUSTED * mean.square()).all()) and not factors
        trusted = trusted and is_kernels
        best = torch.zeros(queries.shape[1], dtype=torch.long)
        if len(grid) > 1 or (weights is None and not trusted):
            raw, scored = self._moments(directions)
            deviation, mean = (
                each.permute(2, 0, 1) for each in (scored.deviation(), scored.mean())
            )
            if len(grid) > 1:
                best = choice(rule, raw)
        each = torch.arange(len(best))
        self._directions = directions[:, best, each]  # [M, Q, k]
        self.dampings = [grid[d] for d in best.tolist()]
        if weights is None:
            unit = units(deviation[:, best, each], mean[:, best, each])
            self._directions /= (unit * len(checkpoints))[..., None]
        else:
            self._directions *= torch.tensor(weights, dtype=torch.float64)[:, None, None]

    def top(self, n: int) -> tuple[Tensor, Tensor]:
        """Positions [Q, n] and scores [Q, n]."""
        dots, best, seen = [Dots(some) for some in self._directions], Best(n), 0
        with self._processes.sharing_errors():
            for block in joint_blocks(self._checkpoints, self._processes):
                scores = [
                    product(rows) * factor
                    for product, rows, factor in zip(
                        dots, block, self._multipliers(block), strict=True
                    )
                ]
                _add_trained(best, torch.stack(scores).sum(0), block[0].index, self._exposed)
                seen += len(block[0])
        self._require_all(seen)
        return best.over(self._processes).sorted()

    def _multipliers(self, block: list[Rows]) -> list[Tensor]:
        """What the scores of a block are multiplied by at each checkpoint, [b] or []."""
        each = zip(self._checkpoints, self._counts, block, strict=True)
        found = [factor_at(one, self._factors, counts, rows) for one, counts, rows in each]
        if self._exposed is None:
            return found
        # Rows of what is known to be untrained from a later checkpoint alone are no zeros.
        masks = self._exposed[:, block[0].index]
        return [factor * mask for factor, mask in zip(found, masks, strict=True)]

    def _require_all(self, seen: int) -> None:
        everywhere, samples = sum(self._processes.gather(seen)), self._checkpoints[0].rows
        if everywhere != samples:
            raise CorruptStoreError(
                f"The shards of step {self._checkpoints[0].step} hold {everywhere} rows, expected "
                f"{samples}. HINT: TraceStore.verify() names files that are damaged."
            )

    def _moments(self, directions: Tensor) -> tuple[Moments, Moments]:
        """Moments [D, Q, M] of the scores of directions [M, D, Q, k]: without the factors, and as
        they are scored."""
        raw = Moments()
        scored = Moments() if self._factors or self._exposed is not None else raw
        known = None if self._exposed is None else compared(self._exposed)
        dots = [Dots(some.flatten(0, 1)) for some in directions]
        with self._processes.sharing_errors():
            for block in joint_blocks(self._checkpoints, self._processes):
                products = [product(rows) for product, rows in zip(dots, block, strict=True)]
                scores = torch.stack(products, 1).unflatten(
                    0, directions.shape[1:3]
                )  # [D, Q, M, b]
                index = block[0].index
                raw.add(scores if known is None else scores[..., known[index]])
                if self._factors:
                    scores = scores * torch.stack(self._multipliers(block))
                if scored is not raw:
                    scored.add(scores, None if self._exposed is None else self._exposed[:, index])
        whole = raw.over(self._processes)
        return whole, whole if scored is raw else scored.over(self._processes)


def joint_blocks(
    checkpoints: Sequence[Checkpoint], processes: Processes = ALONE
) -> Iterator[list[Rows]]:
    """Blocks of rows of the same samples at every checkpoint; of several processes, those in this
    one's share of the first checkpoint's shards.

    Checkpoints that were captured in the same order, as they usually are, are read from end to end;
    the rows of another are looked up one by one, which is slow.
    """
    first, *others = checkpoints
    streams: list[Iterator[Rows] | None] = [other.blocks(processes) for other in others]
    for rows in first.blocks(processes):
        block = [rows]
        for i, other in enumerate(others):
            stream = streams[i]
            found = None if stream is None else next(stream, None)
            if found is None or not torch.equal(found.index, rows.index):
                streams[i] = None
                found = other.rows_of(rows.index)
            block.append(found)
        yield block
    for stream in streams:
        # One step beyond the last block, where a stream checks that it has seen every sample.
        if stream is not None:
            next(stream, None)


def _dense(
    queries: Tensor,
    checkpoints: Sequence[Checkpoint],
    n: int,
    rule: DampingRule,
    weights: Sequence[float] | None,
    factors: Factors,
) -> tuple[Tensor, Tensor, list[float | None]]:
    scores, dampings = chosen_scores(queries, checkpoints, rule, factors=factors)
    best, exposed = Best(n), exposed_at(checkpoints)
    _add_trained(
        best, ensemble(scores, weights, exposed), torch.arange(checkpoints[0].rows), exposed
    )
    return (*best.sorted(), dampings)


def _add_trained(best: Best, scores: Tensor, positions: Tensor, exposed: Tensor | None) -> None:
    """Takes in scores [Q, b] of the samples at ``positions`` [b] that were trained on at the last
    checkpoint of ``exposed`` [M, N]."""
    if exposed is not None:
        trained = exposed[-1, positions]
        scores, positions = scores[:, trained], positions[trained]
    if len(positions):
        best.add(scores, positions)
