"""The one place hits are ordered and merged: by score, ties by passage id ascending, vectorised over queries.

Notable: equal scores are common (duplicated texts, BM25), and whichever row a heap happens to keep would make results
depend on the number of shards. Here a tie is decided by the passage id, ids are looked up only for rows that tie, and
no Python object is made per hit.

    merge([shard_a, shard_b], k=10, ids_of=reader.passage_ids.take)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int64

from raydr.protocols import TopK

IdsOf: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Rows (int64) -> their passage ids (an object array of str)."""


def empty(num_queries: int, k: int) -> TopK:
    """No hits: every row is -1."""
    scores = np.full((num_queries, k), -np.inf, dtype=np.float32)
    return TopK(scores=scores, rows=np.full((num_queries, k), -1, dtype=np.int64))


def order(top: TopK, k: int, ids_of: IdsOf) -> TopK:
    """The `k` best of `top`'s columns, which may be in any order; padded where there are fewer than `k`."""
    scores = np.where(top.rows >= 0, top.scores, -np.inf).astype(np.float32, copy=False)
    rows = top.rows
    if (scores[:, 1:] > scores[:, :-1]).any():
        best = np.argsort(-scores, axis=1, kind="stable")
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    # Columns j and j + 1 tie; a tie wholly behind column k cannot change what is kept.
    ties = (scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] >= 0)
    lines = np.flatnonzero(ties[:, :k].any(axis=1))
    if len(lines):
        scores, rows = scores.copy(), rows.copy()
        best = np.lexsort((_id_ranks(rows[lines], ties[lines], ids_of), -scores[lines]), axis=-1)
        scores[lines] = np.take_along_axis(scores[lines], best, axis=1)
        rows[lines] = np.take_along_axis(rows[lines], best, axis=1)
    return _padded(scores[:, :k], rows[:, :k], k)


def merge(parts: Sequence[TopK], k: int, ids_of: IdsOf) -> TopK:
    """The `k` best of several results for the same queries, whose rows must be of one common numbering."""
    if len(parts) == 1 and parts[0].rows.shape[1] == k:
        return parts[0]  # a single shard has ordered its hits already
    scores = np.concatenate([part.scores for part in parts], axis=1)
    return order(TopK(scores=scores, rows=np.concatenate([part.rows for part in parts], axis=1)), k, ids_of)


def select(scores: Float[np.ndarray, " row"], k: int, *, above: float = -np.inf) -> Int64[np.ndarray, " hit"]:
    """Rows of one query's dense scores that may be among the `k` best: all that tie with the k-th too, in no order."""
    bound = np.partition(scores, len(scores) - k)[len(scores) - k] if k < len(scores) else -np.inf
    return np.flatnonzero((scores >= bound) & (scores > above))


def _id_ranks(
    rows: Int64[np.ndarray, "query column"], ties: np.ndarray, ids_of: IdsOf
) -> Int64[np.ndarray, "query column"]:
    """Place of each row that takes part in a tie in the order of passage ids; 0 for all others."""
    tied = np.zeros(rows.shape, dtype=bool)
    tied[:, 1:] |= ties
    tied[:, :-1] |= ties
    unique, place = np.unique(rows[tied], return_inverse=True)
    by_id = np.argsort(ids_of(unique), kind="stable")
    rank = np.empty(len(unique), dtype=np.int64)
    rank[by_id] = np.arange(len(unique))
    ranks = np.zeros(rows.shape, dtype=np.int64)
    ranks[tied] = rank[place]
    return ranks


def _padded(scores: np.ndarray, rows: np.ndarray, k: int) -> TopK:
    num_queries, width = rows.shape
    if width == k:
        return TopK(scores=scores, rows=rows)
    padded = empty(num_queries, k)
    padded.scores[:, :width], padded.rows[:, :width] = scores, rows
    return padded
