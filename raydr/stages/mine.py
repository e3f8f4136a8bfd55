"""mine: negatives for training queries; writes a set of training examples (kind "examples").

Needs an index and the judged queries of a training split over the same corpus. Candidates come from the encoder's own
hits, from BM25 and from chance; judged passages and likely false negatives are filtered out (`stages/negatives.py`),
the hardest of the rest are kept. Notable: all scores are inner products with the embeddings that lie in the index,
positives included, so no passage is encoded again and scores compare even where the index stores them coarsely. A
query's random draw depends on the seed and its id alone, and blocks, Ray and shards change nothing.

Where documents were split into passages, judgements name documents: no passage of a relevant document is ever a
negative, and one of them is its positive: the one that scores best or, where nothing is scored, the first.

    mine_negatives("runs/a/index", queries, build_encoder, MineConfig(fraction=0.95), out, use_ray=False)
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.data.config import DataConfig
from raydr.data.corpus import QuerySet
from raydr.data.example_files import examples_from_file
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter, QueryLabels
from raydr.data.positives import relevant_ids
from raydr.encoders.factory import BuildEncoder
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.index.reader import IndexReader
from raydr.index.shard import finite
from raydr.progress import Progress
from raydr.stages.config import MineConfig, ModalityConfig, SearchConfig, Source
from raydr.stages.modality import LOW_RANK, WRONG_MODALITY, by_modality, right_modalities
from raydr.stages.negatives import Candidates, choose, score_limits
from raydr.stages.search import Searcher, described
from raydr.storage import named
from raydr.types import DOCUMENT_ID, IMAGE, PASSAGE_ID, TEXT, TITLE, Embeddings, Query

_SOURCES: tuple[Source, ...] = ("model", "bm25", "random")
"""In the order of their turns, which is that of how hard their negatives are."""

_PICTURES_AT_ONCE = 1024
"""Passages with pictures that are in memory together."""

_ELSEWHERE = {
    *("split", "dev_split", "queries", "qrels", "dev_qrels", "base_index"),
    *("source_file", "source_format", "source_corpus", "source_queries", "trust_order"),
}
"""Settings that say nothing of how negatives are found: what they decide is in the fingerprint of the queries."""


def training_data(data: DataConfig, config: MineConfig) -> DataConfig:
    """Where the training queries and their judgements are: the corpus's own source, with another split of it."""
    if data.qrels is not None and config.qrels is None:
        raise ConfigError(
            f"data.qrels names the file {data.qrels!r} whatever the split is; name the one with the judgements to "
            "train on: mine.qrels=FILE"
        )
    return data.model_copy(
        update={"split": config.split, "queries": config.queries or data.queries, "qrels": config.qrels}
    )


def examples_of_file(config: MineConfig, out: Path) -> ExampleSet:
    """The examples of `source_file`, taken as they are. Raises `DataError` naming file, line and field of bad lines."""
    if config.source_file is None:
        raise ConfigError("mine.source_file: name a file of examples")
    return examples_from_file(
        config.source_file,
        out,
        source_format=config.source_format,
        corpus=config.source_corpus,
        queries=config.source_queries,
        trust_order=config.trust_order,
    )


class Judged(NamedTuple):
    """A training query with the rows of what is relevant to it, by passage or, where they were split, by document."""

    query: Query
    relevant: list[Int64[np.ndarray, " _"]]

    @property
    def relevant_rows(self) -> Int64[np.ndarray, " row"]:
        return np.concatenate(self.relevant)


class Positives(NamedTuple):
    """One row for each relevant passage or document, with the encoder's scores where there are any."""

    rows: Int64[np.ndarray, " positive"]
    scores: Float32[np.ndarray, " score"]


class Negatives(NamedTuple):
    """Rows of a query's negatives, with their scores (empty where nothing was scored) and where each is from."""

    rows: Int64[np.ndarray, " negative"]
    scores: list[float]
    sources: list[str]


