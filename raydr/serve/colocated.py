"""Encoder, shards and word side in the searcher's own process: no hop inside the application.

Notable: the deployments' own classes are called directly where a handle would call their replicas, so what is answered
is the same; batches still form from what arrives meanwhile. It is how `colocate: true` serves an index that fits one
replica, what `benchmarks/serve.py` runs without Ray as the floor, and what the tests of the HTTP contract run on.

    searcher = colocated_searcher(args)
    await searcher.use(str(args.index))
    app = build_http(searcher, args)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from raydr.serve.config import AppArgs
from raydr.serve.encoder import Encoder
from raydr.serve.rerank import Reranker
from raydr.serve.search import Searcher
from raydr.serve.shard import Bm25, Shard


class _Method:
    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self.remote = function


class _Results:
    def __init__(self, call: Awaitable[Any]) -> None:
        self._call = call

    async def results_async(self) -> list[Any]:
        return [await self._call]


class Direct:
    """Calls an object the way a deployment handle calls its replicas."""

    def __init__(self, deployment: Any) -> None:
        self._deployment = deployment

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._deployment, method))

    def broadcast(self, method: str, *arguments: Any) -> _Results:
        return _Results(getattr(self._deployment, method)(*arguments))


def colocated_searcher(
    args: AppArgs,
    encoder: Encoder | None = None,
    *,
    rerankers: Mapping[str, Any] | None = None,
    num_shard_deployments: int = 1,
) -> Searcher:
    """A searcher over parts that live in this process; `use` gives it an index.

    `rerankers` are handles of the Reranker deployments by name; without, the configured ones run here too.
    """
    if rerankers is None:
        rerankers = {name: Direct(Reranker(component)) for name, component in args.rerankers.items()}
    numbers = range(num_shard_deployments)
    return Searcher(
        args,
        encoder=Direct(encoder or Encoder(args.versions_held, args.refiner)),
        shards=[Direct(Shard(number, num_shard_deployments, args.versions_held)) for number in numbers],
        bm25=Direct(Bm25(args.versions_held)) if args.bm25 else None,
        rerankers=rerankers,
    )
