"""The HTTP shapes: what `/v1/search`, `/v1/embeddings` and the rerank routes read. `answers.py` has what they write.

Notable: `/v1/search` refuses unknown fields (a typo must not silently change a search); the routes that speak somebody
else's dialect ignore them, because the official clients of OpenAI, Cohere and Jina send fields of their own. Bounds
that the operator sets (`Limits`) are checked in `limits.py`, so this schema is the same on every server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator

Mode = Literal["dense", "bm25", "hybrid"]
HitField = Literal["title", "text", "highlights", "metadata"]


class Shape(BaseModel):
    """Base of what is read: types are not coerced, `NaN` is no number, attribute docstrings document the fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class Dialect(Shape):
    """Base of the requests whose shape others defined."""

    model_config = ConfigDict(extra="ignore")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


QueryText = Annotated[str, Field(min_length=1)]


class FeedbackRequest(Shape):
    """Who judges the first hits, by names in `GET /v1/models`; where both do, the scores come first."""

    scores: str | None = None
    """A reranker whose scores can be compared over a whole list, such as a cross-encoder."""
    order: str | None = None
    """A reranker of which the order counts, such as FIRST."""
    depth: int | None = Field(default=None, ge=2)
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
            ]
        }
    )
    query: QueryText | None = None
    """One query; exactly one of `query` and `queries` is given."""
    queries: list[QueryText] | None = Field(default=None, min_length=1)
    """Many queries, answered in this order."""
    k: int = Field(default=10, ge=1)
    """Hits per query."""
    mode: Mode = "dense"
    """By embedding, by words (BM25), or both fused."""
    filters: dict[str, JsonValue] = Field(default_factory=dict)
    """Conditions on metadata columns, all of which must hold: a value, a list (any of), {gte, gt, lte, lt}, {not}."""
    allow_ids: list[str] | None = None
    """Only these passages."""
    exclude_ids: list[str] = Field(default_factory=list)
    """None of these passages."""
    rerank: bool = False
    """Whether a reranker reorders the first hits."""
    reranker: str | None = None
    """Which one, by its name in `GET /v1/models`; null: the server's first."""
    rerank_depth: int | None = Field(default=None, ge=1)
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


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _check_input(value: Any) -> Any:
    """One clear message instead of one per arm of the union."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("is empty")
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
    input: Annotated[str | list[str] | TokenIds | list[TokenIds], BeforeValidator(_check_input)]
    """A text, a list of texts, a list of token ids, or a list of such lists."""
    model: str | None = None
    """A name from `GET /v1/models`; null: the encoder of the live index."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: little-endian float32."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep this many leading dimensions, normalised again."""
    input_type: Literal["query", "document", "search_query", "search_document"] = "document"
    """Which side of the encoder embeds the texts."""
    user: str | None = None

    @property
    def side(self) -> Literal["query", "passage"]:
        return "query" if self.input_type.endswith("query") else "passage"


def _document_text(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    if not isinstance(value, str):
        raise ValueError('must be a text or an object {"text": ...}')  # noqa: TRY004 (pydantic catches ValueError)
    return value


class RerankRequest(Dialect):
    """Cohere's and Jina's request."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "which pet hunts mice", "documents": ["a cat", "a dog"], "top_n": 1}]}
    )
    query: QueryText
    documents: list[Annotated[str, BeforeValidator(_document_text)]] = Field(min_length=1)
    """Texts, or objects with a `text`."""
    model: str | None = None
    top_n: int | None = Field(default=None, ge=1)
    """How many of the best documents to return; null: all."""
    return_documents: bool = False
    max_tokens_per_doc: int | None = Field(default=None, ge=1)
    """Accepted for the clients that send it; the reranker's own limit holds."""


class TeiRerankRequest(Dialect):
    """Text Embeddings Inference's request."""

    query: QueryText
    texts: list[str] = Field(min_length=1)
    return_text: bool = False
    raw_scores: bool = False
    """Scores are the reranker's own either way."""
    truncate: bool = True
