"""A Reranker deployment: any `raydr.protocols.Reranker`, named in the application's args, behind search and rerank.

Notable: a reranker that is asynchronous, such as those over vLLM, works on many requests at a time, and its engine puts
their windows into one batch; any other runs in a thread, one request at a time. When the engine's process dies every
request in work gets a 503 that says so, Serve's health check fails and Serve replaces the replica. A caller that leaves
takes its prompts out of the engine.

    args: {rerankers: {first: {import_path: "raydr.methods.first:First", args: {engine: {model: OUT/train/model}}}}}
    args: {rerankers: {lexical: {import_path: "mypackage.rerankers:Lexical", args: {}}}}
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from raydr.config import Component
from raydr.encoders.factory import build_reranker
from raydr.errors import RaydrError
from raydr.llm.engine import EngineError
from raydr.serve.errors import ApiError
from raydr.serve.modalities import modalities_of
from raydr.serve.tracing import span
from raydr.types import Hit, Modality, Passage, Query


class Reranker:
    """One replica."""

    def __init__(self, component: Component) -> None:
        reranker = build_reranker(component, where="rerankers")
        self._reranker: Any = reranker
        self._is_async = hasattr(reranker, "rerank_async")
        self._turn = asyncio.Lock()
        if hasattr(reranker, "start"):
            reranker.start()  # now, so that a replica that is ready answers, and one that cannot says so

    async def modalities(self) -> frozenset[Modality]:
        """What the reranker reads; of one that does not say, words."""
        return modalities_of(self._reranker)

    async def rerank(self, query: Query, passages: Sequence[Passage], *, request_id: str) -> list[tuple[int, float]]:
        """(place in `passages`, score), best first, in the order the reranker gives."""
        # They come in some order, which equal scores keep; their ids may repeat, their places do not.
        by_place = {str(place): passage._replace(passage_id=str(place)) for place, passage in enumerate(passages)}
        hits = [Hit(place, 0.0) for place in by_place]
        asked = query._replace(query_id=request_id)
        try:
            with span("raydr.reranker", passages=len(hits)):
                if self._is_async:
                    ranked = await self._reranker.rerank_async(asked, hits, by_place)
                else:
                    ranked = await self._in_turn(asked, hits, by_place)
        except EngineError as error:
            raise ApiError(503, "reranker_unavailable", f"the reranker: {error}", retry_after_s=5.0) from error
        except RaydrError as error:
            raise ApiError(500, "reranker_failed", f"the reranker: {error}") from error
        return [(int(hit.passage_id), float(hit.score)) for hit in ranked]

    async def _in_turn(self, query: Query, hits: list[Hit], passages: dict[str, Passage]) -> list[Hit]:
        """In a thread, which goes on when its caller leaves: the next one waits for it all the same."""
        await self._turn.acquire()
        work = asyncio.ensure_future(asyncio.to_thread(self._reranker.rerank, query, hits, passages))
        work.add_done_callback(self._next)
        return await asyncio.shield(work)

    def _next(self, work: asyncio.Future[Any]) -> None:
        self._turn.release()
        if not work.cancelled():
            work.exception()  # looked at, also where nobody waits for it any more

    async def check_health(self) -> None:
        """Asked by Serve every few seconds; raising makes it replace the replica."""
        if hasattr(self._reranker, "check"):
            await self._reranker.check()

    def __del__(self) -> None:
        """Serve calls this when the replica is stopped."""
        if hasattr(self, "_reranker") and hasattr(self._reranker, "close"):
            self._reranker.close()
