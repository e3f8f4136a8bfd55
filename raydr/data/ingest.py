"""Reads a source, checks it, and writes the `corpus` artifact: the one door through which data enters raydr.

Notable: the source is streamed; only ids stay in memory. Every record either arrives in the artifact or is reported,
as an error that names file, line and field, or (`on_error: skip`) in `rejects.jsonl` and in a count. A finished corpus
of the same config and the same source files (name, size, time) is used as it is.

    corpus = ingest(DataConfig(path="data/scifact", split="test"), Path("runs/scifact/corpus"))
    train = ingest_queries(DataConfig(path="data/scifact", split="train"), corpus, Path("runs/scifact/queries"))
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from raydr.artifacts import ArtifactWriter, fingerprint, is_finished, write_artifact
from raydr.data.config import DataConfig
from raydr.data.corpus import KIND, PASSAGES, QRELS, QUERIES, QUERIES_KIND, REJECTS, Corpus, QuerySet
from raydr.data.fields import Fields, Names
from raydr.data.metadata import MetadataColumns
from raydr.data.parts import PassageWriter
from raydr.data.pictures import ImageReader, Origin, Pending, Prepare, prepare_here
from raydr.data.problems import BadFieldError, Problems
from raydr.data.query_rows import QueryRow, QueryWriter
from raydr.data.records import Record, Records
from raydr.data.sources import Source, open_source
from raydr.data.splitting import DocumentSplitter
from raydr.errors import DataError
from raydr.storage import place, remove_folder
from raydr.types import PASSAGE_ID, QUERY_ID, RELEVANCE, Qrels

T = TypeVar("T")

_LAYOUT = 1
"""Raised whenever the same source would be written differently, so that older artifacts are not taken for current."""
_SCRATCH = ".pictures"
_SPLIT_CHARACTERS = 1_000_000
"""So much text is tokenised at once: enough for the tokenizer's threads, little enough for memory."""


