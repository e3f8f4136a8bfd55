"""Is a difference more than chance? Paired randomisation test, paired bootstrap intervals, Holm's correction.

Notable: queries are the sample, and runs are compared on the same queries. The randomisation test (Fisher; Smucker,
Allan and Carterette, CIKM 2007) flips the sign of each query's difference at random and asks how often the mean is as
far from zero as the observed one; it is exact, over all sign patterns, where there are few enough. All comparisons
share one set of sign flips and one set of resamples, so that a table costs little more than one cell.

    p = randomisation_test(values_b - values_a)          # differences: queries x comparisons
    low, high = bootstrap_interval(values)
    p = holm(p)                                          # when several runs are compared with one
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float64

_BLOCK_CELLS = 4_000_000
"""Random numbers drawn at once (32 MB as float64), so memory stays flat in the number of queries and resamples."""

_MAX_EXACT = 16
"""Queries whose sign patterns (65,536) are all tried."""


def randomisation_test(
    differences: Float64[np.ndarray, "query comparison"], *, num_permutations: int = 100_000, seed: int = 0
) -> Float64[np.ndarray, " comparison"]:
    """Two-sided p-values of the hypothesis that each column's differences are symmetric about zero.

    Exact where at most 16 queries differ and have no more than `num_permutations` sign patterns; otherwise
    `num_permutations` random patterns, the observed one counted among them, so p is never zero.
    """
    num_queries, num_comparisons = differences.shape
    p_values = np.ones(num_comparisons)
    sampled = []
    for column in range(num_comparisons):
        different = differences[differences[:, column] != 0, column : column + 1]  # a zero has no sign to flip
        if len(different) <= min(_MAX_EXACT, math.log2(num_permutations)):
            p_values[column] = _as_extreme(_all_signs(len(different)) @ different, different.sum(axis=0)).mean()
        else:
            sampled.append(column)
    if sampled:
        rng = np.random.default_rng(seed)
        sums = differences[:, sampled].sum(axis=0)
        exceeding = np.zeros(len(sampled))
        for size in _blocks(num_permutations, num_queries):
            bits = np.frombuffer(rng.bytes(size * -(-num_queries // 8)), np.uint8).reshape(size, -1)
            signs = 1.0 - 2.0 * np.unpackbits(bits, axis=1, count=num_queries)
            exceeding += _as_extreme(signs @ differences[:, sampled], sums).sum(axis=0)
        p_values[sampled] = (exceeding + 1) / (num_permutations + 1)
    return p_values


def bootstrap_interval(
    values: Float64[np.ndarray, "query column"],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[Float64[np.ndarray, " column"], Float64[np.ndarray, " column"]]:
    """Percentile bootstrap interval (low, high) of each column's mean over queries.

    Every column is resampled with the same queries, so the columns of two runs, and their difference, are paired.
    """
    num_queries = len(values)
    rng = np.random.default_rng(seed)
    means = []
    for size in _blocks(num_resamples, num_queries):
        drawn = rng.integers(num_queries, size=(size, num_queries))
        cells = (drawn + num_queries * np.arange(size)[:, None]).ravel()
        times_drawn = np.bincount(cells, minlength=size * num_queries).reshape(size, num_queries)
        means.append(times_drawn @ values / num_queries)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    return low, high


def holm(p_values: Float64[np.ndarray, " comparison"]) -> Float64[np.ndarray, " comparison"]:
    """p-values adjusted for being one family (Holm 1979): below 0.05 keeps the chance of any false alarm below 5 %."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return adjusted


def _all_signs(num_queries: int) -> Float64[np.ndarray, "pattern query"]:
    patterns = np.arange(2**num_queries)[:, None] >> np.arange(num_queries)
    return 1.0 - 2.0 * (patterns & 1)


def _as_extreme(
    sums: Float64[np.ndarray, "pattern column"], observed: Float64[np.ndarray, " column"]
) -> Bool[np.ndarray, "pattern column"]:
    # Sums of the same numbers in another order differ in the last digits: those are equal, not smaller.
    return np.abs(sums) >= np.abs(observed) * (1 - 1e-9) - 1e-12


def _blocks(total: int, width: int) -> Iterator[int]:
    """Sizes of blocks of rows, `width` cells each, that add up to `total`."""
    size = max(1, _BLOCK_CELLS // max(1, width))
    for start in range(0, total, size):
        yield min(size, total - start)
