"""Records of a source, one at a time, with their line numbers: JSON lines, CSV, TSV, judgements, Parquet.

Notable: a record is the plain dict a line holds; nothing is judged here but whether the line can be read at all. What
cannot is handed to `Problems` with file and line, and reading goes on with the next line. Line numbers are those of
the file (of a table without lines: the row, from 1). CSV and TSV values are strings; only ids decide their meaning.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from raydr.data.files import LONGEST_LINE, Advance, SourceFile, read_lines
from raydr.data.problems import Problems
from raydr.errors import DataError

Record: TypeAlias = dict[str, Any]
ROWS, ROWS_WITH_IMAGES = 2048, 32
"""So many rows of a table are in memory at once: fewer where they may hold pictures."""
_BUFFER = 1 << 20


@runtime_checkable
class Records(Protocol):
    """One table of a source."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def size(self) -> int:
        """What `advance` adds up to: bytes of a file, rows of a table; 0 where it is unknown."""
        ...

    @property
    def unit(self) -> str:
        """What `size` counts."""
        ...

    @property
    def fixed_columns(self) -> bool:
        """Whether every record has the same fields, so that a missing one is the table's fault, not the record's."""
        ...

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]: ...


@dataclass(frozen=True)
class _InFile:
    file: SourceFile

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return self.file.num_bytes

    @property
    def unit(self) -> str:
        return "B"

    @property
    def fixed_columns(self) -> bool:
        return True

    def _text_lines(self, problems: Problems, advance: Advance, *, exactly: bool = False) -> Iterator[tuple[int, str]]:
        """Lines that are UTF-8; without blank lines and Windows line ends, unless every character counts."""
        for number, line in read_lines(self.file, advance):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add(self.name, number, None, "not valid UTF-8", line, f"byte {error.start + 1} of the line")
                continue
            if exactly:
                yield number, text
            elif text.strip():
                yield number, text.removesuffix("\r")


