"""Reads a source, checks it, and writes the `corpus` artifact: the one door through which data enters raydr.

Notable: the source is streamed; only ids stay in memory. Every record either arrives in the artifact or is reported,
as an error that names file, line and field, or (`on_error: skip`) in `rejects.jsonl` and in a count. A finished corpus
of the same config and the same source files (name, size, time) is used as it is.

    corpus = ingest(DataConfig(path="data/scifact", split="test"), Path("runs/scifact/corpus"))
    train = ingest_queries(DataConfig(path="data/scifact", split="train"), corpus, Path("runs/scifact/queries"))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from raydr.artifacts import ArtifactWriter, fingerprint, is_finished, write_artifact
from raydr.data.config import DataConfig
from raydr.data.corpus import KIND, PASSAGES, QRELS, QUERIES, QUERIES_KIND, REJECTS, Corpus, QuerySet
from raydr.data.fields import Fields, Names
from raydr.data.metadata import MetadataColumns
from raydr.data.parts import PassageWriter
from raydr.data.problems import BadFieldError, Problems
from raydr.data.records import Record, Records
from raydr.data.sources import Source, open_source
from raydr.data.splitting import DocumentSplitter
from raydr.errors import DataError
from raydr.storage import place
from raydr.types import PASSAGE_ID, QUERY_ID, RELEVANCE, TEXT, Qrels

T = TypeVar("T")

_LAYOUT = 1
"""Raised whenever the same source would be written differently, so that older artifacts are not taken for current."""
_SPLIT_CHARACTERS = 1_000_000
"""So much text is tokenised at once: enough for the tokenizer's threads, little enough for memory."""


def ingest(config: DataConfig, out: str | Path) -> Corpus:
    """The corpus at `out`, made from the source unless it is there already.

    Raises `DataError` for input that cannot be used, `ArtifactError` when `out` holds something else.
    """
    out = place(out)
    source = open_source(config)
    settings = _settings(config, source)
    if is_finished(out, fingerprint(KIND, settings, {})):
        print(f"raydr: {out}: reused, {config.path} is unchanged", file=sys.stderr)
        return Corpus.open(out)
    with (
        write_artifact(out, kind=KIND, config=settings) as artifact,
        _problems(config, artifact) as problems,
    ):
        _Ingestion(config, source, problems, artifact).run()
    corpus = Corpus.open(out)
    _summarise(corpus, problems)
    return corpus


def ingest_queries(config: DataConfig, corpus: Corpus, out: str | Path) -> QuerySet:
    """The queries of the split that `config` names, with their judgements, at `out` (kind "queries").

    They are checked as those of a corpus are; the judgements may only name what `corpus` holds, which is not read from
    the source again. Raises `DataError` when the source has no judgements for the split.
    """
    out = place(out)
    source = open_source(config)
    if not source.qrels:
        raise DataError(f"{config.path}: has no judgements; name their file: data.qrels=FILE")
    settings, inputs = _settings(config, source), {"corpus": corpus.artifact}
    if is_finished(out, fingerprint(QUERIES_KIND, settings, {"corpus": corpus.artifact.fingerprint})):
        print(f"raydr: {out}: reused, {config.path} is unchanged", file=sys.stderr)
        return QuerySet.open(out)
    with (
        write_artifact(out, kind=QUERIES_KIND, config=settings, inputs=inputs) as artifact,
        _problems(config, artifact) as problems,
    ):
        ingestion = _Ingestion(config, source, problems, artifact)
        ingestion.check_queries_are_there()
        ingestion.write_queries(corpus.judged_ids())
    queries = QuerySet.open(out)
    _summarise(queries, problems)
    return queries


def _settings(config: DataConfig, source: Source) -> dict[str, Any]:
    return {"data": config.model_dump(mode="json"), "source": source.stamp, "layout": _LAYOUT}


def _problems(config: DataConfig, artifact: ArtifactWriter) -> Problems:
    return Problems(config.path, artifact.path / REJECTS if config.on_error == "skip" else None)


