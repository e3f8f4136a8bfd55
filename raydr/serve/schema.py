"""The HTTP shapes: what `/v1/search`, `/v1/embeddings` and the rerank routes read. `answers.py` has what they write.

Notable: `/v1/search` refuses unknown fields (a typo must not silently change a search); the routes that speak somebody
else's dialect ignore them, because the official clients of OpenAI, Cohere and Jina send fields of their own. Bounds
that the operator sets (`Limits`) are checked in `limits.py`, so this schema is the same on every server. What else is
refused stands in the OpenAPI document as well, also what validators written in Python refuse.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

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
from raydr.stages.config import PrfMethod
from raydr.types import Modality, modality

Mode = Literal["dense", "bm25", "hybrid"]
HitField = Literal["title", "text", "highlights", "metadata", "image"]

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mPQ6w4HAAH7ARFK28dFAAAAAElFTkSuQmCC"
"""A PNG of one green pixel, for the examples."""


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


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
"""An integer as JSON Schema has it: 5.0 is one. The bound is inside, or it would be missing in the document."""
Text = Annotated[str, Field(min_length=1)]
Image = Annotated[str, Field(min_length=1)]
"""A picture's file (PNG, JPEG, WebP, GIF or BMP) in base64, or as `data:image/...;base64,...`."""
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


def _given(field: str, kind: str) -> dict[str, Any]:
    """JSON Schema: the field is there and not null."""
    return {"required": [field], "properties": {field: {"type": kind}}}


def _either(kind: str, one: str, other: str, absent: tuple[str, str]) -> dict[str, Any]:
    """JSON Schema: at least one of two fields is there and not null, and the fields `absent` are not."""
    given = [_given(field, kind) for field in (one, other)]
    return {"anyOf": given, "properties": {field: {"type": "null"} for field in absent}}


