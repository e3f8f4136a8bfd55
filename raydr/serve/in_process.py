"""The serving path without Ray: a `Searcher` over the same deployment objects, called directly in this process.

Notable: it is what `benchmarks/serve.py` compares Serve's hops with and what the tests of the HTTP contract run on;
there are no replicas, no queues between processes and no autoscaling, so it is not how to serve.

    searcher = in_process_searcher(args)
    await searcher.use(str(args.index))
    app = build_http(searcher, args)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
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


class InProcess:
    """Calls an object the way a deployment handle calls its replicas."""

    def __init__(self, deployment: Any) -> None:
        self._deployment = deployment

    def __getattr__(self, method: str) -> _Method:
        return _Method(getattr(self._deployment, method))

    def broadcast(self, method: str, *arguments: Any) -> _Results:
        return _Results(getattr(self._deployment, method)(*arguments))


def in_process_searcher(args: AppArgs, *, num_shard_deployments: int = 1) -> Searcher:
    """A searcher over deployments that live in this process; `use` gives it an index."""
    numbers = range(num_shard_deployments)
    return Searcher(
        args,
        encoder=InProcess(Encoder(args.versions_held)),
        shards=[InProcess(Shard(number, num_shard_deployments, args.versions_held)) for number in numbers],
        bm25=InProcess(Bm25(args.versions_held)) if args.bm25 else None,
        reranker=InProcess(Reranker(args.reranker)) if args.reranker is not None else None,
    )