class _Ingestion:
    """One pass over a source: passages, queries, then the judgements, which may only name what was read before."""

    def __init__(self, config: DataConfig, source: Source, problems: Problems, artifact: ArtifactWriter) -> None:
        self.config, self.source, self.problems, self.artifact = config, source, problems, artifact
        self.metadata = MetadataColumns(config.metadata, config.metadata_types)

    def run(self) -> None:
        self.check_queries_are_there()
        self.write_queries(self._write_passages())
        self.artifact.details |= {"is_split": self.config.split_documents is not None, "metadata": self.metadata.types}

    def check_queries_are_there(self) -> None:
        if self.source.qrels and not self.source.queries:
            raise DataError(f"{self.config.path}: has judgements but no queries; name their file: data.queries=FILE")

    def write_queries(self, passage_ids: Collection[str]) -> None:
        """Writes queries and judgements; these may name `passage_ids` (documents' ids where they are split)."""
        queries = self._read_queries()
        self.problems.check()
        if self.source.qrels:
            qrels = self._read_qrels(passage_ids, queries)
            self.problems.check()
            queries = {query_id: queries[query_id] for query_id in qrels}
            self._write_qrels(qrels)
        table = pa.table(
            {QUERY_ID: pa.array(queries.keys(), pa.string()), TEXT: pa.array(queries.values(), pa.string())}
        )
        pq.write_table(table, self.artifact.path / QUERIES)
        self.artifact.counts |= {"queries": len(queries), "rejected": self.problems.counts.total()}
        self.artifact.details["rejected"] = dict(self.problems.counts)

    def _write_passages(self) -> set[str]:
        """Writes every passage; returns the ids that judgements may name (documents' ids where they are split)."""
        is_split = self.config.split_documents is not None
        writer = PassageWriter(self.artifact.path / PASSAGES, self.metadata, is_split=is_split)
        seen: set[str] = set()
        documents = self._documents(seen)
        if self.config.split_documents is None:
            for document_id, title, text, metadata in documents:
                writer.add(document_id, title, text, metadata, document_id)
        else:
            for document_id, number, title, text, metadata in _split(
                documents, DocumentSplitter(self.config.split_documents)
            ):
                writer.add(f"{document_id}#{number}", title, text, metadata, document_id)
        self.problems.check()
        if not seen:
            rejected = self.problems.counts.total()
            reason = f"all {rejected} records were rejected, see {REJECTS}" if rejected else "the source is empty"
            raise DataError(f"{self.config.path}: has no passages ({reason})")
        self.metadata.check_all_found(self.config.path)
        writer.close()
        self.artifact.counts["passages"] = writer.num_passages
        if is_split:
            self.artifact.counts["documents"] = len(seen)
        return seen

    def _documents(self, seen: set[str]) -> Iterator[tuple[str, str, str, Record]]:
        """Id, title, text and metadata of every passage (or document) that can be used."""

        def parse(record: Record, fields: Fields) -> tuple[str, str, str, Record]:
            passage_id = fields.identifier(record, "passage_id")
            title, text = fields.string(record, "title"), fields.string(record, "text")
            if not text.strip() and not title.strip() and self.config.on_empty == "error":
                raise BadFieldError(fields.name("text"), "is empty", "data.on_empty=keep takes it as an empty passage")
            metadata = self.metadata.convert(record, fields.own)
            _claim(passage_id, seen, fields.name("passage_id"))
            return passage_id, title, text, metadata

        for table in self.source.passages:
            yield from self._parsed(table, self.source.passage_names, parse)

    def _read_queries(self) -> dict[str, str]:
        """Query id -> text, of all queries."""
        queries: dict[str, str] = {}

        def parse(record: Record, fields: Fields) -> tuple[str, str]:
            query_id, text = fields.identifier(record, "query_id"), fields.string(record, "query_text")
            if not text.strip():
                raise BadFieldError(fields.name("query_text"), "is empty")
            if query_id in queries:
                raise BadFieldError(fields.name("query_id"), "duplicate id", repr(query_id))
            return query_id, text

        for table in self.source.queries:
            queries.update(self._parsed(table, self.source.query_names, parse))
        return queries

    def _read_qrels(self, passage_ids: Collection[str], query_ids: Collection[str]) -> Qrels:
        qrels: Qrels = {}

        def parse(record: Record, fields: Fields) -> tuple[str, str, int]:
            query_id = fields.identifier(record, "query_id")
            passage_id = fields.identifier(record, "passage_id")
            relevance = fields.grade(record)
            if query_id not in query_ids:
                raise BadFieldError(fields.name("query_id"), "names an unknown query", repr(query_id))
            if passage_id not in passage_ids:
                raise BadFieldError(fields.name("passage_id"), "names an unknown passage", repr(passage_id))
            if (earlier := qrels.get(query_id, {}).get(passage_id)) is not None:
                detail = f"query {query_id!r} and passage {passage_id!r} have the grade {earlier} already"
                raise BadFieldError(fields.name("passage_id"), "judged twice", detail)
            return query_id, passage_id, relevance

        for table in self.source.qrels:
            for query_id, passage_id, relevance in self._parsed(table, self.source.qrels_names, parse):
                qrels.setdefault(query_id, {})[passage_id] = relevance
        if not qrels:
            names = ", ".join(table.name for table in self.source.qrels)
            self.problems.check()
            raise DataError(f"{names}: no judgement can be used")
        return qrels

    def _write_qrels(self, qrels: Qrels) -> None:
        rows = [(query_id, *grade) for query_id, grades in qrels.items() for grade in grades.items()]
        query_ids, passage_ids, grades = zip(*rows, strict=True)
        columns = {QUERY_ID: query_ids, PASSAGE_ID: passage_ids, RELEVANCE: pa.array(grades, pa.int64())}
        pq.write_table(pa.table(columns), self.artifact.path / QRELS)
        self.artifact.counts["qrels"] = len(rows)

    def _parsed(self, table: Records, names: Names, parse: Callable[[Record, Fields], T]) -> Iterator[T]:
        """What `parse` makes of every record; what it cannot use becomes a problem with its file and line."""
        fields = Fields(table, names)
        # A table that is read in half a second needs no bar.
        bar = tqdm(total=table.size or None, desc=f"read {table.name}", unit=table.unit, unit_scale=True, delay=0.5)
        with bar:
            for line, record in table.read(self.problems, bar.update):
                fields.locate(record)
                try:
                    parsed = parse(record, fields)
                except BadFieldError as error:
                    self.problems.add(table.name, line, error.field, error.reason, record, error.detail)
                else:
                    yield parsed


