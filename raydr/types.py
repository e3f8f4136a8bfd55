"""The nouns of retrieval, and the column names of the tables that flow between stages.

Notable: every noun is a tuple or a plain dict, so a run or a batch can be printed, pickled and compared; ids are
strings everywhere. The axis words used in shape annotations are listed in `docs/vocabulary.md`.

    >>> Hit("d1", 0.5).passage_id
    'd1'
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32
from scipy.sparse import csr_array


class Query(NamedTuple):
    query_id: str
    text: str
    image: bytes | None = None


class Passage(NamedTuple):
    """The unit that is embedded, indexed and returned. A document is a source that was split into passages."""

    passage_id: str
    text: str
    title: str = ""
    image: bytes | None = None

    def joined(self, separator: str) -> str:
        """Title and text as one; the text alone where there is no title."""
        return f"{self.title}{separator}{self.text}" if self.title else self.text


class Qrel(NamedTuple):
    """One judgement; `relevance` is the grade, and grades below 1 mean not relevant (negative grades occur)."""

    query_id: str
    passage_id: str
    relevance: int


class Hit(NamedTuple):
    """One search result; a larger score is better. Rank is the position in the list and is written only to files."""

    passage_id: str
    score: float


Run: TypeAlias = dict[str, list[Hit]]
"""query_id -> hits, best first."""

Qrels: TypeAlias = dict[str, dict[str, int]]
"""query_id -> passage_id -> relevance."""

Embeddings: TypeAlias = Float32[np.ndarray, "row dim"] | csr_array
"""A matrix with one row per text: dense float32, or sparse over a vocabulary."""


# Column names, written once. Tables: queries (QUERY_ID, TEXT), passages (PASSAGE_ID, POSITION, TITLE, TEXT, metadata),
# qrels (QUERY_ID, PASSAGE_ID, RELEVANCE), passage embeddings (PASSAGE_ID, POSITION, EMBEDDING), query embeddings
# (QUERY_ID, EMBEDDING), hits (QUERY_ID, PASSAGE_ID, SCORE).
QUERY_ID = "query_id"
PASSAGE_ID = "passage_id"
DOCUMENT_ID = "document_id"
"""Present only where documents were split into passages: the id of the document a passage was cut from."""
POSITION = "position"
"""0-based place of a passage in its corpus (int64). Stages may reorder rows; the position restores the order, so an
index is the same whatever the parallelism that embedded its corpus."""
TITLE = "title"
TEXT = "text"
RELEVANCE = "relevance"
SCORE = "score"
EMBEDDING = "embedding"

RESERVED_COLUMNS = frozenset({QUERY_ID, PASSAGE_ID, DOCUMENT_ID, POSITION, TITLE, TEXT, RELEVANCE, SCORE, EMBEDDING})
"""Names a corpus may not use for its own metadata columns."""
