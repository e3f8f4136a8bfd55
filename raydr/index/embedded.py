"""Reading an embedded corpus: embeddings and passages by position, from any number of files in any order.

Notable: rows are put in their place while streaming, so no sort and no second copy is needed, and every way in which
embeddings can fail to fit their corpus (missing, doubled, of another corpus, not finite) is an error that says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from jaxtyping import Float32, Int64
from pydantic import Field
from scipy.sparse import csr_array, vstack

from raydr.artifacts import MANIFEST, Artifact
from raydr.config import Component, Config, validate
from raydr.data.arrow_rows import readable
from raydr.errors import ArtifactError
from raydr.storage import bucket_of, reach
from raydr.types import DIMS, EMBEDDING, PASSAGE_ID, POSITION, WEIGHTS, Embeddings, WeightType

_BATCH_ROWS = 16_384
_ONE_AFTER_THE_OTHER = {"batch_readahead": 1, "fragment_readahead": 1}
"""Of a scan of passages, which may have pictures: reading further ahead would take gigabytes."""


class EmbeddedBy(Config):
    """What made embeddings, in the details of their manifest."""

    method: Component
    encoder_version: str
    dim: int = Field(gt=0)
    weight_type: WeightType | None = None
    """How the weights of sparse embeddings are stored; null: the embeddings are dense."""

    @classmethod
    def of(cls, embeddings: Artifact) -> EmbeddedBy:
        """Raises `ConfigError` naming the manifest and the field that is missing or wrong."""
        details = embeddings.manifest.details
        known = {name: details[name] for name in cls.model_fields if name in details}
        return validate(cls, known, where=f"{embeddings.path / MANIFEST}, details")


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Where a corpus and its embeddings lie; small enough to be sent to a task."""

    passage_files: tuple[Path, ...]
    embedding_files: tuple[Path, ...]
    num_passages: int
    dim: int
    weight_type: WeightType | None = None
    """Of sparse embeddings."""

    @classmethod
    def of(cls, passage_files: list[Path], num_passages: int, embeddings: Artifact) -> EmbeddedCorpus:
        """Raises `ArtifactError` when the embeddings cannot be those of this corpus, or a file of them was damaged.

        Of embeddings in a bucket the files are not compared: they stay there, and workers read parts of them.
        """
        if bucket_of(embeddings.path) is None:
            embeddings.verify()
        names = [name for name in embeddings.manifest.files if name.endswith(".parquet")]
        files = tuple(embeddings.path.resolve() / name for name in sorted(names))
        if not files or not num_passages:
            raise ArtifactError(f"{embeddings.path}: no embeddings to index; the corpus has {num_passages} passages")
        with readable(embeddings.path):
            num_embeddings = sum(fragment.count_rows() for fragment in _dataset(files).get_fragments())
        if num_embeddings != num_passages:
            raise ArtifactError(
                f"{embeddings.path}: {num_embeddings} embeddings for {num_passages} passages; embed the corpus again"
            )
        paths = tuple(file.resolve() for file in passage_files)
        made_by = EmbeddedBy.of(embeddings)
        return cls(paths, files, num_passages, made_by.dim, made_by.weight_type)

    @property
    def num_bytes(self) -> int:
        """Of all embeddings in an index without compression."""
        if self.weight_type is None:
            return self.num_passages * self.dim * 4
        entries = 0
        with readable(self.embedding_files[0].parent):
            for fragment in _dataset(self.embedding_files).get_fragments():
                fragment.ensure_complete_metadata()
                for number in range(fragment.metadata.num_row_groups):
                    group = fragment.metadata.row_group(number)
                    columns = map(group.column, range(group.num_columns))
                    entries += sum(own.num_values for own in columns if own.path_in_schema.startswith(f"{DIMS}."))
        return entries * 8

    def embeddings(self, first: int, last: int) -> tuple[Embeddings, pa.StringArray]:
        """Embeddings and passage ids of the positions `first` to `last` (exclusive), in order."""
        if self.weight_type is not None:
            return self._sparse(first, last)
        matrix = np.empty((last - first, self.dim), dtype=np.float32)
        seen = np.zeros(last - first, dtype=bool)
        ids, places = [], []
        for positions, vectors, batch_ids in self._batches(first, last):
            place = positions - first
            matrix[place] = vectors
            seen[place] = True
            ids.append(batch_ids)
            places.append(place)
        if not seen.all():
            missing = first + int(np.flatnonzero(~seen)[0])
            raise ArtifactError(f"{self.embedding_files[0].parent}: no embedding of position {missing}; embed again")
        if sum(map(len, places)) != last - first:
            raise ArtifactError(f"{self.embedding_files[0].parent}: a position is embedded twice; embed again")
        if not np.isfinite(matrix).all():
            bad = first + int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])
            raise ArtifactError(f"{self.embedding_files[0].parent}: the embedding of position {bad} is not finite")
        return matrix, pa.concat_arrays(ids).take(pa.array(np.argsort(np.concatenate(places))))

    def _sparse(self, first: int, last: int) -> tuple[csr_array, pa.StringArray]:
        parts = [csr_array((0, self.dim), dtype=np.float32)]
        ids, places = [pa.array([], pa.string())], [np.zeros(0, dtype=np.int64)]
        columns = [POSITION, PASSAGE_ID, DIMS, *([] if self.weight_type == "ones" else [WEIGHTS])]
        for batch in _scan(self.embedding_files, first, last, columns):
            with readable(self.embedding_files[0].parent):
                parts.append(sparse_rows(batch, self.dim))
            places.append(batch.column(POSITION).to_numpy() - first)
            ids.append(batch.column(PASSAGE_ID))
        place = np.concatenate(places)
        if not np.array_equal(order := np.sort(place), np.arange(last - first)):
            beyond = np.flatnonzero(order != np.arange(len(order)))
            wrong = first + int(beyond[0] if len(beyond) else len(order))
            raise ArtifactError(
                f"{self.embedding_files[0].parent}: position {wrong} is missing or embedded twice; embed again"
            )
        rows = np.argsort(place)
        return csr_array(vstack(parts, format="csr")[rows]), pa.concat_arrays(ids).take(pa.array(rows))

    def sample(self, num: int, rng: np.random.Generator) -> tuple[Int64[np.ndarray, " row"], np.ndarray]:
        """Positions (ascending) and embeddings of `num` passages drawn from the whole corpus."""
        chosen = np.sort(rng.choice(self.num_passages, size=min(num, self.num_passages), replace=False))
        matrix = np.empty((len(chosen), self.dim), dtype=np.float32)
        for positions, vectors, _ in self._batches(0, self.num_passages):
            place = np.searchsorted(chosen, positions)
            wanted = (place < len(chosen)) & (chosen[np.minimum(place, len(chosen) - 1)] == positions)
            matrix[place[wanted]] = vectors[wanted]
        return chosen, matrix

    def blocks(self) -> Iterator[tuple[Int64[np.ndarray, " row"], Float32[np.ndarray, "row dim"]]]:
        """All embeddings with their positions, in the order of the files."""
        for positions, vectors, _ in self._batches(0, self.num_passages):
            yield positions, vectors

    def passages(self, first: int, last: int) -> Iterator[pa.Table]:
        """The passages of the positions `first` to `last` (exclusive), in order, without the position column."""
        next_position = first
        for batch in _scan(self.passage_files, first, last, None, **_ONE_AFTER_THE_OTHER):
            positions = batch.column(POSITION).to_numpy()
            if not np.array_equal(positions, np.arange(next_position, next_position + len(positions))):
                raise ArtifactError(f"{self.passage_files[0].parent}: positions are not in order; ingest it again")
            next_position += len(positions)
            yield pa.Table.from_batches([batch]).drop_columns([POSITION])
        if next_position != last:
            raise ArtifactError(f"{self.passage_files[0].parent}: position {next_position} is missing; ingest it again")

    def _batches(self, first: int, last: int) -> Iterator[tuple[np.ndarray, np.ndarray, pa.StringArray]]:
        for batch in _scan(self.embedding_files, first, last, [POSITION, PASSAGE_ID, EMBEDDING]):
            with readable(self.embedding_files[0].parent):
                vectors = batch.column(EMBEDDING).flatten().to_numpy().reshape(-1, self.dim)
            if len(vectors) != batch.num_rows:
                raise ArtifactError(f"{self.embedding_files[0].parent}: passages without an embedding; embed again")
            yield batch.column(POSITION).to_numpy(), vectors, batch.column(PASSAGE_ID)


