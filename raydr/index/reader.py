"""Reading an index: the state it had when it was opened, its shards, its passages, its BM25 side. No Ray.

Notable: opening reads the manifest; embeddings, passages and BM25 are compared with their checksums and mapped when
first used. Rows of the whole index number the shards' rows one shard after the other; they never leave `index/` and its
callers in batch.

    reader = IndexReader.open("runs/demo/index")
    top = reader.search(embeddings, k=10, allowed=reader.select({"package": "numpy"}))
    reader.passages(top.rows[top.rows >= 0])
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int8, Int64
from scipy.sparse import csr_array, vstack

from raydr.artifacts import Artifact, open_artifact
from raydr.config import Component
from raydr.data.arrow_rows import gather
from raydr.data.passages import has_pictures
from raydr.errors import ArtifactError
from raydr.index.bm25 import BM25
from raydr.index.config import Device, SearchParameters
from raydr.index.filters import Filters
from raydr.index.layout import KIND, IndexDetails, ShardRecord, read_deleted, read_details, shard_path
from raydr.index.shard import PASSAGES, PassageIds, Shard, finite
from raydr.index.topk import TopK, merge
from raydr.storage import bucket_of, reach
from raydr.types import DOCUMENT_ID, MODALITIES, PASSAGE_ID, Embeddings, Modality


class IndexReader:
    """An index on disk, as it was when opened; later additions and deletions are seen by opening it again."""

    def __init__(self, artifact: Artifact, *, device: Device = "cpu", num_threads: int | None = None) -> None:
        self.artifact = artifact
        self.details: IndexDetails = read_details(artifact)
        self._device: Device = device
        self._num_threads = num_threads
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | Path, *, device: Device = "cpu", num_threads: int | None = None) -> IndexReader:
        """Raises `ArtifactError` when there is no finished index at `path`. `num_threads`: FAISS threads per search."""
        return cls(open_artifact(path, kind=KIND, later=True), device=device, num_threads=num_threads)

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def version(self) -> str:
        """Hash of the index's content."""
        return self.details.version

    @property
    def encoder_version(self) -> str:
        """Stamp of the encoder that made the embeddings; queries must come from an encoder with the same stamp."""
        return self.details.encoder_version

    @property
    def method(self) -> Component:
        """The method whose encoder made the embeddings."""
        return self.details.method

    @property
    def dim(self) -> int:
        return self.details.dim

    @property
    def num_shards(self) -> int:
        return len(self.details.shards)

    @property
    def num_rows(self) -> int:
        """Rows of all shards, deleted ones included."""
        return self.details.num_rows

    @property
    def num_passages(self) -> int:
        """Passages that can be found."""
        return self.details.num_rows - self.details.num_deleted

    def shard(self, number: int) -> Shard:
        if number not in self._shards:
            record = self.details.shards[number]
            self._shards[number] = open_shard(
                self.path,
                record,
                parameters=self.details.search,
                device=self._device,
                num_threads=self._num_threads,
            )
        return self._shards[number]

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the passages, the same in every shard; of one in a bucket no more than the file's end is read."""
        if bucket_of(self.path) is None:
            return self.shard(0).table.schema
        filesystem, (file,) = reach([shard_path(self.path, self.details.shards[0].name) / PASSAGES])
        with filesystem.open_input_file(file) as stream:
            return pa.ipc.open_file(stream).schema

    @property
    def shards(self) -> list[Shard]:
        return [self.shard(number) for number in range(self.num_shards)]

    @cached_property
    def first_rows(self) -> Int64[np.ndarray, " boundary"]:
        """First row of each shard in the numbering of the whole index, and the number of rows at the end."""
        return np.cumsum([0, *(record.num_rows for record in self.details.shards)], dtype=np.int64)

    @cached_property
    def passage_ids(self) -> PassageIds:
        """Ids by row of the whole index."""
        return self._ids(PASSAGE_ID)

    @cached_property
    def document_ids(self) -> PassageIds:
        """The document each row was cut from, by row of the whole index; the passage itself where none was split."""
        return self._ids(DOCUMENT_ID if self.details.is_split else PASSAGE_ID)

    @property
    def has_pictures(self) -> bool:
        """Whether passages may have pictures."""
        return has_pictures(self.schema)

    @cached_property
    def modalities(self) -> Int8[np.ndarray, " row"]:
        """What every row of the whole index is made of, deleted ones included, as its place in `types.MODALITIES`."""
        return np.concatenate([shard.modalities() for shard in self.shards])

    def modalities_of(self, ids: Collection[str]) -> dict[str, Modality]:
        """What each passage (or document, where they were split: all its passages together) is made of.

        Ids that are not there are left out.
        """
        found: dict[str, Modality] = {}
        for id_, rows in self.rows_of(ids).items():
            own: set[Modality] = {MODALITIES[place] for place in self.modalities[rows].tolist()}
            found[id_] = own.pop() if len(own) == 1 else "image,text"
        return found

    def _ids(self, name: str) -> PassageIds:
        columns = [shard.table.column(name) for shard in self.shards]
        return PassageIds(pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=pa.string()))

    @cached_property
    def bm25(self) -> BM25:
        """The BM25 side, over rows of the whole index. Raises `ArtifactError` when the index was built without one."""
        if self.details.bm25 is None:
            raise ArtifactError(f"{self.path}: built without BM25; build it with index.bm25={{}} or search mode=dense")
        self.artifact.verify(self.details.bm25)
        return BM25.open(self.path / self.details.bm25)

    def search(
        self,
        embeddings: Embeddings,
        k: int,
        *,
        allowed: Bool[np.ndarray, " passage"] | None = None,
        parameters: SearchParameters | None = None,
    ) -> TopK:
        """The `k` best rows of the whole index per query, every shard searched in this process."""
        queries = finite(embeddings)
        parts = [
            shift(shard.search(queries, k, self.part(allowed, number), parameters=parameters), first)
            for number, (shard, first) in enumerate(zip(self.shards, self.first_rows, strict=False))
        ]
        return merge(parts, k, self.passage_ids.take)

    def search_bm25(self, texts: Sequence[str], k: int, *, allowed: Bool[np.ndarray, " passage"] | None = None) -> TopK:
        """The `k` best rows of the whole index per query text by BM25; deleted rows are never found."""
        if self.details.num_deleted:
            alive = self.select()
            allowed = alive if allowed is None else allowed & alive
        return self.bm25.search(texts, k, ids_of=self.passage_ids.take, allowed=allowed)

    def select(
        self,
        filters: Filters | None = None,
        *,
        allow_ids: Collection[str] | None = None,
        exclude_ids: Collection[str] = (),
    ) -> Bool[np.ndarray, " row"]:
        """The live rows of the whole index that pass the filters. Raises `FilterError` naming the wrong field."""
        return np.concatenate([s.select(filters, allow_ids=allow_ids, exclude_ids=exclude_ids) for s in self.shards])

    def part(self, allowed: Bool[np.ndarray, " passage"] | None, number: int) -> Bool[np.ndarray, " row"] | None:
        """The slice of a mask over the whole index that belongs to one shard."""
        return None if allowed is None else allowed[self.first_rows[number] : self.first_rows[number + 1]]

    def passages(self, rows: Sequence[int] | Int64[np.ndarray, " hit"]) -> list[dict[str, Any]]:
        """passage_id, title, text and metadata of rows of the whole index (none of them -1), in that order."""
        return self.take(rows).to_pylist()

    def take(self, rows: Sequence[int] | Int64[np.ndarray, " hit"], columns: Sequence[str] | None = None) -> pa.Table:
        """The same as a table of the given columns (None: of all)."""
        wanted = np.asarray(rows, dtype=np.int64)
        if not len(wanted):
            return self.shard(0).take(wanted, columns)
        return gather(lambda number, places: self.shard(number).take(places, columns), self.first_rows, wanted)

    @property
    def is_sparse(self) -> bool:
        """Whether its embeddings are sparse, as its queries' have to be."""
        return self.details.weight_type is not None

    def embeddings(self, rows: Int64[np.ndarray, " row"]) -> Embeddings:
        """The embeddings of rows of the whole index, as far as its coding keeps them."""
        numbers = np.searchsorted(self.first_rows, rows, side="right") - 1
        if self.is_sparse:
            return self._sparse_embeddings(rows, numbers)
        found = np.empty((len(rows), self.dim), dtype=np.float32)
        for number in np.unique(numbers).tolist():
            own = numbers == number
            vectors: Any = self.shard(number).vectors
            found[own] = vectors.embeddings(rows[own] - self.first_rows[number])
        return found

    def _sparse_embeddings(self, rows: Int64[np.ndarray, " row"], numbers: Int64[np.ndarray, " row"]) -> csr_array:
        places, parts = [np.zeros(0, dtype=np.int64)], [csr_array((0, self.dim), dtype=np.float32)]
        for number in np.unique(numbers).tolist():
            places.append(np.flatnonzero(numbers == number))
            vectors: Any = self.shard(number).vectors
            parts.append(vectors.embeddings(rows[places[-1]] - self.first_rows[number]))
        return csr_array(vstack(parts, format="csr")[np.argsort(np.concatenate(places))])

    def rows_of(self, ids: Collection[str]) -> dict[str, Int64[np.ndarray, " _"]]:
        """The live row of each passage id, or, where documents were split, those of each document's passages in order.

        Ids that are not there are left out.
        """
        column = self.document_ids if self.details.is_split else self.passage_ids
        rows = column.where(ids)
        if self.details.num_deleted:
            rows = rows[self.select()[rows]]
        found: dict[str, list[int]] = {}
        for id_, row in zip(column.take(rows), rows.tolist(), strict=True):
            found.setdefault(id_, []).append(row)
        return {id_: np.array(own, dtype=np.int64) for id_, own in found.items()}


def open_shard(
    root: Path, record: ShardRecord, *, parameters: SearchParameters, device: Device, num_threads: int | None
) -> Shard:
    """The shard that `record` describes, in the index at `root`."""
    deleted = read_deleted(root, record)
    return Shard(
        shard_path(root, record.name),
        files=record.files,
        deleted=deleted,
        device=device,
        num_threads=num_threads,
        parameters=parameters,
    )


def shift(top: TopK, first_row: int | np.integer) -> TopK:
    """A shard's rows in the numbering of the whole index."""
    return TopK(scores=top.scores, rows=np.where(top.rows >= 0, top.rows + first_row, -1))
