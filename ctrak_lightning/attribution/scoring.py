"""Scores of one checkpoint: ``q (K + lambda I)^-1 Phi^T`` with ``K = Phi^T Phi`` (TRAK, arXiv
2303.14186, eq. 13)."""

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ctrak_lightning.methods.damping import DampingRule, choice, grid_of
from ctrak_lightning.methods.moments import Moments, units
from ctrak_lightning.store import Checkpoint
from ctrak_lightning.store.shards import Rows

_DIGIT = 127
_BASE = 254
_DIGITS = 3
_COLUMNS = 8
"""To a multiple of these the digits are padded: 3 columns take longer than 8 (0.74 and 0.49 ms for
4 MiB of rows)."""
_ROWS_AT_ONCE = 128
"""Rows of 4,096 that are widened to float32 at once: at 6.8 GB/s of int8, 1.8 with 2,048 of them,
which leave the cache."""


class Dots:
    """Inner products with fixed directions.

    Rows of float16 and float32 are multiplied in float32. int8 rows are multiplied as integers
    where the processor can do that (:func:`has_integer_products`): each direction becomes three
    digits to the base 254 with a scale of its own, which keep 23 bits of its largest entry, as
    float32 does, and the sums are exact, so equal rows score the same to the bit. With 64
    directions this is three times as fast as float32 (0.6 GB/s on one core of an AMD EPYC with
    AVX-512 VNNI).

    Args:
        directions: [c, k], of any scale.
    """

    def __init__(self, directions: Tensor) -> None:
        wide = directions.double()
        self._scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)  # [c]
        unit = wide / self._scale[:, None]
        self._plain = unit.float()
        # 127 * 127 * k must stay below 2**31.
        fits = wide.shape[1] <= 2**31 // _DIGIT**2
        self._digits = _digits(unit) if fits and has_integer_products() else None

    def __call__(self, rows: Rows) -> Tensor:
        """Products of the features of n rows with the directions, float64 [c, n]."""
        if rows.unit.dtype == torch.int8 and self._digits is not None:
            products = torch._int_mm(rows.unit, self._digits)  # [n, >= 3 c]
            c = len(self._scale)
            plain = products[:, :c].double()
            for i in range(1, _DIGITS):
                plain.mul_(_BASE).add_(products[:, i * c : (i + 1) * c])
            unit = rows.magnitude().double() / (_DIGIT * float(_BASE) ** (_DIGITS - 1))
            return plain.T * unit * self._scale[:, None]
        parts = [part.float() @ self._plain.T for part in rows.unit.split(_ROWS_AT_ONCE)]
        return (torch.cat(parts).double() * rows.magnitude().double()[:, None]).T * self._scale[
            :, None
        ]


@cache
def has_integer_products() -> bool:
    """Whether int8 matrices are multiplied fast and exactly here.

    Processors without VNNI may add pairs of products in 16 bits, which 127 * 127 twice over
    saturates.
    """
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    rows = torch.full((2, 64), _DIGIT, dtype=torch.int8)
    rows[1] = -_DIGIT
    try:
        found = torch._int_mm(rows, rows.T.contiguous())
    except RuntimeError:
        return False
    return torch.equal(found.long(), rows.long() @ rows.T.long())


