"""search: a set of queries against an index; writes a TREC run and a table of hits.

Needs queries (query_id, text) and an index artifact; adds hits (query_id, passage_id, score, and document_id where
documents were split). Notable: whole blocks of queries go to FAISS and stay arrays of rows until they are written, and
a block is written before the next is searched, so memory does not grow with the number of queries. In this process,
on Ray actors and in `pipeline.py` the steps and their order are the same, and so are the hits.

    search_corpus("runs/a/index", queries, build_encoder, SearchConfig(mode="hybrid"), out, use_ray=False)
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64

from raydr import series
from raydr.artifacts import Artifact, artifacts_named_in, fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Component
from raydr.data.corpus import Corpus
from raydr.data.passages import passage_columns, passages_of
from raydr.encoders.factory import BuildEncoder
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.evaluation.trec import write_run
from raydr.index.fusion import fuse
from raydr.index.reader import IndexReader
from raydr.index.shard import dense
from raydr.index.sharded import LocalShards, RayShards
from raydr.progress import Progress
from raydr.protocols import Reranker, TopK
from raydr.runtime import PLACEMENT
from raydr.stages.config import SearchConfig
from raydr.stages.feedback import Teachers, rerank_lists
from raydr.stages.prf import chosen_refiner
from raydr.stages.query_encoder import BuildRefiner, QueryEncoder, RefinerInfo
from raydr.storage import named
from raydr.types import DOCUMENT_ID, PASSAGE_ID, QUERY_ID, SCORE, Embeddings, Found, Hit, Passage, Query, Run

KIND = "run"
RUN = "run.trec"
HITS = "hits.parquet"


def search_corpus(
    index_path: str | Path,
    queries: Sequence[Query],
    build_encoder: BuildEncoder,
    config: SearchConfig,
    out: Path,
    *,
    use_ray: bool,
    corpus: Corpus | None = None,
    build_refiner: BuildRefiner | None = None,
    reranker: Reranker | None = None,
) -> Artifact:
    """The run of `queries` in `out` (kind "run"); a finished one of the same index, queries and settings stays.

    `corpus`, where given, must be the one the index was built from. Raises `ArtifactError` when the index was made by
    another encoder than `build_encoder` builds, `DataError` for queries that cannot be answered one by one.
    """
    _check_queries(queries, config.mode)
    reader = IndexReader.open(index_path, device=config.device, num_threads=config.num_threads)
    if corpus is not None and reader.artifact.manifest.inputs["corpus"] != corpus.artifact.fingerprint:
        raise ArtifactError(f"{reader.path}: not an index of the corpus in {corpus.path}; build the index again")
    # An index can change under its fingerprint (add, delete), so its version is part of what decides the outcome.
    # What is not asked for is left out: runs that were made before there was such a setting are still the same.
    without = {*PLACEMENT, *(("prf",) if config.prf is None else ())}
    settings = config.model_dump(mode="json", exclude=without) | {
        "index_version": reader.version,
        "queries": hashlib.sha256(json.dumps([read_of(query) for query in queries]).encode()).hexdigest(),
        "method": described(build_encoder),
    }
    # The version stands for the encoder, and says nothing of what refines and reranks.
    chosen = {name: settings.get(name) for name in ("method", "feedback", "prf")}
    inputs = {"index": reader.artifact, **artifacts_named_in(chosen)}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"search: {named(out)} has this run already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer, ExitStack() as stack:
        searcher = Searcher(reader, config, build_encoder, build_refiner, use_ray=use_ray, stack=stack)
        table = HitsTable(out, searcher.ranks_documents, config.run_tag)
        stack.callback(table.close)
        start = time.perf_counter()
        with Progress("search", total=len(queries), unit="query") as progress:
            for first in range(0, len(queries), config.query_batch):
                block = queries[first : first + config.query_batch]
                with series.timed("raydr_search_seconds_total", mode=config.mode):
                    table.write(searcher.hits(block, reranker))
                series.count("raydr_search_queries_total", len(block), mode=config.mode)
                progress.update(len(block))
        search_s = time.perf_counter() - start
        writer.counts.update(queries=len(queries), hits=table.num_hits, unanswered=len(queries) - table.num_answered)
        writer.details.update(
            mode=config.mode,
            index_version=reader.version,
            encoder_version=reader.encoder_version,
            search_s=search_s,
            queries_per_s=len(queries) / search_s,
            **searcher.prf_details,
        )
    return open_artifact(out, kind=KIND)


def described(build_encoder: BuildEncoder) -> Any:
    """What builds the encoder, as a step's settings say it: the method where one is known."""
    method = getattr(build_encoder, "method", build_encoder)
    return method.model_dump(mode="json") if isinstance(method, Component) else str(method)


