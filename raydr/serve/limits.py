"""Checks a request against the operator's limits before any work is done for it.

Notable: a request beyond a limit is refused with the field and the limit named; nothing is cut short in silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raydr.serve.config import Limits
from raydr.serve.errors import ApiError
from raydr.serve.schema import EmbeddingsRequest, Part, RerankRequest, SearchRequest

_ADDRESS = re.compile(r"(?!data:)[A-Za-z][A-Za-z0-9+.-]*:")


def check_search(request: SearchRequest, limits: Limits) -> None:
    """Raises `ApiError` 422 naming the first field beyond its limit."""
    _at_most(request.k, limits.k, "k")
    parts = request.parts
    if request.is_single:
        _at_most(len(parts[0].text), limits.query_chars, "query", "characters")
    else:
        _at_most(len(parts), limits.queries, "images" if request.queries is None else "queries", "entries")
        _texts([part.text for part in parts], limits.query_chars, "queries")
    _at_most(len(request.instruction), limits.query_chars, "instruction", "characters")
    _images(parts, limits, "images")
    _at_most(request.k * len(parts), limits.hits, "k", "hits over all queries")
    feedback_depth = request.feedback.depth if request.feedback is not None else None
    prf_k = request.prf.k if request.prf is not None else None
    depths = {"rerank_depth": request.rerank_depth, "feedback.depth": feedback_depth, "prf.k": prf_k}
    for field, depth in depths.items():
        if depth is not None:
            _at_most(depth, limits.documents, field, "hits")
            _at_most(depth * len(parts), limits.hits, field, "hits over all queries")
    _at_most(len(request.allow_ids or ()), limits.ids, "allow_ids", "entries")
    _at_most(len(request.exclude_ids), limits.ids, "exclude_ids", "entries")
    _at_most(_count_values(request.filters), limits.filter_values, "filters", "values")


def check_embeddings(request: EmbeddingsRequest, limits: Limits) -> None:
    """Raises `ApiError` 422 naming the first field beyond its limit."""
    parts = request.parts
    _at_most(len(parts), limits.inputs, "input", "entries")
    if request.is_single:
        text = parts[0].text
        _at_most(len(text), limits.text_chars, "input", "characters" if isinstance(text, str) else "tokens")
    else:
        _texts([part.text for part in parts], limits.text_chars, "input")
    _at_most(len(request.instruction), limits.query_chars, "instruction", "characters")
    _images(parts, limits, "input")


def check_rerank(request: RerankRequest, limits: Limits, *, documents_field: str = "documents") -> None:
    """Raises `ApiError` 422 naming the first field beyond its limit."""
    _at_most(len(request.query), limits.query_chars, "query", "characters")
    _at_most(len(request.documents), limits.documents, documents_field, "entries")
    _texts(request.documents, limits.text_chars, documents_field)


def check_image_hits(request: SearchRequest, limits: Limits) -> None:
    """The same for a search of an index whose passages have pictures."""
    if "image" in request.fields:
        _at_most(request.k * len(request.parts), limits.image_hits, "k", "hits with pictures (`fields` has image)")


def _at_most(value: int, limit: int, param: str, unit: str = "") -> None:
    if value > limit:
        message = f"{param}: at most {limit} {unit}".rstrip() + f" on this server, got {value}"
        raise ApiError(422, "limit_exceeded", message, param=param)


def _images(parts: Sequence[Part], limits: Limits, field: str) -> None:
    """Of pictures as they were sent; nothing is decoded yet."""
    images = {part.field: part.image for part in parts if part.image is not None}
    _at_most(len(images), limits.images, field, "pictures")
    for param, image in images.items():
        if _ADDRESS.match(image):
            message = f"{param}: addresses are not fetched; send the picture itself, in base64"
            raise ApiError(422, "invalid_image", message, param=param)
        _at_most(len(image) * 3 // 4, limits.largest_image_bytes, param, "bytes (of the picture's file)")


def _texts(texts: Sequence[Any], limit: int, param: str) -> None:
    for position, text in enumerate(texts):
        _at_most(len(text), limit, f"{param}.{position}", "characters" if isinstance(text, str) else "tokens")


def _count_values(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_count_values(inner) for inner in value.values())
    return sum(_count_values(inner) for inner in value) if isinstance(value, list) else 1
