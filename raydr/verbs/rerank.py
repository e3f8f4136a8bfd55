"""rerank: reorders a run of the split's queries and writes `out/rerank/run.trec`; `raydr evaluate` measures it.

    python jobs/rerank.py CONFIG.yaml data.path=DIR out=OUT rerank.depth=100
    python jobs/rerank.py CONFIG.yaml data.path=DIR out=OUT rerank.run=bm25.trec

The reranker is `rerank.reranker`, or what the method brings. The run is that of `search` in `out`, or a TREC file.
"""

from __future__ import annotations

from pathlib import Path

from raydr import runtime
from raydr.artifacts import Artifact
from raydr.data.corpus import Corpus
from raydr.errors import ConfigError
from raydr.evaluation.trec import read_run
from raydr.methods.base import build_method
from raydr.stages.rerank import rerank_run
from raydr.stages.search import RUN
from raydr.verbs.config import RunConfig


def rerank(config: RunConfig, *, name: str = "rerank", index: Path | None = None) -> Artifact:
    """The reordered run in `out/<name>`. Raises `ConfigError` where nobody names a reranker."""
    corpus = Corpus.open(config.out / "corpus")
    use_ray = runtime.uses_ray(config.runtime, num_passages=corpus.num_passages)
    reranker = config.rerank.reranker
    if reranker is None:
        if build_method(config.method).build_reranker() is None:
            raise ConfigError("rerank.reranker: name one, or a method that has one (see docs/papers.md)")
        reranker = config.method
    run = read_run(config.rerank.run or config.out / "search" / RUN)
    if use_ray:
        runtime.connect()
    return rerank_run(
        run,
        corpus.queries(),
        index or config.out / "index",
        reranker,
        config.rerank,
        config.out / name,
        use_ray=use_ray,
    )
