"""Dynamic batching: a batch is whatever arrived while the one before it ran.

Notable: a lone request waits for nobody, and under load batches grow by themselves up to a budget of tokens. Serve's
`@serve.batch` closes a batch after a fixed wait even while the model is still busy: a wait of zero gives batches of
one under load, any other wait is added to every quiet request. Here the wait is the model itself.

    batcher = Batcher(run, budget=4096)          run: list of items -> list of results, called in a thread of its own
    result = await batcher.submit(item, cost=120, group="v1/query")
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Waiting(Generic[Item]):
    item: Item
    cost: int
    group: Hashable
    future: asyncio.Future[Any]
    since: float


class Batcher(Generic[Item, Result]):
    """Runs items of one group (what can be encoded together) in batches whose costs sum to at most `budget`."""

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        budget: int,
        on_batch: Callable[[Hashable, list[Item], int, list[float], int], None] = lambda *_: None,
    ) -> None:
        self.budget = budget
        self._run = run
        self._on_batch = on_batch
        self._waiting: deque[_Waiting[Item]] = deque()
        self._worker: asyncio.Task[None] | None = None
        # One thread: the model uses the cores of its replica for one batch at a time.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch")

    async def submit(self, item: Item, *, cost: int, group: Hashable) -> Result:
        """The result of `item`, which runs alone if dearer than the budget. A cancelled caller leaves the queue."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(item, cost, group, future, time.perf_counter()))
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())
        return await future

    async def alone(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)` in the batcher's thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            items = [waiting.item for waiting in batch]
            started = time.perf_counter()
            waits_s = [started - waiting.since for waiting in batch]
            cost = sum(waiting.cost for waiting in batch)
            self._on_batch(batch[0].group, items, cost, waits_s, len(self._waiting))
            try:
                results = await loop.run_in_executor(self._thread, self._run, items)
                outcomes: Sequence[Any] = list(zip(batch, results, strict=True))
            except Exception as error:  # noqa: BLE001 (handed to every caller of the batch)
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                continue
            for waiting, result in outcomes:
                if not waiting.future.done():
                    waiting.future.set_result(result)
        self._worker = None

    def _next_batch(self) -> list[_Waiting[Item]]:
        """The one that waited longest, and those behind it that may share its batch; the others keep their places."""
        batch: list[_Waiting[Item]] = []
        kept: deque[_Waiting[Item]] = deque()
        cost = 0
        while self._waiting:
            waiting = self._waiting.popleft()
            if waiting.future.done():  # its caller was cancelled
                continue
            fits = not batch or (waiting.group == batch[0].group and cost + waiting.cost <= self.budget)
            if fits:
                batch.append(waiting)
                cost += waiting.cost
            else:
                kept.append(waiting)
        self._waiting = kept
        return batch