def mine_negatives(
    index_path: str | Path,
    queries: QuerySet,
    build_encoder: BuildEncoder,
    config: MineConfig,
    out: Path,
    *,
    use_ray: bool,
    search: SearchConfig | None = None,
) -> Artifact:
    """The training examples in `out`; finished ones of the same index, queries and settings stay.

    `search` says how the index is searched (devices, CPUs, how hard). Raises `ArtifactError` when the index is not one
    of the queries' corpus or was made by another encoder, `DataError` when no query has a positive or the index lacks
    one.
    """
    search = search or SearchConfig()
    reader = IndexReader.open(index_path, device=search.device, num_threads=search.num_threads)
    if reader.artifact.manifest.inputs["corpus"] != queries.artifact.manifest.inputs["corpus"]:
        raise ArtifactError(f"{reader.path}: not an index of the corpus of {queries.path}; build the index again")
    if "bm25" in config.sources and reader.details.bm25 is None:
        raise ArtifactError(
            f"{reader.path}: built without BM25, which mine.sources names; build it with index.bm25={{}}"
        )
    # What is not asked for is left out: examples that were mined before there was such a setting are still the same.
    later = ("modality_aware", "keep", "num_feedback")
    without = {*_ELSEWHERE, *(name for name in later if getattr(config, name) == MineConfig.model_fields[name].default)}
    settings = config.model_dump(mode="json", exclude=without) | {
        "index_version": reader.version,
        "parameters": search.parameters.model_dump(mode="json"),
        "method": described(build_encoder),
    }
    inputs = {"index": reader.artifact, "queries": queries.artifact}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"mine: {named(out)} has these examples already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer, ExitStack() as stack:
        relevant, num_without = relevant_ids(queries, max_queries=config.max_queries, seed=config.seed)
        judged = _judged(queries, relevant, reader)
        miner = Miner(reader, config, build_encoder, search, use_ray=use_ray, stack=stack)
        start = time.perf_counter()
        with (
            ExampleWriter(
                out,
                is_split=reader.details.is_split,
                has_pictures=reader.has_pictures,
                labels=QueryLabels.of(queries),
                has_feedback=config.num_feedback > 0,
            ) as examples,
            Progress("mine", total=len(relevant), unit="query") as progress,
        ):
            while block := list(islice(judged, search.query_batch)):
                miner.write(block, examples)
                progress.update(len(block))
        writer.counts.update(examples.counts, without_positives=num_without, **miner.counts)
        writer.details.update(
            index_version=reader.version,
            encoder_version=reader.encoder_version if miner.is_scored else None,
            mine_s=time.perf_counter() - start,
        )
    _summarise(out, writer.counts)
    return open_artifact(out, kind=KIND)


