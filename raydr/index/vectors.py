"""One FAISS index: made from a factory string, read memory-mapped, searched with masks, deterministic in its ties.

Notable: with no mask and no parameters the whole query block goes to FAISS as it is, so its BLAS path is kept. Where
the score at position k ties with the next one, an exhaustive index is asked again, deeper, for those queries only;
`topk.order` then decides by passage id, so `Flat` equals brute force to the last tie. A mask that leaves few rows is
searched exactly (HNSW would walk past them, IVF would probe lists without them).

    vectors = Vectors(create("HNSW32", dim=384))
    vectors.add(embeddings)
    vectors.search(queries, k=10, ids_of=np.asarray(ids, dtype=object).__getitem__)
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from jaxtyping import Bool, Float32, Int64

from raydr.errors import ArtifactError, ConfigError
from raydr.index.config import Device, SearchParameters
from raydr.index.topk import IdsOf, empty, order
from raydr.protocols import TopK

_DEFAULT = SearchParameters()
_FEW_ROWS = 10_000
"""A mask that leaves at most this many rows is searched by scoring exactly these rows."""
_WIDE_ENTRIES = 2**23
"""Bound on queries x depth of one deeper search for ties (100 MB)."""
_GPU_MAX_K = 2048
"""The largest k FAISS serves on a GPU; a deeper search goes to the CPU index."""


def create(factory: str, dim: int, *, ef_construction: int = 40) -> Any:
    """An empty FAISS index for inner products. Raises `ConfigError` for a factory string that cannot be served."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"index.factory {factory!r} with dimension {dim}: {_reason(error)}; examples are Flat, SQ8, HNSW32, "
            "IVF1024,Flat, IVF1024,PQ48 (the dimension must be a multiple of the number of PQ pieces)"
        ) from error
    core = _core(index)
    if not isinstance(core, (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexHNSW, faiss.IndexIVF)):
        raise ConfigError(
            f"index.factory {factory!r}: FAISS cannot filter a {type(core).__name__}, as deletions and filters "
            "need; use Flat, SQ.., HNSW.. or IVF.. (IVF1024,PQ48 instead of PQ48)"
        )
    if isinstance(core, faiss.IndexHNSW):
        core.hnsw.efConstruction = ef_construction
    return index


def train(index: Any, sample: Float32[np.ndarray, "row dim"], *, device: Device = "cpu") -> None:
    """Trains `index` in place. Raises `ConfigError` when the sample is too small for it."""
    core = _core(index)
    if isinstance(core, faiss.IndexIVF) and core.nlist > len(sample):
        raise ConfigError(
            f"index.factory: {core.nlist} IVF lists cannot be trained on {len(sample)} embeddings; "
            f"use at most IVF{max(1, len(sample) // 39)}, or Flat, which is fast at this size"
        )
    if isinstance(core, faiss.IndexIVF) and uses_gpu(device):
        core.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(core.d))
    try:
        index.train(np.ascontiguousarray(sample))
    except RuntimeError as error:
        raise ConfigError(f"index.factory: training on {len(sample)} embeddings failed: {_reason(error)}") from error


def uses_gpu(device: Device) -> bool:
    """Whether `device` means a GPU here. Raises `ConfigError` for `gpu` where FAISS has none."""
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "gpu" and not num_gpus:
        raise ConfigError("device: gpu was asked for, but FAISS sees none here; use auto or cpu, or install raydr[gpu]")
    return device != "cpu" and num_gpus > 0


