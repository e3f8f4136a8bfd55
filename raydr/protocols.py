"""What the parts of a retrieval system promise one another: the seams every method plugs into.

Notable: these are structural protocols, nothing needs to inherit from them; `tests/contracts.py` holds one check per
protocol that every implementation must pass. Scores are always "larger is better". What training adds stands in
`raydr/train/objective.py` and `raydr/train/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64

from raydr.types import Embeddings, Found, Hit, Passage, Query

if TYPE_CHECKING:
    import ray.data

Stage: TypeAlias = "Callable[[ray.data.Dataset], ray.data.Dataset]"
"""A table in, a table out. A stage's docstring says which columns it needs and which it adds."""


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into embeddings. An empty input gives an empty `(0, dim)` matrix."""

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        ...

    @property
    def version(self) -> str:
        """Stamp of everything that changes the vectors (weights, pooling, lengths, prompts): a searcher refuses to
        search an index whose stamp differs from its query encoder's. Precision and backend are not part of it.
        """
        ...

    def encode_queries(self, queries: Sequence[Query]) -> Embeddings: ...

    def encode_passages(self, passages: Sequence[Passage]) -> Embeddings: ...


@dataclass(frozen=True)
class TopK:
    """The best `k` rows of an index for each query, best first; rows are -1 (and scores -inf) where fewer exist."""

    scores: Float32[np.ndarray, "query k"]
    rows: Int64[np.ndarray, "query k"]


@runtime_checkable
class Index(Protocol):
    """Nearest neighbours by inner product. An index speaks rows; callers turn rows into ids with `passage_ids`."""

    @property
    def passage_ids(self) -> Sequence[str]: ...

    def add(self, passage_ids: Sequence[str], embeddings: Embeddings) -> None: ...

    def search(self, embeddings: Embeddings, k: int, *, allowed: Bool[np.ndarray, " passage"] | None = None) -> TopK:
        """The `k` best rows per query, only among rows where `allowed` is true (None: all rows)."""
        ...


@runtime_checkable
class QueryRefiner(Protocol):
    """Makes better query embeddings from what a first search found (pseudo-relevance feedback)."""

    @property
    def num_feedback(self) -> int:
        """How many hits of the first search `refine` wants to see per query; 0: none, nothing is searched for it."""
        ...

    @property
    def reads(self) -> Literal["passages", "embeddings"]:
        """What it reads of these hits: their passages, or the index's embeddings of them."""
        ...

    def refine(self, queries: Sequence[Query], embeddings: Embeddings, found: Sequence[Found]) -> Embeddings:
        """One row per query, each of which depends on its own query alone: servers refine those of several requests
        at once. Asked only about queries that found all the hits it wants (`raydr.prf.refined`).
        """
        ...


@runtime_checkable
class Reranker(Protocol):
    """Puts hits into a better order with scores of its own; returns every hit it was given, exactly once, best first:
    no score is above the one before.
    """

    def rerank(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]: ...
