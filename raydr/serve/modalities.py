"""What the models of an application read, and what a caller is told who sends them something else.

Notable: a model says it itself, in its attribute `modalities`; one that does not say reads words alone. An encoder that
reads instructions says so in `reads_instructions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydr.serve.errors import ApiError
from raydr.serve.schema import Part
from raydr.types import Modality, Query

if TYPE_CHECKING:
    from raydr.serve.encoder import EncoderInfo

TEXT_ONLY: frozenset[Modality] = frozenset({"text"})

_WORDS: dict[Modality, str] = {"text": "words", "image": "pictures", "image,text": "a picture and words together"}


def modalities_of(model: Any) -> frozenset[Modality]:
    """What an encoder or a reranker reads."""
    return frozenset(getattr(model, "modalities", TEXT_ONLY))


def reads_pictures(modalities: frozenset[Modality]) -> bool:
    return modalities != TEXT_ONLY


def check_encoder(encoder: EncoderInfo, parts: Sequence[Part], instruction: str) -> None:
    """Raises `ApiError` 422 naming the first of `parts` that the encoder does not read, or the instruction."""
    for part in parts:
        if part.modality not in encoder.modalities:
            reads = " or ".join(_WORDS[known] for known in sorted(encoder.modalities, key=list(_WORDS).index))
            message = f"{part.field}: the encoder of this index reads {reads}, not {_WORDS[part.modality]}"
            raise ApiError(422, "invalid_value", message, param=part.field)
    if instruction and not encoder.reads_instructions:
        message = "instruction: the encoder of this index reads no instructions; leave it out"
        raise ApiError(422, "invalid_value", message, param="instruction")


def check_reranker(name: str, modalities: frozenset[Modality], queries: Sequence[Query]) -> None:
    """Raises `ApiError` 422 where a query is a picture alone and the reranker reads none."""
    if "image" not in modalities and any(query.modality == "image" for query in queries):
        message = f"the reranker {name!r} reads no pictures; give the query words too, or search without it"
        raise ApiError(422, "invalid_value", message, param="image")
