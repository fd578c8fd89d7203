"""Metrics of attribution as pure functions: one float64 value per query, so that intervals can be
drawn over queries.

Retrieval: scores [Q, N] (float, higher = more influential) against relevance [Q, N] (bool); [N] is
a single query. torchmetrics' own retrieval functions are right for positive, untied scores alone,
where the tests compare with them: they break ties by position, take a relevant sample that scores
zero or less for a miss (precision, recall, average precision) and squash scores beyond [0, 1] by a
sigmoid, which ties large ones (AUROC). Attribution scores have both signs.

Counterfactuals: scores or concept strengths against what retrained models do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrak_lightning.errors import listed


def precision_at_k(scores: Tensor, relevant: Tensor, k: int = 10) -> Tensor:
    """The relevant share of the ``k`` best-ranked samples, per query [Q].

    Ties at rank ``k`` count with the mean over all orders of the tied samples, so a constant score
    gives the relevant share of all samples: chance.

    Args:
        scores: [Q, N] or [N], float, higher = more influential.
        relevant: of the same shape, bool.
        k: from 1 to N.

    Raises:
        ValueError: shapes or dtypes do not fit, a score is not finite, a query has no relevant
            sample, or ``k`` is out of range.
    """
    scores, relevant = _checked_retrieval("precision_at_k", scores, relevant)
    check_k("precision_at_k", k, scores.shape[1])
    return _expected_hits(scores, relevant, _same_for_all(k, scores)) / k


def r_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Precision at ``k`` = the query's number of relevant samples, per query [Q]; ties as in
    :func:`precision_at_k`.

    Raises:
        ValueError: as :func:`precision_at_k`.
    """
    scores, relevant = _checked_retrieval("r_precision", scores, relevant)
    count = relevant.sum(1)
    return _expected_hits(scores, relevant, count) / count


def recall_at_k(scores: Tensor, relevant: Tensor, k: int = 10) -> Tensor:
    """Relevant samples among the ``k`` best-ranked over ``min(k, n_relevant)``, per query [Q].

    With that denominator the best ranking reaches 1 for any ``k``. (The code published with
    Attribution by Customization, arXiv 2306.09345, divides by all relevant samples.) Ties as in
    :func:`precision_at_k`.

    Raises:
        ValueError: as :func:`precision_at_k`.
    """
    scores, relevant = _checked_retrieval("recall_at_k", scores, relevant)
    check_k("recall_at_k", k, scores.shape[1])
    return _expected_hits(scores, relevant, _same_for_all(k, scores)) / relevant.sum(1).clamp(max=k)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Mean over the relevant samples of the precision at each one's score, per query [Q].

    Tied samples are taken together, at the rank of the last of them (scikit-learn's convention: one
    threshold per distinct score). A constant score gives the relevant share of all samples, never
    more than a random order's mean; a tied group below others may count a little more or less than
    the mean over its orders.

    Raises:
        ValueError: as :func:`precision_at_k`.
    """
    scores, relevant = _checked_retrieval("average_precision", scores, relevant)
    ordered, order = scores.sort(dim=1)
    below = torch.searchsorted(ordered, scores)  # [Q, N]: how many samples score less
    hits_below = F.pad(relevant.gather(1, order).cumsum(1), (1, 0)).gather(1, below)
    count = relevant.sum(1, keepdim=True)
    precision = (count - hits_below) / (scores.shape[1] - below).double()
    return (precision * relevant).sum(1) / count[:, 0]


def auroc(scores: Tensor, relevant: Tensor) -> Tensor:
    """Probability that a relevant sample outranks another one, a tie counting one half, per query
    [Q].

    (Mann-Whitney U on mid-ranks over the number of pairs; a constant score gives 0.5.)

    Raises:
        ValueError: as :func:`precision_at_k`, or every sample of a query is relevant.
    """
    scores, relevant = _checked_retrieval("auroc", scores, relevant)
    _refuse(
        "auroc",
        relevant.all(1),
        "have relevant samples only",
        "AUROC needs samples without the concept",
    )
    count = relevant.sum(1).double()
    rank_sum = (_midranks(scores) * relevant).sum(1)
    return (rank_sum - count * (count + 1) / 2) / (count * (scores.shape[1] - count))


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation over the last dimension of ``a`` and ``b`` [..., S]: [...], with
    mid-ranks for ties.

    Where either side is constant the correlation is undefined and 0 is returned: nothing was
    ranked.

    Raises:
        ValueError: shapes differ, S is below 2, or a value is not a finite float.
    """
    if a.shape != b.shape or a.ndim < 1 or a.shape[-1] < 2:
        raise ValueError(
            f"spearman: a is {list(a.shape)} and b is {list(b.shape)}, expected one shape [..., S] "
            "with S of 2 or more."
        )
    a, b = _checked_floats("spearman", "a", a), _checked_floats("spearman", "b", b)
    centre = (a.shape[-1] + 1) / 2
    a, b = _midranks(a) - centre, _midranks(b) - centre
    scale = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    return (a * b).sum(-1) / scale.where(scale > 0, torch.ones_like(scale))