class Searcher:
    """The steps between queries and hits, over one opened index."""

    def __init__(
        self,
        reader: IndexReader,
        config: SearchConfig,
        build_encoder: BuildEncoder,
        build_refiner: BuildRefiner | None,
        *,
        use_ray: bool,
        stack: ExitStack,
    ) -> None:
        self._reader = reader
        self._config = config
        self._allowed = _allowed(reader, config)
        self.ranks_documents = reader.details.is_split and config.aggregate
        self._prf_s = 0.0
        self._refiner: RefinerInfo | None = None
        if config.mode == "bm25":
            return
        if config.feedback is not None and reader.is_sparse:
            raise ConfigError(
                f"search.feedback: moves dense embeddings, and those of {reader.path} are sparse; leave it out"
            )
        self._teachers = Teachers(config.feedback) if config.feedback is not None else None
        if self._teachers is not None:
            stack.callback(self._teachers.close)
        wanted = [config.encoder_cpus, *reader.num_shards * [config.shard_cpus]]
        share = _cpu_share(wanted, [node["CPU"] for node in config.nodes()]) if use_ray else 1.0
        self._encoder = stack.enter_context(
            QueryEncoder(
                build_encoder,
                chosen_refiner(config.prf, build_refiner),
                use_ray=use_ray,
                num_cpus=config.encoder_cpus * share,
                num_gpus=config.encoder_gpus,
                placement=config.options(),
            )
        )
        _check_stamp(reader, self._encoder.version)
        self._refiner = self._encoder.refiner
        self._shards = LocalShards(reader, parameters=config.parameters)
        if use_ray:
            self._shards = stack.enter_context(
                RayShards(
                    reader,
                    parameters=config.parameters,
                    cpus_per_shard=config.shard_cpus * share,
                    gpus_per_shard=config.shard_gpus,
                    device=config.device,
                    num_threads=config.num_threads,
                    placement=config.options(),
                )
            )

    def hits(self, queries: Sequence[Query], reranker: Reranker | None) -> pa.Table:
        """The hits of a block of queries, best first, in the order of the queries."""
        embeddings = self.embed(queries)
        depth = self._config.k
        while True:
            top = self.search(queries, embeddings, depth)
            table, fewest = self._table(queries, top, reranker)
            # k documents may need more than k passages: look deeper until every query has them, or there are no more.
            if not self.ranks_documents or fewest >= self._config.k or depth >= self._reader.num_rows:
                return table
            depth = min(4 * depth, self._reader.num_rows)

    def embed(self, queries: Sequence[Query]) -> Embeddings | None:
        """The queries' embeddings, refined where the method refines them and moved where there is relevance feedback;
        None where only words are compared.
        """
        if self._config.mode == "bm25":
            return None
        embeddings = self._encoder.encode(queries)
        if self._refiner is not None:
            started = time.perf_counter()
            embeddings = self._encoder.refine(queries, embeddings, self._found(embeddings, len(queries), self._refiner))
            self._prf_s += time.perf_counter() - started
        if self._teachers is not None:
            first = self._shards.search(embeddings, self._teachers.depth, allowed=self._allowed)
            vectors = [dense(self._reader.embeddings(rows[rows >= 0])) for rows in first.rows]
            embeddings = self._teachers.moved(queries, dense(embeddings), self._feedback(first), vectors)
        return embeddings

    def search(self, queries: Sequence[Query], embeddings: Embeddings | None, depth: int) -> TopK:
        """The `depth` best rows of each query; `embeddings` are those of `embed`."""
        texts = [query.text for query in queries]
        if embeddings is None:
            return self._reader.search_bm25(texts, depth, allowed=self._allowed)
        if self._config.mode == "dense":
            return self._shards.search(embeddings, depth, allowed=self._allowed)
        candidates = max(self._config.candidates or max(depth, 100), depth)
        sides = [
            self._shards.search(embeddings, candidates, allowed=self._allowed),
            self._reader.search_bm25(texts, candidates, allowed=self._allowed),
        ]
        return fuse(sides, self._config.fusion, depth, self._reader.passage_ids.take)

    @property
    def prf_details(self) -> dict[str, Any]:
        """Seconds that refining took, its searches included, and with what; empty where nothing refines."""
        if self._refiner is None:
            return {}
        return {"prf": self._refiner._asdict(), "prf_s": self._prf_s}

    def _found(self, embeddings: Embeddings, num_queries: int, refiner: RefinerInfo) -> list[Found]:
        """What a refiner reads of a first search."""
        if not refiner.num_feedback:
            return [Found([]) for _ in range(num_queries)]
        first = self._shards.search(embeddings, refiner.num_feedback, allowed=self._allowed)
        found = []
        for line, scores in zip(first.rows, first.scores, strict=True):
            rows = line[line >= 0]
            ids = self._reader.passage_ids.take(rows).tolist()
            hits = [Hit(id_, float(score)) for id_, score in zip(ids, scores, strict=False)]
            if refiner.reads == "embeddings":
                found.append(Found(hits, embeddings=dense(self._reader.embeddings(rows))))
            else:
                found.append(Found(hits, self._passages(rows)))
        return found

    def _feedback(self, top: TopK) -> list[list[tuple[Hit, Passage]]]:
        feedback = []
        for rows, scores in zip(top.rows, top.scores, strict=True):
            found = self._passages(rows[rows >= 0])
            feedback.append([(Hit(p.passage_id, float(s)), p) for p, s in zip(found, scores, strict=False)])
        return feedback

    def _passages(self, rows: np.ndarray) -> list[Passage]:
        return passages_of(self._reader.take(rows, passage_columns(self._reader.schema)))

    def _table(self, queries: Sequence[Query], top: TopK, reranker: Reranker | None) -> tuple[pa.Table, int]:
        """Hits as columns, and the smallest number of hits of any query."""
        found = top.rows >= 0
        line, rows, scores = np.nonzero(found)[0], top.rows[found], top.scores[found]
        if reranker is not None and self._config.rerank:
            line, rows, scores = self._reranked(queries, line, rows, scores, reranker)
        columns: dict[str, Any] = {}
        if self.ranks_documents:
            kept = _best_per_document(line, self._reader.document_ids.column(rows), scores, self._config.k)
            line, rows, scores = line[kept], rows[kept], scores[kept]
            columns[DOCUMENT_ID] = self._reader.document_ids.column(rows).cast(pa.string())
        query_ids = pa.array([query.query_id for query in queries], type=pa.string())
        columns |= {
            QUERY_ID: query_ids.take(pa.array(line)),
            PASSAGE_ID: self._reader.passage_ids.column(rows).cast(pa.string()),
            SCORE: pa.array(scores.astype(np.float32)),
        }
        return pa.table(columns), int(np.bincount(line, minlength=len(queries)).min(initial=0))

    def _reranked(
        self, queries: Sequence[Query], line: np.ndarray, rows: np.ndarray, scores: np.ndarray, reranker: Reranker
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `rerank` hits of each query by the reranker's scores; the others behind them."""
        new_rows, new_scores = [], []
        parts = [np.split(np.flatnonzero(line == number), [self._config.rerank]) for number in range(len(queries))]
        heads = np.concatenate([own for own, _ in parts]) if parts else np.empty(0, dtype=np.int64)
        passages = dict(zip(rows[heads].tolist(), self._passages(rows[heads]), strict=True))
        row_of = {passage.passage_id: row for row, passage in passages.items()}
        lists = [
            (
                query,
                [Hit(passages[row].passage_id, float(score)) for row, score in zip(rows[own].tolist(), scores[own])],
            )
            for query, (own, _) in zip(queries, parts, strict=True)
        ]
        ranked = rerank_lists(reranker, lists, {passage.passage_id: passage for passage in passages.values()})
        for hits, (own, others) in zip(ranked, parts, strict=True):
            new_rows.extend(row_of[hit.passage_id] for hit in hits)
            new_scores.extend(hit.score for hit in hits)
            lowest = new_scores[-1] if len(own) else 0.0
            new_rows.extend(rows[others])
            new_scores.extend(lowest - np.arange(1, len(others) + 1))
        return line, np.array(new_rows, dtype=np.int64), np.array(new_scores, dtype=np.float32)


def read_of(query: Query) -> tuple[str, ...]:
    """What of a query decides an answer, pictures as their hashes; of texts alone as before there were pictures."""
    if query.image is None and not query.instruction:
        return query.query_id, query.text
    return query.query_id, query.text, hashlib.sha256(query.image or b"").hexdigest(), query.instruction


class HitsTable:
    """Writes hits block by block, as Parquet and as a TREC run."""

    def __init__(self, out: Path, ranks_documents: bool, tag: str) -> None:
        self._out = out
        self._run_id = DOCUMENT_ID if ranks_documents else PASSAGE_ID
        self._tag = tag
        names = [QUERY_ID, PASSAGE_ID, *([DOCUMENT_ID] if ranks_documents else [])]
        self._schema = pa.schema([*[(name, pa.string()) for name in names], (SCORE, pa.float32())])
        self._parquet = pq.ParquetWriter(out / HITS, self._schema)
        self._trec = (out / RUN).open("wb")
        self.num_hits = 0
        self.num_answered = 0

    def write(self, hits: pa.Table) -> None:
        hits = hits.select(self._schema.names)
        self._parquet.write_table(hits)
        run: Run = {}
        names = [hits.column(name).to_pylist() for name in (QUERY_ID, self._run_id, SCORE)]
        for query_id, passage_id, score in zip(*names, strict=True):
            run.setdefault(query_id, []).append(Hit(passage_id, score))
        block = self._out / ".block.trec"
        write_run(run, block, self._tag)
        self._trec.write(block.read_bytes())
        block.unlink()
        self.num_hits += hits.num_rows
        self.num_answered += len(run)

    def close(self) -> None:
        self._parquet.close()
        self._trec.close()


def _best_per_document(
    line: np.ndarray, documents: pa.LargeStringArray, scores: np.ndarray, k: int
) -> Int64[np.ndarray, " hit"]:
    """Places of the best passage of each query's `k` best documents, best first, ties by document id.

    Needs hits grouped by query (`line`: its number) and best first within each.
    """
    encoded = documents.dictionary_encode()
    code = encoded.indices.to_numpy()
    by_id = np.argsort(encoded.dictionary.to_numpy(zero_copy_only=False), kind="stable")
    rank = np.empty(len(by_id), dtype=np.int64)
    rank[by_id] = np.arange(len(by_id))
    _, first = np.unique(line * len(rank) + code, return_index=True)
    first = first[np.lexsort((rank[code[first]], -scores[first], line[first]))]
    starts = np.searchsorted(line[first], line[first], side="left")
    return first[np.arange(len(first)) - starts < k]


def _allowed(reader: IndexReader, config: SearchConfig) -> Bool[np.ndarray, " row"] | None:
    if not config.filters and config.allow_ids is None and not config.exclude_ids:
        return None
    return reader.select(config.filters, allow_ids=config.allow_ids, exclude_ids=config.exclude_ids)


def _check_stamp(reader: IndexReader, version: str) -> None:
    if version != reader.encoder_version:
        raise ArtifactError(
            f"{reader.path}: made by encoder {reader.encoder_version}, but these queries' encoder is {version}; search "
            f"with the index's own method ({reader.method.import_path}, args {reader.method.args}), or embed and index "
            "the corpus again with this one"
        )


def _check_queries(queries: Sequence[Query], mode: str) -> None:
    if not queries:
        raise DataError("no queries to search with; the corpus needs queries.jsonl, and qrels for the split asked for")
    doubled = [id_ for id_, count in Counter(query.query_id for query in queries).items() if count > 1]
    if doubled:
        raise DataError(f"query id {doubled[0]!r} occurs twice; ids must be unique")
    wordless = next((query.query_id for query in queries if query.image is not None and not query.text.strip()), None)
    if mode == "bm25" and wordless is not None:
        raise DataError(
            f"query {wordless!r} is a picture without words, and mode bm25 has nothing else; search.mode=dense"
        )


def _cpu_share(wanted: list[float], nodes: list[float]) -> float:
    """What part of the wanted CPUs each actor may have, so that none waits for ever for a place.

    An actor has to fit on one node. As many as want the most fit on a node have a place there, whoever comes first.
    """
    if not nodes:
        raise ConfigError("this Ray cluster has no CPUs to search with; add a worker, or use runtime=local")
    most = max(wanted)
    # The largest part that gives all of them a place is 1, or one at which a node has no CPU left over.
    parts = {1.0, *(cpus / (most * count) for cpus in nodes for count in range(1, len(wanted) + 1))}
    fitting = [p for p in parts if p <= 1 and sum(int(cpus / (most * p) + 1e-9) for cpus in nodes) >= len(wanted)]
    return np.floor(1000 * max(fitting)) / 1000
