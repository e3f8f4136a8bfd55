"""What the demos share: their common settings, numbered steps, precision, and how they end, an index that is served.

Notable: a demo says what it does while it does it, on stderr; what it found goes to stdout. Without a terminal the
server is stopped after its sample answers.

    steps = DemoSteps(total=3)
    with steps("Embedding"):
        embed(run)
    with presented(run.out / "index", config, steps, dashboard=dashboard) as address:
        print_hits(ask(address, "words", k=3), query="words")
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raydr.config import Component, Config
from raydr.encoders.precision import choose_precision
from raydr.verbs.serve import check_port, prefer_few_hops, serving, wait_for_interrupt

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping


class DemoSettings(Config):
    """Settings that every demo has."""

    out: Path
    """Folder of the artifacts."""
    port: int = 8000
    """Port of the search page on 127.0.0.1."""
    serve: bool = True
    """Whether to serve after the evaluation."""


class DemoSteps:
    """Says which step of how many begins, and how long it took."""

    def __init__(self, total: int) -> None:
        self._total, self._number = total, 0
        self._started = time.monotonic()

    @contextmanager
    def __call__(self, title: str) -> Generator[None]:
        self._number += 1
        print(f"[{self._number}/{self._total}] {title}", file=sys.stderr, flush=True)
        started = time.monotonic()
        yield
        print(f"      {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Since the first of them was announced."""
        return time.monotonic() - self._started


def prepare_serving(config: DemoSettings) -> None:
    """What has to be done before Ray starts where a demo is to be served; raises `ConfigError` for a port that is taken
    now, not after minutes of work.
    """
    if config.serve:
        check_port("127.0.0.1", config.port)
        prefer_few_hops()


@contextmanager
def presented(
    index: Path,
    config: DemoSettings,
    steps: DemoSteps,
    *,
    dashboard: str | None,
    rerankers: Mapping[str, Component] | None = None,
) -> Generator[str]:
    """Serves `index`, hands its address to the `with` block for sample answers, and after that goes on until Ctrl-C;
    without a terminal it stops there.
    """
    with ExitStack() as stack:
        with steps("Deploying the encoder, the shards and the search page on Ray Serve"):
            server = serving(index, host="127.0.0.1", port=config.port, rerankers=rerankers)
            address = stack.enter_context(server)
        yield address
        print(f"Ray dashboard:  {dashboard}   (asks for a token: ray get-auth-token)\n")
        if sys.stdin.isatty():
            print("Serving until Ctrl-C.", flush=True)
            wait_for_interrupt()
        else:
            print(f"No terminal: shutting down. `raydr serve {index}` serves this index again.")


def fast_precision() -> Literal["float32", "bfloat16"]:
    """What to train in on this processor: bfloat16 where it is measured to be faster."""
    return "bfloat16" if choose_precision("auto", "cpu") == "bfloat16" else "float32"
