"""Significance: against scipy, hand-worked cases, and the properties a test must have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from raydr.evaluation.significance import bootstrap_interval, holm, randomisation_test


def mean(x, axis):
    return x.mean(axis=axis)


def test_exact_hand_worked():
    # Of the eight sign patterns of (1, 2, 4), only +++ and --- reach a sum of 7 in size.
    assert randomisation_test(np.array([[1.0], [2.0], [4.0]])).tolist() == [2 / 8]
    # (3, -1): sums 2, 4, -4, -2 are all as extreme as the observed 2.
    assert randomisation_test(np.array([[3.0], [-1.0]])).tolist() == [1.0]


@pytest.mark.parametrize("seed", range(5))
def test_exact_equals_scipy(seed):
    rng = np.random.default_rng(seed)
    # Rounded: many different sign patterns give the same sum, which floating point must not tell apart.
    differences = np.round(rng.normal(0.1, 0.3, (11, 3)), 1)
    ours = randomisation_test(differences)
    for column in range(3):
        theirs = stats.permutation_test(
            (differences[:, column],), mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        )
        assert ours[column] == pytest.approx(theirs.pvalue, abs=1e-12)


def test_exact_equals_enumeration_where_many_queries_agree():
    # 300 queries, of which only 10 differ: zeros have no sign, so this is still exact.
    differences = np.zeros((300, 1))
    differences[::30, 0] = [0.5, 0.1, -0.2, 0.4, 0.3, 0.2, -0.1, 0.6, 0.1, 0.2]
    sums = [sum(s * d for s, d in zip(signs, differences[::30, 0], strict=True))
            for signs in itertools.product([1, -1], repeat=10)]  # fmt: skip
    expected = np.mean([abs(total) >= abs(differences.sum()) - 1e-9 for total in sums])
    assert randomisation_test(differences).tolist() == [expected]


def test_sampled_agrees_with_scipy_and_with_exact():
    rng = np.random.default_rng(3)
    differences = rng.normal(0.05, 0.3, (15, 1))
    exact = randomisation_test(differences, num_permutations=2**15)[0]
    sampled = randomisation_test(differences, num_permutations=2**15 - 1)[0]
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=0.01)
    many = rng.normal(0.02, 0.3, (301, 1))  # not a multiple of eight, the bits in a random byte
    theirs = stats.permutation_test(
        (many[:, 0],), mean, permutation_type="samples", n_resamples=20_000, batch=1000, vectorized=True, rng=rng
    )
    assert randomisation_test(many)[0] == pytest.approx(theirs.pvalue, abs=0.015)


def test_same_seed_same_p_values_whatever_stands_beside():
    differences = np.random.default_rng(0).normal(0.05, 0.3, (50, 3))
    together = randomisation_test(differences, seed=5)
    assert np.array_equal(together, randomisation_test(differences, seed=5))
    assert together[1:2] == pytest.approx(randomisation_test(differences[:, 1:2], seed=5))
    assert not np.array_equal(together, randomisation_test(differences, seed=6))


def test_two_sided_and_never_zero():
    differences = np.full((200, 2), 0.5) * [1, -1]
    assert randomisation_test(differences, num_permutations=999).tolist() == [1 / 1000, 1 / 1000]
    assert randomisation_test(np.zeros((200, 1))).tolist() == [1.0]
    assert randomisation_test(np.zeros((5, 0))).tolist() == []


def test_thousands_of_queries():
    differences = np.random.default_rng(0).normal(0.02, 0.3, (3000, 1))
    normal = 2 * stats.norm.sf(abs(differences.mean()) / np.sqrt((differences**2).mean() / 3000))
    assert randomisation_test(differences, num_permutations=20_000)[0] == pytest.approx(normal, abs=0.01)


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(1)
    p = randomisation_test(rng.normal(size=(40, 400)), num_permutations=2000)
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert 0.02 < (p < 0.05).mean() < 0.09


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(2).beta(2, 3, (200, 2))
    low, high = bootstrap_interval(values, num_resamples=20_000)
    for column in range(2):
        theirs = stats.bootstrap(
            (values[:, column],), np.mean, n_resamples=20_000, method="percentile", vectorized=True, rng=0
        ).confidence_interval
        assert low[column] == pytest.approx(theirs.low, abs=0.002)
        assert high[column] == pytest.approx(theirs.high, abs=0.002)


def test_interval_is_paired():
    a = np.random.default_rng(4).random(100)
    low, high = bootstrap_interval(np.stack([a, a + 0.1, np.full(100, 0.1)], axis=1))
    # A constant difference has no spread, although both columns have.
    assert low[1] - low[0] == pytest.approx(0.1)
    assert (low[2], high[2]) == pytest.approx((0.1, 0.1))
    assert high[0] - low[0] > 0.05


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    values = rng.exponential(1.0, (100, 300))
    low, high = bootstrap_interval(values, confidence=0.9, num_resamples=1000)
    covered = ((low <= 1) & (high >= 1)).mean()
    assert 0.82 < covered < 0.95


def test_one_query_has_a_point_interval():
    low, high = bootstrap_interval(np.array([[0.3]]))
    assert (low.tolist(), high.tolist()) == ([0.3], [0.3])


def test_holm_hand_worked():
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.02])).tolist() == [0.02]
    assert holm(np.array([])).tolist() == []
