"""Checks a request against the operator's limits before any work is done for it.

Notable: a request beyond a limit is refused with the field and the limit named; nothing is cut short in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raydr.serve.config import Limits
from raydr.serve.errors import ApiError
from raydr.serve.schema import EmbeddingsRequest, RerankRequest, SearchRequest


def check_search(request: SearchRequest, limits: Limits) -> None:
    """Raises `ApiError` 422 naming the first field beyond its limit."""
    _at_most(request.k, limits.k, "k")
    if request.queries is not None:
        _at_most(len(request.queries), limits.queries, "queries", "entries")
        _texts(request.queries, limits.query_chars, "queries")
    else:
        _at_most(len(request.texts[0]), limits.query_chars, "query", "characters")
    _at_most(request.k * len(request.texts), limits.hits, "k", "hits over all queries")
    feedback_depth = request.feedback.depth if request.feedback is not None else None
    for field, depth in {"rerank_depth": request.rerank_depth, "feedback.depth": feedback_depth}.items():
        if depth is not None:
            _at_most(depth, limits.documents, field, "hits")
            _at_most(depth * len(request.texts), limits.hits, field, "hits over all queries")
    _at_most(len(request.allow_ids or ()), limits.ids, "allow_ids", "entries")
    _at_most(len(request.exclude_ids), limits.ids, "exclude_ids", "entries")
    _at_most(_count_values(request.filters), limits.filter_values, "filters", "values")


def check_embeddings(request: EmbeddingsRequest, limits: Limits) -> None:
    """Raises `ApiError` 422 naming the first field beyond its limit."""
    inputs: Any = request.input
    if isinstance(inputs, str):
        _at_most(len(inputs), limits.text_chars, "input", "characters")
    elif isinstance(inputs[0], int):
        _at_most(len(inputs), limits.text_chars, "input", "tokens")
    else:
        _at_most(len(inputs), limits.inputs, "input", "entries")
        _texts(inputs, limits.text_chars, "input")


def check_rerank(request: RerankRequest, limits: Limits, *, documents_field: str = "documents") -> None:
    """Raises `ApiError` 422 naming the first field beyond its limit."""
    _at_most(len(request.query), limits.query_chars, "query", "characters")
    _at_most(len(request.documents), limits.documents, documents_field, "entries")
    _texts(request.documents, limits.text_chars, documents_field)


def _at_most(value: int, limit: int, param: str, unit: str = "") -> None:
    if value > limit:
        message = f"{param}: at most {limit} {unit}".rstrip() + f" on this server, got {value}"
        raise ApiError(422, "limit_exceeded", message, param=param)


def _texts(texts: Sequence[Any], limit: int, param: str) -> None:
    for position, text in enumerate(texts):
        _at_most(len(text), limit, f"{param}.{position}", "characters" if isinstance(text, str) else "tokens")


def _count_values(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_count_values(inner) for inner in value.values())
    return sum(_count_values(inner) for inner in value) if isinstance(value, list) else 1
