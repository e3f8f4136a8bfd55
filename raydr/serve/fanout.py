"""Calls to the other deployments: what Serve reports of them, a deadline, and the shards asked as one.

Notable: everything a search asks for only reads, so a call whose replica died under it is made once more; with a second
replica nobody notices, with one it waits for the next, as long as its deadline allows. A shard that does not answer in
time is, as the request wants it, an error (503) or missing from the answer; one that is missing is not asked again by
the same request. There is no second call beside a slow one ("hedging"): Serve's router chooses the replica, and cannot
be told to avoid the one that is slow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int64

from raydr.serve import metrics
from raydr.serve.answers import MissingShard
from raydr.serve.errors import ApiError
from raydr.serve.shard import IndexInfo

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_DOES_NOT_ANSWER = ("unavailable", "overloaded", "shard_timeout")
"""Codes of errors that say something of a deployment, not of the request."""


class _ReplicaDiedError(ApiError):
    """Its own type only so that `ask` knows it; the caller of the server sees any other 503."""


async def call(response: Any) -> Any:
    """The result of a deployment call; what Serve reports about it becomes an error a caller understands."""
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    try:
        return await response
    except BackPressureError:
        raise ApiError(429, "overloaded", "this server is at its limit; try again shortly", retry_after_s=1.0) from None
    except (DeploymentUnavailableError, RayActorError) as error:
        logger.warning("a deployment did not answer: %s", error)
        message = "a part of this server is restarting"
        kind = _ReplicaDiedError if isinstance(error, RayActorError) else ApiError
        raise kind(503, "unavailable", message, retry_after_s=1.0) from None
    except RayTaskError as error:
        if isinstance(error.cause, ApiError):
            raise error.cause from None
        raise
    except asyncio.CancelledError:
        cancel: Callable[[], None] = getattr(response, "cancel", lambda: None)
        cancel()
        raise


async def ask(method: Any, *arguments: Any, **named: Any) -> Any:
    """The result of `method.remote(...)`, which changes nothing: asked once more where the replica died meanwhile."""
    try:
        return await call(method.remote(*arguments, **named))
    except _ReplicaDiedError:
        return await call(method.remote(*arguments, **named))


async def ask_within(limit_s: float, part: str, method: Any, *arguments: Any) -> Any:
    """The same. Raises `ApiError` 503 `shard_timeout`, which names `part`, when it takes longer than `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            return await ask(method, *arguments)
    except TimeoutError:
        message = f"{part} did not answer within {limit_s:g} s; try again shortly"
        raise ApiError(503, "shard_timeout", message, retry_after_s=1.0) from None


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of `works`, all at work at once. Raises the first `ApiError` of one, and cancels the others then."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except* ApiError as errors:
        failure = next(error for error in errors.exceptions if isinstance(error, ApiError))
    else:
        return [task.result() for task in tasks]
    raise failure


class Fanout:
    """The Shard deployments for one request over the index version `info`."""

    def __init__(
        self, shards: Sequence[Any], info: IndexInfo, *, limit_s: float, on_failure: Literal["error", "partial"]
    ) -> None:
        self._shards = shards
        self._info = info
        self._limit_s = limit_s
        self._on_failure = on_failure
        self._failures: dict[int, ApiError] = {}
        self.numbers = range(min(len(shards), info.num_shards))
        """The deployments that hold something of this version."""

    async def ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """What the deployments (by number) answer to `method` with their own arguments, all asked at once.

        Raises the `ApiError` of the first that does not answer; where the request takes a partial answer, these are
        left out. `unavailable` when the request has got none of what it asked the shards for.
        """
        asked = {number: own for number, own in arguments.items() if number not in self._failures}
        answers = await together(
            self._one(number, getattr(self._shards[number], method), own) for number, own in asked.items()
        )
        if len(self._failures) == len(self.numbers):
            raise next(iter(self._failures.values()))
        return {number: found for number, found in zip(asked, answers, strict=True) if number not in self._failures}

    async def _one(self, number: int, method: Any, arguments: tuple[Any, ...]) -> Any:
        try:
            return await ask_within(self._limit_s, f"Shard{number}", method, *arguments)
        except ApiError as failure:
            if failure.code not in _DOES_NOT_ANSWER:
                raise
            metrics.record_shard_failure(number, failure.code)
            if self._on_failure == "error":
                raise
            self._failures[number] = failure

    @property
    def is_partial(self) -> bool:
        return bool(self._failures)

    def by_owner(self, rows: Sequence[int]) -> dict[int, list[int]]:
        """Which of `rows` each deployment holds, for those that hold some."""
        owners = (self._info.shards_of(rows) % len(self._shards)).tolist()
        return {
            number: [row for row, owner in zip(rows, owners, strict=True) if owner == number] for number in set(owners)
        }

    def present(self, rows: Int64[np.ndarray, "query k"]) -> Int64[np.ndarray, "query k"]:
        """`rows` with -1 in the place of those whose deployment has not answered."""
        owners = self._info.shards_of(rows.ravel()).reshape(rows.shape) % len(self._shards)
        return np.where(np.isin(owners, list(self._failures)), -1, rows)

    def missing(self) -> list[MissingShard]:
        """The shards of the index that are not in the answer."""
        counts = np.diff(self._info.first_rows).tolist()
        return [
            MissingShard(shard=shard, num_passages=counts[shard], reason=failure.message)
            for shard in range(self._info.num_shards)
            if (failure := self._failures.get(shard % len(self._shards))) is not None
        ]