class Vectors:
    """A FAISS index whose row i holds the embedding of row i of its shard."""

    def __init__(self, index: Any, *, device: Device = "cpu", num_threads: int | None = None) -> None:
        self.index = index
        self._core = _core(index)
        self._device = device
        self._num_threads = num_threads
        self._path: Path | None = None
        # Boundary ties are resolved where every row's score is known and final.
        self._exhaustive = isinstance(faiss.downcast_index(index), faiss.IndexFlatCodes)

    @classmethod
    def read(cls, path: Path, *, device: Device = "cpu", num_threads: int | None = None) -> Vectors:
        """The index in a file, memory-mapped: processes on one machine share its pages."""
        try:
            vectors = cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), device=device, num_threads=num_threads)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: not a readable FAISS index: {_reason(error)}") from error
        vectors._path = path
        return vectors

    def write(self, path: Path) -> None:
        faiss.write_index(self.index, str(path))

    @property
    def num_rows(self) -> int:
        return self.index.ntotal

    @property
    def dim(self) -> int:
        return self.index.d

    @property
    def is_exact(self) -> bool:
        """Whether a search gives the true nearest neighbours."""
        return isinstance(faiss.downcast_index(self.index), faiss.IndexFlat)

    def add(self, embeddings: Float32[np.ndarray, "row dim"]) -> None:
        self._use_threads()
        self.index.add(np.ascontiguousarray(embeddings))

    @classmethod
    def empty_copy(cls, path: Path) -> Vectors:
        """An empty index with the settings, and what training learnt, of the one in a file."""
        vectors = cls(faiss.read_index(str(path)))
        vectors.index.reset()
        return vectors

    def reconstruct(self) -> Float32[np.ndarray, "row dim"]:
        """Every row's embedding, as far as the index's coding keeps it."""
        with self._damage_told():
            if isinstance(self._core, faiss.IndexIVF):
                self._core.make_direct_map()
            return self.index.reconstruct_n(0, self.num_rows)

    def embeddings(self, rows: Int64[np.ndarray, " row"]) -> Float32[np.ndarray, "row dim"]:
        """The embeddings of some rows, as far as the index's coding keeps them."""
        with self._damage_told():
            if isinstance(self._core, faiss.IndexIVF) and self._core.direct_map.no():
                self._core.make_direct_map()
            return self.index.reconstruct_batch(rows)

    @contextmanager
    def _damage_told(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ArtifactError(f"{self._path or 'index'}: FAISS cannot use it: {_reason(error)}") from error

    def search(
        self,
        embeddings: Float32[np.ndarray, "query dim"],
        k: int,
        *,
        ids_of: IdsOf,
        allowed: Bool[np.ndarray, " row"] | None = None,
        parameters: SearchParameters = _DEFAULT,
    ) -> TopK:
        """The `k` best rows per query (by inner product, ties by id), only among `allowed` rows."""
        queries = np.ascontiguousarray(embeddings)
        if queries.shape[1] != self.dim:
            raise ConfigError(f"queries of dimension {queries.shape[1]} for an index of {self.dim}: another encoder's")
        limit = self.num_rows if allowed is None else int(allowed.sum())
        if limit == 0 or not len(queries):
            return empty(len(queries), k)
        if allowed is not None and limit == self.num_rows:
            allowed = None
        if allowed is not None and limit <= _FEW_ROWS and not isinstance(self._core, faiss.IndexIVF):
            return self._search_few(queries, k, np.flatnonzero(allowed), ids_of)
        # One more than asked shows whether the last place is tied.
        depth = min(k + 1 if self._exhaustive else k, limit)
        found = self._search(queries, depth, limit, allowed, parameters)
        top = order(found, k, ids_of)
        if self._exhaustive and k < depth < limit:
            tied = np.flatnonzero(found.scores[:, k - 1] == found.scores[:, k])
            self._search_deeper(queries, tied, top, k, limit, allowed, ids_of)
        return top

    def _search_deeper(
        self,
        queries: np.ndarray,
        tied: np.ndarray,
        top: TopK,
        k: int,
        limit: int,
        allowed: np.ndarray | None,
        ids_of: IdsOf,
    ) -> None:
        """Replaces the lines `tied` of `top`, searching deeper until every row that ties with the k-th is seen."""
        depth = k + 1
        while len(tied):
            depth = min(4 * depth, limit)
            unresolved = []
            for lines in np.array_split(tied, math.ceil(len(tied) * depth / _WIDE_ENTRIES)):
                found = self._search(queries[lines], depth, limit, allowed, _DEFAULT)
                best = order(found, k, ids_of)
                top.scores[lines], top.rows[lines] = best.scores, best.rows
                unresolved.append(lines[found.scores[:, k - 1] == found.scores[:, -1]])
            tied = np.concatenate(unresolved) if depth < limit else tied[:0]

    def _search_few(self, queries: np.ndarray, k: int, rows: np.ndarray, ids_of: IdsOf) -> TopK:
        subset = Vectors(faiss.IndexFlatIP(self.dim), num_threads=self._num_threads)
        subset.add(self.index.reconstruct_batch(rows))
        top = subset.search(queries, k, ids_of=lambda places: ids_of(rows[places]))
        return TopK(scores=top.scores, rows=np.where(top.rows >= 0, rows[top.rows], -1))

    def _search(
        self,
        queries: np.ndarray,
        depth: int,
        limit: int,
        allowed: np.ndarray | None,
        parameters: SearchParameters,
    ) -> TopK:
        self._use_threads()
        if allowed is None and depth <= _GPU_MAX_K and self._on_gpu is not None:
            scores, rows = self._on_gpu.search(queries, depth)
        elif allowed is None and parameters == _DEFAULT:
            scores, rows = self.index.search(queries, depth)
        else:
            share = 1.0 if allowed is None else limit / self.num_rows
            selector = None if allowed is None else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
            settings = _settings(self.index, parameters, selector, depth, share)
            scores, rows = self.index.search(queries, depth, params=settings)
        if rows.max(initial=-1) >= self.num_rows:
            raise ArtifactError(f"{self._path or 'index'}: damaged: it finds rows that it does not have")
        return TopK(scores=scores, rows=rows)

    def _use_threads(self) -> None:
        # OpenMP keeps this per calling thread, so it is set where the call is made.
        if self._num_threads is not None:
            faiss.omp_set_num_threads(self._num_threads)

    @cached_property
    def _on_gpu(self) -> Any:
        """A copy on the GPU, or None. Masks are searched on the CPU, where FAISS has selectors."""
        if not uses_gpu(self._device):
            return None
        try:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self.index)
        except RuntimeError as error:
            if self._device == "gpu":
                raise ConfigError(f"device: gpu: FAISS cannot search this index there: {_reason(error)}") from error
            return None