def sparse_rows(batch: pa.RecordBatch, dim: int) -> csr_array:
    """The sparse embeddings of a batch. Raises `ValueError` where a list is no embedding of this width."""
    dims = batch.column(DIMS)
    bounds = dims.offsets.to_numpy() - dims.offsets[0].as_py()
    indices = dims.flatten().to_numpy()
    if WEIGHTS in batch.schema.names:
        data = batch.column(WEIGHTS).flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    else:
        data = np.ones(len(indices), dtype=np.float32)
    if dims.null_count or len(data) != len(indices):
        raise ValueError("passages without an embedding, or with other weights than dimensions")
    if len(indices) and not 0 <= indices.min() <= indices.max() < dim:
        raise ValueError(f"an embedding has a dimension beyond the {dim} there are")
    rows = csr_array((data, indices.astype(np.int32), bounds.astype(np.int32)), shape=(len(dims), dim))
    if not rows.has_canonical_format:
        raise ValueError("the dimensions of an embedding do not ascend")
    return rows


def _scan(
    files: tuple[Path, ...], first: int, last: int, columns: list[str] | None, **settings: Any
) -> Iterator[pa.RecordBatch]:
    """Batches of the rows with positions in the range; row groups outside of it are not read."""
    within = (ds.field(POSITION) >= first) & (ds.field(POSITION) < last)
    with readable(files[0].parent):
        scanner = _dataset(files).scanner(columns=columns, filter=within, batch_size=_BATCH_ROWS, **settings)
        batches = scanner.to_batches()
    while True:
        with readable(files[0].parent):
            batch = next(batches, None)
        if batch is None:
            return
        if batch.num_rows:
            yield batch


def _dataset(files: tuple[Path, ...]) -> ds.Dataset:
    filesystem, paths = reach(files)
    return ds.dataset(paths, format="parquet", filesystem=filesystem)
