"""One check per protocol of `raydr.protocols`: every implementation must pass the one of its protocol.

check_index(lambda: VectorIndex("Flat"))
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raydr.protocols import Index


def check_index(build: Callable[[], Index], *, dim: int = 8) -> None:
    """`build` makes an empty index, exact for as few rows as these."""
    rng = np.random.default_rng(0)
    ids = [f"p{number:02d}" for number in rng.permutation(40)]
    embeddings = rng.integers(-3, 4, size=(40, dim)).astype(np.float32)
    queries = rng.integers(-3, 4, size=(5, dim)).astype(np.float32)
    index = build()
    assert isinstance(index, Index)

    nothing = index.search(queries, 3)
    assert nothing.rows.shape == nothing.scores.shape == (5, 3)
    assert (nothing.rows == -1).all()
    assert np.isneginf(nothing.scores).all()

    index.add(ids[:25], embeddings[:25])
    index.add([], embeddings[:0])
    index.add(ids[25:], embeddings[25:])
    assert list(index.passage_ids) == ids
    assert index.search(queries[:0], 3).rows.shape == (0, 3)

    allowed = rng.random(40) < 0.4
    for k in (1, 7, 40, 50):
        for mask in (None, allowed, np.zeros(40, dtype=bool)):
            top = index.search(queries, k, allowed=mask)
            assert top.rows.dtype == np.int64
            assert top.scores.dtype == np.float32
            for query, rows, scores in zip(queries, top.rows, top.scores, strict=True):
                candidates = range(40) if mask is None else np.flatnonzero(mask)
                best = sorted(candidates, key=lambda row: (-float(embeddings[row] @ query), ids[row]))[:k]
                assert rows[: len(best)].tolist() == [int(row) for row in best]
                assert scores[: len(best)].tolist() == [float(embeddings[row] @ query) for row in best]
                assert (rows[len(best) :] == -1).all()
