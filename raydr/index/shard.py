"""A shard: `vectors.faiss` beside `passages.arrow`, row-aligned and memory-mapped. Knows nothing of Ray.

Notable: row i of both files is the same passage, so looking a passage up is a `take` from memory-mapped Arrow, without
a database, and copying one folder moves a shard. Sparse embeddings lie in `postings.arrow` instead. Deleted rows are a
mask over files that never change. `VectorIndex` is the same thing in memory, for a notebook or a test.

    index = VectorIndex("Flat")
    index.add(["a", "b"], encoder.encode_passages(passages))
    index.search(encoder.encode_queries(queries), k=10)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int8, Int64
from scipy.sparse import csr_array

from raydr.artifacts import FileRecord, bring, checked
from raydr.data.arrow_rows import ArrowRows
from raydr.data.passages import has_pictures
from raydr.errors import ArtifactError, ConfigError
from raydr.index.config import Device, SearchParameters
from raydr.index.filters import Filters, row_mask
from raydr.index.postings import Postings
from raydr.index.topk import empty
from raydr.index.vectors import Vectors, create
from raydr.protocols import TopK
from raydr.types import IMAGE, MODALITIES, PASSAGE_ID, TEXT, TITLE, Embeddings

VECTORS = "vectors.faiss"
POSTINGS = "postings.arrow"
PASSAGES = "passages.arrow"
_BATCH_ROWS = 8192


class PassageIds(Sequence[str]):
    """Ids by row, kept in Arrow: a string is made for each id asked for, not for each row there is."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        ids = column.cast(pa.large_string()).combine_chunks()
        self._ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, row: int | np.integer) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | np.integer | slice) -> str | list[str]:
        found = self._ids[row if isinstance(row, slice) else int(row)]
        return found.to_pylist() if isinstance(row, slice) else found.as_py()

    def take(self, rows: Int64[np.ndarray, " hit"]) -> np.ndarray:
        """The ids of `rows`, as an object array of str."""
        return self.column(rows).to_numpy(zero_copy_only=False)

    def column(self, rows: Int64[np.ndarray, " hit"]) -> pa.LargeStringArray:
        """The ids of `rows`, left in Arrow."""
        return self._ids.take(pa.array(rows))

    def where(self, ids: Collection[str]) -> Int64[np.ndarray, " row"]:
        """The rows, ascending, whose id is one of `ids`."""
        wanted = pa.array(list(ids), type=pa.large_string())
        return np.flatnonzero(pc.is_in(self._ids, value_set=wanted).to_numpy(zero_copy_only=False).astype(bool))


class Shard:
    """One shard on disk. Where its files' records are known, each is compared with its own when it is first used, and
    `ArtifactError` names the one that was damaged; without, opening reads nothing but headers.
    """

    def __init__(
        self,
        path: Path,
        *,
        files: Mapping[str, FileRecord] | None = None,
        deleted: Int64[np.ndarray, " deleted"] | None = None,
        device: Device = "cpu",
        num_threads: int | None = None,
        parameters: SearchParameters | None = None,
    ) -> None:
        self.path = path
        self._files = files or {}
        self._rows = ArrowRows.open(self._file(PASSAGES))
        self.table = self._rows.table
        self._device = device
        self._num_threads = num_threads
        self._parameters = parameters or SearchParameters()
        self.alive: Bool[np.ndarray, " row"] | None = None
        if deleted is not None and len(deleted):
            self.alive = np.ones(self.num_rows, dtype=bool)
            self.alive[deleted] = False

    @cached_property
    def vectors(self) -> Vectors | Postings:
        is_sparse = POSTINGS in self._files or (not self._files and (self.path / POSTINGS).is_file())
        if is_sparse:
            vectors = Postings.read(self._file(POSTINGS))
        else:
            vectors = Vectors.read(self._file(VECTORS), device=self._device, num_threads=self._num_threads)
        if vectors.num_rows != self.num_rows:
            raise ArtifactError(
                f"{self.path}: {vectors.num_rows} embeddings beside {self.num_rows} passages; build the index again"
            )
        return vectors

    def _file(self, name: str) -> Path:
        record = self._files.get(name)
        return bring(self.path / name) if record is None else checked(self.path / name, record)

    @property
    def num_rows(self) -> int:
        """Rows on disk, deleted ones included."""
        return self.table.num_rows

    @cached_property
    def passage_ids(self) -> PassageIds:
        return PassageIds(self.table.column(PASSAGE_ID))

    def search(
        self,
        embeddings: Embeddings,
        k: int,
        allowed: Bool[np.ndarray, " passage"] | None = None,
        *,
        parameters: SearchParameters | None = None,
    ) -> TopK:
        """The `k` best live rows per query, only among `allowed` ones; `parameters` override the index's own."""
        if self.alive is not None:
            allowed = self.alive if allowed is None else allowed & self.alive
        if isinstance(self.vectors, Postings):
            return self.vectors.search(embeddings, k, ids_of=self.passage_ids.take, allowed=allowed)
        given = parameters.model_dump(exclude_none=True) if parameters else {}
        settings = self._parameters.model_copy(update=given)
        queries = dense(embeddings)
        return self.vectors.search(queries, k, ids_of=self.passage_ids.take, allowed=allowed, parameters=settings)

    def warm_up(self) -> None:
        """Opens the embeddings and searches once."""
        nothing = np.zeros((1, self.vectors.dim), dtype=np.float32)
        self.search(csr_array(nothing) if isinstance(self.vectors, Postings) else nothing, 1)

    def select(
        self,
        filters: Filters | None = None,
        *,
        allow_ids: Collection[str] | None = None,
        exclude_ids: Collection[str] = (),
    ) -> Bool[np.ndarray, " row"]:
        """The live rows that pass the filters. Raises `FilterError` naming the field that is wrong."""
        mask = row_mask(self.table, filters, allow_ids=allow_ids, exclude_ids=exclude_ids)
        return mask if self.alive is None else mask & self.alive

    def modalities(self) -> Int8[np.ndarray, " row"]:
        """What every row is made of, as its place in `types.MODALITIES`; no picture is read."""
        text, image, both = map(MODALITIES.index, ("text", "image", "image,text"))
        if not has_pictures(self.table.schema):
            return np.full(self.num_rows, text, dtype=np.int8)
        parts = []
        for batch in self.table.select([TITLE, TEXT, IMAGE]).to_batches():
            words = [pc.utf8_trim_whitespace(pc.fill_null(batch[name], "")) for name in (TITLE, TEXT)]
            has_text = pc.or_(*(pc.not_equal(own, "") for own in words)).to_numpy(zero_copy_only=False)
            has_image = batch[IMAGE].is_valid().to_numpy(zero_copy_only=False)
            parts.append(np.where(has_image, np.where(has_text, both, image), text).astype(np.int8))
        return np.concatenate([np.zeros(0, dtype=np.int8), *parts])

    def take(self, rows: Sequence[int] | Int64[np.ndarray, " hit"], columns: Sequence[str] | None = None) -> pa.Table:
        """The passages of `rows`, in that order. Only the batches that hold them are touched."""
        return self._rows.take(rows, columns)

    def passages(self, rows: Sequence[int] | Int64[np.ndarray, " hit"]) -> list[dict[str, Any]]:
        """passage_id, title, text and metadata of each of `rows`, in that order."""
        return self.take(rows).to_pylist()


