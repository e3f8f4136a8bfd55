"""How far long work has come: a bar on a terminal, a line now and then in a log.

with Progress("embed", total=8000, unit="passage") as progress:
    progress.update(512)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType

LINE_EVERY_S = 15.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """Counts `unit`s up to `total`; `initial` of them are done already. Writes to stderr."""

    def __init__(self, name: str, *, total: int, initial: int = 0, unit: str = "item") -> None:
        from tqdm import tqdm

        self._name, self._total, self._unit = name, total, unit
        self._done = initial
        self._written = time.monotonic()
        self._since: tuple[int, float] | None = None
        """How many were done, and when, at the first update: what came before it, workers that start and a model that
        is loaded, says nothing of the rate."""
        self._bar = tqdm(total=total, initial=initial, desc=name, unit=unit, unit_scale=total > 10_000, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, count: int) -> None:
        """`count` more are done."""
        self.update_to(self._done + count)

    def update_to(self, done: int) -> None:
        """`done` are done in all."""
        now = time.monotonic()
        if done < self._done or (self._since is None and done > self._done):  # resumed further back than it had come
            self._since = (done, now)
        self._bar.update(done - self._done)
        self._done = done
        if self._bar.disable and now - self._written >= LINE_EVERY_S:
            self._written = now
            print(self._line(now), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        line = f"{self._name}: {self._done:,} of {self._total:,}"
        first, since = self._since or (self._done, now)
        if self._done <= first or now <= since:
            return line
        rate = (self._done - first) / (now - since)
        return f"{line} ({_readable(rate)} {self._unit}/s, {(self._total - self._done) / rate:.0f} s left)"


@contextmanager
def followed(name: str, done: Callable[[], int], *, total: int, unit: str) -> Generator[None]:
    """Shows how far work elsewhere has come: asks `done` at the start, every second while the block runs, and last."""
    ended = threading.Event()
    with Progress(name, total=total, initial=done(), unit=unit) as progress:

        def follow() -> None:
            while not ended.wait(1.0):
                progress.update_to(done())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            progress.update_to(done())


def _readable(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
