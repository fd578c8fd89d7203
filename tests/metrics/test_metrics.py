"""The metrics against scikit-learn, scipy, torchmetrics, and the mean over every order of tied
samples."""

from collections.abc import Callable
from itertools import combinations, permutations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.retrieval import (
    RetrievalAUROC,
    RetrievalMAP,
    RetrievalPrecision,
    RetrievalRecall,
    RetrievalRPrecision,
)

from ctrak_lightning import metrics
from ctrak_lightning.metrics import (
    METRICS,
    ConceptAUROC,
    ConceptMAP,
    ConceptPrecision,
    ConceptRecall,
    ConceptRPrecision,
    CounterfactualDrop,
    LinearDatamodelingScore,
    bootstrap_difference,
    bootstrap_interval,
    datamodeling_correlations,
    noise_ceiling,
    spearman,
)
from ctrak_lightning.metrics.functional import (
    auroc,
    average_precision,
    counterfactual_drop,
    precision_at_k,
    r_precision,
    recall_at_k,
)

EXACT = {"rtol": 0, "atol": 1e-12}  # float64 against float64
SINGLE = {"rtol": 0, "atol": 1e-6}  # a side is float32

RETRIEVAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "precision": lambda scores, relevant: precision_at_k(scores, relevant, k=2),
    "r_precision": r_precision,
    "recall": lambda scores, relevant: recall_at_k(scores, relevant, k=2),
    "average_precision": average_precision,
    "auroc": auroc,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def positional(scores: Tensor, relevant: Tensor, k: int) -> dict[str, float]:
    """The retrieval values of one untied ranking, counted by hand."""
    ranked = relevant[scores.argsort(descending=True)].tolist()
    n = sum(ranked)
    at_hits = [sum(ranked[: i + 1]) / (i + 1) for i, hit in enumerate(ranked) if hit]
    return {
        "precision": sum(ranked[:k]) / k,
        "r_precision": sum(ranked[:n]) / n,
        "recall": sum(ranked[:k]) / min(k, n),
        "average_precision": sum(at_hits) / n,
    }


def mean_over_orders(scores: Tensor, relevant: Tensor, k: int) -> dict[str, float]:
    """The mean of :func:`positional` over every order of the samples, which breaks ties in every
    way."""
    orders = [torch.tensor(order) for order in permutations(range(len(scores)))]
    found = [positional(scores + 1e-3 * order, relevant, k) for order in orders]
    return {name: float(np.mean([values[name] for values in found])) for name in found[0]}


@st.composite
def tied_rankings(draw: st.DrawFn, most: int = 12, least: int = 2) -> tuple[Tensor, Tensor]:
    """Few distinct scores of both signs; at least one relevant sample and one other."""
    n = draw(st.integers(least, most))
    scores = draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    relevant = draw(
        st.lists(st.booleans(), min_size=n, max_size=n).filter(lambda x: any(x) and not all(x))
    )
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(relevant)


