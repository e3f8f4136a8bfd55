"""A sharded index behind the protocol of a plain one: fan out, merge. In this process, or a Ray actor per shard.

Notable: both give the same hits. An actor holds one shard memory-mapped; Ray restarts one that dies and repeats its
search, so a lost process costs time and not the run. Embeddings and masks go through the object store once, whatever
the number of shards.

    with RayShards(reader, cpus_per_shard=2) as index:
        index.search(embeddings, k=100)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Bool

from raydr.errors import ArtifactError
from raydr.index.config import Device, SearchParameters
from raydr.index.layout import ShardRecord
from raydr.index.reader import IndexReader, open_shard, shift
from raydr.index.shard import PassageIds, finite
from raydr.index.topk import merge
from raydr.protocols import TopK
from raydr.types import Embeddings, shape_of

_RESTARTS = 3


class LocalShards:
    """All shards of an index in this process, as one index."""

    def __init__(self, reader: IndexReader, *, parameters: SearchParameters | None = None) -> None:
        self._reader = reader
        self._parameters = parameters

    @property
    def passage_ids(self) -> PassageIds:
        return self._reader.passage_ids

    def add(self, passage_ids: Sequence[str], embeddings: Embeddings) -> None:
        """Always raises: files are not grown in place."""
        raise ArtifactError(
            f"{self._reader.path}: an index on disk grows by raydr.index.store.add, not in place "
            f"({len(passage_ids)} passages, {shape_of(embeddings)[0]} embeddings refused)"
        )

    def search(self, embeddings: Embeddings, k: int, *, allowed: Bool[np.ndarray, " passage"] | None = None) -> TopK:
        return self._reader.search(embeddings, k, allowed=allowed, parameters=self._parameters)


class RayShards(LocalShards):
    """A Ray actor per shard, spread over the nodes, as one index that every node sees or brings from its bucket."""

    def __init__(
        self,
        reader: IndexReader,
        *,
        parameters: SearchParameters | None = None,
        cpus_per_shard: float = 1.0,
        gpus_per_shard: float = 0.0,
        device: Device = "cpu",
        num_threads: int | None = None,
        placement: Mapping[str, Any] | None = None,
    ) -> None:
        import ray

        super().__init__(reader, parameters=parameters)
        actor: Any = ray.remote(
            num_cpus=cpus_per_shard,
            num_gpus=gpus_per_shard,
            max_restarts=_RESTARTS,
            max_task_retries=-1,  # until it has died too often: each try while Ray finds a node dead counts
            scheduling_strategy="SPREAD",  # an index larger than a node's memory lies on several
            **(placement or {}),
        )(_ShardActor)
        threads = num_threads or max(1, round(cpus_per_shard))
        path, details = reader.path.resolve(), reader.details
        self.actors: list[Any] = [
            actor.remote(path, record, details.search, device, threads) for record in details.shards
        ]

    def search(self, embeddings: Embeddings, k: int, *, allowed: Bool[np.ndarray, " passage"] | None = None) -> TopK:
        import ray

        queries = ray.put(finite(embeddings))
        parts = ray.get(
            [
                actor.search.remote(queries, k, self._reader.part(allowed, number), self._parameters)
                for number, actor in enumerate(self.actors)
            ]
        )
        shifted = [shift(part, first) for part, first in zip(parts, self._reader.first_rows, strict=False)]
        return merge(shifted, k, self.passage_ids.take)

    def close(self) -> None:
        """Ends the actors and frees their CPUs."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def __enter__(self) -> RayShards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _ShardActor:
    """One shard of an index, in a process of its own. It keeps the state its reader saw, whatever is written later."""

    def __init__(
        self, path: Path, record: ShardRecord, parameters: SearchParameters, device: Device, num_threads: int
    ) -> None:
        self._shard = open_shard(path, record, parameters=parameters, device=device, num_threads=num_threads)
        self._name = f"shard {record.name} of {path.parent.name}/{path.name}"

    def __repr__(self) -> str:
        """What Ray's dashboard calls it."""
        return self._name

    def search(self, embeddings: Any, k: int, allowed: Any, parameters: SearchParameters | None) -> TopK:
        return self._shard.search(embeddings, k, allowed, parameters=parameters)
