"""The searcher: what the routes ask of an application, answered over its deployments; and swaps of index versions.

Notable: it lives in the Ingress replica, so a search (`stages.py`) costs one hop to the encoder and one to the shards,
which are asked at the same time. A request takes the live version once, at its start, and names it in every call it
makes: what it returns comes from one index and its own encoder, also when the live version changes in between. A new
version goes live only after every replica of every deployment has loaded it; if that fails, the old one stays and the
reason is in the log and in `/ready`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float32

from raydr.errors import RaydrError
from raydr.serve import metrics
from raydr.serve.answers import ModelCard, ModelList, SearchAnswer, Status
from raydr.serve.config import AppArgs
from raydr.serve.encoder import Content, EncoderInfo
from raydr.serve.errors import ApiError
from raydr.serve.fanout import ask, call
from raydr.serve.judges import Judges
from raydr.serve.limits import check_image_hits
from raydr.serve.modalities import check_encoder
from raydr.serve.pictures import PictureReader
from raydr.serve.prf import card, check_served
from raydr.serve.schema import EmbeddingsRequest, Mode, SearchRequest
from raydr.serve.shard import IndexInfo, read_index_info
from raydr.serve.stages import Deployments, Live, Search
from raydr.types import Passage, Query

logger = logging.getLogger("ray.serve")


class Searcher:
    """Answers for one Ingress replica. `encoder`, `shards`, `bm25` and `rerankers` are deployment handles.

    Anything with the same `handle.method.remote(...)` does, so the whole path also runs in one process.
    """

    def __init__(
        self,
        args: AppArgs,
        *,
        encoder: Any,
        shards: Sequence[Any],
        bm25: Any = None,
        rerankers: Mapping[str, Any] | None = None,
    ) -> None:
        self._args = args
        self._encoder = encoder
        self._shards = shards
        self._bm25 = bm25
        self._judges = Judges(rerankers or {})
        self._pictures = PictureReader(args.limits)
        self._live: Live | None = None
        self._status = Status(status="loading")

    # --- versions

    async def use(self, path: str, *, version: str | None = None) -> None:
        """Makes the index at `path` the live one, after everybody has loaded it. Keeps the old one on any error.

        Raises `RaydrError` when there is no such index (or not in this `version`), `ApiError` when a deployment
        cannot load it.
        """
        self._status = self._status.model_copy(update={"preparing": str(path), "error": None})
        try:
            info = await asyncio.to_thread(read_index_info, path)
            if version is not None and info.ref.version != version:
                raise RaydrError(f"{path}: holds version {info.ref.version}, but user_config asks for {version}")
            encoder = await self._prepare(info)
        except BaseException as error:
            self._status = self._status.model_copy(update={"preparing": None, "error": _reason(error)})
            metrics.record_swap("failed")
            raise
        previous, self._live = self._live, Live(info, encoder)
        self._status = Status(status="ready", index_version=info.ref.version)
        if previous is not None and previous.ref != info.ref:
            metrics.record_live_index(previous.ref.version, previous.ref.encoder_version, live=False)
        metrics.record_live_index(info.ref.version, info.ref.encoder_version, live=True)
        metrics.record_swap("done")
        logger.info("index live", extra={"event": "index_live", "index_version": info.ref.version, "index": str(path)})

    async def _prepare(self, info: IndexInfo) -> EncoderInfo:
        """Has all replicas of all deployments load a version."""
        handles = [self._encoder, *self._shards, *([self._bm25] if self._uses_bm25(info) else [])]
        # A call waits for a deployment's first replica; the broadcast then reaches all that there are.
        encoder, *_ = await asyncio.gather(*(call(handle.prepare.remote(info.ref)) for handle in handles))
        await asyncio.gather(*(handle.broadcast("prepare", info.ref).results_async() for handle in handles))
        if encoder.dim != info.dim:
            message = f"the encoder's dimension is {encoder.dim}, the index's {info.dim}"
            raise ApiError(503, "encoder_mismatch", message)
        check_served(self._args.prf, encoder.refiner)
        return encoder

    def _uses_bm25(self, info: IndexInfo) -> bool:
        return self._bm25 is not None and info.has_bm25

    def _require_live(self) -> Live:
        if self._live is None:
            raise ApiError(503, "not_ready", "the index is still loading", retry_after_s=5.0)
        return self._live

    # --- what the routes ask for

    def status(self) -> Status:
        return self._status

    def models(self) -> ModelList:
        cards = []
        if self._live is not None:
            index, encoder = self._live
            modes: list[Mode] = ["dense", "bm25", "hybrid"] if self._uses_bm25(index) else ["dense"]
            cards.append(
                ModelCard(
                    id=self._model_name(self._live),
                    created=index.created,
                    capabilities=["embeddings", "search"],
                    dimensions=encoder.dim,
                    index_version=index.ref.version,
                    num_passages=index.num_passages,
                    num_shards=index.num_shards,
                    modes=modes,
                    metadata_columns=index.metadata_columns,
                    modalities=sorted(encoder.modalities, reverse=True),
                    reads_instructions=encoder.reads_instructions,
                    explains=encoder.is_sparse,
                    has_images=index.has_images,
                    prf=card(encoder.refiner),
                )
            )
        cards += [ModelCard(id=name, created=0, capabilities=["rerank"]) for name in self._judges.names]
        return ModelList(data=cards)

    async def embed(
        self, request: EmbeddingsRequest, *, request_id: str
    ) -> tuple[Float32[np.ndarray, "input dim"], int, str]:
        live = self._require_live()
        parts = request.parts
        if live.encoder.is_sparse:
            message = (
                f"input: this model's embeddings are sparse, {live.encoder.dim} dimensions wide; they are for "
                "/v1/search, where explain=true shows them"
            )
            raise ApiError(422, "invalid_value", message, param="input")
        check_encoder(live.encoder, parts, request.instruction)
        images = await self._pictures.read(parts, live.index.images)
        contents = [Content(part.text, image) for part, image in zip(parts, images, strict=True)]
        how = {"instruction": request.instruction, "request_id": request_id}
        encoded = await ask(self._encoder.encode_counted, live.ref, contents, request.side, **how)
        return encoded.embeddings, encoded.num_tokens, self._model_name(live)

    def reranker_name(self, asked: str | None) -> str:
        return self._judges.name(asked)

    async def rerank(
        self, query: str, documents: Sequence[str], *, model: str | None = None, request_id: str
    ) -> list[tuple[int, float]]:
        passages = [Passage(str(place), text) for place, text in enumerate(documents)]
        name = self.reranker_name(model)
        return await self._judges.rank(name, Query("", query), passages, request_id=request_id)

    async def search(
        self, request: SearchRequest, *, request_id: str, required: Mapping[str, Any] = MappingProxyType({})
    ) -> SearchAnswer:
        """Finds nothing that does not meet `required`, whatever the request says. Raises `ApiError`."""
        live = self._require_live()
        if request.mode != "dense" and not self._uses_bm25(live.index):
            raise ApiError(422, "invalid_value", "mode: this index has no word side, only dense", param="mode")
        if request.mode != "bm25":
            check_encoder(live.encoder, request.parts, request.instruction)
        _check_kind(live.encoder, request)
        if live.index.has_images:
            check_image_hits(request, self._args.limits)
        live.index.check(request.filters)
        _check_required(live.index, required)
        of = Deployments(self._args, self._encoder, self._shards, self._bm25, self._judges, self._pictures)
        search = Search(of, live, request, request_id, required)
        results = await search.run()
        metrics.record_stages(search.timings_ms, request.mode)
        single = request.is_single
        return SearchAnswer(
            request_id=request_id,
            index_version=live.ref.version,
            model=self._model_name(live),
            mode=request.mode,
            k=request.k,
            query=request.query,
            hits=results[0].hits if single else None,
            results=None if single else results,
            reranking=search.reranking,
            feedback=search.feedback,
            prf=search.prf,
            partial=True if search.missing else None,
            missing_shards=search.missing or None,
            timings_ms=search.timings_ms,
        )

    def _model_name(self, live: Live) -> str:
        return self._args.model_name or live.encoder.name


def _check_kind(encoder: EncoderInfo, request: SearchRequest) -> None:
    """What only embeddings of one kind have."""
    if request.explain and not encoder.is_sparse:
        message = "explain: the live index's embeddings are dense, and their dimensions are no words"
        raise ApiError(422, "invalid_value", message, param="explain")
    if request.feedback is not None and encoder.is_sparse:
        message = "feedback: moves dense embeddings, and the live index's are sparse"
        raise ApiError(422, "invalid_value", message, param="feedback")


def _check_required(index: IndexInfo, required: Mapping[str, Any]) -> None:
    try:
        index.check(dict(required))
    except ApiError as error:  # an index without the column would otherwise be open to everybody's keys, or to nobody's
        logger.error("the filters of an API key do not fit the live index: %s", error.message)
        raise ApiError(503, "key_mismatch", "the live index cannot be searched with this key") from None


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, (RaydrError, ApiError)) else f"{type(error).__name__}, see the log"
