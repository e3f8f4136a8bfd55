"""The HTTP shapes that are written: what the routes answer. `schema.py` has what they read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from raydr.serve.schema import Mode
from raydr.types import Modality

Span = tuple[int, int]
"""`[start, end)` in Unicode characters of the text it belongs to."""


class Answer(BaseModel):
    """Base of what is written."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


class Highlights(Answer):
    """Where words of the query occur, ascending and without overlap; offsets count Unicode characters."""

    title: list[Span]
    text: list[Span]
    snippet: Span
    """The stretch of `text` with the most of them."""


class WordWeight(Answer):
    """A word piece, and how much it counts."""

    token: str
    weight: float


class Explanation(Answer):
    """Which words made a hit's score: `matches` and `rest` add up to `score`."""

    score: float
    """The inner product of the query's and the passage's embedding; the hit's own score where nothing was fused,
    reranked or rounded."""
    matches: list[WordWeight]
    """The words that both have, by what they add to the score: the product of their weights. The largest."""
    rest: float
    """What all further words that both have add."""
    passage: list[WordWeight]
    """The passage's own weights, the largest."""


class SearchHit(Answer):
    """A passage found."""

    id: str
    score: float
    """Larger is better; scores of different modes, and of rerankers, are not comparable. Behind `rerank_depth` the
    first score stands here."""
    retrieval_score: float | None = None
    """The score it was found with, where a reranker gave it another."""
    title: str | None = None
    text: str | None = None
    highlights: Highlights | None = None
    metadata: dict[str, Any] | None = None
    image: str | None = None
    """The passage's picture as a `data:` URL; left out where it has none."""
    explanation: Explanation | None = None
    """Where `explain` asked for it; left out of a hit whose shard did not answer with its embedding."""


class QueryResult(Answer):
    """The hits of one of many queries."""

    query: str | None = None
    """Its words; left out where it was a picture alone."""
    hits: list[SearchHit]


class Reranking(Answer):
    """What reordered the hits."""

    model: str
    depth: int
    """Hits per query that were given to it."""
    applied: bool = True
    """False where it failed and the first order was kept."""
    reason: str | None = None
    """Why it was not applied."""


class Feedback(Answer):
    """What moved the queries' embeddings."""

    scores: str | None = None
    order: str | None = None
    depth: int
    """Hits per query of the first search that were judged."""
    applied: bool = True
    """False where a reranker failed and the embeddings stayed."""
    reason: str | None = None
    """Why it was not applied."""


class Prf(Answer):
    """What refined the queries' embeddings."""

    method: str
    k: int
    """Hits per query of the first search that were read."""
    applied: bool = True
    """False where the embeddings stayed as they were."""
    reason: str | None = None
    """Why it was not applied, or not to all queries."""


class PrfCard(Answer):
    """How queries may be refined."""

    methods: list[str]
    learned_k: int | None = None
    """Hits that the learned refiner reads; left out where there is none."""
    learned_version: str | None = None
    """Its stamp: of the encoder it was trained for, of k, and of its weights."""


class MissingShard(Answer):
    """A shard of the index that did not answer."""

    shard: int
    """Its number in the index."""
    num_passages: int
    """How many passages it holds; none of them can be among the hits."""
    reason: str


class SearchAnswer(Answer):
    """`query` and `hits` answer a single query, `results` a list of queries; the other one is left out."""

    object: Literal["search"] = "search"
    request_id: str
    index_version: str
    """The version of the index that gave every hit of this response."""
    model: str
    mode: Mode
    k: int
    query: str | None = None
    hits: list[SearchHit] | None = None
    results: list[QueryResult] | None = None
    reranking: Reranking | None = None
    feedback: Feedback | None = None
    prf: Prf | None = None
    partial: Literal[True] | None = None
    """True where shards are missing; else it is left out."""
    missing_shards: list[MissingShard] | None = None
    timings_ms: dict[str, float]
    """Wall time of each stage that ran; `total` is the time in the server."""


class EmbeddingItem(Answer):
    """One embedding."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(Answer):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(Answer):
    """OpenAI's response."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class RerankDocument(Answer):
    """A document given back."""

    text: str


class RerankItem(Answer):
    """One document's score; `index` is its place in the request."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankAnswer(Answer):
    """Best first, with what both dialects' clients look for (`usage`, `meta`)."""

    id: str
    model: str
    results: list[RerankItem]
    usage: Usage
    meta: dict[str, Any]


class TeiRerankItem(Answer):
    """One text's score; `index` is its place in the request."""

    index: int
    score: float
    text: str | None = None


class ModelCard(Answer):
    """A model this server answers with; the fields after `owned_by` are raydr's own."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "raydr"
    capabilities: list[str]
    dimensions: int | None = None
    index_version: str | None = None
    num_passages: int | None = None
    num_shards: int | None = None
    modes: list[Mode] | None = None
    metadata_columns: list[str] | None = None
    modalities: list[Modality] | None = None
    """What the encoder reads: `text`, `image`, and `image,text` (both as one)."""
    reads_instructions: bool | None = None
    """Whether the encoder reads a search's `instruction`."""
    prf: PrfCard | None = None
    """What a search's `prf` may ask for."""
    explains: bool | None = None
    """Whether a search can be explained: whether the index's embeddings are weights of words."""
    has_images: bool | None = None
    """Whether passages of the index may have pictures."""


class ModelList(Answer):
    """OpenAI's list of models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The faulty field, as a path: `queries.3`."""
    code: str


class ErrorAnswer(Answer):
    """The one shape of every error."""

    error: ErrorDetail


class Status(Answer):
    """Health and readiness."""

    status: Literal["ok", "ready", "loading"]
    index_version: str | None = None
    preparing: str | None = None
    """The index being swapped in, while that lasts."""
    error: str | None = None
    """Why the last swap did not happen; the index before it is still served."""
