"""Ordering and merging of hits: equal to sorting everything, whatever the number of parts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raydr.index.topk import TopK, empty, merge, order, select
from tests.corpora import as_pairs


@given(
    num_rows=st.integers(1, 40),
    num_parts=st.integers(1, 5),
    num_queries=st.integers(1, 4),
    k=st.integers(1, 50),
    spread=st.integers(0, 4),
    seed=st.integers(0, 10_000),
)
def test_merging_parts_is_sorting_the_whole(num_rows, num_parts, num_queries, k, spread, seed):
    rng = np.random.default_rng(seed)
    ids = np.array([f"p{number}" for number in rng.permutation(num_rows)], dtype=object)
    scores = rng.integers(-spread, spread + 1, size=(num_queries, num_rows)).astype(np.float32)
    parts = []
    for rows in np.array_split(np.arange(num_rows), num_parts):
        every = TopK(scores=scores[:, rows], rows=np.tile(rows, (num_queries, 1)))
        parts.append(order(every, k, ids.__getitem__))
    expected = [sorted(zip(ids, line.tolist(), strict=True), key=lambda hit: (-hit[1], hit[0]))[:k] for line in scores]
    assert as_pairs(merge(parts, k, ids.__getitem__), ids) == expected
    for line, best in zip(scores, expected, strict=True):
        rows = select(line, k)
        assert as_pairs(order(TopK(line[None, rows], rows[None]), k, ids.__getitem__), ids)[0] == best


def test_only_tied_rows_have_their_ids_looked_up():
    asked = []

    def ids_of(rows):
        asked.extend(rows.tolist())
        return np.array([f"p{9 - row}" for row in rows], dtype=object)

    top = TopK(scores=np.array([[5, 4, 4, 3, 2]], dtype=np.float32), rows=np.array([[0, 1, 2, 3, 4]], dtype=np.int64))
    assert order(top, 4, ids_of).rows.tolist() == [[0, 2, 1, 3]]
    assert sorted(asked) == [1, 2]


def test_missing_rows_go_last_and_inputs_stay_as_they_are():
    scores = np.array([[-5.0, 9.0, -5.0]], dtype=np.float32)
    rows = np.array([[1, -1, 0]], dtype=np.int64)
    top = order(TopK(scores=scores, rows=rows), 4, np.array(["b", "a"], dtype=object).__getitem__)
    assert top.rows.tolist() == [[1, 0, -1, -1]]
    assert top.scores.tolist() == [[-5.0, -5.0, -np.inf, -np.inf]]
    assert rows.tolist() == [[1, -1, 0]]
    assert scores.tolist() == [[-5.0, 9.0, -5.0]]


def test_select_keeps_only_scores_above_the_bound():
    assert select(np.array([0.0, 2.0, 0.0], dtype=np.float32), 2, above=0.0).tolist() == [1]


def test_no_queries_and_no_columns():
    assert order(empty(0, 3), 5, lambda rows: rows).rows.shape == (0, 5)
    assert merge([empty(2, 0), empty(2, 0)], 3, lambda rows: rows).rows.tolist() == [[-1] * 3] * 2
