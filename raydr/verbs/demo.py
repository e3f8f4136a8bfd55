"""demo: semantic search over the documentation of the Python packages installed here, from corpus to served page.

Notable: every part is the real one: Ray Data embeds with a pretrained encoder, FAISS shards and BM25 are built as Ray
tasks, the three ways of searching are measured side by side on held-out questions, and Ray Serve answers over HTTP. A
second run reuses what is finished. Without a terminal the server is stopped after its sample answers.

    raydr demo                 raydr demo size=all                 raydr demo --no-serve
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raydr import runtime
from raydr.config import Config
from raydr.data.api_docs import build_api_docs
from raydr.data.config import DataConfig
from raydr.index.config import IndexConfig
from raydr.stages.config import EmbedConfig, SearchConfig
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.evaluate import evaluate
from raydr.verbs.index import index
from raydr.verbs.query import print_hits
from raydr.verbs.search import search
from raydr.verbs.serve import ask, check_port, prefer_few_hops, serving, wait_for_interrupt

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE_QUERIES = (
    "join two data frames on a column",
    "gradually lower the learning rate during training",
    "retry a task when its worker dies",
)


class DemoConfig(Config):
    """Settings of the demo."""

    out: Path = Path("runs/demo")
    """Folder of the artifacts."""
    size: int | Literal["all"] = 8000
    """Number of passages, or `all` documentation found in the environment."""
    port: int = 8000
    """Port of the search page on 127.0.0.1."""
    serve: bool = True
    """Whether to serve after the evaluation."""


def demo(config: DemoConfig) -> None:
    """Runs the whole demo; returns when the server is interrupted, or at once after its answers without a terminal."""
    started = time.monotonic()
    if config.serve:
        check_port("127.0.0.1", config.port)  # now, not after minutes of work
        prefer_few_hops()
    with _step(1, "Collecting the documentation of the packages installed in this environment"):
        build_api_docs(config.out / "docs", size=config.size)
    run = RunConfig(
        out=config.out,
        runtime="ray",
        data=DataConfig(path=str(config.out / "docs"), split="test"),
        embed=EmbedConfig(passages_per_block=512),  # small blocks, so that the progress bar moves
        index=IndexConfig(factory="Flat", num_shards=2),
        search=SearchConfig(k=100),
    )
    dashboard = runtime.connect(dashboard=True)
    with _step(2, "Embedding it with all-MiniLM-L6-v2 on Ray Data"):
        embed(run)
    with _step(3, "Building two FAISS shards and a BM25 index"):
        index(run)
    with _step(4, "Searching with the held-out questions: BM25, dense, hybrid"):
        runs = {mode: search(_with_mode(run, mode), name=f"search_{mode}") for mode in ("bm25", "dense", "hybrid")}
    with _step(5, "Evaluating them side by side"):
        baselines = {"BM25": runs["bm25"], "dense": runs["dense"]}
        evaluation = evaluate(run, name="search_hybrid", label="hybrid", baselines=baselines)
    print("\n" + (evaluation.path / "summary.txt").read_text())
    print(f"Plot: {evaluation.path / 'report.png'}   Report: {evaluation.path / 'report.html'}\n")
    if not config.serve:
        return
    with ExitStack() as served:
        with _step(6, "Deploying the encoder, the shards and the search page on Ray Serve"):
            address = served.enter_context(serving(config.out / "index", host="127.0.0.1", port=config.port))
        for query in SAMPLE_QUERIES:
            print_hits(ask(address, query, k=3), query=query)
        print(f"Done in {time.monotonic() - started:.0f} s.")
        print(f"Search page:    {address}")
        print(f"Ray dashboard:  {dashboard}   (asks for a token: ray get-auth-token)\n")
        if sys.stdin.isatty():
            print("Serving until Ctrl-C.", flush=True)
            wait_for_interrupt()
        else:
            print("No terminal: shutting down. `raydr serve` serves this index again.")


def _with_mode(run: RunConfig, mode: Literal["dense", "bm25", "hybrid"]) -> RunConfig:
    return run.model_copy(update={"search": run.search.model_copy(update={"mode": mode})})


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    print(f"[{number}/6] {title}", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    print(f"      {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
