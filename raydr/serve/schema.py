"""The HTTP shapes: what `/v1/search`, `/v1/embeddings` and the rerank routes read and write.

Notable: `/v1/search` refuses unknown fields (a typo must not silently change a search); the routes that speak somebody
else's dialect ignore them, because the official clients of OpenAI, Cohere and Jina send fields of their own. Bounds
that the operator sets (`Limits`) are checked in `limits.py`, so this schema is the same on every server. What else is
refused stands in the OpenAPI document as well, also what validators written in Python refuse.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from raydr.index.filters import MAX_CHARACTERS, MAX_CONDITIONS, MAX_VALUES

Mode = Literal["dense", "bm25", "hybrid"]
HitField = Literal["title", "text", "highlights", "metadata"]
Span = tuple[int, int]
"""`[start, end)` in Unicode characters of the text it belongs to."""


class Shape(BaseModel):
    """Base of what is read: types are not coerced, `NaN` is no number, attribute docstrings document the fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Dialect(Shape):
    """Base of the requests whose shape others defined."""

    model_config = ConfigDict(extra="ignore")


class Answer(BaseModel):
    """Base of what is written."""

    model_config = ConfigDict(use_attribute_docstrings=True, protected_namespaces=())


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
"""An integer as JSON Schema has it: 5.0 is one. The bound is inside, or it would be missing in the document."""
Text = Annotated[str, Field(min_length=1)]
QueryText = Annotated[str, Field(min_length=1, json_schema_extra={"pattern": r"\S"})]
"""Checked by `_not_blank`, whose message is clearer than a pattern."""

_VALUE: list[dict[str, Any]] = [
    {"type": "string", "maxLength": MAX_CHARACTERS},
    {"type": "number"},
    {"type": "boolean"},
]
_OR_NULL: list[dict[str, Any]] = [*_VALUE, {"type": "null"}]
_ANY_OF = [*_OR_NULL, {"type": "array", "minItems": 1, "maxItems": MAX_VALUES, "items": {"anyOf": _OR_NULL}}]
_OPERATORS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": False,
    "properties": {**{name: {"anyOf": _VALUE} for name in ("gt", "gte", "lt", "lte")}, "not": {"anyOf": _ANY_OF}},
}
_FILTERS = {
    "type": "object",
    "maxProperties": MAX_CONDITIONS,
    "additionalProperties": {"anyOf": [*_ANY_OF, _OPERATORS]},
}
"""The shape of `filters`; which columns and types there are is the index's business (`raydr.index.filters`)."""


def _given(field: str, kind: str, absent: str | None = None) -> dict[str, Any]:
    """JSON Schema: `field` is there and not null, and `absent` is not."""
    others = {absent: {"type": "null"}} if absent else {}
    return {"required": [field], "properties": {field: {"type": kind}, **others}}


class FeedbackRequest(Shape):
    """Who judges the first hits, by names in `GET /v1/models`; where both do, the scores come first."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_given("scores", "string"), _given("order", "string")]})
    scores: str | None = None
    """A reranker whose scores can be compared over a whole list, such as a cross-encoder."""
    order: str | None = None
    """A reranker of which the order counts, such as FIRST."""
    depth: Annotated[int, Field(ge=2), BeforeValidator(_whole)] | None = None
    """How many hits are judged; null: as the server is set."""

    @model_validator(mode="after")
    def _somebody_judges(self) -> FeedbackRequest:
        if self.scores is None and self.order is None:
            raise ValueError("name a reranker: scores (a cross-encoder), order (a listwise one), or both")
        return self


class SearchRequest(Shape):
    """One or many queries over the index."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "join two data frames on a column", "k": 5, "mode": "dense"},
                {"queries": ["read a csv file", "sort by index"], "filters": {"package": ["pandas", "numpy"]}},
            ],
            "oneOf": [_given("query", "string", "queries"), _given("queries", "array", "query")],
            "not": {
                "required": ["mode", "feedback"],
                "properties": {"mode": {"const": "bm25"}, "feedback": {"type": "object"}},
            },
        }
    )
    query: QueryText | None = None
    """One query; exactly one of `query` and `queries` is given."""
    queries: list[QueryText] | None = Field(default=None, min_length=1)
    """Many queries, answered in this order."""
    k: Count = 10
    """Hits per query."""
    mode: Mode = "dense"
    """By embedding, by words (BM25), or both fused."""
    filters: Annotated[dict[str, JsonValue], WithJsonSchema(_FILTERS)] = Field(default_factory=dict)
    """Conditions on metadata columns, all of which must hold: a value, a list (any of), {gte, gt, lte, lt}, {not}."""
    allow_ids: list[str] | None = None
    """Only these passages."""
    exclude_ids: list[str] = Field(default_factory=list)
    """None of these passages."""
    rerank: bool = False
    """Whether a reranker reorders the first hits."""
    reranker: str | None = None
    """Which one, by its name in `GET /v1/models`; null: the server's first."""
    rerank_depth: Count | None = None
    """How many hits are reordered; null: as the server is set, and at least `k`."""
    feedback: FeedbackRequest | None = None
    """Relevance feedback: the query's embedding moves towards what rerankers say of a first search by embedding, and
    the search is made with it; null: without."""
    on_rerank_failure: Literal["error", "keep_order"] = "error"
    """What a reranker that does not answer means: an error, or the first order (and the first embedding), marked in
    the answer."""
    on_shard_failure: Literal["error", "partial"] = "error"
    """What a shard that does not answer means: an error, or the hits of the others, marked in the answer."""
    fields: list[HitField] = Field(default=["title", "text", "highlights", "metadata"])
    """What a hit carries beside `id` and `score`."""

    @model_validator(mode="after")
    def _one_kind_of_query(self) -> SearchRequest:
        if (self.query is None) == (self.queries is None):
            raise ValueError("give exactly one of query and queries")
        return self

    @model_validator(mode="after")
    def _feedback_has_an_embedding_to_move(self) -> SearchRequest:
        if self.feedback is not None and self.mode == "bm25":
            raise ValueError("feedback moves the query's embedding, and mode bm25 has none; use dense or hybrid")
        return self

    @field_validator("query")
    @classmethod
    def _query_not_blank(cls, query: str | None) -> str | None:
        return None if query is None else _not_blank(query)

    @field_validator("queries")
    @classmethod
    def _queries_not_blank(cls, queries: list[str] | None) -> list[str] | None:
        for position, query in enumerate(queries or []):
            if not query.strip():
                raise ValueError(f"number {position} is empty")
        return queries

    @property
    def texts(self) -> list[str]:
        return [self.query] if self.query is not None else self.queries or []


