"""The nouns of retrieval, and the column names of the tables that flow between stages.

Notable: every noun is a tuple or a plain dict, so a run or a batch can be printed, pickled and compared; ids are
strings everywhere. The axis words used in shape annotations are listed in `docs/vocabulary.md`.

    >>> Hit("d1", 0.5).passage_id
    'd1'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Float32
from scipy.sparse import csr_array

Modality: TypeAlias = Literal["text", "image", "image,text"]
"""What a query or a passage is made of; the words are M-BEIR's."""
MODALITIES: tuple[Modality, ...] = get_args(Modality)
"""All of them; arrays hold their places in it."""


class Entity(NamedTuple):
    """A stretch of a text that names something: characters `start` to `end` (exclusive)."""

    start: int
    end: int
    label: str
    """What is named: PER, ORG, LOC or MISC; other labels where a tagger has others."""


class Annotation(NamedTuple):
    """The entities that were marked in a text."""

    entities: tuple[Entity, ...]
    labels: tuple[str, ...]
    """What was looked for. A name of another kind may stand in the text and not be marked."""


class Query(NamedTuple):
    """A question, a picture, or both; `text` is empty where there is only a picture."""

    query_id: str
    text: str
    image: bytes | None = None
    """A picture as the bytes of its file (PNG, JPEG or WebP)."""
    instruction: str = ""
    """What is looked for ("Find a picture that the text describes."), for encoders that read instructions."""
    feedback: tuple[Passage, ...] = ()
    """What a first search found, best first, for encoders that read it (pseudo-relevance feedback)."""
    annotation: Annotation | None = None
    """The entities marked in the text, where a tagger is trained on it."""

    @property
    def modality(self) -> Modality:
        return modality(self.text, has_image=self.image is not None)


class Passage(NamedTuple):
    """The unit that is embedded, indexed and returned. A document is a source that was split into passages."""

    passage_id: str
    text: str
    title: str = ""
    image: bytes | None = None
    """A picture as the bytes of its file (PNG, JPEG or WebP)."""

    @property
    def modality(self) -> Modality:
        return modality(self.title + self.text, has_image=self.image is not None)

    def joined(self, separator: str) -> str:
        """Title and text as one; the text alone where there is no title."""
        return f"{self.title}{separator}{self.text}" if self.title else self.text


def modality(text: str, *, has_image: bool) -> Modality:
    """What something with this text is made of; what has neither text nor picture counts as text."""
    if not has_image:
        return "text"
    return "image,text" if text.strip() else "image"


class Qrel(NamedTuple):
    """One judgement; `relevance` is the grade, and grades below 1 mean not relevant (negative grades occur)."""

    query_id: str
    passage_id: str
    relevance: int


class Hit(NamedTuple):
    """One search result; a larger score is better. Rank is the position in the list and is written only to files."""

    passage_id: str
    score: float


class Found(NamedTuple):
    """What a first search found for one query, best first, for a refiner; of the passages only what it reads."""

    hits: Sequence[Hit]
    passages: Sequence[Passage] = ()
    """Those of the hits; empty where the refiner reads embeddings."""
    embeddings: Float32[np.ndarray, "hit dim"] = np.empty((0, 0), dtype=np.float32)
    """The index's own of the hits, as far as its coding keeps them; none where the refiner reads passages."""


def with_rest(head: list[Hit], rest: Sequence[Hit]) -> list[Hit]:
    """A list whose head was ranked anew: the rest follows as it was, with scores below it that only say so."""
    lowest = head[-1].score if head else 0.0
    return [*head, *(Hit(hit.passage_id, lowest - place) for place, hit in enumerate(rest, start=1))]


Run: TypeAlias = dict[str, list[Hit]]
"""query_id -> hits, best first."""

Qrels: TypeAlias = dict[str, dict[str, int]]
"""query_id -> passage_id -> relevance."""

Embeddings: TypeAlias = Float32[np.ndarray, "row dim"] | csr_array
"""A matrix with one row per text: dense float32, or sparse over a vocabulary."""


def shape_of(embeddings: Any) -> tuple[int, int]:
    """(rows, dimensions) of embeddings; scipy's own annotation of it is no pair of integers."""
    return embeddings.shape


WeightType: TypeAlias = Literal["float32", "float16", "ones"]
"""How the weights of sparse embeddings are stored; `ones`: not at all, where every one of them is 1."""


# Column names, written once. Tables: queries (QUERY_ID, TEXT), passages (PASSAGE_ID, POSITION, TITLE, TEXT, metadata),
# qrels (QUERY_ID, PASSAGE_ID, RELEVANCE), passage embeddings (PASSAGE_ID, POSITION, and EMBEDDING or DIMS and WEIGHTS),
# query embeddings (QUERY_ID, EMBEDDING), hits (QUERY_ID, PASSAGE_ID, SCORE).
QUERY_ID = "query_id"
PASSAGE_ID = "passage_id"
DOCUMENT_ID = "document_id"
"""Present only where documents were split into passages: the id of the document a passage was cut from."""
POSITION = "position"
"""0-based place of a passage in its corpus (int64). Stages may reorder rows; the position restores the order, so an
index is the same whatever the parallelism that embedded its corpus."""
TITLE = "title"
TEXT = "text"
IMAGE = "image"
"""The bytes of a picture's file, of a query or a passage; null where it has none."""
INSTRUCTIONS = "instructions"
"""Of a query: what is looked for, in several wordings (a list of strings)."""
TASK = "task"
"""Of a query: a label that queries of one kind and source share, such as the task of a benchmark of many."""
COPIES = "copies"
"""Of a query: how often an epoch of training shows it (1 where nobody says)."""
EXCLUDED_IDS = "excluded_ids"
"""Of a query: what is no answer to it, such as the picture it asks with (a list of strings)."""
ANNOTATION = "annotation"
"""Of a query: the entities marked in its text."""
RELEVANCE = "relevance"
SCORE = "score"
EMBEDDING = "embedding"
DIMS = "dimensions"
"""Of a sparse embedding: the dimensions that are not 0, ascending (a list of int32)."""
WEIGHTS = "weights"
"""Of a sparse embedding: their weights (a list of float32 or float16); no such column where all of them are 1."""

RESERVED_COLUMNS = frozenset({QUERY_ID, PASSAGE_ID, DOCUMENT_ID, POSITION, TITLE, TEXT, RELEVANCE, SCORE, EMBEDDING})
"""Names a corpus may not use for its own metadata columns."""