def untied(queries: int = 6, n: int = 40) -> tuple[Tensor, Tensor]:
    """Scores in (0, 1) without ties [Q, N], the only kind torchmetrics handles, and relevance with
    1 to 8 samples each."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(n, generator=generator) + 1 for _ in range(queries)]) / (
        n + 1
    )
    counts = torch.tensor([1, 2, 3, 5, 8, 8])[:queries, None]
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(queries)])
    return scores, order < counts


class TestRetrieval:
    def test_values_of_a_ranking_counted_by_hand(self) -> None:
        scores = torch.tensor([0.9, 0.1, -0.3, 0.5, -2.0])
        relevant = torch.tensor([True, False, True, False, True])  # at ranks 1, 4 and 5
        expected = {
            "precision": 1 / 2,
            "r_precision": 1 / 3,
            "recall": 1 / 2,
            "average_precision": (1 / 1 + 2 / 4 + 3 / 5) / 3,
            "auroc": 2 / 6,
        }
        for name, function in RETRIEVAL.items():
            assert function(scores, relevant).tolist() == pytest.approx([expected[name]], abs=1e-12)

    def test_recall_divides_by_the_smaller_of_k_and_the_relevant(self) -> None:
        scores = torch.arange(6.0)
        few = torch.tensor([False, False, True, False, False, True])
        many = torch.tensor([False, True, True, True, True, True])
        assert recall_at_k(scores, few, k=3).item() == 1 / 2
        assert recall_at_k(scores, many, k=3).item() == 1.0
        assert recall_at_k(scores, many, k=6).item() == 1.0

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (ConceptPrecision(k=5), RetrievalPrecision(top_k=5, empty_target_action="error")),
            (ConceptPrecision(k=1), RetrievalPrecision(top_k=1, empty_target_action="error")),
            (ConceptRPrecision(), RetrievalRPrecision(empty_target_action="error")),
            (
                ConceptRecall(k=8),
                RetrievalRecall(top_k=8, empty_target_action="error"),
            ),  # n_relevant <= k
            (ConceptMAP(), RetrievalMAP(empty_target_action="error")),
            (ConceptAUROC(), RetrievalAUROC(empty_target_action="error")),
        ],
        ids=lambda metric: type(metric).__name__,
    )
    def test_torchmetrics_agrees_without_ties_and_signs(self, ours, theirs) -> None:
        scores, relevant = untied()
        ours.update(scores, relevant)
        theirs.update(
            scores, relevant, indexes=torch.arange(len(scores))[:, None].expand_as(scores)
        )
        torch.testing.assert_close(ours.compute(), theirs.compute(), **SINGLE)

    @given(tied_rankings(most=30))
    def test_sklearn_agrees_with_ties_and_signs(self, ranking: tuple[Tensor, Tensor]) -> None:
        scores, relevant = ranking
        assert auroc(scores, relevant).item() == pytest.approx(
            roc_auc_score(relevant, scores), abs=1e-12
        )
        expected = average_precision_score(relevant, scores)
        assert average_precision(scores, relevant).item() == pytest.approx(expected, abs=1e-12)

    @settings(max_examples=60)
    @given(tied_rankings(most=5), st.data())
    def test_ties_count_with_the_mean_over_all_orders(
        self, ranking: tuple[Tensor, Tensor], data: st.DataObject
    ) -> None:
        k = data.draw(st.integers(1, len(ranking[0])))
        expected = mean_over_orders(*ranking, k)
        assert precision_at_k(*ranking, k).item() == pytest.approx(expected["precision"], abs=1e-12)
        assert r_precision(*ranking).item() == pytest.approx(expected["r_precision"], abs=1e-12)
        assert recall_at_k(*ranking, k).item() == pytest.approx(expected["recall"], abs=1e-12)

    @pytest.mark.parametrize("n_relevant", [1, 2, 4, 5])
    @pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
    def test_a_constant_score_is_chance_wherever_the_relevant_samples_stand(
        self, value: float, n_relevant: int
    ) -> None:
        scores = torch.full((6,), value)
        for places in combinations(range(6), n_relevant):
            relevant = torch.zeros(6, dtype=torch.bool)
            relevant[list(places)] = True
            chance = n_relevant / 6
            assert precision_at_k(scores, relevant, k=3).item() == pytest.approx(chance)
            assert r_precision(scores, relevant).item() == pytest.approx(chance)
            assert recall_at_k(scores, relevant, k=3).item() == pytest.approx(
                3 * chance / min(3, n_relevant)
            )
            assert average_precision(scores, relevant).item() == pytest.approx(chance)
            assert auroc(scores, relevant).item() == pytest.approx(0.5)

    @pytest.mark.parametrize("n_relevant", [1, 2, 3, 4, 5])
    def test_average_precision_of_a_constant_never_beats_a_random_order(
        self, n_relevant: int
    ) -> None:
        scores, relevant = torch.zeros(5), torch.arange(5) < n_relevant
        random = mean_over_orders(scores, relevant, k=1)["average_precision"]
        assert average_precision(scores, relevant).item() <= random + 1e-12

    @given(tied_rankings(), st.randoms(use_true_random=False))
    def test_order_of_samples_and_monotone_transforms_do_not_matter(
        self, ranking: tuple[Tensor, Tensor], random
    ) -> None:
        scores, relevant = ranking
        order = list(range(len(scores)))
        random.shuffle(order)
        for function in RETRIEVAL.values():
            expected = function(scores, relevant)
            torch.testing.assert_close(function(scores[order], relevant[order]), expected, **EXACT)
            for transform in (scores.exp(), scores**3 - 50, 1e6 * scores + 3e6):
                torch.testing.assert_close(function(transform, relevant), expected, **EXACT)

    @pytest.mark.parametrize("name", RETRIEVAL)
    def test_each_query_is_ranked_by_itself(self, name: str) -> None:
        scores, relevant = untied()
        scores = scores * torch.tensor([[1.0], [100.0], [-1.0], [0.01], [5.0], [1.0]])
        function = RETRIEVAL[name]
        apart = torch.cat([function(s, r) for s, r in zip(scores, relevant, strict=True)])
        torch.testing.assert_close(function(scores, relevant), apart, **EXACT)
        strided = function(scores.T.contiguous().T, relevant.T.contiguous().T)
        torch.testing.assert_close(strided, apart, **EXACT)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_low_precision_is_no_obstacle(self, dtype: torch.dtype) -> None:
        scores = torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
        for function in RETRIEVAL.values():
            value = function(scores, torch.tensor([False, True, True]))
            assert value.dtype == torch.float64
            torch.testing.assert_close(
                value, function(scores.double(), torch.tensor([False, True, True]))
            )


RETRIEVAL_METRICS = {
    name: METRICS[name]
    for name in (
        "concept_precision",
        "concept_r_precision",
        "concept_recall",
        "concept_map",
        "concept_auroc",
    )
}


class TestRetrievalErrors:
    @pytest.fixture(params=RETRIEVAL_METRICS)
    def metric(self, request: pytest.FixtureRequest):
        return RETRIEVAL_METRICS[request.param]()

    def test_shapes(self, metric) -> None:
        relevant = torch.ones(2, 12, dtype=torch.bool)
        with pytest.raises(
            ValueError, match=r"scores is \[2, 13\] and relevant is \[2, 12\], expected one shape"
        ):
            metric.update(torch.rand(2, 13), relevant)
        with pytest.raises(ValueError, match=r"scores is \[12\] and relevant is \[2, 12\]"):
            metric.update(torch.rand(12), relevant)
        with pytest.raises(ValueError, match=r"expected one shape for both, \[Q, N\] or \[N\]"):
            metric.update(torch.rand(1, 2, 12), relevant[None])
        with pytest.raises(ValueError, match="a query and a sample at least"):
            metric.update(torch.rand(0, 12), relevant[:0])

    def test_dtypes(self, metric) -> None:
        with pytest.raises(
            ValueError, match=r"relevant has torch.int64, expected bool. HINT: relevant.bool\(\)"
        ):
            metric.update(torch.rand(12), torch.ones(12, dtype=torch.long))
        with pytest.raises(
            ValueError, match=r"scores has torch.int64, expected floats. HINT: scores.float\(\)"
        ):
            metric.update(torch.arange(12), torch.ones(12, dtype=torch.bool))

    def test_no_relevant_sample_names_the_queries(self, metric) -> None:
        relevant = torch.rand(4, 12) > 2
        relevant[[0, 2], 3] = True
        with pytest.raises(ValueError, match=r"queries 1, 3 have no relevant sample. HINT"):
            metric.update(torch.rand(4, 12), relevant)
        with pytest.raises(ValueError, match=r"queries 0, 1, 2, 3, 4 and 1 more have no"):
            metric.update(torch.rand(6, 12), torch.zeros(6, 12, dtype=torch.bool))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_scores_that_are_not_finite(self, metric, bad: float) -> None:
        scores = torch.rand(3, 12)
        scores[1, [4, 7]] = bad
        with pytest.raises(
            ValueError, match=r"scores has 2 values that are not finite, the first at \[1, 4\]"
        ):
            metric.update(scores, torch.ones(3, 12, dtype=torch.bool))

    @pytest.mark.parametrize("kind", [ConceptPrecision, ConceptRecall])
    def test_k(self, kind: Callable[..., ConceptPrecision]) -> None:
        for k in (0, -1, 2.5):
            with pytest.raises(
                ValueError, match=rf"{kind.__name__}\(k={k}\): expected an int of at least 1"
            ):
                kind(k=k)
        with pytest.raises(
            ValueError, match=r"\(k=4\): there are only 3 samples. HINT: choose k of at most 3"
        ):
            kind(k=4).update(torch.rand(3), torch.tensor([True, False, True]))
        kind(k=3).update(torch.rand(3), torch.tensor([True, False, True]))

    @pytest.mark.parametrize("function", [precision_at_k, recall_at_k])
    def test_k_of_the_functions(self, function: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match=r"\(k=0\): expected an int"):
            function(torch.rand(3), torch.tensor([True, False, True]), k=0)

    def test_auroc_needs_samples_without_the_concept(self) -> None:
        relevant = torch.tensor([[True, False], [True, True]])
        with pytest.raises(ValueError, match=r"auroc: queries 1 have relevant samples only"):
            ConceptAUROC().update(torch.rand(2, 2), relevant)

    def test_a_refused_update_counts_for_nothing(self) -> None:
        metric = ConceptMAP()
        metric.update(torch.tensor([2.0, 1.0]), torch.tensor([False, True]))
        with pytest.raises(ValueError, match="no relevant"):
            metric.update(torch.rand(2, 2), torch.tensor([[True, False], [False, False]]))
        assert metric.compute() == 0.5


class TestSpearman:
    @given(st.integers(2, 15), st.data())
    def test_scipy_agrees_with_ties(self, n: int, data: st.DataObject) -> None:
        lists = st.lists(st.integers(-3, 3), min_size=n, max_size=n).filter(
            lambda x: len(set(x)) > 1
        )
        a, b = (torch.tensor(data.draw(lists), dtype=torch.float64) for _ in range(2))
        assert spearman(a, b).item() == pytest.approx(
            scipy.stats.spearmanr(a, b).statistic, abs=1e-12
        )

    def test_leading_dimensions_and_strides(self) -> None:
        a, b = torch.randn(2, 3, 4, 7).unbind()
        a, b = a.transpose(0, 1), b.transpose(0, 1)
        found = spearman(a, b)
        assert found.shape == (4, 3)
        expected = scipy.stats.spearmanr(a[2, 1], b[2, 1]).statistic
        assert found[2, 1].item() == pytest.approx(expected, abs=1e-12)

    def test_bounds_are_reached_and_kept(self) -> None:
        for n in range(2, 60):
            x = torch.randn(n)
            assert spearman(x, x.exp()).item() == pytest.approx(1, abs=1e-12)
            assert spearman(x, -x).item() == pytest.approx(-1, abs=1e-12)
            assert spearman(x, x) <= 1

    def test_a_constant_side_gives_zero(self) -> None:
        constant = torch.full((2, 5), 0.1)
        values = torch.randn(2, 5)
        for a, b in ((constant, values), (values, constant), (constant, constant)):
            assert spearman(a, b).tolist() == [0, 0]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"a is \[2, 5\] and b is \[5\], expected one shape"):
            spearman(torch.rand(2, 5), torch.rand(5))
        with pytest.raises(ValueError, match="S of 2 or more"):
            spearman(torch.rand(3, 1), torch.rand(3, 1))
        with pytest.raises(
            ValueError, match=r"b has 1 values that are not finite, the first at \[0\]"
        ):
            spearman(torch.rand(2), torch.tensor([float("nan"), 1.0]))


def datamodel(queries: int = 3, n: int = 20, subsets: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Random scores [Q, N], subsets of half of the samples [S, N] and outcomes [Q, S]."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(n, generator=generator) < n // 2 for _ in range(subsets)])
    scores = torch.randn(queries, n, generator=generator)
    return scores, kept, torch.randn(queries, subsets, generator=generator)


class TestLinearDatamodelingScore:
    def test_scipy_on_sums_over_subsets(self) -> None:
        scores, subsets, outcomes = datamodel()
        expected = []
        for query, outcome in zip(scores.double(), outcomes, strict=True):
            sums = [float(query[kept].sum()) for kept in subsets]
            expected.append(scipy.stats.spearmanr(sums, outcome).statistic)
        found = datamodeling_correlations(scores, subsets, outcomes)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        metric = LinearDatamodelingScore()
        metric.update(scores, subsets, outcomes)
        assert metric.compute().item() == pytest.approx(np.mean(expected), abs=1e-6)

    def test_a_linear_model_scores_one_and_its_negative_minus_one(self) -> None:
        scores, subsets, _ = datamodel()
        outcomes = scores @ subsets.float().T
        ones = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(
            datamodeling_correlations(scores, subsets, outcomes), ones, **EXACT
        )
        torch.testing.assert_close(
            datamodeling_correlations(-scores, subsets, outcomes), -ones, **EXACT
        )

    @pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-310, 1e300, 0.0])
    @pytest.mark.parametrize("n", [20, 37, 1000])
    def test_a_constant_prediction_gives_exactly_zero(self, value: float, n: int) -> None:
        _, subsets, outcomes = datamodel(n=n)
        scores = torch.full((3, n), value, dtype=torch.float64)
        assert datamodeling_correlations(scores, subsets, outcomes).tolist() == [0, 0, 0]

    def test_equal_sums_tie_whatever_they_are_made_of(self) -> None:
        subsets = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
        for scale in (1.0, 2.0**-60, 2.0**-1000, 2.0**900):
            scores = (
                torch.tensor([[1.0, 2.0, 3.0, -5.0]], dtype=torch.float64) * scale
            )  # sums 3, 3, 4, -5
            outcomes = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
            expected = scipy.stats.spearmanr([3, 3, 4, -5], outcomes[0]).statistic
            found = datamodeling_correlations(scores, subsets, outcomes).item()
            assert found == pytest.approx(expected, abs=1e-12)

    def test_subsets_of_equal_scores_tie_exactly(self) -> None:
        """Every subset takes one copy of each value, here or there: sums of one kind, in another
        order."""
        values = torch.randn(1, 50, dtype=torch.float64) * torch.logspace(
            -6, 0, 50, dtype=torch.float64
        )
        first = torch.rand(16, 50) < 0.5
        subsets, outcomes = torch.cat([first, ~first], 1), torch.randn(1, 16)
        assert datamodeling_correlations(values.repeat(1, 2), subsets, outcomes).tolist() == [0]

    def test_each_query_has_a_scale_of_its_own(self) -> None:
        scores, subsets, outcomes = datamodel()
        scales = torch.tensor([[1.0], [2.0**-70], [2.0**70]])
        expected = datamodeling_correlations(scores, subsets, outcomes)
        found = datamodeling_correlations(scores * scales, subsets, outcomes)
        torch.testing.assert_close(found, expected, **EXACT)

    def test_small_scores_beside_a_large_one_are_not_lost(self) -> None:
        scores = torch.tensor([[1e6, 0.01, 0.02, 0.03, 0.0]])
        subsets = torch.cat([torch.ones(4, 1), torch.eye(4)], 1).bool()
        outcomes = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
        assert datamodeling_correlations(scores, subsets, outcomes).item() == pytest.approx(1)

    def test_order_of_samples_and_subsets_and_scale_do_not_matter(self) -> None:
        scores, subsets, outcomes = datamodel(n=301)
        expected = datamodeling_correlations(scores, subsets, outcomes)
        samples, order = torch.randperm(301), torch.randperm(16)
        for found in (
            datamodeling_correlations(scores[:, samples], subsets[:, samples], outcomes),
            datamodeling_correlations(scores, subsets[order], outcomes[:, order]),
            datamodeling_correlations(scores * 1000, subsets, outcomes.exp()),
            datamodeling_correlations(scores + 5, subsets, outcomes),  # the subsets are of one size
        ):
            torch.testing.assert_close(found, expected, **EXACT)

    def test_errors(self) -> None:
        scores, subsets, outcomes = datamodel()
        shapes = r"scores, subsets and outcomes are .* expected \[Q, N\], \[S, N\] and \[Q, S\]"
        metric = LinearDatamodelingScore()
        for wrong in (
            (scores[:, :-1], subsets, outcomes),
            (scores[:-1], subsets, outcomes),
            (scores, subsets[:-1], outcomes),
            (scores[0], subsets, outcomes[0]),
            (scores, subsets[:1], outcomes[:, :1]),
            (scores[:0], subsets, outcomes[:0]),
        ):
            with pytest.raises(ValueError, match=shapes):
                metric.update(*wrong)
        with pytest.raises(ValueError, match="subsets has torch.float32, expected bool"):
            metric.update(scores, subsets.float(), outcomes)
        with pytest.raises(ValueError, match="outcomes has 1 values that are not finite"):
            metric.update(scores, subsets, _with_nan(outcomes))
        with pytest.raises(ValueError, match="scores has 1 values that are not finite"):
            metric.update(_with_nan(scores), subsets, outcomes)


def _with_nan(values: Tensor) -> Tensor:
    values = values.clone()
    values[1, 2] = torch.nan
    return values


class TestNoiseCeiling:
    def test_formula(self) -> None:
        a = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
        b = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
        expected = [1.0, (2 * 0.5 / 1.5) ** 0.5, 0.0, 0.0]  # r = 1, 1/2, -1, undefined
        assert noise_ceiling(a, b).tolist() == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
    def test_a_perfect_predictor_reaches_it(self, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        truth, e1, e2 = torch.randn(3, 1, 200_000, generator=generator)
        a, b = truth + noise * e1, truth + noise * e2
        reached = spearman(truth, (a + b) / 2)
        torch.testing.assert_close(noise_ceiling(a, b), reached, rtol=0, atol=0.02)

    def test_errors(self) -> None:
        with pytest.raises(
            ValueError, match=r"noise_ceiling: outcomes_a is \[4\], expected \[Q, S\]"
        ):
            noise_ceiling(torch.rand(4), torch.rand(4))
        with pytest.raises(ValueError, match="expected one shape"):
            noise_ceiling(torch.rand(2, 4), torch.rand(2, 5))


class TestBootstrap:
    values = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2, 0.5, 0.8, 0.3])

    def test_scipy_agrees(self) -> None:
        values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        theirs = scipy.stats.bootstrap(
            (values.numpy(),),
            np.mean,
            n_resamples=20_000,
            confidence_level=0.9,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        ours = bootstrap_interval(values, confidence=0.9, resamples=20_000)
        assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)

    def test_the_seed_decides(self) -> None:
        assert bootstrap_interval(self.values) == bootstrap_interval(self.values, seed=0)
        assert bootstrap_interval(self.values) != bootstrap_interval(self.values, seed=1)

    def test_more_confidence_is_wider_and_the_mean_is_inside(self) -> None:
        wide, narrow = (bootstrap_interval(self.values, confidence=c) for c in (0.99, 0.5))
        assert wide[0] < narrow[0] < self.values.mean() < narrow[1] < wide[1]

    def test_the_difference_is_paired(self) -> None:
        low, high = bootstrap_difference(self.values.double() + 0.25, self.values.double())
        assert (low, high) == pytest.approx((0.25, 0.25), abs=1e-12)
        other = self.values.flip(0)
        expected = bootstrap_interval(self.values.double() - other.double(), 0.8, 100, 3)
        assert bootstrap_difference(self.values, other, 0.8, 100, 3) == expected

    def test_errors(self) -> None:
        with pytest.raises(
            ValueError, match=r"values is \[\], .* HINT: give the values of each query"
        ):
            bootstrap_interval(torch.tensor(0.5))
        with pytest.raises(
            ValueError, match=r"values is \[1\], expected \[Q\] with 2 queries or more"
        ):
            bootstrap_interval(torch.tensor([0.5]))
        for options in (
            {"confidence": 0.0},
            {"confidence": 1.0},
            {"confidence": 95},
            {"resamples": 0},
        ):
            with pytest.raises(
                ValueError, match="expected a confidence between 0 and 1 and 1 resample or more"
            ):
                bootstrap_interval(self.values, **options)
        with pytest.raises(ValueError, match="not finite"):
            bootstrap_interval(torch.tensor([0.5, torch.nan]))
        with pytest.raises(ValueError, match=r"bootstrap_difference: a is \[8\] and b is \[7\]"):
            bootstrap_difference(self.values, self.values[1:])


class TestCounterfactualDrop:
    before, after = torch.tensor([0.8, 0.4, -0.5]), torch.tensor([0.2, 0.5, -1.0])

    def test_absolute_and_relative(self) -> None:
        absolute = counterfactual_drop(self.before, self.after)
        assert absolute.tolist() == pytest.approx([0.6, -0.1, 0.5], abs=1e-6)
        relative = counterfactual_drop(self.before, self.after, relative=True)
        assert relative.tolist() == pytest.approx([0.75, -0.25, 1.0], abs=1e-6)
        assert not counterfactual_drop(
            self.before.clone().requires_grad_(), self.after
        ).requires_grad
        for flag, expected in ((False, 1 / 3), (True, 0.5)):
            metric = CounterfactualDrop(relative=flag)
            metric.update(self.before, self.after)
            assert metric.compute().item() == pytest.approx(expected, abs=1e-6)

    def test_errors(self) -> None:
        with pytest.raises(
            ValueError, match=r"before is \[3\] and after is \[2\], expected one shape \[Q\]"
        ):
            counterfactual_drop(self.before, self.after[:2])
        with pytest.raises(ValueError, match=r"before is \[1, 3\]"):
            counterfactual_drop(self.before[None], self.after[None])
        with pytest.raises(ValueError, match="a query at least"):
            counterfactual_drop(self.before[:0], self.after[:0])
        with pytest.raises(ValueError, match="after has 1 values that are not finite"):
            counterfactual_drop(self.before, torch.tensor([0.0, torch.inf, 0.0]))
        zero = torch.tensor([1.0, 0.0, 0.0])
        with pytest.raises(
            ValueError, match=r"relative=True\): queries 1, 2 have a strength of 0 before. HINT"
        ):
            counterfactual_drop(zero, self.after, relative=True)
        assert counterfactual_drop(zero, self.after).shape == (3,)


def arguments(name: str) -> tuple[Tensor, ...]:
    """Arguments of an update with 6 queries."""
    if name in RETRIEVAL_METRICS:
        return untied()
    if name == "linear_datamodeling_score":
        return datamodel(queries=6)
    return torch.linspace(0.5, 1, 6), torch.linspace(0.4, 0.1, 6)


def part(name: str, queries: slice) -> tuple[Tensor, ...]:
    """The same, for some of the queries."""
    if name == "linear_datamodeling_score":
        scores, subsets, outcomes = arguments(name)
        return scores[queries], subsets, outcomes[queries]
    return tuple(x[queries] for x in arguments(name))


@pytest.mark.parametrize("name", METRICS)
class TestEveryMetric:
    def test_updates_in_uneven_batches_equal_one_update(self, name: str) -> None:
        whole, batched = METRICS[name](), METRICS[name]()
        whole.update(*arguments(name))
        for queries in (slice(0, 1), slice(1, 5), slice(5, 6)):
            batched.update(*part(name, queries))
        assert whole.compute().dtype == torch.float32
        torch.testing.assert_close(batched.compute(), whole.compute(), **SINGLE)

    def test_forward_gives_the_batch_and_keeps_the_rest(self, name: str) -> None:
        metric, first, whole = METRICS[name](), METRICS[name](), METRICS[name]()
        first.update(*part(name, slice(0, 2)))
        whole.update(*arguments(name))
        torch.testing.assert_close(metric(*part(name, slice(0, 2))), first.compute())
        metric(*part(name, slice(2, 6)))
        torch.testing.assert_close(metric.compute(), whole.compute(), **SINGLE)

    def test_states_of_processes_add_up(self, name: str) -> None:
        whole, one, other = METRICS[name](), METRICS[name](), METRICS[name]()
        whole.update(*arguments(name))
        one.update(*part(name, slice(0, 5)))
        other.update(*part(name, slice(5, 6)))
        one.merge_state(other)
        torch.testing.assert_close(one.compute(), whole.compute(), **SINGLE)

    def test_reset_forgets(self, name: str) -> None:
        metric = METRICS[name]()
        metric.update(*part(name, slice(0, 3)))
        metric.reset()
        metric.update(*part(name, slice(3, 6)))
        fresh = METRICS[name]()
        fresh.update(*part(name, slice(3, 6)))
        assert metric.compute() == fresh.compute()

    def test_compute_without_a_query(self, name: str) -> None:
        metric = METRICS[name]()
        metric._update_count = 1  # torchmetrics would warn first
        with pytest.raises(
            ValueError, match=rf"{type(metric).__name__}.compute\(\): no query yet. HINT"
        ):
            metric.compute()

    def test_plot(self, name: str) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        metric = METRICS[name]()
        metric.update(*arguments(name))
        figure, axes = metric.plot()
        assert axes.lines[0].get_ydata().tolist() == [metric.compute().item()]
        figure.canvas.draw()
        _, axes = metric.plot([torch.tensor(0.25), torch.tensor(0.5)])
        assert axes.lines[0].get_ydata().tolist() == [0.25, 0.5]
        pyplot.close("all")

    def test_by_name(self, name: str) -> None:
        assert type(metrics.by_name(name)) is METRICS[name]
        assert metrics.by_name(name) is not metrics.by_name(name)


def test_names() -> None:
    assert {
        "concept_precision": ConceptPrecision,
        "concept_r_precision": ConceptRPrecision,
        "concept_recall": ConceptRecall,
        "concept_map": ConceptMAP,
        "concept_auroc": ConceptAUROC,
        "linear_datamodeling_score": LinearDatamodelingScore,
        "counterfactual_drop": CounterfactualDrop,
    } == METRICS


def test_by_name_lists_the_known_names() -> None:
    with pytest.raises(
        ValueError, match=r"by_name\('ndcg'\): unknown metric. Known: concept_precision, .*drop"
    ):
        metrics.by_name("ndcg")


def test_a_collection_keeps_metrics_apart_that_start_equal() -> None:
    """MetricCollection merges metrics with equal states after the first update; here all of them
    are 1 then."""
    found = {
        "p1": ConceptPrecision(k=1),
        "p2": ConceptPrecision(k=2),
        "r1": ConceptRecall(k=1),
        "r2": ConceptRecall(k=2),
    }
    others = {"rp": ConceptRPrecision(), "map": ConceptMAP(), "auroc": ConceptAUROC()}
    collection = MetricCollection({**found, **others})
    collection.update(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([True, True, False, False]))
    assert all(value == 1 for value in collection.compute().values())
    collection.update(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([False, True, False, False]))
    values = {name: round(float(value), 4) for name, value in collection.compute().items()}
    assert values == {
        "p1": 0.5,
        "p2": 0.75,
        "r1": 0.5,
        "r2": 1.0,
        "rp": 0.5,
        "map": 0.75,
        "auroc": 0.8333,
    }
