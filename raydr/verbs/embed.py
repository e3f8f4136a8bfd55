"""embed: reads the corpus (`out/corpus`) and embeds every passage of it (`out/embed`).

python jobs/embed.py jobs/configs/zero_shot.yaml data.path=DIR out=OUT
"""

from __future__ import annotations

from raydr import runtime
from raydr.artifacts import Artifact
from raydr.data.ingest import ingest
from raydr.stages.embed import embed_corpus
from raydr.stages.pictures_on_ray import preparation
from raydr.stages.preprocess import preprocessed_corpus
from raydr.verbs.config import RunConfig


def embed(config: RunConfig) -> Artifact:
    """The embeddings of the corpus; what is finished already is used as it is, what was interrupted is resumed."""
    corpus = ingest(config.data, config.out / "corpus", prepare=preparation(config.runtime))
    use_ray = runtime.uses_ray(config.runtime, num_passages=corpus.num_passages)
    if use_ray:
        runtime.connect()
    ready, build_encoder = preprocessed_corpus(
        corpus, config.method, config.preprocess, config.out / "preprocessed", use_ray=use_ray
    )
    return embed_corpus(
        ready,
        build_encoder,
        config.embed,
        config.out / "embed",
        use_ray=use_ray,
        method=config.method,
    )