@dataclass(frozen=True)
class JsonLines(_InFile):
    """One JSON object per line."""

    @property
    def fixed_columns(self) -> bool:
        return False

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        for number, line in self._text_lines(problems, advance):
            try:
                record = _DECODER.decode(line)
                if "\\ud" in line or "\\uD" in line:  # half of a surrogate pair is no text and cannot be stored
                    json.dumps(record, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                problems.add(self.name, number, None, "holds a lone surrogate (\\ud800...), which is not text", line)
                continue
            except (ValueError, RecursionError) as error:
                problems.add(self.name, number, None, "not valid JSON", line, _explain(error, line))
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                kind = type(record).__name__
                problems.add(self.name, number, None, "not a JSON object", line, f"a {kind}; one object per line")


@dataclass(frozen=True)
class CsvRows(_InFile):
    """A header row, then one record per row; RFC 4180 quoting, so a value may hold line breaks."""

    delimiter: str = ","

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        csv.field_size_limit(LONGEST_LINE)  # the default of 128 KiB is shorter than a long document
        at = _Position()
        reader = csv.reader(
            at.follow(self._text_lines(problems, advance, exactly=True)), delimiter=self.delimiter, strict=True
        )
        header: list[str] | None = None
        while True:
            at.start_record()
            try:
                row = next(reader, None)
            except csv.Error as error:
                problems.add(self.name, at.first, None, "not valid CSV", at.text, str(error))
                continue
            if row is None:
                break
            if not row:  # a blank line
                continue
            if header is None:
                header = self._header(row)
            elif len(row) != len(header):
                detail = f"{len(row)} instead of {len(header)}"
                problems.add(self.name, at.first, None, "wrong number of columns", at.text, detail)
            else:
                yield at.first, dict(zip(header, row, strict=True))
        if header is None:
            raise DataError(f"{self.name}: is empty; a CSV file starts with a header row")

    def _header(self, row: list[str]) -> list[str]:
        twice = sorted({name for name in row if row.count(name) > 1})
        if twice:
            raise DataError(f"{self.name}, line 1: the header names the column {twice[0]!r} twice")
        return row


class _Position:
    """Follows the lines a CSV reader takes, so that a record is known by its first line."""

    def __init__(self) -> None:
        self.first = 0
        self.text = ""

    def start_record(self) -> None:
        self.first = 0

    def follow(self, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
        for number, line in lines:
            if not self.first:
                self.first, self.text = number, line
            yield line + "\n"


@dataclass(frozen=True)
class TsvRows(_InFile):
    """MS MARCO's form: no header, no quoting, a tab between the columns that `names` gives."""

    names: tuple[str, ...]

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        for number, line in self._text_lines(problems, advance):
            row = line.split("\t")
            if len(row) == len(self.names):
                yield number, dict(zip(self.names, row, strict=True))
            else:
                detail = f"{len(row)} instead of {len(self.names)} ({', '.join(self.names)}), with a tab between"
                problems.add(self.name, number, None, "wrong number of columns", line, detail)


@dataclass(frozen=True)
class BeirQrels(_InFile):
    """BEIR's judgements: a header row, then `query-id<TAB>corpus-id<TAB>score`."""

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        for number, line in self._text_lines(problems, advance):
            row = line.split("\t")
            if number == 1:
                if len(row) == 3 and _is_integer(row[2]):
                    reason = "a judgement where the header row (query-id, corpus-id, score) must be"
                    problems.add(self.name, number, None, reason, line)
                continue
            if len(row) == 3:
                yield number, {"query_id": row[0], "passage_id": row[1], "relevance": row[2]}
            else:
                detail = f"{len(row)} instead of 3 (query-id, corpus-id, score), with a tab between"
                problems.add(self.name, number, None, "wrong number of columns", line, detail)


@dataclass(frozen=True)
class TrecQrels(_InFile):
    """TREC's and MS MARCO's judgements: `query-id 0 passage-id grade`, any whitespace between, no header."""

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        for number, line in self._text_lines(problems, advance):
            row = line.split()
            if len(row) == 4:
                yield number, {"query_id": row[0], "passage_id": row[2], "relevance": row[3]}
            else:
                detail = f"{len(row)} instead of 4 (query-id, 0, passage-id, grade)"
                problems.add(self.name, number, None, "wrong number of columns", line, detail)


@dataclass(frozen=True)
class ParquetRows(_InFile):
    """One record per row; `line` is the row's number."""

    columns: tuple[str, ...] | None = None
    """Only these columns are read where they exist; None reads all."""
    has_images: bool = False
    """Whether values may be pictures: then a row group is not read as a whole."""

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        try:
            with self.file.filesystem.open_input_file(self.file.path) as stream:
                table = pq.ParquetFile(
                    stream, buffer_size=_BUFFER if self.has_images else 0, pre_buffer=not self.has_images
                )
                columns = None
                if self.columns is not None:
                    columns = [name for name in table.schema_arrow.names if name in self.columns]
                number, rows = 0, ROWS_WITH_IMAGES if self.has_images else ROWS
                for batch in table.iter_batches(rows, columns=columns):
                    yield from batch_records(self.name, batch, number, problems)
                    number += batch.num_rows
                    advance(self.size * batch.num_rows // table.metadata.num_rows)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
            raise DataError(f"{self.name}: cannot be read as Parquet: {error}") from error


def batch_records(
    name: str, batch: pa.RecordBatch | pa.Table, offset: int, problems: Problems
) -> Iterator[tuple[int, Record]]:
    """The rows of an Arrow batch whose first row is number `offset + 1` of its table."""
    try:
        yield from enumerate(batch.to_pylist(), start=offset + 1)
    except UnicodeDecodeError:  # a writer that lied about its strings: find the rows
        for row in range(batch.num_rows):
            try:
                yield offset + row + 1, batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                problems.add(name, offset + row + 1, None, "not valid UTF-8", error.object)


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _explain(error: ValueError | RecursionError, line: str) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if line.startswith("["):
        return "the file looks like one array; JSON lines have one object per line"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_repeated_keys, parse_constant=_refuse_constant)