def _where(properties: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema: where these properties are there and are so, `then` holds as well."""
    return {"if": {"required": list(properties), "properties": properties}, "then": then}


_STRINGS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
_EACH_HAS_WORDS: dict[str, Any] = {
    "anyOf": [_given("query", "string"), {"required": ["queries"], "properties": {"queries": _STRINGS}}]
}
_NONE_IS_NULL: dict[str, Any] = {
    field: {"properties": {field: {"anyOf": [_STRINGS, {"type": "null"}]}}} for field in ("queries", "images")
}
_NOT_BY_WORDS: dict[str, Any] = {
    "image": {"type": "null"},
    "feedback": {"type": "null"},
    "prf": {"type": "null"},
    "explain": {"const": False},
    "images": {"items": {"type": "null"}},
    "instruction": {"maxLength": 0},
}
"""What mode bm25 has no use for."""


class Part(NamedTuple):
    """One query, or one thing to embed, as it was sent."""

    field: str
    """Where its picture stands in the request, or its words where it has none; for messages."""
    text: str | list[int]
    """Words, or their token ids; empty where there is only a picture."""
    image: str | None

    @property
    def modality(self) -> Modality:
        """By what was sent: the picture has not been looked at."""
        return modality(self.text if isinstance(self.text, str) else "token ids", has_image=self.image is not None)


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


class PrfRequest(Shape):
    """How the query is refined by what a first search found; nobody judges it."""

    method: PrfMethod = "learned"
    """`learned`: by a trained encoder that reads the query and its first k hits; `average`: the mean of the query's
    embedding and theirs; `rocchio`: the two weighed, as the server is set; `none`: not at all."""
    k: Count | None = None
    """How many hits are read; null: as the server is set. A learned refiner reads as many as it was trained with."""


class SearchRequest(Shape):
    """One or many queries over the index."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "join two data frames on a column", "k": 5, "mode": "dense"},
                {"queries": ["read a csv file", "sort by index"], "filters": {"package": ["pandas", "numpy"]}},
                {"query": "join two data frames on a column", "prf": {"method": "rocchio", "k": 5}},
                {"query": "the same in red", "image": _PIXEL, "instruction": "Find a picture.", "fields": ["image"]},
            ],
            "oneOf": [
                _either("string", "query", "image", ("queries", "images")),
                _either("array", "queries", "images", ("query", "image")),
            ],
            "allOf": [
                _where({"mode": {"enum": ["bm25", "hybrid"]}}, _EACH_HAS_WORDS),
                _where({"mode": {"const": "bm25"}}, {"properties": _NOT_BY_WORDS}),
                {"anyOf": [_given("images", "array"), _NONE_IS_NULL["queries"]]},
                {"anyOf": [_given("queries", "array"), _NONE_IS_NULL["images"]]},
            ],
        }
    )
    query: QueryText | None = None
    """One query; `query`, `image` or both are given, or else `queries`, `images` or both."""
    queries: list[QueryText | None] | None = Field(default=None, min_length=1)
    """Many queries, answered in this order; null where there is only a picture."""
    image: Image | None = None
    """The query's picture, beside its words or alone: a PNG, JPEG, WebP, GIF or BMP file in base64, or as
    `data:image/...;base64,...`. Addresses are not fetched."""
    images: list[Image | None] | None = Field(default=None, min_length=1)
    """The pictures of many queries, one each; null where a query has none."""
    instruction: str = ""
    """What is looked for, such as "Find a picture that the text describes.", for encoders that read instructions."""
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
    prf: PrfRequest | None = None
    """Pseudo-relevance feedback: the query's embedding is made anew from what a first search found, and the search is
    made again with it, in the same shards; null: as the server is set."""
    on_rerank_failure: Literal["error", "keep_order"] = "error"
    """What a reranker, or a learned refiner of `prf`, that does not answer means: an error, or the first order (and the
    first embedding), marked in the answer."""
    on_shard_failure: Literal["error", "partial"] = "error"
    """What a shard that does not answer means: an error, or the hits of the others, marked in the answer."""
    explain: bool = False
    """Whether each hit says which words made its score, of an index of sparse embeddings (`explains` in `GET
    /v1/models`)."""
    fields: list[HitField] = Field(default=["title", "text", "highlights", "metadata"])
    """What a hit carries beside `id` and `score`."""

    @model_validator(mode="after")
    def _one_kind_of_query(self) -> SearchRequest:
        one = self.query is not None or self.image is not None
        many = self.queries is not None or self.images is not None
        if one == many:
            raise ValueError("give exactly one of query and queries, or their pictures: image, images")
        if self.queries is not None and self.images is not None and len(self.queries) != len(self.images):
            counts = f"{len(self.images)} images for {len(self.queries)} queries"
            raise ValueError(f"{counts}; give each query one, or null in its place")
        for place, part in enumerate(self.parts):
            if not part.text and part.image is None:
                raise ValueError(f"query number {place} has neither words nor a picture")
        return self

    @model_validator(mode="after")
    def _words_where_words_are_searched(self) -> SearchRequest:
        if self.mode != "dense" and not all(part.text for part in self.parts):
            message = f"mode {self.mode} searches by words, and a picture alone has none; use dense, or add words"
            raise ValueError(message)
        has_pictures = any(part.image is not None for part in self.parts)
        if self.mode == "bm25" and (has_pictures or self.instruction):
            what = "picture" if has_pictures else "instruction"
            raise ValueError(f"mode bm25 searches by the query's words and reads no {what}; use dense or hybrid")
        return self

    @model_validator(mode="after")
    def _feedback_has_an_embedding_to_move(self) -> SearchRequest:
        if self.feedback is not None and self.mode == "bm25":
            raise ValueError("feedback moves the query's embedding, and mode bm25 has none; use dense or hybrid")
        if self.prf is not None and self.mode == "bm25":
            raise ValueError("prf refines the query's embedding, and mode bm25 has none; use dense or hybrid")
        return self

    @model_validator(mode="after")
    def _explains_embeddings(self) -> SearchRequest:
        if self.explain and self.mode == "bm25":
            raise ValueError("explain says which words of two embeddings match, and mode bm25 has none; use dense")
        return self

    @field_validator("query")
    @classmethod
    def _query_not_blank(cls, query: str | None) -> str | None:
        return None if query is None else _not_blank(query)

    @field_validator("queries")
    @classmethod
    def _queries_not_blank(cls, queries: list[str | None] | None) -> list[str | None] | None:
        for position, query in enumerate(queries or []):
            if query is not None and not query.strip():
                raise ValueError(f"number {position} is empty")
        return queries

    @property
    def is_single(self) -> bool:
        return self.queries is None and self.images is None

    @property
    def parts(self) -> list[Part]:
        """Its queries."""
        if self.is_single:
            return [Part("query" if self.image is None else "image", self.query or "", self.image)]
        number = len(self.queries or self.images or ())
        pairs = zip(self.queries or [None] * number, self.images or [None] * number, strict=True)
        return [
            Part(f"queries.{place}" if image is None else f"images.{place}", query or "", image)
            for place, (query, image) in enumerate(pairs)
        ]


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingInput(Dialect):
    """Jina's form of something to embed: words, a picture, or (raydr's own) both as one."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [_given("text", "string"), _given("image", "string")]})
    text: Annotated[str, Field(min_length=1)] | None = None
    image: Image | None = None
    """As in a search."""


def _check_input(value: Any) -> Any:
    """One clear message instead of one per arm of the union."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("is empty")
    kinds = {type(item) for item in items}
    if kinds & {list, float}:
        items = value = [[_whole(number) for number in ids] if isinstance(ids, list) else _whole(ids) for ids in items]
        kinds = {type(item) for item in items}
    if kinds <= {str, dict}:
        if any(item == "" for item in items):
            raise ValueError("holds an empty text")
        inputs = [EmbeddingInput(**_text_or_image(item)) if isinstance(item, dict) else item for item in items]
        return inputs if isinstance(value, list) else inputs[0]
    if kinds != {int} and not (kinds == {list} and all(ids and {type(i) for i in ids} == {int} for ids in items)):
        raise ValueError(
            "must be a text, a list of texts, a list of token ids, a list of lists of token ids, or a list of objects "
            '{"text": ...}, {"image": ...} or both'
        )
    return value


