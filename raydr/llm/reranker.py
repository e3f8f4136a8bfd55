"""A reranker over a language model: asynchronous within, so that an engine sees the prompts of all callers together.

A subclass is what ranks a list:

    class Mine(EngineReranker):
        async def rerank_async(self, query, hits, passages): ...       # await self.engine.next_token_logprobs(...)
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from raydr.llm.engine import Engine, EngineConfig, build_engine
from raydr.types import Hit, Passage, Query

T = TypeVar("T")


class EngineReranker(ABC):
    """A `Reranker` that asks an engine: asynchronous within, and the same for a caller without an event loop."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine_config = engine

    @abstractmethod
    async def rerank_async(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        """Every hit once, best first. Calls may overlap. Raises `EngineError` when the engine does not answer."""

    @abstractmethod
    def start(self) -> None:
        """Starts the engine and checks its tokenizer; otherwise the first list does."""

    @cached_property
    def engine(self) -> Engine:
        engine = build_engine(self._engine_config)
        weakref.finalize(self, engine.close)  # at the latest when the process ends: an engine has processes of its own
        return engine

    def rerank(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        """`rerank_async`, awaited."""
        return self._wait(self.rerank_async(query, hits, passages))

    def rerank_many(
        self, lists: Sequence[tuple[Query, Sequence[Hit]]], passages: Mapping[str, Passage]
    ) -> list[list[Hit]]:
        """Many lists at the same time, so that the engine can batch their prompts."""

        async def all_lists() -> list[list[Hit]]:
            return await asyncio.gather(*(self.rerank_async(query, hits, passages) for query, hits in lists))

        return self._wait(all_lists())

    async def check(self) -> None:
        """Raises `EngineError` when the engine cannot answer any more."""
        await self.engine.check()

    def close(self) -> None:
        """Ends the engine, if it was started."""
        if "engine" not in vars(self):
            return
        if "_loop" in vars(self):

            async def in_its_loop() -> None:  # where vLLM cannot see its core end before it knows that it is to
                self.engine.close()

            self._wait(in_its_loop())
        else:
            self.engine.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """One loop for the life of the reranker: an engine belongs to the loop that it was first asked in."""
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="reranker", daemon=True).start()
        return loop