class VectorIndex:
    """An index in memory: `protocols.Index` over any FAISS factory that needs no training, by default an exact one."""

    def __init__(self, factory: str = "Flat", dim: int | None = None) -> None:
        self._factory = factory
        self._dim = dim
        self._vectors: Vectors | None = None
        self._ids: list[str] = []

    @property
    def passage_ids(self) -> Sequence[str]:
        return self._ids

    def add(self, passage_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Appends rows. Raises `ConfigError` on ids that are there already, or a dimension that differs."""
        matrix = dense(embeddings)
        if len(passage_ids) != len(matrix):
            raise ConfigError(f"{len(passage_ids)} passage ids for {len(matrix)} embeddings; one each is needed")
        if len({*self._ids, *passage_ids}) != len(self._ids) + len(passage_ids):
            raise ConfigError("a passage id was added twice; ids are unique in an index")
        if self._vectors is None:
            self._vectors = self._create(self._dim or matrix.shape[1])
        if matrix.shape[1] != self._vectors.dim:
            raise ConfigError(f"embeddings of dimension {matrix.shape[1]} for an index of {self._vectors.dim}")
        self._vectors.add(matrix)
        self._ids += passage_ids

    def search(self, embeddings: Embeddings, k: int, *, allowed: Bool[np.ndarray, " passage"] | None = None) -> TopK:
        """The `k` best rows per query, ties by passage id."""
        queries = dense(embeddings)
        if self._vectors is None:
            return empty(len(queries), k)
        return self._vectors.search(queries, k, ids_of=self._take, allowed=allowed)

    def _take(self, rows: Int64[np.ndarray, " hit"]) -> np.ndarray:
        return np.array([self._ids[row] for row in rows], dtype=object)

    def _create(self, dim: int) -> Vectors:
        index = create(self._factory, dim)
        if not index.is_trained:
            raise ConfigError(f"{self._factory!r} must be trained first; use raydr.index.build, or Flat or HNSW32 here")
        return Vectors(index)


def finite(embeddings: Embeddings) -> Embeddings:
    """`embeddings`, dense or sparse. Raises `ConfigError` where they hold what is no number."""
    if not isinstance(embeddings, csr_array):
        return dense(embeddings)
    if not np.isfinite(embeddings.data).all():
        raise ConfigError("embeddings hold NaN or infinity; look at the encoder's precision")
    return embeddings


def dense(embeddings: Embeddings) -> Float32[np.ndarray, "row dim"]:
    """`embeddings`, finite and dense. Raises `ConfigError` otherwise."""
    if not isinstance(embeddings, np.ndarray):
        raise ConfigError("dense embeddings are needed here, and these are sparse: another encoder's")
    if not np.isfinite(embeddings).all():
        raise ConfigError("embeddings hold NaN or infinity; look at the encoder's precision")
    return embeddings


def write_passages(path: Path, tables: Iterable[pa.Table]) -> None:
    """Writes `passages.arrow` from tables of one schema, in batches small enough to be taken from cheaply."""
    writer = None
    try:
        for table in tables:
            table = _plain(table)
            writer = writer or pa.ipc.new_file(path, table.schema)
            writer.write_table(table, max_chunksize=_BATCH_ROWS)
    finally:
        if writer is not None:
            writer.close()


def _plain(table: pa.Table) -> pa.Table:
    """The table without metadata and dictionary encoding, which filters and appended batches would have to follow."""
    types = [t.value_type if pa.types.is_dictionary(t) else t for t in table.schema.types]
    return table.cast(pa.schema(list(zip(table.column_names, types, strict=True))))
