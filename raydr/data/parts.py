"""Writes passages as numbered Parquet parts with one schema for all of them.

Notable: parts grow with the corpus (an eighth of what was written before, between 1,024 and 32,768 passages, and never
more than 64 MB of text or 128 MB of pictures), so that a small corpus still gives every worker something to do and a
large one does not become thousands of files. Metadata types may widen while streaming; parts written before are then
rewritten at the end, one at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydr.data.metadata import ARROW_TYPES, MetadataColumns
from raydr.data.records import Record
from raydr.errors import DataError
from raydr.types import DOCUMENT_ID, IMAGE, PASSAGE_ID, POSITION, TEXT, TITLE

_MIN_ROWS, _MAX_ROWS = 1024, 32_768
_GROWTH = 8
_MAX_CHARACTERS = 64_000_000
_MAX_IMAGE_BYTES = 128_000_000


class PassageWriter:
    """Writes `part-00000.parquet`, `part-00001.parquet`, ... into a folder."""

    def __init__(self, folder: Path, metadata: MetadataColumns, *, is_split: bool) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._metadata = metadata
        self._is_split = is_split
        self._rows: list[tuple[str, str, str, str, Record, bytes | None]] = []
        self._num_characters = 0
        self._num_image_bytes = 0
        self._parts: list[tuple[Path, pa.Schema]] = []
        self.num_passages = 0
        self.num_images = 0

    def add(
        self, passage_id: str, title: str, text: str, metadata: Record, document_id: str, image: bytes | None = None
    ) -> None:
        """Adds one passage; `document_id` is written only where documents are split, images where there are any."""
        self._rows.append((passage_id, title, text, document_id, metadata, image))
        self._num_characters += len(text)
        self._num_image_bytes += len(image or b"")
        self.num_images += image is not None
        part_rows = min(_MAX_ROWS, max(_MIN_ROWS, self.num_passages // _GROWTH))
        if (
            len(self._rows) >= part_rows
            or self._num_characters >= _MAX_CHARACTERS
            or self._num_image_bytes >= _MAX_IMAGE_BYTES
        ):
            self._write_part()

    def close(self) -> None:
        """Writes the last part and gives all parts the final schema."""
        if self._rows:
            self._write_part()
        schema = self._schema()
        for path, written in self._parts:
            if written != schema:
                _write(path, _recast(pq.read_table(path), schema))

    def _write_part(self) -> None:
        ids, titles, texts, documents, metadata, images = zip(*self._rows, strict=True)
        positions = range(self.num_passages, self.num_passages + len(ids))
        columns: dict[str, Any] = {PASSAGE_ID: ids, POSITION: positions, TITLE: titles, TEXT: texts}
        if self._is_split:
            columns[DOCUMENT_ID] = documents
        if self.num_images:
            columns[IMAGE] = images
        for name in self._metadata.types:
            columns[name] = [values.get(name) for values in metadata]
        schema = self._schema()
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
        path = self._folder / f"part-{len(self._parts):05d}.parquet"
        _write(path, pa.Table.from_arrays(arrays, schema=schema))
        self._parts.append((path, schema))
        self.num_passages += len(ids)
        self._rows, self._num_characters, self._num_image_bytes = [], 0, 0

    def _schema(self) -> pa.Schema:
        fields = {PASSAGE_ID: pa.string(), POSITION: pa.int64(), TITLE: pa.string(), TEXT: pa.string()}
        if self._is_split:
            fields[DOCUMENT_ID] = pa.string()
        if self.num_images:
            fields[IMAGE] = pa.binary()
        return pa.schema({**fields, **{name: ARROW_TYPES[kind] for name, kind in self._metadata.types.items()}})


def _write(path: Path, table: pa.Table) -> None:
    # Ids, texts, positions and pictures hardly repeat: a dictionary would only cost time.
    dictionary = [name for name in table.column_names if name not in (PASSAGE_ID, POSITION, TEXT, IMAGE)]
    pq.write_table(table, path, compression="zstd", use_dictionary=dictionary)


def _recast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A part with the final schema: columns that came later are null, types that widened are converted."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table[field.name]
        if column.null_count == len(column):  # it had no type yet
            column = pa.nulls(table.num_rows, field.type)
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowInvalid as error:
            raise DataError(
                f"metadata column {field.name!r} mixes fractions with whole numbers too large for float64 ({error}); "
                f"declare it: data.metadata_types.{field.name}=string"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema)