def _settings(index: Any, parameters: SearchParameters, selector: Any, depth: int, share: float) -> Any:
    """FAISS's search parameters, nested as the index is; `share` of its rows pass the mask."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexRefine):
        factor = parameters.rescore_factor or index.k_factor
        inner = _settings(index.base_index, parameters, selector, math.ceil(depth * factor), share)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _settings(index.index, parameters, selector, depth, share)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        nprobe = parameters.nprobe or index.nprobe
        if selector is not None:  # enough lists to hold ten times the rows asked for, once the mask is applied
            nprobe = max(math.ceil(nprobe / share), math.ceil(10 * depth * index.nlist / (share * index.ntotal)))
        return faiss.SearchParametersIVF(nprobe=min(nprobe, index.nlist), sel=selector)
    if isinstance(index, faiss.IndexHNSW):
        ef_search = math.ceil(max(parameters.ef_search or index.hnsw.efSearch, depth) / share)
        return faiss.SearchParametersHNSW(efSearch=ef_search, sel=selector)
    return faiss.SearchParameters(sel=selector)


def _core(index: Any) -> Any:
    """The index behind any transform and any rescoring."""
    index = faiss.downcast_index(index)
    while isinstance(index, (faiss.IndexRefine, faiss.IndexPreTransform)):
        inner = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
        index = faiss.downcast_index(inner)
    return index


def _reason(error: RuntimeError) -> str:
    """FAISS's message without its C++ source position."""
    return str(error).rsplit(".cpp:", 1)[-1].split(":", 1)[-1].strip()
