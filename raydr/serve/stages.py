"""One search on its way through its stages: pictures decoded, queries embedded, refined (`prf`) or moved by feedback,
shards and word side asked, fused, reranked, passages fetched.

Notable: the passages of a short list ride along with the shards' answers; their pictures never do, and are fetched for
the hits that are returned or judged, where somebody asks for them. A search goes on without the shards that do not
answer where its request says so, and says what it lacks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from raydr.index.explanation import Shares
from raydr.index.fusion import fuse
from raydr.index.topk import merge
from raydr.index.topk import order as ordered
from raydr.prf import refined
from raydr.protocols import TopK
from raydr.serve import metrics
from raydr.serve.answers import (
    Explanation,
    Feedback,
    MissingShard,
    Prf,
    QueryResult,
    Reranking,
    SearchHit,
    WordWeight,
)
from raydr.serve.config import AppArgs
from raydr.serve.encoder import EncoderInfo
from raydr.serve.errors import ApiError
from raydr.serve.fanout import Fanout, ask, ask_within, together
from raydr.serve.highlight import highlight
from raydr.serve.judges import Judges
from raydr.serve.modalities import TEXT_ONLY, check_reranker, reads_pictures
from raydr.serve.pictures import PictureReader, data_url
from raydr.serve.prf import Refinement, outcome, planned
from raydr.serve.schema import SearchRequest
from raydr.serve.shard import IndexInfo, Ranked, Selection
from raydr.serve.tracing import span
from raydr.serve.versions import IndexRef
from raydr.types import IMAGE, PASSAGE_ID, TEXT, TITLE, Embeddings, Found, Hit, Passage, Query

INLINE_HITS = 64
"""Up to this many hits in a response the shards send the passages with their hits and save a second hop."""


class Live(NamedTuple):
    """The version being served."""

    index: IndexInfo
    encoder: EncoderInfo

    @property
    def ref(self) -> IndexRef:
        return self.index.ref


class Deployments(NamedTuple):
    """Whom a search asks: handles, or anything with the same `handle.method.remote(...)`."""

    args: AppArgs
    encoder: Any
    shards: Sequence[Any]
    bm25: Any
    judges: Judges
    pictures: PictureReader


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


class Search:
    """One request on its way through the stages."""

    def __init__(
        self, of: Deployments, live: Live, request: SearchRequest, request_id: str, required: Mapping[str, Any]
    ) -> None:
        self._of = of
        self._live = live
        self._request = request
        self._request_id = request_id
        self._selection = Selection.of(request, required)
        self._limit_s = of.args.limits.answering_s
        self._fanout = Fanout(of.shards, live.index, limit_s=self._limit_s, on_failure=request.on_shard_failure)
        self.missing: list[MissingShard] = []
        self._ids: dict[int, str] = {}
        self._passages: dict[int, dict[str, Any]] = {}
        self.reranking: Reranking | None = None
        if request.rerank:
            name = of.judges.name(request.reranker, param="reranker")
            self.reranking = Reranking(model=name, depth=self._depth(request))
        self.feedback: Feedback | None = None
        if (asked := request.feedback) is not None:
            for field in ("scores", "order"):
                if (name := getattr(asked, field)) is not None:
                    of.judges.name(name, param=f"feedback.{field}")
            depth = asked.depth or of.args.feedback.depth
            self.feedback = Feedback(scores=asked.scores, order=asked.order, depth=depth)
        self._refinement = planned(of.args.prf, request, live.encoder.refiner)
        self.prf: Prf | None = None
        self.timings_ms: dict[str, float] = {}
        self._query_embeddings: Embeddings | None = None
        self._judged_until: float | None = None

    async def run(self) -> list[QueryResult]:
        fields: set[str] = set(self._request.fields)
        started = time.perf_counter()
        queries = await self._queries()
        top = await self._rank(queries)
        if self.reranking is not None:
            lists = await self._reranked(queries, top, self.reranking)
        else:
            lists = _found(top)
        lists = [[found for found in line if found.row >= 0][: self._request.k] for line in lists]
        if fields:
            rows = np.array([found.row for line in lists for found in line], dtype=np.int64)
            await self._fetch(rows)
            needed = PASSAGE_ID
            if "image" in fields and self._live.index.has_images:
                await self._fetch_images(rows)
                needed = IMAGE
            lists = [[found for found in line if needed in self._passages.get(found.row, ())] for line in lists]
        if self._request.explain:
            with self._stage("explain"):
                explained = await self._explained(lists)
        else:
            explained = [[None] * len(line) for line in lists]
        self.missing = self._fanout.missing()
        results = [
            QueryResult(
                query=query.text or None,
                hits=[self._hit(query.text, *pair, fields) for pair in zip(line, why, strict=True)],
            )
            for query, line, why in zip(queries, lists, explained, strict=True)
        ]
        self.timings_ms["total"] = _ms_since(started)
        return results

    async def _queries(self) -> list[Query]:
        parts: list[Any] = self._request.parts
        images: Sequence[bytes | None] = [None] * len(parts)
        if any(part.image is not None for part in parts):
            with self._stage("picture"):
                images = await self._of.pictures.read(parts, self._live.index.images)
        instruction = self._request.instruction
        pairs = zip(parts, images, strict=True)
        return [Query(str(number), part.text, image, instruction) for number, (part, image) in enumerate(pairs)]

    async def _rank(self, queries: Sequence[Query]) -> TopK:
        k = max(self._request.k, self.reranking.depth if self.reranking is not None else 0)
        if self._request.mode == "dense":
            return await self._dense(queries, k)
        if self._request.mode == "bm25":
            return await self._words(queries, k)
        candidates = max(k, self._of.args.candidates)
        dense, words = await asyncio.gather(self._dense(queries, candidates), self._words(queries, candidates))
        if self._fanout.is_partial:
            words = ordered(TopK(words.scores, self._fanout.present(words.rows)), candidates, self._ids_of)
        return fuse([dense, words], self._of.args.fusion, k, self._ids_of)

    async def _dense(self, queries: Sequence[Query], k: int) -> TopK:
        with self._stage("encode"):
            encode = self._of.encoder.encode
            embeddings = await ask(encode, self._live.ref, queries, "query", request_id=self._request_id)
        if self._refinement is not None:
            with self._stage("prf"):
                embeddings = await self._refined(queries, embeddings, self._refinement)
        if self.feedback is not None:
            with self._stage("feedback"):
                embeddings = await self._moved(queries, embeddings, self.feedback)
        self._query_embeddings = embeddings
        with self._stage("search"):
            return await self._shards(embeddings, k, len(queries))

    async def _refined(self, queries: Sequence[Query], embeddings: np.ndarray, by: Refinement) -> np.ndarray:
        """Pseudo-relevance feedback: a first search, and embeddings made anew from what it found."""
        found = await self._first_found(embeddings, len(queries), by)
        self.prf = outcome(by, found)
        if found is None or not self.prf.applied:
            return embeddings
        if by.vector is not None:
            return np.asarray(refined(by.vector, queries, embeddings, found))
        asked = ask(self._of.encoder.refine, self._live.ref, queries, embeddings, found, request_id=self._request_id)
        try:
            return await self._in_time("prf", asked)
        except ApiError as failure:
            if self._is_error(failure):
                raise
            self.prf = self.prf.model_copy(update={"applied": False, "reason": failure.message})
            return embeddings

    async def _first_found(self, embeddings: np.ndarray, num_queries: int, by: Refinement) -> list[Found] | None:
        """What a refiner reads of a first search; None where a shard is missing that has some of it."""
        if not by.k:
            return [Found([]) for _ in range(num_queries)]
        first = await self._shards(embeddings, by.k, num_queries)
        if by.reads == "passages":
            await self._fetch(first.rows)
            if reads_pictures(self._live.encoder.modalities):
                await self._fetch_images(first.rows)
            present = np.isin(first.rows, list(self._passages))
        else:
            present = first.rows >= 0
        rows = [line[own] for line, own in zip(first.rows, present, strict=True)]
        hits = [
            [Hit(self._ids[row], score) for row, score in zip(own.tolist(), scores[there].tolist(), strict=True)]
            for own, scores, there in zip(rows, first.scores, present, strict=True)
        ]
        if by.reads == "passages":
            return [Found(h, [self._passage(row) for row in own.tolist()]) for h, own in zip(hits, rows, strict=True)]
        vectors = await self._vectors(rows)
        if vectors is None:
            return None
        return [Found(own, embeddings=part) for own, part in zip(hits, vectors, strict=True)]

    async def _moved(self, queries: Sequence[Query], embeddings: np.ndarray, feedback: Feedback) -> np.ndarray:
        """Relevance feedback: what rerankers say of a first search's hits moves the embeddings."""
        first = await self._shards(embeddings, feedback.depth, len(queries))
        await self._fetch(first.rows)
        present = np.isin(first.rows, list(self._passages))
        rows = [line[own] for line, own in zip(first.rows, present, strict=True)]
        names = {"scores": feedback.scores, "order": feedback.order}
        judges = {side: name for side, name in names.items() if name is not None}
        try:
            opinions = await asyncio.gather(*(self._judged(name, queries, rows) for name in judges.values()))
        except ApiError as failure:
            if self._is_error(failure):
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
        return await ask(self._of.encoder.move, embeddings, vectors, scores, self._of.args.feedback, judged)

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

    async def _explained(self, lists: Sequence[Sequence[_Found]]) -> list[list[Explanation | None]]:
        """Which words made each hit's score; None of one whose shard has gone silent."""
        rows = np.unique([found.row for line in lists for found in line]).astype(np.int64)
        parts = self._fanout.by_owner(rows.tolist()) if len(rows) else {}
        answers = await self._fanout.ask("embeddings", {number: (self._live.ref, own) for number, own in parts.items()})
        passages = {
            row: embeddings[[place]]
            for number, embeddings in answers.items()
            for place, row in enumerate(parts[number])
        }
        queries: Any = self._query_embeddings
        pairs = [
            [None if found.row not in passages else (queries[[line]], passages[found.row]) for found in own]
            for line, own in enumerate(lists)
        ]
        shares = [[None if pair is None else Shares.of(*pair) for pair in own] for own in pairs]
        dims = sorted({dim for own in shares for share in own if share is not None for dim in share.dims})
        tokens = await ask(self._of.encoder.tokens_of, self._live.ref, dims) if dims else []
        names = dict(zip(dims, tokens, strict=True))
        return [[None if share is None else _explanation(share, names) for share in own] for own in shares]

    async def _shards(self, embeddings: Embeddings, k: int, num_queries: int) -> TopK:
        arguments = (self._live.ref, embeddings, k, self._selection, self._inline(k * num_queries))
        answers = await self._fanout.ask("search", dict.fromkeys(self._fanout.numbers, arguments))
        return merge([self._noted(answer) for answer in answers.values()], k, self._ids_of)

    async def _words(self, queries: Sequence[Query], k: int) -> TopK:
        texts = [query.text for query in queries]
        arguments = (self._live.ref, texts, k, self._selection, self._inline(k * len(texts)))
        with self._stage("bm25"):
            return self._noted(await ask_within(self._limit_s, "the word side", self._of.bm25.search, *arguments))

    def _inline(self, num_hits: int) -> tuple[str, ...]:
        """The columns that come with so many hits."""
        return self._live.index.inline_columns if self._request.fields and num_hits <= INLINE_HITS else ()

    def _noted(self, answer: Ranked) -> TopK:
        self._ids.update(answer.ids)
        self._passages.update(answer.passages)
        return answer.top

    def _ids_of(self, rows: Int64[np.ndarray, " hit"]) -> np.ndarray:
        return np.array([self._ids[row] for row in rows.tolist()], dtype=object)

    async def _fetch(self, rows: Int64[np.ndarray, "query k"]) -> None:
        """Gets the passages that did not come with the hits from the deployments that hold them."""
        missing = [row for row in np.unique(rows[rows >= 0]).tolist() if row not in self._passages]
        self._passages.update(await self._columns(missing, self._live.index.inline_columns))

    async def _fetch_images(self, rows: Int64[np.ndarray, "query k"]) -> None:
        """The same for the pictures of passages that are here."""
        if self._live.index.has_images:
            known = [row for row in np.unique(rows).tolist() if IMAGE not in self._passages.get(row, {IMAGE: None})]
            for row, record in (await self._columns(known, (IMAGE,))).items():
                self._passages[row] |= record

    async def _columns(self, rows: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        if not rows:
            return {}
        arguments = {number: (self._live.ref, own, columns) for number, own in self._fanout.by_owner(rows).items()}
        with self._stage("passages"):
            answers = await self._fanout.ask("passages", arguments)
        return {row: record for answer in answers.values() for row, record in answer.items()}

    def _passage(self, row: int) -> Passage:
        record = self._passages[row]
        image = record.get(IMAGE) if self._live.index.has_images else None
        return Passage(record[PASSAGE_ID], record[TEXT] or "", record.get(TITLE) or "", image)

    def _depth(self, request: SearchRequest) -> int:
        """Hits that are reordered: as asked; else so many as the server sets, and at least those that are shown."""
        return request.rerank_depth or max(request.k, self._of.args.rerank_depth)

    async def _reranked(self, queries: Sequence[Query], top: TopK, reranking: Reranking) -> list[list[_Found]]:
        """Each query's first `depth` hits in the reranker's order and with its scores, the others behind them."""
        firsts = _found(top)
        await self._fetch(top.rows[:, : reranking.depth])
        heads = [[found for found in line[: reranking.depth] if found.row in self._passages] for line in firsts]
        rows = [np.array([found.row for found in head], dtype=np.int64) for head in heads]
        try:
            with self._stage("rerank"):
                ranked = await self._judged(reranking.model, queries, rows)
        except ApiError as failure:
            if self._is_error(failure):
                raise
            self.reranking = reranking.model_copy(update={"applied": False, "reason": failure.message})
            return firsts
        lists = []
        for line, head, order in zip(firsts, heads, ranked, strict=True):
            new = [head[place]._replace(score=score, retrieval_score=head[place].score) for place, score in order]
            lists.append([*new, *line[reranking.depth :]])
        return lists

    def _is_error(self, failure: ApiError) -> bool:
        """Whether a reranker's failure is the answer: what is wrong with the request is, whatever it says."""
        return failure.status == 422 or self._request.on_rerank_failure == "error"

    async def _judged(
        self, name: str, queries: Sequence[Query], rows: Sequence[Int64[np.ndarray, " hit"]]
    ) -> list[list[tuple[int, float]]]:
        """What the reranker `name` makes of each query's rows, whose passages are here: (place, score), best first.

        Raises `ApiError`.
        """
        judges = self._of.judges
        reads = TEXT_ONLY
        if self._live.index.has_images or any(query.image is not None for query in queries):
            reads = await self._in_time(name, judges.reads(name))
            check_reranker(name, reads, queries)
        if reads_pictures(reads):
            await self._fetch_images(np.concatenate(rows))
            lists = [[self._passage(row) for row in own.tolist()] for own in rows]
        else:
            queries = [query._replace(image=None) for query in queries]
            lists = [[self._passage(row)._replace(image=None) for row in own.tolist()] for own in rows]
        ranked = together(
            judges.rank(name, query, own, request_id=self._request_id)
            for query, own in zip(queries, lists, strict=True)
        )
        return await self._in_time(name, ranked)

    async def _in_time(self, name: str, answer: Awaitable[Any]) -> Any:
        """What a reranker or a refiner answers, within the one limit for all that they do for a request."""
        limit_s = self._of.args.limits.judging_s
        if self._judged_until is None:
            self._judged_until = asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(self._judged_until):
                return await answer
        except ApiError as error:
            failure = error
        except TimeoutError:
            failure = _timed_out(name, limit_s)
        metrics.record_rerank_failure(name, failure.code)
        raise failure

    def _hit(self, query: str, found: _Found, explanation: Explanation | None, fields: set[str]) -> SearchHit:
        row = found.row
        hit = SearchHit(
            id=self._ids[row], score=found.score, retrieval_score=found.retrieval_score, explanation=explanation
        )
        if fields:
            record = self._passages[row]
            title, text = record.get(TITLE) or "", record[TEXT] or ""
            hit.title = title if "title" in fields else None
            hit.text = text if "text" in fields else None
            hit.highlights = highlight(query, title=title, text=text) if "highlights" in fields else None
            columns = self._live.index.metadata_columns
            hit.metadata = {name: record[name] for name in columns} if "metadata" in fields else None
            if "image" in fields and self._live.index.has_images and record[IMAGE] is not None:
                hit.image = data_url(record[IMAGE])
        return hit

    @contextmanager
    def _stage(self, name: str) -> Generator[None]:
        """Times the block, where it does not raise, and puts a span around it and the calls that it makes."""
        started = time.perf_counter()
        with span(f"raydr.{name}"):
            yield
        self.timings_ms[name] = round(self.timings_ms.get(name, 0.0) + _ms_since(started), 3)


def _explanation(shares: Shares, names: Mapping[int, str]) -> Explanation:
    def words(pairs: Sequence[tuple[int, float]]) -> list[WordWeight]:
        return [WordWeight(token=names[dim], weight=weight) for dim, weight in pairs]

    return Explanation(
        score=shares.score, matches=words(shares.matches), rest=shares.rest, passage=words(shares.passage)
    )


def _timed_out(name: str, limit_s: float) -> ApiError:
    message = f"the reranker did not answer within {limit_s:g} s; ask for fewer hits (rerank_depth) or try again"
    if name == "prf":
        message = f"the refiner of queries did not answer within {limit_s:g} s; search without (prf.method none)"
    return ApiError(504, "rerank_timeout", message, retry_after_s=1.0)


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