class Miner:
    """The steps between judged queries and examples, over one opened index."""

    def __init__(
        self,
        reader: IndexReader,
        config: MineConfig,
        build_encoder: BuildEncoder,
        search: SearchConfig,
        *,
        use_ray: bool,
        stack: ExitStack,
    ) -> None:
        self._reader, self._config = reader, config
        self.is_scored = "model" in config.sources or config.filters_scores or config.num_feedback > 0
        everything = {"filters": {}, "allow_ids": None, "exclude_ids": (), "prf": None}
        mode = "dense" if self.is_scored else "bm25"
        plain = search.model_copy(update={"mode": mode, **everything})
        self._searcher = Searcher(reader, plain, build_encoder, None, use_ray=use_ray, stack=stack)
        self._alive = np.flatnonzero(reader.select()) if reader.details.num_deleted else None
        self._rows_of_modalities: dict[bytes, Int64[np.ndarray, " row"]] = {}
        self._hits: Int64[np.ndarray, "query hit"] = np.empty((0, 0), dtype=np.int64)
        """What the search by embedding found for the block at hand."""
        self.counts: Counter[str] = Counter(negatives=0, without_negatives=0, filled=0)

    def write(self, block: Sequence[Judged], examples: ExampleWriter) -> None:
        """Mines for a block of queries and appends its examples."""
        found = self._searcher.embed([judged.query for judged in block])
        embeddings = None if found is None else finite(found)
        self._hits = self._searched(block, embeddings)
        positives = [self._positives(judged, _line(embeddings, line)) for line, judged in enumerate(block)]
        if self._config.modality_aware is None:
            sources = [source for source in _SOURCES if source in self._config.sources]
            negatives, counts = self._chosen(block, positives, self._candidates(block, embeddings, sources))
        else:
            negatives, counts = self._by_modality(block, embeddings, positives, self._config.modality_aware)
        self.counts.update(counts)
        empty = [line for line, own in enumerate(negatives) if not len(own.rows)]
        self.counts["without_negatives"] += len(empty)
        if empty and self._config.fill_random:
            part, theirs = [block[line] for line in empty], _lines(embeddings, empty)
            candidates = self._candidates(part, theirs, ["random"], purpose="fill")
            drawn, _ = self._chosen(part, [positives[line] for line in empty], candidates)
            for line, filling in zip(empty, drawn, strict=True):
                negatives[line] = filling
                self.counts["filled"] += bool(len(filling.rows))
        self._append(block, positives, negatives, examples)

    def _by_modality(
        self,
        block: Sequence[Judged],
        embeddings: Embeddings | None,
        positives: Sequence[Positives],
        config: ModalityConfig,
    ) -> tuple[list[Negatives], Counter[str]]:
        """Of another modality than the positives and above them, or of theirs and low in the ranking."""
        candidates = self._candidates(block, embeddings, ["model"])
        hard = by_modality(
            candidates,
            [judged.relevant_rows for judged in block],
            self._reader.modalities,
            self._limits(positives),
            config,
        )
        return [_negatives(candidates, line, *hard.of(line)) for line in range(len(block))], hard.counts

    def _positives(self, judged: Judged, embedding: Float32[np.ndarray, " dim"] | None) -> Positives:
        if embedding is None:
            return Positives(np.array([rows[0] for rows in judged.relevant]), np.zeros(0, dtype=np.float32))
        scores = [self._scores(embedding, rows) for rows in judged.relevant]
        best = [int(own.argmax()) for own in scores]
        rows = np.array([own[place] for own, place in zip(judged.relevant, best, strict=True)])
        return Positives(rows, np.array([own.max() for own in scores], dtype=np.float32))

    def _candidates(
        self,
        block: Sequence[Judged],
        embeddings: Embeddings | None,
        sources: Sequence[Source],
        *,
        purpose: str = "source",
    ) -> Candidates:
        parts = [self._found(source, block, embeddings, purpose) for source in sources]
        rows = np.concatenate(parts, axis=1)
        columns = [source for source, part in zip(sources, parts, strict=True) for _ in range(part.shape[1])]
        if embeddings is None:
            return Candidates(rows, columns, None)
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        for line, found in enumerate(rows):
            scores[line, found >= 0] = self._scores(_line(embeddings, line), found[found >= 0])
        return Candidates(rows, columns, scores)

    def _found(
        self,
        source: Source,
        block: Sequence[Judged],
        embeddings: Embeddings | None,
        purpose: str,
    ) -> Int64[np.ndarray, "query candidate"]:
        """What one source finds for each query, best first; padded with -1."""
        if source == "random":
            return np.stack([self._drawn(judged, purpose) for judged in block])
        first, last = self._ranks
        if source == "model":
            return self._hits[:, first - 1 : last]
        return self._reader.search_bm25([judged.query.text for judged in block], last).rows[:, first - 1 :]

    @property
    def _ranks(self) -> tuple[int, int]:
        """The first and the last rank of a search that is a candidate."""
        if (aware := self._config.modality_aware) is not None:
            return 1, aware.depth
        return self._config.first_rank, self._config.last_rank

    def _searched(self, block: Sequence[Judged], embeddings: Embeddings | None) -> Int64[np.ndarray, "query hit"]:
        """The hits by embedding, best first, as deep as candidates and feedback go; padded with -1."""
        depth = max(self._ranks[1] if "model" in self._config.sources else 0, self._config.num_feedback)
        if not depth:
            return np.empty((len(block), 0), dtype=np.int64)
        return self._searcher.search([judged.query for judged in block], embeddings, depth).rows

    def _drawn(self, judged: Judged, purpose: str) -> Int64[np.ndarray, " candidate"]:
        """`num_negatives` rows drawn uniformly from those that are not relevant (and, where modality counts, of a right
        one), in random order; padded with -1.
        """
        rng = self._rng(purpose, judged)
        relevant, num = judged.relevant_rows, self._config.num_negatives
        pool = self._alive if self._config.modality_aware is None else self._alive_of_right_modality(relevant)
        size = self._reader.num_passages if pool is None else len(pool)
        rows = rng.choice(size, size=min(size, num + len(relevant)), replace=False)
        rows = rows if pool is None else pool[rows]
        rows = rows[~np.isin(rows, relevant)][:num]
        return np.pad(rows.astype(np.int64), (0, num - len(rows)), constant_values=-1)

    def _rng(self, purpose: str, judged: Judged) -> np.random.Generator:
        label = f"{self._config.seed}\n{purpose}\n{judged.query.query_id}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "big"))

    def _alive_of_right_modality(self, relevant: Int64[np.ndarray, " relevant"]) -> Int64[np.ndarray, " row"]:
        """Rows that can be found and are of a modality that one of the `relevant` rows has."""
        (right,) = right_modalities([relevant], self._reader.modalities)
        if (key := right.tobytes()) not in self._rows_of_modalities:
            own = np.flatnonzero(right[self._reader.modalities])
            self._rows_of_modalities[key] = own if self._alive is None else np.intersect1d(own, self._alive)
        return self._rows_of_modalities[key]

    def _scores(
        self, embedding: Float32[np.ndarray, " dim"] | None, rows: Int64[np.ndarray, " row"]
    ) -> Float32[np.ndarray, " row"]:
        return self._reader.embeddings(rows) @ embedding

    def _limits(self, positives: Sequence[Positives]) -> dict[str, Float64[np.ndarray, " query"]]:
        lowest = np.array([own.scores.min(initial=np.inf) for own in positives], dtype=np.float32)
        return score_limits(lowest, self._config)

    def _chosen(
        self, block: Sequence[Judged], positives: Sequence[Positives], candidates: Candidates
    ) -> tuple[list[Negatives], Counter[str]]:
        """The candidates that are left and kept, hardest first; and what was removed of them."""
        drawn, wanted = self._config.keep == "random", self._config.num_negatives
        choice = choose(
            candidates,
            [judged.relevant_rows for judged in block],
            self._limits(positives),
            num_negatives=candidates.rows.shape[1] if drawn else wanted,
            ids_of=self._reader.passage_ids.take,
        )
        negatives = []
        for line, columns in enumerate(choice.columns):
            own = columns[columns >= 0]
            if drawn and len(own) > wanted:
                own = own[np.sort(self._rng("keep", block[line]).choice(len(own), wanted, replace=False))]
            negatives.append(_negatives(candidates, line, own, [candidates.sources[column] for column in own]))
        return negatives, choice.counts

    def _append(
        self,
        block: Sequence[Judged],
        positives: Sequence[Positives],
        negatives: Sequence[Negatives],
        examples: ExampleWriter,
    ) -> None:
        ids = self._reader.passage_ids.take
        mined, row_of = [], {}
        for judged, (rows, scores), (negative_rows, negative_scores, sources), hits in zip(
            block, positives, negatives, self._hits[:, : self._config.num_feedback], strict=True
        ):
            first = hits[hits >= 0]
            own, others, feedback = (ids(part).tolist() for part in (rows, negative_rows, first))
            named = [*rows.tolist(), *negative_rows.tolist(), *first.tolist()]
            row_of |= dict(zip([*own, *others, *feedback], named, strict=True))
            mined.append(Example(judged.query, own, others, negative_scores, sources, scores.tolist(), feedback))
            self.counts["negatives"] += len(others)
        columns = [PASSAGE_ID, TITLE, TEXT, *([DOCUMENT_ID] if self._reader.details.is_split else [])]
        new = [row_of[passage_id] for passage_id in examples.new(row_of)]
        while self._reader.has_pictures and len(new) > _PICTURES_AT_ONCE:
            some, new = new[:_PICTURES_AT_ONCE], new[_PICTURES_AT_ONCE:]
            examples.add_passages(self._reader.take(some, [*columns, IMAGE]))
        columns += [IMAGE] if self._reader.has_pictures else []
        examples.add(mined, self._reader.take(new, columns))


