"""An inverted index of sparse embeddings: for each dimension, the rows that have it, with their weights. Exact.

SciPy's compressed matrices do the scoring: of the columns that a query has, times its weights. Notable: a search
touches nothing else, so it costs what the query's words are common; the file is an Arrow table of one line per
dimension, whose buffers are mapped and used as they lie there (weights in half precision, or left out where all are 1,
are written out in memory). Only rows that share a dimension with the query are found, as in any index of words.

    postings = Postings.of(embeddings, weight_type="float32")       # scipy.sparse.csr_array
    postings.search(queries, k=10, ids_of=np.asarray(ids, dtype=object).__getitem__)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64
from scipy.sparse import csc_array, csr_array, vstack

from raydr.errors import ArtifactError, ConfigError
from raydr.index.topk import IdsOf, empty, order, select
from raydr.protocols import TopK
from raydr.types import WEIGHTS, Embeddings, WeightType, shape_of

_ROWS = "rows"
_NUM_ROWS, _WEIGHT_TYPE = b"num_rows", b"weight_type"
_MOST_ENTRIES = 2**31 - 1
"""Of one shard: places in it are 32-bit numbers."""


class Postings:
    """The embeddings of a shard by dimension."""

    is_exact = True

    def __init__(self, columns: csc_array, weight_type: WeightType, path: Path | None = None) -> None:
        self._columns = columns
        self.weight_type: WeightType = weight_type
        self._path = path

    @classmethod
    def of(cls, embeddings: csr_array, *, weight_type: WeightType) -> Postings:
        """Row i of `embeddings` becomes row i. Raises `ConfigError` where a weight is negative or not finite."""
        if embeddings.nnz > _MOST_ENTRIES:
            raise ConfigError(f"a shard with {embeddings.nnz:,} weights: set index.num_shards or index.shard_bytes")
        if not (np.isfinite(embeddings.data).all() and (embeddings.data >= 0).all()):
            raise ConfigError("weights of sparse embeddings are neither negative nor infinite; look at the precision")
        columns = csc_array(embeddings)
        columns.eliminate_zeros()  # of weights too small for their precision
        columns.sort_indices()  # of each dimension, rows ascend
        return cls(columns, weight_type)

    @classmethod
    def read(cls, path: Path) -> Postings:
        """The index in a file, memory-mapped. Raises `ArtifactError` where it is damaged."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            table.validate(full=True)
            metadata = table.schema.metadata or {}
            num_rows, kind = int(metadata[_NUM_ROWS]), str(metadata[_WEIGHT_TYPE].decode())
            rows = table[_ROWS].chunk(0)
            bounds, indices = rows.offsets.to_numpy(), rows.values.to_numpy()
            if kind == "ones":
                data = np.ones(len(indices), dtype=np.float32)
            else:
                data = table[WEIGHTS].chunk(0).values.to_numpy().astype(np.float32, copy=False)
            columns = csc_array((data, indices, bounds), shape=(num_rows, table.num_rows))
            columns.has_sorted_indices = True
            if len(indices) and not 0 <= indices.min() <= indices.max() < num_rows:
                raise ValueError(f"rows beyond the {num_rows} there are")
            if kind not in get_args(WeightType):
                raise ValueError(f"weights of type {kind!r}")
        except (OSError, KeyError, ValueError, IndexError, TypeError, AttributeError, pa.ArrowException) as error:
            raise ArtifactError(f"{path}: not a readable inverted index: {error}; build the index again") from error
        known: Any = kind
        return cls(columns, known, path)

    def write(self, path: Path) -> None:
        columns = self._columns
        bounds = pa.array(columns.indptr.astype(np.int32))
        lists = {_ROWS: pa.ListArray.from_arrays(bounds, pa.array(columns.indices.astype(np.int32)))}
        if self.weight_type != "ones":
            weights = columns.data.astype(np.float16 if self.weight_type == "float16" else np.float32)
            lists[WEIGHTS] = pa.ListArray.from_arrays(bounds, pa.array(weights))
        metadata = {_NUM_ROWS: str(self.num_rows).encode(), _WEIGHT_TYPE: self.weight_type.encode()}
        table = pa.table(lists).replace_schema_metadata(metadata)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(1, table.num_rows))

    @property
    def num_rows(self) -> int:
        return shape_of(self._columns)[0]

    @property
    def dim(self) -> int:
        return shape_of(self._columns)[1]

    @property
    def num_entries(self) -> int:
        """Weights that are not 0, of all rows together."""
        return int(self._columns.nnz)

    def search(
        self, embeddings: Embeddings, k: int, *, ids_of: IdsOf, allowed: Bool[np.ndarray, " passage"] | None = None
    ) -> TopK:
        """The `k` best rows per query (by inner product, ties by id), only among `allowed` rows that share a dimension
        with it.
        """
        queries = sparse(embeddings, self.dim)
        found = empty(shape_of(queries)[0], 2 * k)
        for line, (start, end) in enumerate(zip(queries.indptr, queries.indptr[1:], strict=False)):
            scores = self._columns[:, queries.indices[start:end]] @ queries.data[start:end]
            if allowed is not None:
                scores[~allowed] = 0
            rows = select(scores, k, above=0.0)
            if len(rows) > 2 * k:  # very many ties: decided here, so that one query does not widen all lines
                rows = order(TopK(scores=scores[None, rows], rows=rows[None]), k, ids_of).rows[0]
            found.scores[line, : len(rows)], found.rows[line, : len(rows)] = scores[rows], rows
        return order(found, k, ids_of)

    def embeddings(self, rows: Int64[np.ndarray, " row"]) -> csr_array:
        """The embeddings of some rows. The first call turns the index around, which takes its size in memory."""
        return csr_array(self._by_row[rows])

    @cached_property
    def _by_row(self) -> csr_array:
        return csr_array(self._columns)


