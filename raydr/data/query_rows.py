"""The queries of a corpus on their way to disk: what is kept of each, and the table they become.

Notable: a column is written only where a query has something for it, so that queries of texts alone have an id and a
text. Pictures come one at a time and go into row groups; everything else of a query is small and kept in memory.

    writer = QueryWriter(file, rows.values())
    writer.add("q1", rows["q1"], image)
    writer.close()
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raydr.types import COPIES, EXCLUDED_IDS, IMAGE, INSTRUCTIONS, QUERY_ID, TASK, TEXT

_MAX_BYTES = 64_000_000


class QueryRow(NamedTuple):
    """What is kept of a query beside its id and its picture."""

    text: str
    has_image: bool = False
    instructions: list[str] = []
    task: str = ""
    copies: int | None = None
    excluded_ids: list[str] = []


class QueryWriter:
    """Writes a table of queries into one file, in the order they are added."""

    def __init__(self, file: Path, rows: Collection[QueryRow]) -> None:
        """`rows` are all that may come; they decide the columns."""
        fields = {QUERY_ID: pa.string(), TEXT: pa.string()}
        if any(row.has_image for row in rows):
            fields[IMAGE] = pa.binary()
        if any(row.instructions for row in rows):
            fields[INSTRUCTIONS] = pa.list_(pa.string())
        if any(row.task for row in rows):
            fields[TASK] = pa.string()
        if any(row.copies is not None for row in rows):
            fields[COPIES] = pa.int64()
        if any(row.excluded_ids for row in rows):
            fields[EXCLUDED_IDS] = pa.list_(pa.string())
        self._schema = pa.schema(fields)
        self._writer = pq.ParquetWriter(file, self._schema)
        self._rows: list[tuple[str, QueryRow, bytes | None]] = []
        self._num_bytes = 0
        self.num_queries = 0
        self.num_images = 0

    def add(self, query_id: str, row: QueryRow, image: bytes | None) -> None:
        self._rows.append((query_id, row, image))
        self._num_bytes += len(image or b"")
        self.num_queries += 1
        self.num_images += image is not None
        if self._num_bytes >= _MAX_BYTES:
            self._write()

    def close(self) -> None:
        self._write()
        self._writer.close()

    def _write(self) -> None:
        ids, rows, images = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        columns = {
            QUERY_ID: ids,
            TEXT: [row.text for row in rows],
            IMAGE: images,
            INSTRUCTIONS: [row.instructions for row in rows],
            TASK: [row.task or None for row in rows],
            COPIES: [row.copies or 1 for row in rows],
            EXCLUDED_IDS: [row.excluded_ids for row in rows],
        }
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows, self._num_bytes = [], 0