def _lines(embeddings: Any, lines: Sequence[int]) -> Embeddings | None:
    return None if embeddings is None else embeddings[lines]


def _line(embeddings: Any, line: int) -> Float32[np.ndarray, " dim"] | None:
    """One query's embedding; of sparse ones, written out, to be multiplied with many passages'."""
    if embeddings is None or isinstance(embeddings, np.ndarray):
        return None if embeddings is None else embeddings[line]
    return embeddings[[line]].toarray()[0]


def _negatives(
    candidates: Candidates, line: int, columns: Int64[np.ndarray, " negative"], sources: Sequence[str]
) -> Negatives:
    scores = [] if candidates.scores is None else candidates.scores[line, columns].tolist()
    return Negatives(candidates.rows[line, columns], scores, list(sources))


def _judged(queries: QuerySet, relevant: Mapping[str, Sequence[str]], reader: IndexReader) -> Iterator[Judged]:
    """The queries that have something relevant, one after the other: their pictures may be many."""
    rows = reader.rows_of({passage_id for ids in relevant.values() for passage_id in ids})
    for query_id, ids in relevant.items():
        if missing := [passage_id for passage_id in ids if passage_id not in rows]:
            raise DataError(
                f"{reader.path}: lacks {missing[0]!r}, which is relevant to query {query_id!r}; it was deleted from "
                "the index since: build the index again, or leave the judgement out"
            )
    asked = (query for query in queries.stream() if query.query_id in relevant)
    return (Judged(query, [rows[id_] for id_ in relevant[query.query_id]]) for query in asked)


def _summarise(out: Path, counts: dict[str, int]) -> None:
    removed = ", ".join(
        f"{name.removeprefix('removed_')} {number:,}" for name, number in counts.items() if name.startswith("removed_")
    )
    print(
        f"mine: {out}: {counts['examples']:,} queries, {counts['negatives']:,} negatives of {counts['candidates']:,} "
        f"candidates; removed: {removed}",
        file=sys.stderr,
    )
    if WRONG_MODALITY in counts:
        kinds = [
            f"{counts[kind]:,} {kind} ({counts[f'without_{kind}']:,} queries have none)"
            for kind in (WRONG_MODALITY, LOW_RANK)
        ]
        print(f"mine: negatives: {', '.join(kinds)}", file=sys.stderr)
    if counts["without_negatives"]:
        filled = f"{counts['filled']:,} of them got random ones"
        print(f"mine: {counts['without_negatives']:,} queries had no negative left, {filled}", file=sys.stderr)
    if counts["without_positives"]:
        print(f"mine: {counts['without_positives']:,} queries left out: nothing is relevant to them", file=sys.stderr)
