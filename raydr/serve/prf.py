"""Pseudo-relevance feedback of a search: what its request and the server's settings come to, and what came of it.

Notable: the two refiners without parameters are a sum of vectors, so they run in the searcher; a learned one is a
second encoder and runs where the encoder does. It reads exactly as many hits as it was trained with: another `k` is a
422. A query that found fewer than are read keeps its first embedding, and the answer says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from raydr.errors import ConfigError
from raydr.protocols import QueryRefiner
from raydr.serve.answers import Prf, PrfCard
from raydr.serve.errors import ApiError
from raydr.serve.schema import SearchRequest
from raydr.stages.config import PrfConfig
from raydr.stages.prf import check_k, vector_refiner
from raydr.stages.query_encoder import RefinerInfo
from raydr.types import Found


class Refinement(NamedTuple):
    """How the queries of a search are refined."""

    method: str
    k: int
    """Hits of the first search that are read."""
    reads: Literal["passages", "embeddings"]
    vector: QueryRefiner | None
    """The refiner where it runs in this process; None: the Encoder deployment has it."""


def planned(settings: PrfConfig | None, request: SearchRequest, learned: RefinerInfo | None) -> Refinement | None:
    """What refines the queries of `request`; None: nothing does.

    Raises `ApiError` 422 for a learned refiner that is not here, or one that reads another number of hits.
    """
    if request.mode == "bm25":
        return None
    if request.prf is None:
        config = settings or PrfConfig(method="learned" if learned is not None else "none")
    else:
        default = settings or PrfConfig()
        own_k = default.k if default.method == request.prf.method else None
        config = default.model_copy(update={"method": request.prf.method, "k": request.prf.k or own_k})
    if config.method == "none":
        return None
    if config.method != "learned":
        vector = vector_refiner(config)
        return Refinement(config.method, vector.num_feedback, vector.reads, vector)
    if learned is None:
        message = "prf.method: nothing here has learned to refine queries; use average, rocchio or none"
        raise ApiError(422, "invalid_value", message, param="prf.method")
    try:
        check_k(config.k, learned.num_feedback)
    except ConfigError as error:
        raise ApiError(422, "invalid_value", str(error), param="prf.k") from None
    return Refinement("learned", learned.num_feedback, learned.reads, None)


def check_served(settings: PrfConfig | None, learned: RefinerInfo | None) -> None:
    """Raises `ApiError` 503 where the server's own settings ask for a learned refiner that an index does not have."""
    if settings is None or settings.method != "learned":
        return
    if learned is None:
        message = "prf.method is learned, but neither prf.refiner nor the index's method has learned to refine queries"
        raise ApiError(503, "encoder_mismatch", message)
    try:
        check_k(settings.k, learned.num_feedback)
    except ConfigError as error:
        raise ApiError(503, "encoder_mismatch", str(error)) from None


def outcome(by: Refinement, found: Sequence[Found] | None) -> Prf:
    """What the answer says of it; `found` is None where a shard is missing that has some of it."""
    if found is None:
        reason = "a shard did not answer with the embeddings of its hits"
        return Prf(method=by.method, k=by.k, applied=False, reason=reason)
    short = sum(len(own.hits) < by.k for own in found)
    if not short:
        return Prf(method=by.method, k=by.k)
    reason = f"{short} of {len(found)} queries found fewer than {by.k} passages and were not refined"
    return Prf(method=by.method, k=by.k, applied=short < len(found), reason=reason)


def card(learned: RefinerInfo | None) -> PrfCard:
    """What `/v1/models` says."""
    if learned is None:
        return PrfCard(methods=["average", "rocchio", "none"])
    return PrfCard(
        methods=["learned", "average", "rocchio", "none"],
        learned_k=learned.num_feedback,
        learned_version=learned.version,
    )