def ingest(config: DataConfig, out: str | Path, *, prepare: Prepare = prepare_here) -> Corpus:
    """The corpus at `out`, made from the source unless it is there already; `prepare` prepares its pictures.

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
        _Ingestion(config, source, problems, artifact, prepare).run()
    corpus = Corpus.open(out)
    _summarise(corpus, problems)
    return corpus


def ingest_queries(config: DataConfig, corpus: Corpus, out: str | Path, *, prepare: Prepare = prepare_here) -> QuerySet:
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
        ingestion = _Ingestion(config, source, problems, artifact, prepare)
        ingestion.check_queries_are_there()
        ingestion.write_queries(corpus.judged_ids())
    queries = QuerySet.open(out)
    _summarise(queries, problems)
    return queries


def _settings(config: DataConfig, source: Source) -> dict[str, Any]:
    return {"data": config.recorded(), "source": source.stamp, "layout": _LAYOUT}


def _problems(config: DataConfig, artifact: ArtifactWriter) -> Problems:
    return Problems(config.path, artifact.path / REJECTS if config.on_error == "skip" else None)


class _Document(NamedTuple):
    """A passage, or a document that is split into passages."""

    document_id: str
    title: str
    text: str
    metadata: Record
    image: bytes | None


class _Ingestion:
    """One pass over a source: passages, queries, then the judgements, which may only name what was read before."""

    def __init__(
        self, config: DataConfig, source: Source, problems: Problems, artifact: ArtifactWriter, prepare: Prepare
    ) -> None:
        self.config, self.source, self.problems, self.artifact = config, source, problems, artifact
        self.metadata = MetadataColumns(config.metadata, config.metadata_types, config.reserved)
        self.images = ImageReader.of(config.images, source.folder) if config.images is not None else None
        self.prepare = prepare

    def run(self) -> None:
        self.check_queries_are_there()
        self.write_queries(self._write_passages())
        self.artifact.details |= {"is_split": self.config.split_documents is not None, "metadata": self.metadata.types}

    def check_queries_are_there(self) -> None:
        if self.source.qrels and not self.source.queries:
            raise DataError(f"{self.config.path}: has judgements but no queries; name their file: data.queries=FILE")

    def write_queries(self, passage_ids: Collection[str]) -> None:
        """Writes queries and judgements; these may name `passage_ids` (documents' ids where they are split)."""
        queries = {query_id: row for query_id, row, _ in self._read_queries(self.problems)}
        self.problems.check()
        qrels: Qrels | None = None
        if self.source.qrels:
            qrels = self._read_qrels(passage_ids, queries)
            self.problems.check()
            queries = {query_id: queries[query_id] for query_id in qrels}
        writer = QueryWriter(self.artifact.path / QUERIES, queries.values())
        if any(row.has_image for row in queries.values()):
            self._write_with_images(writer, queries, qrels)
        else:
            for query_id, row in queries.items():
                writer.add(query_id, row, None)
        writer.close()
        if qrels is not None:
            self._write_qrels(qrels)
        self.artifact.counts |= {"queries": writer.num_queries, "rejected": self.problems.counts.total()}
        if self.images is not None:
            self.artifact.counts["query_images"] = writer.num_images
        self.artifact.counts |= self.source.counts()
        self.artifact.details["rejected"] = dict(self.problems.counts)

    def _write_with_images(self, writer: QueryWriter, queries: dict[str, QueryRow], qrels: Qrels | None) -> None:
        """Reads the queries once more, for the pictures of those that are kept, and writes them in their own order.

        A query whose picture is bad is left out, and its judgements with it.
        """
        left_out: list[str] = []
        with Problems(self.config.path, Path(os.devnull)) as quiet:  # what is wrong was told at the first reading
            pending = (picture for query_id, _, picture in self._read_queries(quiet) if query_id in queries)
            for (query_id,), image in self._prepared(pending, left_out):
                writer.add(query_id, queries[query_id], image)
        judgements = self.source.qrels[0].name if self.source.qrels else ""
        judged = qrels if qrels is not None else {}
        for query_id in left_out:
            for passage_id, grade in judged.pop(query_id, {}).items():
                raw = {QUERY_ID: query_id, PASSAGE_ID: passage_id, RELEVANCE: grade}
                self.problems.add(judgements, None, QUERY_ID, "names a query whose picture is bad", raw)
        self.problems.check()

    def _write_passages(self) -> set[str]:
        """Writes every passage; returns the ids that judgements may name (documents' ids where they are split)."""
        is_split = self.config.split_documents is not None
        writer = PassageWriter(self.artifact.path / PASSAGES, self.metadata, is_split=is_split)
        seen: set[str] = set()
        documents = self._documents(seen)
        if self.config.split_documents is None:
            for id_, title, text, metadata, image in documents:
                writer.add(id_, title, text, metadata, id_, image)
        else:
            for (id_, title, _, metadata, image), number, text in _split(
                documents, DocumentSplitter(self.config.split_documents)
            ):
                writer.add(f"{id_}#{number}", title, text, metadata, id_, image)
        self.problems.check()
        if not seen:
            rejected = self.problems.counts.total()
            reason = f"all {rejected} records were rejected, see {REJECTS}" if rejected else "the source is empty"
            raise DataError(f"{self.config.path}: has no passages ({reason})")
        self.metadata.check_all_found(self.config.path)
        writer.close()
        self.artifact.counts["passages"] = writer.num_passages
        if self.images is not None:
            self.artifact.counts["passage_images"] = writer.num_images
        if is_split:
            self.artifact.counts["documents"] = len(seen)
        return seen

    def _documents(self, seen: set[str]) -> Iterator[_Document]:
        """Every passage (or document) that can be used, with its picture prepared; `seen` gets their ids."""

        def parse(record: Record, fields: Fields, line: int) -> Pending:
            passage_id = fields.identifier(record, "passage_id")
            image, origin = self._image(record, fields, line, "image")
            title, text = fields.string(record, "title"), fields.string(record, "text", optional=image is not None)
            is_empty = not text.strip() and not title.strip() and image is None
            if is_empty and self.config.on_empty == "error":
                raise BadFieldError(fields.name("text"), "is empty", "data.on_empty=keep takes it as an empty passage")
            metadata = self.metadata.convert(record, fields.own)
            _claim(passage_id, seen, fields.name("passage_id"))
            return Pending([passage_id, title, text, metadata], image, origin)

        names, left_out = self.source.passage_names, []
        pending = (one for table in self.source.passages for one in self._parsed(table, names, parse, self.problems))
        for row, image in self._prepared(pending, left_out):
            yield _Document._make([*row, image])
        seen.difference_update(left_out)  # only now: an id that comes twice is a fault wherever the first one ended

    def _read_queries(self, problems: Problems) -> Iterator[tuple[str, QueryRow, Pending]]:
        """Id and row of every query that can be used, and its picture, not prepared yet."""
        seen: set[str] = set()

        def parse(record: Record, fields: Fields, line: int) -> tuple[str, QueryRow, Pending]:
            query_id = fields.identifier(record, "query_id")
            image, origin = self._image(record, fields, line, "query_image")
            text = fields.string(record, "query_text", optional=image is not None)
            if not text.strip() and image is None:
                raise BadFieldError(fields.name("query_text"), "is empty")
            row = QueryRow(text, excluded_ids=fields.strings(record, "excluded_ids"))
            if self.images is not None:
                row = row._replace(
                    has_image=image is not None,
                    instructions=fields.strings(record, "instructions"),
                    task=fields.string(record, "task"),
                    copies=fields.count(record, "copies"),
                )
            _claim(query_id, seen, fields.name("query_id"))
            return query_id, row, Pending([query_id], image, origin)

        for table in self.source.queries:
            yield from self._parsed(table, self.source.query_names, parse, problems)

    def _image(self, record: Record, fields: Fields, line: int, role: str) -> tuple[bytes | str | None, Origin]:
        """The picture of a record as it is found, and where it was."""
        if self.images is None:
            return None, Origin(fields.table, line, "", "")
        field = fields.name(role)
        return self.images.find(field, fields.value(record, role)), Origin(fields.table, line, field, record)

    def _prepared(self, pending: Iterator[Pending], left_out: list[str]) -> Iterator[tuple[list[Any], bytes | None]]:
        """Rows with their pictures, in order; a bad picture becomes a problem, and its row's id is one `left_out`."""
        if self.images is None:
            yield from ((one.row, None) for one in pending)
            return
        scratch = self.artifact.path / _SCRATCH
        for row, image, origin, error in self.prepare(pending, self.images, scratch):
            if error is None:
                yield row, image
            else:
                self.problems.add(*origin[:3], f"picture {error.reason}", origin.raw, error.detail)
                left_out.append(row[0])
        remove_folder(scratch)

    def _read_qrels(self, passage_ids: Collection[str], query_ids: Collection[str]) -> Qrels:
        qrels: Qrels = {}

        def parse(record: Record, fields: Fields, line: int) -> tuple[str, str, int]:
            del line
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

        names = self.source.qrels_names
        for table in self.source.qrels:
            for query_id, passage_id, relevance in self._parsed(table, names, parse, self.problems):
                qrels.setdefault(query_id, {})[passage_id] = relevance
        return qrels

    def _write_qrels(self, qrels: Qrels) -> None:
        """Raises `DataError` when there are none."""
        if not qrels:
            names = ", ".join(table.name for table in self.source.qrels)
            raise DataError(f"{names}: no judgement can be used")
        rows = [(query_id, *grade) for query_id, grades in qrels.items() for grade in grades.items()]
        query_ids, passage_ids, grades = zip(*rows, strict=True)
        columns = {QUERY_ID: query_ids, PASSAGE_ID: passage_ids, RELEVANCE: pa.array(grades, pa.int64())}
        pq.write_table(pa.table(columns), self.artifact.path / QRELS)
        self.artifact.counts["qrels"] = len(rows)

    def _parsed(
        self, table: Records, names: Names, parse: Callable[[Record, Fields, int], T], problems: Problems
    ) -> Iterator[T]:
        """What `parse` makes of every record and its line; what it cannot use becomes a problem with file and line."""
        fields = Fields(table, names)
        # A table that is read in half a second needs no bar.
        bar = tqdm(total=table.size or None, desc=f"read {table.name}", unit=table.unit, unit_scale=True, delay=0.5)
        with bar:
            for line, record in table.read(problems, bar.update):
                fields.locate(record)
                try:
                    parsed = parse(record, fields, line)
                except BadFieldError as error:
                    problems.add(table.name, line, error.field, error.reason, record, error.detail)
                else:
                    yield parsed


def _split(documents: Iterator[_Document], splitter: DocumentSplitter) -> Iterator[tuple[_Document, int, str]]:
    """Document, number and text of every passage of every document."""
    for batch in _batches(documents):
        for document, passages in zip(batch, splitter.split([one.text for one in batch]), strict=True):
            for number, text in enumerate(passages):
                yield document, number, text


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + len(document.image or b"")
        if size >= _SPLIT_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _claim(id_: str, seen: set[str], field: str) -> None:
    if id_ in seen:
        raise BadFieldError(field, "duplicate id", repr(id_))
    seen.add(id_)


def _summarise(written: QuerySet, problems: Problems) -> None:
    counts = written.artifact.manifest.counts
    names = ("documents", "passages", "passage_images", "queries", "query_images", "qrels")
    parts = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if name in counts]
    print(f"raydr: {written.path}: {', '.join(parts)}", file=sys.stderr)
    if problems.counts:
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in problems.counts.most_common())
        print(
            f"raydr: records left out: {problems.counts.total():,} ({reasons}); listed in {written.path / REJECTS}",
            file=sys.stderr,
        )
