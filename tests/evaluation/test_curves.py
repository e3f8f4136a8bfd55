"""ROC: brute-force pair counting, scikit-learn, and the protocol of the pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import mannwhitneyu

from raydr.evaluation.curves import area_per_query, pooled_curve, roc_curve, score_pools
from raydr.types import Hit

few_values = hnp.arrays(np.float64, st.integers(1, 12), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 2.0]))


def pairs_won(positives, negatives):
    return np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives])


def test_reference_vector_of_the_method_card():
    assert roc_curve(np.array([0.9, 0.5]), np.array([0.2, 0.6])).area == 0.75


@given(few_values, few_values.map(lambda scores: np.where(np.isinf(scores), 0.0, scores)))
def test_area_counts_pairs(positives, negatives):
    curve = roc_curve(positives, negatives)
    assert curve.area == pytest.approx(pairs_won(positives, negatives), abs=1e-12)
    assert (curve.false_positive_rate[0], curve.true_positive_rate[0]) == (0, 0)
    assert (curve.false_positive_rate[-1], curve.true_positive_rate[-1]) == (1, 1)
    assert (np.diff(curve.thresholds) < 0).all()
    for threshold, fpr, tpr in zip(curve.thresholds, curve.false_positive_rate, curve.true_positive_rate, strict=True):
        assert fpr == pytest.approx((negatives >= threshold).mean())
        assert tpr == pytest.approx((positives >= threshold).mean())


def test_equals_sklearn_and_mann_whitney():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    positives, negatives = np.round(rng.normal(1, 1, 400), 1), np.round(rng.normal(0, 1, 3000), 1)
    labels, scores = np.repeat([1, 0], [400, 3000]), np.concatenate([positives, negatives])
    curve = roc_curve(positives, negatives)
    assert curve.area == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert curve.area == pytest.approx(mannwhitneyu(positives, negatives).statistic / (400 * 3000), abs=1e-12)
    fpr, tpr, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert curve.thresholds == pytest.approx(thresholds)
    assert curve.false_positive_rate == pytest.approx(fpr)
    assert curve.true_positive_rate == pytest.approx(tpr)


def test_thinned_keeps_the_shape():
    rng = np.random.default_rng(1)
    curve = roc_curve(rng.normal(2, 1, 5000), rng.normal(0, 1, 50_000))
    thin = curve.thinned(200)
    assert len(thin.thresholds) <= 204
    assert thin.area == pytest.approx(curve.area, abs=1e-3)
    assert (thin.false_positive_rate[[0, -1]], thin.true_positive_rate[[0, -1]]) == (pytest.approx([0, 1]),) * 2


def test_nothing_to_separate():
    assert roc_curve(np.array([1.0]), np.array([])) is None
    assert roc_curve(np.array([]), np.array([1.0])) is None


def test_pool_of_a_query():
    run = {
        "q": [Hit("a", 9.0), Hit("u", 8.0), Hit("b", 7.0), Hit("v", 6.0), Hit("w", 5.0)],
        "unjudged": [Hit("a", 1.0)],
    }
    qrels = {"q": {"a": 2, "b": 1, "missed": 2, "w": 0}, "unanswered": {"a": 1}}
    pools = score_pools(run, qrels, num_negatives=2)
    assert [*pools] == ["q", "unanswered"]
    assert pools["q"].positives.tolist() == [9.0, 7.0, -np.inf]
    assert pools["q"].negatives.tolist() == [8.0, 6.0]
    assert pools["unanswered"].positives.tolist() == [-np.inf]
    assert pools["unanswered"].negatives.tolist() == []
    strict = score_pools(run, qrels, relevance_level=2)["q"]
    assert (strict.positives.tolist(), strict.negatives.tolist()) == ([9.0, -np.inf], [8.0, 7.0, 6.0, 5.0])


def test_pooled_sees_what_per_query_areas_cannot():
    # Both queries are ranked perfectly, but q2 scores lower throughout: no single threshold fits both.
    run = {"q1": [Hit("a", 10.0), Hit("x", 9.0)], "q2": [Hit("b", 2.0), Hit("y", 1.0)]}
    pools = score_pools(run, {"q1": {"a": 1}, "q2": {"b": 1}})
    assert area_per_query(pools) == {"q1": 1.0, "q2": 1.0}
    curve = pooled_curve(pools)
    assert curve.area == 0.75
    assert (curve.num_positives, curve.num_negatives, curve.num_missed) == (2, 2, 0)


def test_missed_positives_cost():
    pools = score_pools({"q": [Hit("a", 2.0), Hit("x", 1.0)]}, {"q": {"a": 1, "missed": 1}, "empty": {"z": 0}})
    assert pooled_curve(pools).area == 0.5
    assert pooled_curve(pools).num_missed == 1
    areas = area_per_query(pools)
    assert areas["q"] == 0.5
    assert np.isnan(areas["empty"])
