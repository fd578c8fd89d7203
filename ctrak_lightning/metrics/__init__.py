"""torchmetrics metrics for attribution: thin classes over
:mod:`ctrak_lightning.metrics.functional`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ctrak_lightning.metrics import functional
from ctrak_lightning.metrics.functional import (
    bootstrap_difference,
    bootstrap_interval,
    datamodeling_correlations,
    noise_ceiling,
    spearman,
)

__all__ = [
    "METRICS",
    "ConceptAUROC",
    "ConceptMAP",
    "ConceptPrecision",
    "ConceptRPrecision",
    "ConceptRecall",
    "CounterfactualDrop",
    "LinearDatamodelingScore",
    "bootstrap_difference",
    "bootstrap_interval",
    "by_name",
    "datamodeling_correlations",
    "functional",
    "noise_ceiling",
    "spearman",
]


class _QueryMean(Metric):
    """Mean of one value per query; queries weigh the same however they were batched, or spread over
    processes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    queries: Tensor

    def __init__(self, total: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A name of its own: MetricCollection makes one of metrics whose states have the same names
        # and, by chance, the same values after the first update.
        self._total = total
        self.add_state(total, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean over all queries so far, a float32 scalar.

        Raises:
            ValueError: there was no query.
        """
        if self.queries == 0:
            raise ValueError(
                f"{type(self).__name__}.compute(): no query yet. HINT: call update() first."
            )
        total: Tensor = getattr(self, self._total)
        return (total / self.queries).float()

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plots ``val``, a result of ``compute`` or a list of them (None: computes one); returns
        figure and axes."""
        return self._plot(val, ax)

    def _add(self, values: Tensor) -> None:
        setattr(self, self._total, getattr(self, self._total) + values.sum())
        self.queries += len(values)


class _Retrieval(_QueryMean):
    """How well scores find the samples that carry a concept, in [0, 1]."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Adds queries: scores [Q, N] or [N], float, and which samples carry the concept, bool of
        the same shape.

        Raises:
            ValueError: shapes or dtypes do not fit, a score is not finite, a query has no relevant
                sample, or ``k`` is larger than N. Queries are named by their position in this
                update.
        """
        self._add(self._values(scores, relevant))

    def _values(self, scores: Tensor, relevant: Tensor) -> Tensor:
        raise NotImplementedError


class ConceptPrecision(_Retrieval):
    """Precision at k: the share of the k best-ranked samples that carry the concept.

    See :func:`~ctrak_lightning.metrics.functional.precision_at_k`, ties included: a constant score
    gives chance.

    Args:
        k: how many samples to look at.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``k`` is not an int of at least 1.

    Example:
        >>> metric = ConceptPrecision(k=2)
        >>> metric.update(torch.tensor([0.9, -0.2, 0.4]), torch.tensor([True, True, False]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self, k: int = 10, **kwargs: Any) -> None:
        functional.check_k("ConceptPrecision", k)
        super().__init__(f"precision_at_{k}", **kwargs)
        self.k = k

    def _values(self, scores: Tensor, relevant: Tensor) -> Tensor:
        return functional.precision_at_k(scores, relevant, self.k)


class ConceptRPrecision(_Retrieval):
    """R-precision: precision at k = the number of samples that carry the concept.

    See :func:`~ctrak_lightning.metrics.functional.r_precision`, ties included: a constant score
    gives chance.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("r_precision", **kwargs)

    def _values(self, scores: Tensor, relevant: Tensor) -> Tensor:
        return functional.r_precision(scores, relevant)


class ConceptRecall(_Retrieval):
    """Recall at k as Attribution by Customization has it: hits among the k best-ranked over min(k,
    n_relevant).

    See :func:`~ctrak_lightning.metrics.functional.recall_at_k`, ties included: a constant score
    gives chance.

    Args:
        k: how many samples to look at.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``k`` is not an int of at least 1.
    """

    def __init__(self, k: int = 10, **kwargs: Any) -> None:
        functional.check_k("ConceptRecall", k)
        super().__init__(f"recall_at_{k}", **kwargs)
        self.k = k

    def _values(self, scores: Tensor, relevant: Tensor) -> Tensor:
        return functional.recall_at_k(scores, relevant, self.k)


class ConceptMAP(_Retrieval):
    """Mean average precision, ties taken together as scikit-learn does.

    See :func:`~ctrak_lightning.metrics.functional.average_precision`.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("average_precision", **kwargs)

    def _values(self, scores: Tensor, relevant: Tensor) -> Tensor:
        return functional.average_precision(scores, relevant)


class ConceptAUROC(_Retrieval):
    """Area under the ROC curve, a tie counting one half: 0.5 is chance.

    See :func:`~ctrak_lightning.metrics.functional.auroc`.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("auroc", **kwargs)

    def _values(self, scores: Tensor, relevant: Tensor) -> Tensor:
        return functional.auroc(scores, relevant)


class LinearDatamodelingScore(_QueryMean):
    """How well sums of scores rank the outcomes of retrained models (LDS; TRAK, Park et al. 2023,
    arXiv 2303.14186).

    See :func:`~ctrak_lightning.metrics.functional.datamodeling_correlations`; a constant prediction
    gives 0.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> subsets = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
        >>> metric = LinearDatamodelingScore()
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0]]), subsets, outcomes=torch.tensor([[0.9, 0.5, 0.1]]))
        >>> metric.compute()
        tensor(1.)
    """

    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("linear_datamodeling_score", **kwargs)

    def update(self, scores: Tensor, subsets: Tensor, outcomes: Tensor) -> None:
        """Adds queries: scores [Q, N], the subsets kept, bool [S, N], and the outcomes measured [Q,
        S].

        Raises:
            ValueError: shapes or dtypes do not fit, S is below 2, or a value is not finite.
        """
        self._add(functional.datamodeling_correlations(scores, subsets, outcomes))


class CounterfactualDrop(_QueryMean):
    """How much of a concept is gone once the samples blamed for it are left out of training; higher
    is better.

    See :func:`~ctrak_lightning.metrics.functional.counterfactual_drop`.

    Args:
        relative: each drop as a share of the query's strength before.
        kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = CounterfactualDrop(relative=True)
        >>> metric.update(before=torch.tensor([0.8, 0.4]), after=torch.tensor([0.2, 0.3]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self, relative: bool = False, **kwargs: Any) -> None:
        super().__init__("relative_drop" if relative else "drop", **kwargs)
        self.relative = relative

    def update(self, before: Tensor, after: Tensor) -> None:
        """Adds queries: the concept's strength before [Q] and after [Q].

        Raises:
            ValueError: shapes do not fit, a value is not a finite float, or a 0 before and the drop
                is relative.
        """
        self._add(functional.counterfactual_drop(before, after, self.relative))


METRICS: dict[str, Callable[..., Metric]] = {
    "concept_precision": ConceptPrecision,
    "concept_r_precision": ConceptRPrecision,
    "concept_recall": ConceptRecall,
    "concept_map": ConceptMAP,
    "concept_auroc": ConceptAUROC,
    "linear_datamodeling_score": LinearDatamodelingScore,
    "counterfactual_drop": CounterfactualDrop,
}


def by_name(name: str) -> Metric:
    """A new metric of that name with its defaults.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in METRICS:
        raise ValueError(f"metrics.by_name({name!r}): unknown metric. Known: {', '.join(METRICS)}.")
    return METRICS[name]()