def datamodeling_correlations(scores: Tensor, subsets: Tensor, outcomes: Tensor) -> Tensor:
    """Linear datamodeling score of each query [Q] (TRAK, Park et al. 2023, arXiv 2303.14186).

    Spearman's correlation, over the subsets, of the predicted outcome (the sum of the scores of the
    samples kept) with the measured one. Equal predictions tie whatever the order of the samples; a
    prediction that is the same for every subset gives 0.

    Args:
        scores: [Q, N], float.
        subsets: [S, N], bool: the samples each retraining kept.
        outcomes: [Q, S], float: the output measured for each query under each subset's model, such
            that more influential samples raise it (a negative loss, not a loss).

    Raises:
        ValueError: shapes or dtypes do not fit, S is below 2, or a value is not finite.
    """
    name = "datamodeling_correlations"
    shapes = [list(x.shape) for x in (scores, subsets, outcomes)]
    fits = scores.ndim == subsets.ndim == outcomes.ndim == 2 and (
        (scores.shape[1], scores.shape[0], subsets.shape[0])
        == (subsets.shape[1], outcomes.shape[0], outcomes.shape[1])
    )
    if not fits or min(scores.shape) < 1 or len(subsets) < 2:
        raise ValueError(
            f"{name}: scores, subsets and outcomes are {shapes[0]}, {shapes[1]} and {shapes[2]}, "
            "expected [Q, N], [S, N] and [Q, S] with S of 2 or more."
        )
    _check_bool(name, "subsets", subsets)
    scores, outcomes = (
        _checked_floats(name, "scores", scores),
        _checked_floats(name, "outcomes", outcomes),
    )
    return spearman(_subset_sums(scores, subsets), outcomes)


def noise_ceiling(outcomes_a: Tensor, outcomes_b: Tensor) -> Tensor:
    """The best linear datamodeling score within reach of a perfect predictor, per query [Q].

    With ``r`` Spearman's correlation between the outcomes of two retraining seeds, the mean of the
    two has the reliability ``2 r / (1 + r)`` (Spearman 1910, Brown 1910), and the noise-free
    outcome correlates with that mean by its square root: ``sqrt(2 r / (1 + r))``. ``r <= 0`` gives
    0. (Exact for Pearson's correlation and noise that is additive, independent and of equal
    variance; close to it for ranks.)

    Args:
        outcomes_a: [Q, S], measured outcomes with one seed.
        outcomes_b: [Q, S], the same subsets with another. Score against ``(outcomes_a + outcomes_b)
            / 2``.

    Raises:
        ValueError: shapes differ or are not [Q, S], S is below 2, or a value is not a finite float.
    """
    if outcomes_a.ndim != 2:
        raise ValueError(f"noise_ceiling: outcomes_a is {list(outcomes_a.shape)}, expected [Q, S].")
    r = spearman(outcomes_a, outcomes_b).clamp(min=0)
    return (2 * r / (1 + r)).sqrt()


def counterfactual_drop(before: Tensor, after: Tensor, relative: bool = False) -> Tensor:
    """How much of a concept is gone once the samples blamed for it are left out, per query [Q].

    ``before - after``, or ``(before - after) / |before|`` if relative.

    Args:
        before: [Q], strength of the concept in the model's output; higher = more of it.
        after: [Q], the same after retraining without the best-ranked samples.
        relative: as a share of ``before``.

    Raises:
        ValueError: shapes do not fit, a value is not a finite float, or ``before`` holds a 0 and
            the drop is relative.
    """
    name = "counterfactual_drop"
    _check_queries(name, before=before, after=after)
    before, after = _checked_floats(name, "before", before), _checked_floats(name, "after", after)
    if not relative:
        return before - after
    _refuse(
        f"{name}(relative=True)", before == 0, "have a strength of 0 before", "use relative=False"
    )
    return (before - after) / before.abs()


