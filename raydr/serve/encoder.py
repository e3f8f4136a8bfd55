"""The Encoder deployment: query and document embeddings for every index version in use, dynamically batched.

Notable: the encoder comes from the index itself (the method its manifest records), so it cannot be configured to
disagree with the vectors; one whose version stamp differs from the index's all the same (weights replaced on disk) is
refused with a 503, never searched with, and so is a refiner of queries that was trained for another encoder. Encoders
are held by stamp and method: a new index made by the same one loads none.

Texts, pictures, and both together never share a batch: a network runs them at different costs.

    deployments: [{name: Encoder, user_config: {batch_tokens: 2048}}]
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from raydr.artifacts import open_artifact
from raydr.config import Component, Config, validate
from raydr.encoders.factory import EncoderFactory
from raydr.encoders.multimodal import MultimodalReader
from raydr.encoders.text import TextEncoder
from raydr.encoders.tokenization import BoundedTokenizer, load_tokenizer
from raydr.encoders.vocabulary import in_order
from raydr.errors import RaydrError
from raydr.prf import refined
from raydr.protocols import Encoder as EncoderProtocol
from raydr.protocols import QueryRefiner
from raydr.serve import metrics
from raydr.serve.batching import Batcher
from raydr.serve.errors import ApiError
from raydr.serve.modalities import modalities_of, reads_pictures
from raydr.serve.tracing import span
from raydr.serve.versions import IndexRef, VersionCache
from raydr.stages.config import FeedbackSteps
from raydr.stages.feedback import moved
from raydr.stages.prf import build_learned
from raydr.stages.query_encoder import RefinerInfo
from raydr.types import Embeddings, Found, Modality, Passage, Query

logger = logging.getLogger("ray.serve")

_FIRST = Query("", "warm up")

Side: TypeAlias = Literal["query", "passage"]


class EncoderSettings(Config):
    """`user_config` of the Encoder deployment; changed without a restart."""

    batch_tokens: int = Field(default=4096, ge=1)
    """Tokens (estimated from characters) encoded at once; a single request may exceed it."""
    image_tokens: int = Field(default=576, ge=1)
    """Tokens that a picture counts for; 576 are those of a square of 336 pixels in patches of 14."""


class EncoderInfo(NamedTuple):
    """What the searcher wants to know of an encoder."""

    name: str
    dim: int
    refiner: RefinerInfo | None
    """The refiner of queries that was learned for it; None: there is none."""
    modalities: frozenset[Modality]
    """What it reads."""
    reads_instructions: bool
    is_sparse: bool = False
    """Whether its embeddings are weights of words, which can be explained."""


class Content(NamedTuple):
    """Something to embed: words or their token ids, a picture, or both."""

    text: str | Sequence[int]
    image: bytes | None = None


class Encoded(NamedTuple):
    """Embeddings of one request's contents, and how many tokens they have."""

    embeddings: Embeddings
    num_tokens: int


