"""Which index a request is for, and the versions a replica holds: what makes a swap invisible to callers.

Notable: every request inside the application names its index version. A replica that does not hold a version loads it
when first asked, beside the one it serves, and keeps the last few; so replicas of different deployments need not
change over at the same moment, and one that starts in the middle of a swap is as good as the others. Callers that ask
for the same missing version wait for one load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class IndexRef(NamedTuple):
    """One version of an index: where it lies, its version, and the stamp of the encoder that made it."""

    path: str
    version: str
    encoder_version: str
    method: str = ""
    """Its method as JSON: two methods of one encoder may refine its queries differently."""


class VersionCache(Generic[T]):
    """Holds what `load` makes for each of the `keep` versions used last. Not for use from several threads."""

    def __init__(self, load: Callable[[IndexRef], T], keep: int, key: Callable[[IndexRef], object] = lambda r: r):
        self._load = load
        self._keep = keep
        self._key = key
        self._held: dict[object, asyncio.Task[T]] = {}

    async def get(self, ref: IndexRef) -> T:
        """What belongs to `ref`, loaded in a thread if need be. A load that fails is tried anew by the next caller."""
        key = self._key(ref)
        task = self._held.pop(key, None) or asyncio.ensure_future(asyncio.to_thread(self._load, ref))
        self._held[key] = task  # the last entry is the one used last
        while len(self._held) > self._keep:
            del self._held[next(iter(self._held))]
        try:
            # A caller that gives up must not take the load away from the others.
            return await asyncio.shield(task)
        except Exception:
            if self._held.get(key) is task and task.done():
                del self._held[key]
            raise
