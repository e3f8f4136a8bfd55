"""The Shard and Bm25 deployments: top hits of a part of the index, and the passages of given rows.

Notable: rows are those of the whole index, so hits of several shards, and of both sides, merge and fuse by row. Shard
deployment i of D holds the shards j with j % D == i, whatever their number in the version asked for. Searches run in
threads (FAISS lets go of Python's lock), so a replica answers its health checks and other requests meanwhile. A
filter's row mask is kept for the next request with the same filter.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from raydr.data.images import ImageConfig
from raydr.data.passages import has_pictures
from raydr.index.filters import FilterError, check_filters, filterable_columns
from raydr.index.reader import IndexReader, shift
from raydr.index.topk import empty, merge
from raydr.protocols import TopK
from raydr.serve import metrics
from raydr.serve.errors import ApiError
from raydr.serve.schema import SearchRequest
from raydr.serve.tracing import span
from raydr.serve.versions import IndexRef, VersionCache
from raydr.types import IMAGE, PASSAGE_ID, TITLE, Embeddings, shape_of

MASKS_HELD = 8


@dataclass(frozen=True)
class IndexInfo:
    """What the searcher needs to know of an index version without opening its vectors."""

    ref: IndexRef
    dim: int
    num_passages: int
    num_shards: int
    first_rows: Int64[np.ndarray, " boundary"]
    has_bm25: bool
    schema: pa.Schema
    """Columns of its passages, the same in every shard."""
    images: ImageConfig
    """How pictures are prepared; those of queries as the passages' were."""
    created: int
    """Unix time at which the index was made."""

    @cached_property
    def metadata_columns(self) -> list[str]:
        return [name for name in self.inline_columns if name in filterable_columns(self.schema) and name != TITLE]

    @cached_property
    def has_images(self) -> bool:
        return has_pictures(self.schema)

    @cached_property
    def inline_columns(self) -> tuple[str, ...]:
        """What is small enough to ride along with hits: everything but pictures."""
        return tuple(name for name in self.schema.names if name != IMAGE or not self.has_images)

    def check(self, filters: dict[str, Any]) -> None:
        """Raises `ApiError` 422 naming the column that a filter gets wrong."""
        try:
            check_filters(filters, self.schema)
        except FilterError as error:
            raise ApiError(422, "invalid_filter", str(error), param=f"filters.{error.field}") from None

    def shards_of(self, rows: Sequence[int] | Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        return np.searchsorted(self.first_rows, rows, side="right") - 1


def read_index_info(path: str) -> IndexInfo:
    """Reads an index's manifest and one schema. Raises `ArtifactError` when there is no finished index."""
    reader = IndexReader.open(path)
    return IndexInfo(
        ref=IndexRef(str(path), reader.version, reader.encoder_version, reader.method.model_dump_json()),
        dim=reader.dim,
        num_passages=reader.num_passages,
        num_shards=reader.num_shards,
        first_rows=reader.first_rows,
        has_bm25=reader.details.bm25 is not None,
        schema=reader.schema,
        images=reader.details.images or ImageConfig(),
        created=int(datetime.fromisoformat(reader.artifact.manifest.created_at).timestamp()),
    )


class Selection(NamedTuple):
    """Which passages may be found."""

    filters: dict[str, Any]
    allow_ids: tuple[str, ...] | None
    exclude_ids: tuple[str, ...]
    required: dict[str, Any]
    """Filters of the caller's key, which hold beside those of the request."""

    @classmethod
    def of(cls, request: SearchRequest, required: Mapping[str, Any]) -> Selection:
        allow_ids = None if request.allow_ids is None else tuple(request.allow_ids)
        return cls(request.filters, allow_ids, tuple(request.exclude_ids), dict(required))

    @property
    def is_everything(self) -> bool:
        return not self.filters and self.allow_ids is None and not self.exclude_ids and not self.required


class Ranked(NamedTuple):
    """Hits by row of the whole index, the ids of these rows, and their passages where they were asked for."""

    top: TopK
    ids: dict[int, str]
    passages: dict[int, dict[str, Any]]


class _Part:
    """An index version open in this replica, and the last masks made over it."""

    def __init__(self, reader: IndexReader) -> None:
        self.reader = reader
        self._masks: OrderedDict[tuple[int, str], Bool[np.ndarray, " row"]] = OrderedDict()

    def mask(self, number: int, selection: Selection) -> Bool[np.ndarray, " row"] | None:
        """The rows of a shard that may be found; None: all. The searcher has checked the filters."""
        if selection.is_everything:
            return None
        key = (number, json.dumps(selection))
        mask = self._masks.get(key)
        if mask is None:
            shard = self.reader.shard(number)
            mask = shard.select(selection.filters, allow_ids=selection.allow_ids, exclude_ids=selection.exclude_ids)
            if selection.required:
                mask &= shard.select(selection.required)
            self._masks[key] = mask
            while len(self._masks) > MASKS_HELD:
                self._masks.popitem(last=False)
        return mask

    def ranked(self, top: TopK, inline: Sequence[str]) -> Ranked:
        rows = np.unique(top.rows[top.rows >= 0])
        if inline:
            passages = self.passages(rows.tolist(), inline)
            return Ranked(top, {row: passage[PASSAGE_ID] for row, passage in passages.items()}, passages)
        return Ranked(top, dict(zip(rows.tolist(), self.ids_of(rows).tolist(), strict=True)), {})

    def passages(self, rows: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """`columns` of `rows` of the whole index."""
        return dict(zip(rows, self.reader.take(rows, columns).to_pylist(), strict=True))

    def ids_of(self, rows: Int64[np.ndarray, " hit"]) -> np.ndarray:
        """Ids by row of the whole index, read from the shards concerned only."""
        ids = np.empty(len(rows), dtype=object)
        numbers = np.searchsorted(self.reader.first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            own = numbers == number
            ids[own] = self.reader.shard(number).passage_ids.take(rows[own] - self.reader.first_rows[number])
        return ids


class Shard:
    """One replica of Shard deployment `number` of `num_deployments`."""

    def __init__(self, number: int, num_deployments: int, versions_held: int) -> None:
        self._number = number
        self._num_deployments = num_deployments
        self._parts = VersionCache(self._open, versions_held)

    async def prepare(self, ref: IndexRef) -> int:
        """Opens a version and touches its vectors; the number of shards it has here. Raises `ApiError` 503."""
        return len(self._numbers(await self._parts.get(ref)))

    async def search(
        self,
        ref: IndexRef,
        embeddings: Embeddings,
        k: int,
        selection: Selection,
        inline: Sequence[str],
    ) -> Ranked:
        """The `k` best of this deployment's shards per query; with the columns `inline` of their passages, if any."""
        part = await self._parts.get(ref)
        return await asyncio.to_thread(self._search, part, embeddings, k, selection, inline)

    async def passages(self, ref: IndexRef, rows: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Columns of the passages of rows of this deployment's shards."""
        part = await self._parts.get(ref)
        return await asyncio.to_thread(part.passages, rows, columns)

    async def embeddings(self, ref: IndexRef, rows: Sequence[int]) -> Embeddings:
        """The embeddings of rows of this deployment's shards, as far as the index's coding keeps them."""
        part = await self._parts.get(ref)
        return await asyncio.to_thread(part.reader.embeddings, np.asarray(rows, dtype=np.int64))

    def _open(self, ref: IndexRef) -> _Part:
        part = open_version(ref)
        for number in self._numbers(part):
            part.reader.shard(number).warm_up()
        return part

    def _numbers(self, part: _Part) -> range:
        return range(self._number, part.reader.num_shards, self._num_deployments)

    def _search(
        self, part: _Part, embeddings: Embeddings, k: int, selection: Selection, inline: Sequence[str]
    ) -> Ranked:
        tops = []
        for number in self._numbers(part):
            mask = part.mask(number, selection)
            started = time.perf_counter()
            with span("raydr.faiss", shard=number, queries=shape_of(embeddings)[0], k=k):
                top = part.reader.shard(number).search(embeddings, k, mask)
            metrics.record_shard_search(number, time.perf_counter() - started)
            tops.append(shift(top, int(part.reader.first_rows[number])))
        # A version with fewer shards than there are deployments leaves some with nothing to search.
        return part.ranked(merge(tops, k, part.ids_of) if tops else empty(shape_of(embeddings)[0], k), inline)


class Bm25:
    """One replica of the word side, over all shards."""

    def __init__(self, versions_held: int) -> None:
        self._parts = VersionCache(_open_words, versions_held)

    async def prepare(self, ref: IndexRef) -> None:
        """Opens a version. Raises `ApiError` 503."""
        await self._parts.get(ref)

    async def search(
        self, ref: IndexRef, texts: Sequence[str], k: int, selection: Selection, inline: Sequence[str]
    ) -> Ranked:
        """The `k` best of the whole index per query by words; with the columns `inline` of their passages, if any."""
        part = await self._parts.get(ref)
        return await asyncio.to_thread(self._search, part, texts, k, selection, inline)

    def _search(self, part: _Part, texts: Sequence[str], k: int, selection: Selection, inline: Sequence[str]) -> Ranked:
        masks = [part.mask(number, selection) for number in range(part.reader.num_shards)]
        allowed = None if selection.is_everything else np.concatenate([mask for mask in masks if mask is not None])
        with span("raydr.words", queries=len(texts), k=k):
            top = part.reader.search_bm25(texts, k, allowed=allowed)
        return part.ranked(top, inline)


def open_version(ref: IndexRef) -> _Part:
    """Opens the index at `ref.path`. Raises `ApiError` 503 when another version lies there by now."""
    reader = IndexReader.open(ref.path)
    if reader.version != ref.version:
        message = f"the index at this path is now version {reader.version}; {ref.version} is gone"
        raise ApiError(503, "version_gone", message, retry_after_s=1.0)
    return _Part(reader)


def _open_words(ref: IndexRef) -> _Part:
    part = open_version(ref)
    part.reader.search_bm25(["warm up"], 1)
    return part