def _digits(unit: Tensor) -> Tensor:
    """Directions [c, k] with entries in [-1, 1] as digits ``sum_i digit_i / (127 * 254**i)``, int8
    [k, >= 3 c], zeros after them."""
    rest, parts = unit * _DIGIT, []
    for _ in range(_DIGITS):
        digit = rest.round().clamp(-_DIGIT, _DIGIT)
        parts.append(digit.to(torch.int8))
        rest = (rest - digit) * _BASE
    columns = -(-_DIGITS * len(unit) // _COLUMNS) * _COLUMNS
    # A new tensor also where one column would do as a view: torch._int_mm goes wrong where strides
    # are not those of one.
    digits = torch.zeros(unit.shape[1], columns, dtype=torch.int8)
    digits[:, : _DIGITS * len(unit)] = torch.cat(parts).T
    return digits


Factor = Literal["loss", "exposures"]
Factors = tuple[Factor, ...]

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
    rule: DampingRule,
    *,
    factors: Factors = (),
) -> tuple[Tensor, list[float | None]]:
    """Scores [M, Q, N] of queries [M, Q, k] at every checkpoint, and the damping used for each
    query. A sample that had not been trained on at a checkpoint scores 0 there.

    Args:
        queries: projected gradients of the queries, for each of the M checkpoints.
        checkpoints: sealed checkpoints of one store.
        rule: of the damping.
        factors: what the scores are multiplied by, once the damping is chosen.
    """
    parts, chosen = [], []
    exposed, grid = exposed_at(checkpoints), grid_of(rule, checkpoints)
    known = slice(None) if exposed is None else compared(exposed)
    room = max(1, SCORES_AT_ONCE // (len(grid) * len(checkpoints) * checkpoints[0].rows))
    for part in queries.split(room, 1):
        each = [scores_by_damping(rows, c, grid) for rows, c in zip(part, checkpoints, strict=True)]
        scores = torch.stack(each, 1)  # [D, M, Q, N]
        best = torch.zeros(part.shape[1], dtype=torch.long)
        if len(grid) > 1:
            moments = [Moments() for _ in grid]  # one damping at a time: their sums copy the scores
            for sums, at_one in zip(moments, scores, strict=True):
                sums.add(at_one[..., known].movedim(0, -2))
            best = choice(rule, Moments.stacked(moments))
        parts.append(torch.stack([scores[d, :, i] for i, d in enumerate(best.tolist())], 1))
        chosen += [grid[d] for d in best.tolist()]
    scores = torch.cat(parts, 1)
    if factors:
        counts = known_exposures(checkpoints)
        pairs = zip(checkpoints, counts, strict=True)
        each_sample = torch.stack([factor_at(one, factors, count) for one, count in pairs])
        scores = scores * each_sample.unsqueeze(1)
    if exposed is not None:  # the dual form leaves what rounding makes of 0
        scores = scores * exposed.unsqueeze(1)
    return scores, chosen


def factor_at(
    checkpoint: Checkpoint,
    factors: Factors,
    exposures: Tensor | None = None,
    rows: Rows | None = None,
) -> Tensor:
    """What the scores of a checkpoint are multiplied by, float64 [N]; [b] of a block of ``rows``.
    ``exposures`` [N] are its own of :func:`known_exposures`."""
    product = torch.ones((), dtype=torch.float64)
    if "loss" in factors:
        product = product * (checkpoint.losses() if rows is None else rows.loss).double()
    if "exposures" in factors:
        assert exposures is not None, "factors_of() asks"
        product = product * (exposures if rows is None else exposures[rows.index]).double()
    return product


def factors_of(residual: bool, per_exposure: bool, checkpoints: Sequence[Checkpoint]) -> Factors:
    """What a :class:`~ctrak_lightning.methods.method.Method` multiplies the samples' scores by; not
    by their exposures where the store does not know those of the last checkpoint."""
    known = per_exposure and all(each is not None for each in known_exposures(checkpoints))
    loss: Factors = ("loss",) if residual else ()
    return (*loss, "exposures") if known else loss


def exposed_at(checkpoints: Sequence[Checkpoint]) -> Tensor | None:
    """Which samples had been trained on at each checkpoint, bool [M, N]; None where all had, as far
    as is known."""
    each = [
        None if one is None or bool(one.all()) else one > 0 for one in known_exposures(checkpoints)
    ]
    if all(one is None for one in each):
        return None
    every = torch.ones(checkpoints[0].rows, dtype=torch.bool)
    return torch.stack([every if one is None else one for one in each])


def known_exposures(checkpoints: Sequence[Checkpoint]) -> list[Tensor | None]:
    """How often each sample had entered an optimizer step at each checkpoint, int64 [N].

    Where that is not known, as at the next one where it is: it was at most so often, and not at all
    where it was not even then. None at those after the last that knows.
    """
    found: list[Tensor | None] = []
    later: Tensor | None = None
    for checkpoint in reversed(checkpoints):
        own = checkpoint.exposures()
        later = later if own is None else own
        found.append(later)
    return found[::-1]


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
    up to rounding, their size (:func:`~ctrak_lightning.methods.moments.units`). ``exposed`` [M,
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
