"""Rows by number out of memory-mapped Arrow: only the parts that hold some of them are touched.

Notable: pyarrow's own `take` on a table of several batches first joins all of them, which for a large file is a copy of
the whole of it (and fails beyond 2 GiB of text). Passages are looked up by the million, so parts are taken from alone.

    rows = ArrowRows.open(folder / "passages.arrow")
    rows.take([7, 3], ["passage_id", "text"])
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from raydr.errors import ArtifactError


@contextmanager
def readable(path: Path) -> Generator[None]:
    """Makes what Arrow says of a damaged file, or of one without a column, an `ArtifactError` that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}; make the artifact again") from error


class ArrowRows:
    """A table whose rows are looked up by number."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._batches = table.to_batches()
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @classmethod
    def open(cls, path: Path) -> ArrowRows:
        """The table in an Arrow IPC file, memory-mapped. Raises `ArtifactError` when it is none."""
        with readable(path):
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            table.validate()
        return cls(table)

    def take(self, rows: Sequence[int] | Int64[np.ndarray, " hit"], columns: Sequence[str] | None = None) -> pa.Table:
        """The given columns (None: all) of `rows`, in that order."""
        names = self.table.column_names if columns is None else list(columns)
        wanted = np.asarray(rows, dtype=np.int64)
        if not len(wanted):
            return self.table.select(names).slice(0, 0)

        def take(number: int, places: np.ndarray) -> pa.Table:
            return pa.Table.from_batches([self._batches[number].select(names).take(pa.array(places))])

        return gather(take, self._first_rows, wanted)


def gather(
    take: Callable[[int, Int64[np.ndarray, " place"]], pa.Table],
    first_rows: Int64[np.ndarray, " boundary"],
    rows: Int64[np.ndarray, " hit"],
) -> pa.Table:
    """Rows that lie in several parts, in the order asked for; there must be at least one.

    Part i holds the rows `first_rows[i]` to `first_rows[i + 1]` (exclusive), and `take(i, places)` gives rows of it by
    their places within the part.
    """
    numbers = np.searchsorted(first_rows, rows, side="right") - 1
    by_part = np.argsort(numbers, kind="stable")
    parts = [
        take(int(number), rows[by_part][numbers[by_part] == number] - first_rows[number])
        for number in np.unique(numbers)
    ]
    back = np.empty(len(rows), dtype=np.int64)
    back[by_part] = np.arange(len(rows))
    return pa.concat_tables(parts).combine_chunks().take(pa.array(back))
