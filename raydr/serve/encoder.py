"""The Encoder deployment: query and document embeddings for every index version in use, dynamically batched.

Notable: the encoder comes from the index itself (the method its manifest records), so it cannot be configured to
disagree with the vectors; one whose version stamp differs from the index's all the same (weights replaced on disk) is
refused with a 503, never searched with. Encoders are held by stamp: a new index made by the same encoder loads none.

    deployments: [{name: Encoder, user_config: {batch_tokens: 2048}}]
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from raydr.artifacts import open_artifact
from raydr.config import Component, Config, validate
from raydr.encoders.factory import EncoderFactory
from raydr.protocols import Encoder as EncoderProtocol
from raydr.protocols import QueryRefiner
from raydr.serve import metrics
from raydr.serve.batching import Batcher
from raydr.serve.errors import ApiError
from raydr.serve.versions import IndexRef, VersionCache
from raydr.types import Hit, Passage, Query

logger = logging.getLogger("ray.serve")

Side: TypeAlias = Literal["query", "passage"]
Feedback: TypeAlias = Sequence[Sequence[tuple[Hit, Passage]]]


class EncoderSettings(Config):
    """`user_config` of the Encoder deployment; changed without a restart."""

    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens (estimated from characters) encoded at once; a single request may exceed it."""


class EncoderInfo(NamedTuple):
    """What the searcher wants to know of an encoder."""

    name: str
    dim: int
    num_feedback: int
    """Passages per query that the method's refiner wants to see; 0: the method has none."""


class Encoded(NamedTuple):
    """Embeddings of one request's texts, and how many tokens they have."""

    embeddings: Float32[np.ndarray, "text dim"]
    num_tokens: int


@dataclass(frozen=True)
class _Loaded:
    encoder: EncoderProtocol
    refiner: QueryRefiner | None
    info: EncoderInfo


class _Item(NamedTuple):
    loaded: _Loaded
    texts: Sequence[str]
    side: Side
    request_id: str


class Encoder:
    """One replica: holds up to `versions_held` encoders, runs one batch at a time."""

    def __init__(self, versions_held: int) -> None:
        # By stamp: two indexes of one encoder share it.
        self._encoders = VersionCache(load_encoder, versions_held, key=lambda ref: ref.encoder_version)
        self._batcher: Batcher[_Item, Encoded] = Batcher(
            _encode_batch, budget=EncoderSettings().batch_tokens, on_batch=_record
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        settings = validate(EncoderSettings, user_config, where="user_config of the Encoder deployment")
        self._batcher.budget = settings.batch_tokens

    async def prepare(self, ref: IndexRef) -> EncoderInfo:
        """Loads the encoder of an index, and encodes once so that nothing lazy is left for the first request."""
        loaded = await self._encoders.get(ref)
        await self.encode(ref, ["warm up"], "query", request_id="prepare")
        return loaded.info

    async def encode(
        self, ref: IndexRef, texts: Sequence[str] | Sequence[Sequence[int]], side: Side, *, request_id: str
    ) -> Encoded:
        """Embeddings by the encoder of `ref`. Raises `ApiError` 503 when there is none with its stamp."""
        loaded = await self._encoders.get(ref)
        plain = [text if isinstance(text, str) else decode_tokens(loaded.encoder, text) for text in texts]
        cost = sum(1 + len(text) // 4 for text in plain)
        item = _Item(loaded, plain, side, request_id)
        return await self._batcher.submit(item, cost=cost, group=(id(loaded), side))

    async def refine(
        self, ref: IndexRef, texts: Sequence[str], embeddings: Float32[np.ndarray, "query dim"], feedback: Feedback
    ) -> Float32[np.ndarray, "query dim"]:
        """Better query embeddings from the passages of a first search, by the method's refiner."""
        loaded = await self._encoders.get(ref)
        if loaded.refiner is None:
            return embeddings
        queries = [Query(str(number), text) for number, text in enumerate(texts)]
        return await self._batcher.alone(loaded.refiner.refine, queries, embeddings, feedback)


def load_encoder(ref: IndexRef) -> _Loaded:
    """The encoder that the index at `ref.path` records. Raises `ApiError` 503 when its stamp is not the index's."""
    component = Component.model_validate(open_artifact(ref.path, kind="index").manifest.details["method"])
    encoder = EncoderFactory(component)()
    if encoder.version != ref.encoder_version:
        message = (
            f"the encoder's version is {encoder.version}, but the index was made by {ref.encoder_version}: embed and "
            "index the corpus again, or restore the encoder's files"
        )
        raise ApiError(503, "encoder_mismatch", message)
    build_refiner = getattr(component.build(), "build_refiner", None)
    refiner = build_refiner(encoder) if build_refiner is not None else None
    num_feedback = refiner.num_feedback if refiner is not None else 0
    return _Loaded(encoder, refiner, EncoderInfo(model_name(encoder, component), encoder.dim, num_feedback))


def _encode_batch(items: list[_Item]) -> list[Encoded]:
    """Runs in the batcher's thread; all items are of one encoder and one side."""
    encoder, side = items[0].loaded.encoder, items[0].side
    texts = [text for item in items for text in item.texts]
    if side == "query":
        embeddings = encoder.encode_queries([Query("", text) for text in texts])
    else:
        embeddings = encoder.encode_passages([Passage("", text) for text in texts])
    ends = np.cumsum([len(item.texts) for item in items])
    tokens = [count_tokens(encoder, item.texts) for item in items]
    parts = np.split(np.asarray(embeddings, dtype=np.float32), ends[:-1])
    return [Encoded(part, count) for part, count in zip(parts, tokens, strict=True)]


def _record(group: Hashable, items: list[_Item], cost: int, waits_s: list[float], queue_length: int) -> None:
    del group
    num_texts = sum(len(item.texts) for item in items)
    metrics.record_batch(items[0].side, texts=num_texts, tokens=cost, waits_s=waits_s, queue_length=queue_length)
    # One batch serves many requests, so Serve's own request id cannot stand on this line.
    ids = [item.request_id for item in items]
    logger.info("encode", extra={"event": "encode_batch", "request_ids": ids, "texts": num_texts, "tokens": cost})
