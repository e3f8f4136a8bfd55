"""The searcher: fans a query out to the deployments, merges, fuses, fetches the passages; and swaps index versions.

Notable: it lives in the Ingress replica, so a search costs one hop to the encoder and one to the shards (asked at the
same time), and the passages of a short list ride along with the shards' answers. A request takes the live version once,
at its start, and names it in every call it makes: what it returns comes from one index and its own encoder, also when
the live version changes in between. A new version goes live only after every replica of every deployment has loaded
it; if that fails, the old one stays and the reason is in the log and in `/ready`. A search goes on without the shards
that do not answer where its request says so, and says what it lacks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from raydr.errors import RaydrError
from raydr.index.fusion import fuse
from raydr.index.topk import merge
from raydr.index.topk import order as ordered
from raydr.protocols import TopK
from raydr.serve import metrics
from raydr.serve.answers import (
    Feedback,
    MissingShard,
    ModelCard,
    ModelList,
    QueryResult,
    Reranking,
    SearchAnswer,
    SearchHit,
    Status,
)
from raydr.serve.config import AppArgs
from raydr.serve.encoder import EncoderInfo
from raydr.serve.errors import ApiError
from raydr.serve.fanout import Fanout, ask, ask_within, call
from raydr.serve.highlight import highlight
from raydr.serve.schema import Mode, SearchRequest
from raydr.serve.shard import IndexInfo, Ranked, Selection, read_index_info
from raydr.serve.tracing import span
from raydr.serve.versions import IndexRef
from raydr.types import PASSAGE_ID, POSITION, TEXT, TITLE, Hit, Passage

logger = logging.getLogger("ray.serve")

INLINE_HITS = 64
"""Up to this many hits in a response the shards send the passages with their hits and save a second hop."""


class Live(NamedTuple):
    """The version being served."""

    index: IndexInfo
    encoder: EncoderInfo

    @property
    def ref(self) -> IndexRef:
        return self.index.ref


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
        self._rerankers = dict(rerankers or {})
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
                )
            )
        cards += [ModelCard(id=name, created=0, capabilities=["rerank"]) for name in self._rerankers]
        return ModelList(data=cards)

    async def embed(
        self, texts: Sequence[str] | Sequence[Sequence[int]], side: str, *, request_id: str
    ) -> tuple[Float32[np.ndarray, "text dim"], int, str]:
        live = self._require_live()
        encoded = await ask(self._encoder.encode_counted, live.ref, texts, side, request_id=request_id)
        return encoded.embeddings, encoded.num_tokens, self._model_name(live)

    def reranker_name(self, asked: str | None, *, param: str = "model") -> str:
        """The reranker that a request means: the one it names (in the field `param`), or the first. Raises `ApiError`
        501 without any, 404 for a name that is not there.
        """
        if not self._rerankers:
            message = "no reranker is configured on this server; set `rerankers` in the application's args"
            raise ApiError(501, "reranker_not_configured", message)
        name = asked if asked is not None else next(iter(self._rerankers))
        if name not in self._rerankers:
            message = f"no reranker {name!r} here; there is: {', '.join(self._rerankers)}"
            raise ApiError(404, "model_not_found", message, param=param)
        return name

    async def rerank(
        self, query: str, documents: Sequence[str], *, model: str | None = None, request_id: str
    ) -> list[tuple[int, float]]:
        reranker = self._rerankers[self.reranker_name(model)]
        passages = [Passage(str(place), text) for place, text in enumerate(documents)]
        return await call(reranker.rerank.remote(query, passages, request_id=request_id))

    async def search(
        self, request: SearchRequest, *, request_id: str, required: Mapping[str, Any] = MappingProxyType({})
    ) -> SearchAnswer:
        """Finds nothing that does not meet `required`, whatever the request says. Raises `ApiError`."""
        live = self._require_live()
        if request.mode != "dense" and not self._uses_bm25(live.index):
            raise ApiError(422, "invalid_value", "mode: this index has no word side, only dense", param="mode")
        live.index.check(request.filters)
        _check_required(live.index, required)
        search = _Search(self, live, request, request_id, required)
        results = await search.run()
        metrics.record_stages(search.timings_ms, request.mode)
        single = request.query is not None
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
            partial=True if search.missing else None,
            missing_shards=search.missing or None,
            timings_ms=search.timings_ms,
        )

    def _model_name(self, live: Live) -> str:
        return self._args.model_name or live.encoder.name


class _Found(NamedTuple):
    """A hit on its way: its row, its score, and its first score where a reranker gave it another."""

    row: int
    score: float
    retrieval_score: float | None = None


def _found(top: TopK) -> list[list[_Found]]:
    return [
        [_Found(row, score) for row, score in zip(rows, scores, strict=True)]
        for rows, scores in zip(top.rows.tolist(), top.scores.tolist(), strict=True)
    ]


class _Search:
    """One request on its way through the stages."""

    def __init__(
        self, searcher: Searcher, live: Live, request: SearchRequest, request_id: str, required: Mapping[str, Any]
    ) -> None:
        self._of = searcher
        self._live = live
        self._request = request
        self._request_id = request_id
        self._selection = Selection.of(request, required)
        self._limit_s = searcher._args.limits.answering_s
        self._fanout = Fanout(searcher._shards, live.index, limit_s=self._limit_s, on_failure=request.on_shard_failure)
        self.missing: list[MissingShard] = []
        self._ids: dict[int, str] = {}
        self._passages: dict[int, dict[str, Any]] = {}
        self.reranking: Reranking | None = None
        if request.rerank:
            name = searcher.reranker_name(request.reranker, param="reranker")
            self.reranking = Reranking(model=name, depth=self._depth(request))
        self.feedback: Feedback | None = None
        if (asked := request.feedback) is not None:
            for field in ("scores", "order"):
                if (name := getattr(asked, field)) is not None:
                    searcher.reranker_name(name, param=f"feedback.{field}")
            depth = asked.depth or searcher._args.feedback.depth
            self.feedback = Feedback(scores=asked.scores, order=asked.order, depth=depth)
        self.timings_ms: dict[str, float] = {}
        self._judged_until: float | None = None

    async def run(self) -> list[QueryResult]:
        texts = self._request.texts
        fields: set[str] = set(self._request.fields)
        started = time.perf_counter()
        top = await self._rank(texts)
        if self.reranking is not None:
            lists = await self._reranked(texts, top, self.reranking)
        else:
            lists = _found(top)
        lists = [[found for found in line if found.row >= 0][: self._request.k] for line in lists]
        if fields:
            await self._fetch(np.array([found.row for line in lists for found in line], dtype=np.int64))
            lists = [[found for found in line if found.row in self._passages] for line in lists]
        self.missing = self._fanout.missing()
        results = [
            QueryResult(query=text, hits=[self._hit(text, found, fields) for found in line])
            for text, line in zip(texts, lists, strict=True)
        ]
        self.timings_ms["total"] = _ms_since(started)
        return results

    async def _rank(self, texts: Sequence[str]) -> TopK:
        k = max(self._request.k, self.reranking.depth if self.reranking is not None else 0)
        if self._request.mode == "dense":
            return await self._dense(texts, k)
        if self._request.mode == "bm25":
            return await self._words(texts, k)
        candidates = max(k, self._of._args.candidates)
        dense, words = await asyncio.gather(self._dense(texts, candidates), self._words(texts, candidates))
        if self._fanout.is_partial:
            words = ordered(TopK(words.scores, self._fanout.present(words.rows)), candidates, self._ids_of)
        return fuse([dense, words], self._of._args.fusion, k, self._ids_of)

    async def _dense(self, texts: Sequence[str], k: int) -> TopK:
        with self._stage("encode"):
            encode = self._of._encoder.encode
            embeddings = await ask(encode, self._live.ref, texts, "query", request_id=self._request_id)
        if self._live.encoder.num_feedback:
            with self._stage("refine"):
                embeddings = await self._refined(texts, embeddings)
        if self.feedback is not None:
            with self._stage("feedback"):
                embeddings = await self._moved(texts, embeddings, self.feedback)
        with self._stage("search"):
            return await self._shards(embeddings, k, len(texts))

    async def _refined(self, texts: Sequence[str], embeddings: np.ndarray) -> np.ndarray:
        """Pseudo-relevance feedback: a first search, whose passages improve the embeddings."""
        first = await self._shards(embeddings, self._live.encoder.num_feedback, len(texts))
        await self._fetch(first.rows)
        known = self._passages
        feedback = [
            [(Hit(self._ids[row], score), self._passage(row)) for row, score in zip(rows, scores) if row in known]
            for rows, scores in zip(first.rows.tolist(), first.scores.tolist(), strict=True)
        ]
        return await ask(self._of._encoder.refine, self._live.ref, texts, embeddings, feedback)

    async def _moved(self, texts: Sequence[str], embeddings: np.ndarray, feedback: Feedback) -> np.ndarray:
        """Relevance feedback: what rerankers say of a first search's hits moves the embeddings."""
        first = await self._shards(embeddings, feedback.depth, len(texts))
        await self._fetch(first.rows)
        present = np.isin(first.rows, list(self._passages))
        rows = [line[own] for line, own in zip(first.rows, present, strict=True)]
        names = {"scores": feedback.scores, "order": feedback.order}
        judges = {side: name for side, name in names.items() if name is not None}
        try:
            opinions = await asyncio.gather(*(self._judged(name, texts, rows) for name in judges.values()))
        except ApiError as failure:
            if self._request.on_rerank_failure == "error":
                raise
            self.feedback = feedback.model_copy(update={"applied": False, "reason": failure.message})
            return embeddings
        vectors = await self._vectors(rows)
        if vectors is None:
            reason = "a shard did not answer with the embeddings of its hits"
            self.feedback = feedback.model_copy(update={"applied": False, "reason": reason})
            return embeddings
        scores = [line[own].tolist() for line, own in zip(first.scores, present, strict=True)]
        judged = dict(zip(judges, opinions, strict=True))
        return await ask(self._of._encoder.move, embeddings, vectors, scores, self._of._args.feedback, judged)

    async def _vectors(self, rows: Sequence[Int64[np.ndarray, " hit"]]) -> list[Float32[np.ndarray, "hit dim"]] | None:
        """The index's embeddings of each query's hits; None where a shard is missing that has some of them."""
        wanted = np.unique(np.concatenate(rows))
        vectors = np.empty((len(wanted), self._live.index.dim), dtype=np.float32)
        parts = self._fanout.by_owner(wanted.tolist())
        answers = await self._fanout.ask("embeddings", {number: (self._live.ref, own) for number, own in parts.items()})
        if len(answers) < len(parts):
            return None
        for number, found in answers.items():
            vectors[np.searchsorted(wanted, parts[number])] = found
        return [vectors[np.searchsorted(wanted, own)] for own in rows]

    async def _shards(self, embeddings: np.ndarray, k: int, num_queries: int) -> TopK:
        inline = bool(self._request.fields) and k * num_queries <= INLINE_HITS
        arguments = (self._live.ref, embeddings, k, self._selection, inline)
        answers = await self._fanout.ask("search", dict.fromkeys(self._fanout.numbers, arguments))
        return merge([self._noted(answer) for answer in answers.values()], k, self._ids_of)

    async def _words(self, texts: Sequence[str], k: int) -> TopK:
        inline = bool(self._request.fields) and k * len(texts) <= INLINE_HITS
        arguments = (self._live.ref, texts, k, self._selection, inline)
        with self._stage("bm25"):
            return self._noted(await ask_within(self._limit_s, "the word side", self._of._bm25.search, *arguments))

    def _noted(self, answer: Ranked) -> TopK:
        self._ids.update(answer.ids)
        self._passages.update(answer.passages)
        return answer.top

    def _ids_of(self, rows: Int64[np.ndarray, " hit"]) -> np.ndarray:
        return np.array([self._ids[row] for row in rows.tolist()], dtype=object)

    async def _fetch(self, rows: Int64[np.ndarray, "query k"]) -> None:
        """Gets the passages that did not come with the hits from the deployments that hold them."""
        missing = [row for row in np.unique(rows[rows >= 0]).tolist() if row not in self._passages]
        if not missing:
            return
        arguments = {number: (self._live.ref, own) for number, own in self._fanout.by_owner(missing).items()}
        with self._stage("passages"):
            for passages in (await self._fanout.ask("passages", arguments)).values():
                self._passages.update(passages)

    def _passage(self, row: int) -> Passage:
        record = self._passages[row]
        return Passage(record[PASSAGE_ID], record[TEXT] or "", record.get(TITLE) or "")

    def _depth(self, request: SearchRequest) -> int:
        """Hits that are reordered: as asked; else so many as the server sets, and at least those that are shown."""
        return request.rerank_depth or max(request.k, self._of._args.rerank_depth)

    async def _reranked(self, texts: Sequence[str], top: TopK, reranking: Reranking) -> list[list[_Found]]:
        """Each query's first `depth` hits in the reranker's order and with its scores, the others behind them."""
        firsts = _found(top)
        await self._fetch(top.rows[:, : reranking.depth])
        heads = [[found for found in line[: reranking.depth] if found.row in self._passages] for line in firsts]
        rows = [np.array([found.row for found in head], dtype=np.int64) for head in heads]
        try:
            with self._stage("rerank"):
                ranked = await self._judged(reranking.model, texts, rows)
        except ApiError as failure:
            if self._request.on_rerank_failure == "error":
                raise
            self.reranking = reranking.model_copy(update={"applied": False, "reason": failure.message})
            return firsts
        lists = []
        for line, head, order in zip(firsts, heads, ranked, strict=True):
            new = [head[place]._replace(score=score, retrieval_score=head[place].score) for place, score in order]
            lists.append([*new, *line[reranking.depth :]])
        return lists

    async def _judged(
        self, name: str, texts: Sequence[str], rows: Sequence[Int64[np.ndarray, " hit"]]
    ) -> list[list[tuple[int, float]]]:
        """What the reranker `name` makes of each query's rows, whose passages are here: (place, score), best first.

        Raises `ApiError`.
        """
        rerank = self._of._rerankers[name].rerank.remote
        lists = [[self._passage(row) for row in own.tolist()] for own in rows]
        limit_s = self._of._args.limits.judging_s
        if self._judged_until is None:  # one limit for all that rerankers do for a request, feedback included
            self._judged_until = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(self._judged_until), asyncio.TaskGroup() as group:
                # A group, because the lists that are still being ranked when one fails are cancelled with it.
                asked = [
                    group.create_task(call(rerank(text, own, request_id=self._request_id)))
                    for text, own in zip(texts, lists, strict=True)
                ]
        except* ApiError as errors:
            failure = next(error for error in errors.exceptions if isinstance(error, ApiError))
        except* TimeoutError:
            failure = _timed_out(limit_s)
        else:
            return [task.result() for task in asked]
        metrics.record_rerank_failure(name, failure.code)
        raise failure

    def _hit(self, query: str, found: _Found, fields: set[str]) -> SearchHit:
        row = found.row
        hit = SearchHit(id=self._ids[row], score=found.score, retrieval_score=found.retrieval_score)
        if fields:
            record = self._passages[row]
            title, text = record.get(TITLE) or "", record[TEXT] or ""
            hit.title = title if "title" in fields else None
            hit.text = text if "text" in fields else None
            hit.highlights = highlight(query, title=title, text=text) if "highlights" in fields else None
            own = (PASSAGE_ID, TITLE, TEXT, POSITION)
            hit.metadata = {n: v for n, v in record.items() if n not in own} if "metadata" in fields else None
        return hit

    @contextmanager
    def _stage(self, name: str) -> Generator[None]:
        """Times the block, where it does not raise, and puts a span around it and the calls that it makes."""
        started = time.perf_counter()
        with span(f"raydr.{name}"):
            yield
        self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + _ms_since(started), 3)


def _check_required(index: IndexInfo, required: Mapping[str, Any]) -> None:
    try:
        index.check(dict(required))
    except ApiError as error:  # an index without the column would otherwise be open to everybody's keys, or to nobody's
        logger.error("the filters of an API key do not fit the live index: %s", error.message)
        raise ApiError(503, "key_mismatch", "the live index cannot be searched with this key") from None


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, (RaydrError, ApiError)) else f"{type(error).__name__}, see the log"


def _timed_out(limit_s: float) -> ApiError:
    message = f"the reranker did not answer within {limit_s:g} s; ask for fewer hits (rerank_depth) or try again"
    return ApiError(504, "rerank_timeout", message, retry_after_s=1.0)


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