def _text_or_image(value: dict[str, Any]) -> dict[str, str]:
    given = {name: value[name] for name in ("text", "image") if value.get(name) is not None}
    if not given or not all(isinstance(part, str) and part for part in given.values()):
        raise ValueError("an object in it has a text, an image (in base64), or both, none of them empty")
    return given


class EmbeddingsRequest(Dialect):
    """OpenAI's request; `input_type` as vLLM and Cohere have it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": ["first text", "second text"]},
                {"input": [{"image": _PIXEL}, {"text": "green"}, {"image": _PIXEL, "text": "the same in red"}]},
            ],
            "allOf": [
                _where(
                    {"instruction": {"type": "string", "minLength": 1}},
                    {"required": ["input_type"], "properties": {"input_type": {"enum": ["query", "search_query"]}}},
                )
            ],
        }
    )
    input: Annotated[
        Text
        | EmbeddingInput
        | Annotated[list[Text | EmbeddingInput], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)],
        BeforeValidator(_check_input),
    ]
    """A text, a list of texts, a list of token ids, or a list of such lists. In the place of a text, an object with a
    `text`, an `image` (in base64, as in a search), or both, which are embedded as one."""
    model: str | None = None
    """A name from `GET /v1/models`; null: the encoder of the live index."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: little-endian float32."""
    dimensions: Count | None = None
    """Keep this many leading dimensions, normalised again."""
    input_type: Literal["query", "document", "search_query", "search_document"] = "document"
    """Which side of the encoder embeds the texts."""
    instruction: str = ""
    """What the queries look for, for encoders that read instructions; only with `input_type` query."""
    user: str | None = None

    @model_validator(mode="after")
    def _instruction_of_queries(self) -> EmbeddingsRequest:
        if self.instruction and self.side != "query":
            raise ValueError("an instruction belongs to queries; send input_type: query with it")
        return self

    @property
    def side(self) -> Literal["query", "passage"]:
        return "query" if self.input_type.endswith("query") else "passage"

    @property
    def is_single(self) -> bool:
        return not isinstance(self.input, list) or isinstance(self.input[0], int)

    @property
    def parts(self) -> list[Part]:
        """What is embedded, one by one."""
        items: list[Any] = [self.input] if self.is_single else list(self.input)
        parts = []
        for place, item in enumerate(items):
            field = "input" if self.is_single else f"input.{place}"
            text, image = (item.text or "", item.image) if isinstance(item, EmbeddingInput) else (item, None)
            parts.append(Part(field if image is None else f"{field}.image", text, image))
        return parts


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
