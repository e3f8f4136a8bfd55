"""search: searches `out/index` with the queries of the split and writes `out/search/run.trec`.

python jobs/search.py jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT search.mode=hybrid
"""

from __future__ import annotations

from pathlib import Path

from raydr import runtime
from raydr.artifacts import Artifact
from raydr.data.corpus import Corpus
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ConfigError
from raydr.methods.base import build_method
from raydr.stages.search import search_corpus
from raydr.verbs.config import RunConfig


def search(config: RunConfig, *, name: str = "search", index: Path | None = None) -> Artifact:
    """The run of the split's queries in `out/<name>`, found in `index` (None: `out/index`).

    Raises `ArtifactError` when there is no index yet.
    """
    corpus = Corpus.open(config.out / "corpus")
    use_ray = runtime.uses_ray(config.runtime, num_passages=corpus.num_passages)
    if use_ray:
        runtime.connect()
    method = build_method(config.method)
    reranker = method.build_reranker() if config.search.rerank else None
    if config.search.rerank and reranker is None:
        raise ConfigError(f"search.rerank: {type(method).__name__} has no reranker; set it to 0")
    build_encoder = EncoderFactory(config.method)
    return search_corpus(
        index or config.out / "index",
        corpus.queries(),
        build_encoder,
        config.search,
        config.out / name,
        use_ray=use_ray,
        corpus=corpus,
        build_refiner=method.build_refiner,
        reranker=reranker,
    )