class Highlights(Answer):
    """Where words of the query occur, ascending and without overlap; offsets count Unicode characters."""

    title: list[Span]
    text: list[Span]
    snippet: Span
    """The stretch of `text` with the most of them."""


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


class QueryResult(Answer):
    """The hits of one of many queries."""

    query: str
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
    partial: Literal[True] | None = None
    """True where shards are missing; else it is left out."""
    missing_shards: list[MissingShard] | None = None
    timings_ms: dict[str, float]
    """Wall time of each stage that ran; `total` is the time in the server."""


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _check_input(value: Any) -> Any:
    """One clear message instead of one per arm of the union."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("is empty")
    kinds = {type(item) for item in items}
    if kinds & {list, float}:
        items = value = [[_whole(number) for number in ids] if isinstance(ids, list) else _whole(ids) for ids in items]
        kinds = {type(item) for item in items}
    if isinstance(value, str) or kinds == {str}:
        if any(not item for item in items):
            raise ValueError("holds an empty text")
    elif kinds != {int} and not (kinds == {list} and all(ids and {type(i) for i in ids} == {int} for ids in items)):
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")
    return value


class EmbeddingsRequest(Dialect):
    """OpenAI's request; `input_type` as vLLM and Cohere have it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["first text", "second text"]}]})
    input: Annotated[
        Text | Annotated[list[Text], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)],
        BeforeValidator(_check_input),
    ]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    model: str | None = None
    """A name from `GET /v1/models`; null: the encoder of the live index."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: little-endian float32."""
    dimensions: Count | None = None
    """Keep this many leading dimensions, normalised again."""
    input_type: Literal["query", "document", "search_query", "search_document"] = "document"
    """Which side of the encoder embeds the texts."""
    user: str | None = None

    @property
    def side(self) -> Literal["query", "passage"]:
        return "query" if self.input_type.endswith("query") else "passage"


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


def _document_text(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    if not isinstance(value, str):
        raise ValueError('must be a text or an object {"text": ...}')  # noqa: TRY004 (pydantic catches ValueError)
    return value


_WITH_TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
Document = Annotated[
    str, BeforeValidator(_document_text), WithJsonSchema({"anyOf": [{"type": "string"}, _WITH_TEXT]}, mode="validation")
]


class RerankRequest(Dialect):
    """Cohere's and Jina's request."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "which pet hunts mice", "documents": ["a cat", "a dog"], "top_n": 1}]}
    )
    query: Text
    documents: list[Document] = Field(min_length=1)
    """Texts, or objects with a `text`."""
    model: str | None = None
    top_n: Count | None = None
    """How many of the best documents to return; null: all."""
    return_documents: bool = False
    max_tokens_per_doc: Count | None = None
    """Accepted for the clients that send it; the reranker's own limit holds."""


class TeiRerankRequest(Dialect):
    """Text Embeddings Inference's request."""

    query: Text
    texts: list[str] = Field(min_length=1)
    return_text: bool = False
    raw_scores: bool = False
    """Scores are the reranker's own either way."""
    truncate: bool = True


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