def bootstrap_interval(
    values: Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of the mean over queries: ``(low, high)``.

    It covers the choice of queries only, not the seeds of training.

    Args:
        values: [Q], a metric's value for each query.
        confidence: of the interval, between 0 and 1.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        ValueError: ``values`` is not [Q] with 2 finite floats or more, ``confidence`` or
            ``resamples`` is out of range.
    """
    name = "bootstrap_interval"
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"{name}: values is {list(values.shape)}, expected [Q] with 2 queries or more. HINT: "
            "give the values of each query, not their mean."
        )
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"{name}(confidence={confidence}, resamples={resamples}): expected a confidence "
            "between 0 and 1 and 1 resample or more."
        )
    values = _checked_floats(name, "values", values).cpu()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (resamples, len(values)), generator=generator)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(
        values[draws].mean(1), torch.tensor([tail, 1 - tail], dtype=torch.float64)
    )
    return float(low), float(high)


def bootstrap_difference(
    a: Tensor, b: Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """:func:`bootstrap_interval` of the mean of ``a - b``, paired: two methods on the same queries
    [Q].

    Raises:
        ValueError: shapes differ, or as :func:`bootstrap_interval`.
    """
    _check_queries("bootstrap_difference", a=a, b=b)
    return bootstrap_interval(a.double() - b.double(), confidence, resamples, seed)


def check_k(name: str, k: int, n: int | None = None) -> None:
    """Raises ValueError unless ``k`` is an int from 1 to ``n`` (None: any)."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{name}(k={k!r}): expected an int of at least 1.")
    if n is not None and k > n:
        raise ValueError(
            f"{name}(k={k}): there are only {n} samples. HINT: choose k of at most {n}."
        )


def _expected_hits(scores: Tensor, relevant: Tensor, k: Tensor) -> Tensor:
    """Mean number of relevant samples among the ``k`` [Q] best-ranked, over all orders of tied
    samples: [Q]."""
    boundary = scores.sort(dim=1, descending=True).values.gather(1, (k - 1)[:, None])
    above, tied = scores > boundary, scores == boundary
    slots = k - above.sum(1)
    return (relevant & above).sum(1) + slots * (relevant & tied).sum(1).double() / tied.sum(1)


def _midranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension, float64; tied values share the mean of their ranks."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2


def _subset_sums(scores: Tensor, subsets: Tensor) -> Tensor:
    """Sums [Q, S] of each query's scores [Q, N] over the samples of each subset [S, N], in units of
    the query's own.

    Rounding within a sum would give equal subsets unequal sums, and Spearman would rank the
    rounding. So the scores become integers, as fine as float64 can sum exactly in any order: for N
    = 100 000, 2^-35 of the largest score.
    """
    bits = 52 - math.ceil(math.log2(scores.shape[1]))
    shift = bits - torch.frexp(scores.abs().amax(1, keepdim=True)).exponent
    half = shift // 2  # 2^shift itself is infinite for the smallest scores
    return (
        scores * half.double().exp2() * (shift - half).double().exp2()
    ).round() @ subsets.double().T


def _same_for_all(k: int, scores: Tensor) -> Tensor:
    return torch.full((len(scores),), k, device=scores.device)


def _checked_retrieval(name: str, scores: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [Q, N] in float64 and relevance [Q, N], or a ValueError."""
    if scores.shape != relevant.shape or scores.ndim not in (1, 2) or scores.numel() == 0:
        raise ValueError(
            f"{name}: scores is {list(scores.shape)} and relevant is {list(relevant.shape)}, "
            "expected one shape for both, [Q, N] or [N], with a query and a sample at least."
        )
    _check_bool(name, "relevant", relevant)
    scores, relevant = torch.atleast_2d(scores), torch.atleast_2d(relevant)
    scores = _checked_floats(name, "scores", scores)
    _refuse(
        name,
        ~relevant.any(1),
        "have no relevant sample",
        "leave them out, or look for a misspelt label",
    )
    return scores, relevant


def _checked_floats(name: str, argument: str, values: Tensor) -> Tensor:
    """The values in float64, contiguous (searchsorted warns if they are not), or a ValueError."""
    if not values.is_floating_point():
        raise ValueError(
            f"{name}: {argument} has {values.dtype}, expected floats. HINT: {argument}.float()."
        )
    bad = ~values.isfinite()
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: {argument} has {int(bad.sum())} values that are not finite, the first at "
            f"{place}. HINT: look for an overflow, or a division by zero, where they were computed."
        )
    return values.detach().double().contiguous()


def _check_bool(name: str, argument: str, values: Tensor) -> None:
    if values.dtype != torch.bool:
        raise ValueError(
            f"{name}: {argument} has {values.dtype}, expected bool. HINT: {argument}.bool()."
        )


def _check_queries(name: str, **arguments: Tensor) -> None:
    """Raises ValueError unless the two arguments are [Q], of one Q of 1 or more."""
    (first, a), (second, b) = arguments.items()
    if a.shape != b.shape or a.ndim != 1 or len(a) < 1:
        raise ValueError(
            f"{name}: {first} is {list(a.shape)} and {second} is {list(b.shape)}, expected one "
            "shape [Q] for both, with a query at least."
        )


def _refuse(name: str, queries: Tensor, problem: str, hint: str) -> None:
    """Raises ValueError if any of the queries [Q] is marked, naming the first ones by position."""
    found = queries.nonzero()[:, 0].tolist()
    if found:
        raise ValueError(f"{name}: queries {listed(found)} {problem}. HINT: {hint}.")
