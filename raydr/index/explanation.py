"""Why a passage was found: how much each dimension of two sparse embeddings adds to their inner product.

Notable: a score is a sum, so nothing has to be approximated: the shares, and the sum of those that are not shown, add
up to it. Dimensions are numbers here; the encoder says which words they are (`VocabularyEncoder.tokens_of`).

    shares = Shares.of(queries[[0]], passages[[3]])
    [(token, share) for token, (_, share) in zip(encoder.tokens_of([d for d, _ in shares.matches]), shares.matches)]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

SHOWN_MATCHES = 12
"""Dimensions that are told one by one."""
SHOWN_WORDS = 40
"""Of the passage's own dimensions."""


@dataclass(frozen=True)
class Shares:
    """(dimension, share of the score) and (dimension, weight), the largest first."""

    score: float
    matches: list[tuple[int, float]]
    rest: float
    """What the matches that are not told add up to."""
    passage: list[tuple[int, float]]

    @classmethod
    def of(
        cls, query: csr_array, passage: csr_array, *, matches: int = SHOWN_MATCHES, words: int = SHOWN_WORDS
    ) -> Shares:
        """Of one query's row and one passage's."""
        dims, of_query, of_passage = np.intersect1d(query.indices, passage.indices, return_indices=True)
        products = query.data[of_query].astype(np.float64) * passage.data[of_passage]
        told = np.argsort(-products, kind="stable")[:matches]
        largest = np.argsort(-passage.data, kind="stable")[:words]
        return cls(
            score=float(products.sum()),
            matches=list(zip(dims[told].tolist(), products[told].tolist(), strict=True)),
            rest=max(0.0, float(products.sum() - products[told].sum())),
            passage=list(zip(passage.indices[largest].tolist(), passage.data[largest].tolist(), strict=True)),
        )

    @property
    def dims(self) -> set[int]:
        """All that are told."""
        return {dim for dim, _ in (*self.matches, *self.passage)}
