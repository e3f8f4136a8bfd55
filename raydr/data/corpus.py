"""The corpus artifact: checked passages, queries and judgements, as every verb reads them.

corpus = Corpus.open("runs/a/corpus")
for table in corpus.passages(["passage_id", "text"]): ...
corpus.queries(); corpus.qrels()                for query in corpus.stream(): ... where there are pictures
QuerySet.open("runs/a/queries").qrels()         the queries of another split over the same passages
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import Artifact, open_artifact
from raydr.data.arrow_rows import readable
from raydr.data.images import ImageConfig
from raydr.data.passages import has_pictures
from raydr.errors import DataError
from raydr.types import (
    COPIES,
    DOCUMENT_ID,
    EXCLUDED_IDS,
    IMAGE,
    INSTRUCTIONS,
    PASSAGE_ID,
    POSITION,
    QUERY_ID,
    RELEVANCE,
    TASK,
    TEXT,
    TITLE,
    Qrels,
    Query,
)

KIND = "corpus"
QUERIES_KIND = "queries"
PASSAGES = "passages"
QUERIES = "queries.parquet"
QRELS = "qrels.parquet"
REJECTS = "rejects.jsonl"
_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class QuerySet:
    """Queries and their judgements on disk."""

    artifact: Artifact

    @classmethod
    def open(cls, path: str | Path) -> QuerySet:
        """Raises `ArtifactError` when there are no finished queries at `path`."""
        return cls(open_artifact(path, kind=QUERIES_KIND))

    @property
    def path(self) -> Path:
        return self.artifact.path

    def queries(self) -> list[Query]:
        """The queries that have judgements, or all of them where there are no judgements."""
        return list(self.stream())

    def stream(self) -> Iterator[Query]:
        """The same, one after the other: the pictures of a few are in memory at a time."""
        with readable(self.path / QUERIES), pq.ParquetFile(self.path / QUERIES) as file:
            names = file.schema_arrow.names
            columns = [name for name in (QUERY_ID, TEXT, IMAGE, INSTRUCTIONS) if name in names]
            for batch in file.iter_batches(batch_size=_QUERIES_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    instruction = next(iter(row.get(INSTRUCTIONS) or ()), "")
                    yield Query(row[QUERY_ID], row[TEXT] or "", row.get(IMAGE), instruction)

    def query_ids(self) -> list[str]:
        """The ids of `queries()`, in their order."""
        with readable(self.path / QUERIES):
            return pq.read_table(self.path / QUERIES, columns=[QUERY_ID])[QUERY_ID].to_pylist()

    @property
    def has_query_pictures(self) -> bool:
        """Whether queries may have pictures."""
        with readable(self.path / QUERIES):
            return has_pictures(pq.read_schema(self.path / QUERIES))

    def instructions(self) -> dict[str, list[str]]:
        """All wordings of the instruction of each query that has one; the first is the one it is searched with."""
        known: dict[tuple[str, ...], list[str]] = {}  # a million queries share a few instructions
        given = self._column(INSTRUCTIONS)
        return {id_: known.setdefault(tuple(wordings), wordings) for id_, wordings in given.items() if wordings}

    def copies(self) -> dict[str, int]:
        """How often an epoch of training shows each query for which that is said."""
        return {query_id: copies for query_id, copies in self._column(COPIES).items() if copies is not None}

    def tasks(self) -> dict[str, str]:
        """The task of each query that has one."""
        return {query_id: task for query_id, task in self._column(TASK).items() if task}

    def excluded(self) -> dict[str, list[str]]:
        """What is no answer to a query, of each query for which that is said; evaluations drop such hits."""
        return {query_id: ids for query_id, ids in self._column(EXCLUDED_IDS).items() if ids}

    def _column(self, name: str) -> dict[str, Any]:
        """Query id -> value of a column; nothing where the queries have no such column."""
        with readable(self.path / QUERIES):
            if name not in pq.read_schema(self.path / QUERIES).names:
                return {}
            table = pq.read_table(self.path / QUERIES, columns=[QUERY_ID, name])
        return dict(zip(table[QUERY_ID].to_pylist(), table[name].to_pylist(), strict=True))

    @property
    def has_qrels(self) -> bool:
        return (self.path / QRELS).is_file()

    def qrels(self) -> Qrels:
        """The judgements; they name documents where documents were split. Raises `DataError` when there are none."""
        if not self.has_qrels:
            raise DataError(f"{self.path}: has no judgements (qrels)")
        with readable(self.path / QRELS):
            table = pq.read_table(self.path / QRELS, columns=[QUERY_ID, PASSAGE_ID, RELEVANCE])
        qrels: Qrels = {}
        rows = zip(*(table[name].to_pylist() for name in (QUERY_ID, PASSAGE_ID, RELEVANCE)), strict=True)
        for query_id, passage_id, relevance in rows:
            qrels.setdefault(query_id, {})[passage_id] = relevance
        return qrels


@dataclass(frozen=True)
class Corpus(QuerySet):
    """A finished corpus on disk: passages, with the queries and judgements of a split where there are any."""

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Raises `ArtifactError` when there is no finished corpus at `path`."""
        return cls(open_artifact(path, kind=KIND))

    @property
    def name(self) -> str:
        """What dashboards and logs call it: the last part of the path it was read from."""
        source = self.artifact.manifest.config.get("data", {}).get("path", self.path)
        return Path(str(source)).name

    @property
    def num_passages(self) -> int:
        return self.artifact.manifest.counts["passages"]

    @property
    def is_split(self) -> bool:
        """Whether passages were cut from longer documents: a `document_id` column exists and qrels name documents."""
        return bool(self.artifact.manifest.details["is_split"])

    @property
    def images(self) -> ImageConfig | None:
        """How its pictures were prepared; None where none were read."""
        settings = self.artifact.manifest.config.get("data", {}).get("images")
        return None if settings is None else ImageConfig.model_validate(settings)

    @property
    def metadata_columns(self) -> list[str]:
        """Names of the further columns carried from the source."""
        return list(self.artifact.manifest.details["metadata"])

    @property
    def passage_files(self) -> list[Path]:
        """The Parquet parts in the order of their positions."""
        return sorted((self.path / PASSAGES).glob("part-*.parquet"))

    def passages(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """One table per part, in order; `columns` limits what is read."""
        for file in self.passage_files:
            with readable(file):
                table = pq.read_table(file, columns=list(columns) if columns is not None else None)
            yield table

    @property
    def has_pictures(self) -> bool:
        """Whether passages may have pictures."""
        return bool(self.passage_files) and has_pictures(pq.read_schema(self.passage_files[0]))

    @property
    def encoded_columns(self) -> list[str]:
        """What an encoder wants to know of a passage, and which one it is."""
        return [PASSAGE_ID, POSITION, TITLE, TEXT, *([IMAGE] if self.has_pictures else [])]

    def judged_ids(self) -> set[str]:
        """The ids that judgements may name: those of the passages, or of the documents where they were split."""
        name = DOCUMENT_ID if self.is_split else PASSAGE_ID
        return {id_ for table in self.passages([name]) for id_ in table[name].to_pylist()}
