"""index: builds the FAISS shards and the BM25 side (`out/index`) from `out/corpus` and `out/embed`.

python jobs/index.py jobs/configs/zero_shot.yaml data.path=DIR out=OUT
"""

from __future__ import annotations

from raydr import runtime
from raydr.artifacts import Artifact, open_artifact
from raydr.data.corpus import Corpus
from raydr.index.build import build_index
from raydr.verbs.config import RunConfig


def index(config: RunConfig) -> Artifact:
    """The index over the embedded corpus. Raises `ArtifactError` when the corpus is not embedded yet."""
    corpus = Corpus.open(config.out / "corpus")
    embeddings = open_artifact(config.out / "embed", kind="embeddings", later=True)
    use_ray = runtime.uses_ray(config.runtime, num_passages=corpus.num_passages)
    if use_ray:
        runtime.connect()
    return build_index(corpus, embeddings, config.index, config.out / "index", use_ray=use_ray)