def sparse(embeddings: Embeddings, dim: int) -> csr_array:
    """`embeddings` as they are. Raises `ConfigError` unless they are sparse, finite and of this width."""
    if not isinstance(embeddings, csr_array):
        raise ConfigError("an inverted index needs sparse embeddings, these are dense: another encoder's")
    if (own := shape_of(embeddings)[1]) != dim:
        raise ConfigError(f"embeddings of dimension {own} for an index of {dim}: another encoder's")
    if not np.isfinite(embeddings.data).all():
        raise ConfigError("embeddings hold NaN or infinity; look at the encoder's precision")
    return embeddings


class SparseIndex:
    """An index in memory: `protocols.Index` over sparse embeddings, exact."""

    def __init__(self) -> None:
        self._embeddings: csr_array | None = None
        self._postings: Postings | None = None
        self._ids: list[str] = []

    @property
    def passage_ids(self) -> Sequence[str]:
        return self._ids

    def add(self, passage_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Appends rows. Raises `ConfigError` on ids that are there already, or a dimension that differs."""
        before = self._embeddings
        new = sparse(embeddings, shape_of(embeddings if before is None else before)[1])
        if len(passage_ids) != (count := shape_of(new)[0]):
            raise ConfigError(f"{len(passage_ids)} passage ids for {count} embeddings; one each is needed")
        if len({*self._ids, *passage_ids}) != len(self._ids) + len(passage_ids):
            raise ConfigError("a passage id was added twice; ids are unique in an index")
        self._embeddings = new if before is None else csr_array(vstack([before, new], format="csr"))
        self._postings = Postings.of(self._embeddings, weight_type="float32")
        self._ids += passage_ids

    def search(self, embeddings: Embeddings, k: int, *, allowed: Bool[np.ndarray, " passage"] | None = None) -> TopK:
        """The `k` best rows per query, ties by passage id, of those that share a dimension with it."""
        if self._postings is None:
            return empty(shape_of(embeddings)[0], k)
        return self._postings.search(embeddings, k, ids_of=self._take, allowed=allowed)

    def _take(self, rows: Int64[np.ndarray, " hit"]) -> np.ndarray:
        return np.array([self._ids[row] for row in rows], dtype=object)
