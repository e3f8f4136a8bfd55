"""One check per protocol of `raydr.protocols`: every implementation must pass the one of its protocol.

check_index(lambda: VectorIndex("Flat"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raydr.protocols import Encoder, Index
from raydr.types import Passage, Query


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
                assert rows[: len(best)].tolist() == list(best)
                assert scores[: len(best)].tolist() == [float(embeddings[row] @ query) for row in best]
                assert (rows[len(best) :] == -1).all()


def check_encoder(encoder: Encoder) -> None:
    """What every `Encoder` promises: shapes, order, empty input, and embeddings that depend on nothing but the text."""
    assert isinstance(encoder, Encoder)
    assert encoder.dim > 0
    assert encoder.version
    assert encoder.version == encoder.version
    assert encoder.encode_queries([]).shape == (0, encoder.dim)
    assert encoder.encode_passages([]).shape == (0, encoder.dim)

    texts = ["a cat", "a much longer text about cats, dogs and what they do all day", "", "naïve 東京 🙂", "a cat"]
    passages = [Passage(f"p{i}", text, title=f"title {i % 2}") for i, text in enumerate(texts)]
    queries = [Query(f"q{i}", text) for i, text in enumerate(texts)]
    _check_encoding(encoder.encode_passages, passages, encoder.dim)
    _check_encoding(encoder.encode_queries, queries, encoder.dim)


def _check_encoding(encode: Callable[[Any], Any], items: Sequence[Any], dim: int) -> None:
    """The first and the last of `items` are equal but for their ids."""
    together = encode(items)
    assert together.shape == (len(items), dim)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    alone = np.concatenate([encode([item]) for item in items])
    assert _cosines(together, alone).min() > 0.999
    backwards = encode(items[::-1])[::-1]
    assert _cosines(together, backwards).min() > 0.999
    assert _cosines(together[:1], together[-1:]).min() > 0.999
    assert _cosines(together[:1], together[1:2]).max() < 0.999


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