def _split(
    documents: Iterator[tuple[str, str, str, Record]], splitter: DocumentSplitter
) -> Iterator[tuple[str, int, str, str, Record]]:
    """Document id, number, title, text and metadata of every passage of every document."""
    for batch in _batches(documents):
        texts = [text for _, _, text, _ in batch]
        for (document_id, title, _, metadata), passages in zip(batch, splitter.split(texts), strict=True):
            for number, text in enumerate(passages):
                yield document_id, number, title, text, metadata


def _batches(documents: Iterator[tuple[str, str, str, Record]]) -> Iterator[list[tuple[str, str, str, Record]]]:
    batch: list[tuple[str, str, str, Record]] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document[2])
        if num_characters >= _SPLIT_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _claim(passage_id: str, seen: set[str], field: str) -> None:
    if passage_id in seen:
        raise BadFieldError(field, "duplicate id", repr(passage_id))
    seen.add(passage_id)


def _summarise(written: QuerySet, problems: Problems) -> None:
    counts = written.artifact.manifest.counts
    parts = [f"{counts[name]:,} {name}" for name in ("documents", "passages", "queries", "qrels") if name in counts]
    print(f"raydr: {written.path}: {', '.join(parts)}", file=sys.stderr)
    if problems.counts:
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in problems.counts.most_common())
        print(
            f"raydr: records left out: {problems.counts.total():,} ({reasons}); listed in {written.path / REJECTS}",
            file=sys.stderr,
        )