class Tokens:
    """The tokenizer of an encoder's checkpoint, for what HTTP adds: counting, and input given as token ids."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._tokenizer, _ = load_tokenizer(encoder.checkpoint.path, lowercase=encoder.checkpoint.lowercase)
        own = encoder.checkpoint.max_tokens
        limits = {"query": encoder.config.max_query_tokens, "passage": encoder.config.max_passage_tokens}
        self._by_side = {side: BoundedTokenizer(self._tokenizer, limit or own) for side, limit in limits.items()}

    def count(self, contents: Sequence[Query] | Sequence[Passage], side: Side) -> int:
        """Tokens the encoder reads of the texts, special ones included, what it cuts off left out."""
        return sum(len(ids) for ids in self._by_side[side].encode([content.text for content in contents]))

    def text(self, ids: Sequence[int]) -> str:
        """The text behind token ids. Raises `ApiError` 422 for ids the tokenizer does not have."""
        if max(ids) >= self._tokenizer.get_vocab_size():
            message = f"input: token ids are below {self._tokenizer.get_vocab_size()} for this model"
            raise ApiError(422, "invalid_value", message, param="input")
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class _Loaded:
    encoder: EncoderProtocol
    refiner: QueryRefiner | None
    tokens: Tokens | None
    count: Callable[[Sequence[Any], Side], int] | None
    info: EncoderInfo


class _Item(NamedTuple):
    loaded: _Loaded
    contents: Sequence[Query] | Sequence[Passage]
    side: Literal["query", "passage", "prf"]
    request_id: str
    embeddings: np.ndarray | None = None
    """prf: the first ones of these queries."""
    found: Sequence[Found] = ()
    """prf: what these found."""


class Encoder:
    """One replica: holds up to `versions_held` encoders, runs one batch at a time."""

    def __init__(self, versions_held: int, refiner: Component | None = None) -> None:
        # By stamp: two indexes of one encoder share it.
        load = functools.partial(load_encoder, refiner=refiner)
        self._encoders = VersionCache(load, versions_held, key=lambda ref: (ref.encoder_version, ref.method))
        self._settings = EncoderSettings()
        self._batcher: Batcher[_Item, Any] = Batcher(
            _encode_batch, budget=self._settings.batch_tokens, on_batch=_record
        )

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        self._settings = validate(EncoderSettings, user_config, where="user_config of the Encoder deployment")
        self._batcher.budget = self._settings.batch_tokens

    async def prepare(self, ref: IndexRef) -> EncoderInfo:
        """Loads the encoder of an index, and encodes once so that nothing lazy is left for the first request."""
        loaded = await self._encoders.get(ref)
        reads = loaded.info.modalities
        first = [query for query in _first_queries() if query.modality in reads] if reads_pictures(reads) else [_FIRST]
        await self.encode(ref, first, "query", request_id="prepare")
        return loaded.info

    async def encode(
        self, ref: IndexRef, contents: Sequence[Query] | Sequence[Passage], side: Side, *, request_id: str
    ) -> Embeddings:
        """Embeddings by the encoder of `ref`, which has to read what `contents` are made of.

        Raises `ApiError` 503 when there is none with its stamp.
        """
        loaded = await self._encoders.get(ref)
        rows: dict[Modality, list[int]] = {}
        for row, content in enumerate(contents):
            rows.setdefault(content.modality, []).append(row)
        with span("raydr.batch", texts=len(contents)):  # the wait for it included
            if len(rows) == 1:
                return await self._batched(loaded, contents, side, request_id)
            parts = [[contents[row] for row in own] for own in rows.values()]
            found = await asyncio.gather(*(self._batched(loaded, part, side, request_id) for part in parts))
        if loaded.info.is_sparse:
            return in_order([(np.array(own), part) for own, part in zip(rows.values(), found, strict=True)])
        embeddings = np.empty((len(contents), loaded.info.dim), dtype=np.float32)
        for own, part in zip(rows.values(), found, strict=True):
            embeddings[own] = part
        return embeddings

    async def tokens_of(self, ref: IndexRef, dims: Sequence[int]) -> list[str]:
        """What dimensions of sparse embeddings stand for."""
        inner: Any = getattr((loaded := await self._encoders.get(ref)).encoder, "inner", loaded.encoder)
        return await asyncio.to_thread(inner.tokens_of, dims)

    async def _batched(self, loaded: _Loaded, contents: Sequence[Any], side: Side, request_id: str) -> Any:
        item = _Item(loaded, contents, side, request_id)
        cost = sum(self._cost(content) for content in contents)
        return await self._batcher.submit(item, cost=cost, group=(id(loaded), side, contents[0].modality))

    def _cost(self, content: Query | Passage) -> int:
        """Tokens, about."""
        around = content.instruction if isinstance(content, Query) else content.title
        words = 1 + (len(content.text) + len(around)) // 4
        return words if content.image is None else words + self._settings.image_tokens

    async def encode_counted(
        self, ref: IndexRef, contents: Sequence[Content], side: Side, *, instruction: str = "", request_id: str
    ) -> Encoded:
        """The same for contents whose words may be token ids, with the number of tokens read (0 for an encoder without
        a tokenizer). `instruction`: of queries.
        """
        loaded = await self._encoders.get(ref)
        texts = _texts(contents, loaded.tokens)
        images = [content.image for content in contents]
        if side == "query":
            whole: Any = [Query("", text, image, instruction) for text, image in zip(texts, images, strict=True)]
        else:
            whole = [Passage("", text, "", image) for text, image in zip(texts, images, strict=True)]
        embeddings = await self.encode(ref, whole, side, request_id=request_id)
        return Encoded(embeddings, await asyncio.to_thread(loaded.count, whole, side) if loaded.count else 0)

    async def refine(
        self,
        ref: IndexRef,
        queries: Sequence[Query],
        embeddings: Float32[np.ndarray, "query dim"],
        found: Sequence[Found],
        *,
        request_id: str,
    ) -> Float32[np.ndarray, "query dim"]:
        """Better query embeddings from what a first search found, by the learned refiner; with those of other requests
        in one batch.
        """
        loaded = await self._encoders.get(ref)
        if loaded.refiner is None:
            return embeddings
        item = _Item(loaded, queries, "prf", request_id, embeddings, found)
        cost = sum(map(self._cost, queries)) + sum(self._cost(passage) for own in found for passage in own.passages)
        with span("raydr.batch", texts=len(queries)):
            return await self._batcher.submit(item, cost=cost, group=(id(loaded), "prf"))

    async def move(
        self,
        embeddings: Float32[np.ndarray, "query dim"],
        vectors: Sequence[Float32[np.ndarray, "hit dim"]],
        first_scores: Sequence[Sequence[float]],
        steps: FeedbackSteps,
        judged: dict[str, Sequence[Sequence[tuple[int, float]]]],
    ) -> Float32[np.ndarray, "query dim"]:
        """Query embeddings nearer to what rerankers said of their first hits (`raydr.stages.feedback.moved`)."""
        return await self._batcher.alone(functools.partial(moved, **judged), embeddings, vectors, first_scores, steps)


def load_encoder(ref: IndexRef, refiner: Component | None = None) -> _Loaded:
    """The encoder that the index at `ref.path` records, and the refiner of the method `refiner` (None: of the index's).

    Raises `ApiError` 503 when its stamp is not the index's, or the refiner was trained for another one.
    """
    component = Component.model_validate(open_artifact(ref.path, kind="index", later=True).manifest.details["method"])
    encoder = EncoderFactory(component)()
    if encoder.version != ref.encoder_version:
        message = (
            f"the encoder's version is {encoder.version}, but the index was made by {ref.encoder_version}: embed and "
            "index the corpus again, or restore the encoder's files"
        )
        raise ApiError(503, "encoder_mismatch", message)
    try:
        learned = build_learned(refiner or component, encoder)
    except RaydrError as error:
        raise ApiError(503, "encoder_mismatch", f"prf: {error}") from error
    if refiner is not None and learned is None:
        raise ApiError(503, "encoder_mismatch", f"prf.refiner: {refiner.import_path} refines no queries")
    inner = getattr(encoder, "inner", encoder)
    model = getattr(getattr(inner, "config", None), "model", None)
    # A folder's name, the last part of a hub name, or what the method is called.
    name = Path(model).name if isinstance(model, str) else component.import_path.rpartition(":")[2]
    texts = getattr(inner, "texts", inner)  # of an encoder that has its texts read by another one
    tokens = Tokens(texts) if isinstance(texts, TextEncoder) else None
    reader = getattr(inner, "reader", None)
    counter = reader if isinstance(reader, MultimodalReader) else tokens
    reads_instructions = bool(getattr(inner, "reads_instructions", False))
    is_sparse = hasattr(inner, "tokens_of")
    read = (modalities_of(inner), reads_instructions, is_sparse)
    info = EncoderInfo(name, encoder.dim, RefinerInfo.of(learned), *read)
    return _Loaded(encoder, learned, tokens, None if counter is None else counter.count, info)


def _texts(contents: Sequence[Content], tokens: Tokens | None) -> list[str]:
    if tokens is not None:
        return [text if isinstance(text, str) else tokens.text(text) for text, _ in contents]
    plain = [text for text, _ in contents if isinstance(text, str)]
    if len(plain) < len(contents):
        raise ApiError(422, "invalid_value", "input: this model takes texts, not token ids", param="input")
    return plain


def _first_queries() -> list[Query]:
    """One of each kind."""
    from PIL import Image

    grey = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(grey, "PNG")
    return [_FIRST, _FIRST._replace(text="", image=grey.getvalue()), _FIRST._replace(image=grey.getvalue())]


def _encode_batch(items: list[_Item]) -> list[Any]:
    """Runs in the batcher's thread; all items are of one encoder, one side and one modality."""
    encoder, refiner, side = items[0].loaded.encoder, items[0].loaded.refiner, items[0].side
    contents: list[Any] = [content for item in items for content in item.contents]
    if side == "prf" and refiner is not None:
        first = np.concatenate([item.embeddings for item in items if item.embeddings is not None])
        embeddings: Any = refined(refiner, contents, first, [own for item in items for own in item.found])
    else:
        embeddings = encoder.encode_queries(contents) if side == "query" else encoder.encode_passages(contents)
    bounds = np.cumsum([0, *(len(item.contents) for item in items)]).tolist()
    if isinstance(embeddings, np.ndarray):
        embeddings = embeddings.astype(np.float32, copy=False)
    return [embeddings[start:end] for start, end in pairwise(bounds)]


def _record(group: Hashable, items: list[_Item], cost: int, waits_s: list[float], queue_length: int) -> None:
    del group
    num_texts = sum(len(item.contents) for item in items)
    metrics.record_batch(items[0].side, texts=num_texts, tokens=cost, waits_s=waits_s, queue_length=queue_length)
    # One batch serves many requests, so Serve's own request id cannot stand on this line.
    ids = [item.request_id for item in items]
    logger.info("encode", extra={"event": "encode_batch", "request_ids": ids, "texts": num_texts, "tokens": cost})
