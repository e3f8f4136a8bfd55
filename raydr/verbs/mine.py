"""mine: training examples (`out/examples`) for the queries of another split, with negatives found in `out/index`.

python jobs/mine.py jobs/configs/zero_shot.yaml data.path=DIR out=OUT mine.split=train mine.fraction=0.95
raydr mine data.path=DIR out=OUT mine.source_file=train.jsonl       a file of examples instead, taken as it is
"""

from __future__ import annotations

from raydr import runtime
from raydr.artifacts import Artifact
from raydr.data.corpus import Corpus
from raydr.data.ingest import ingest_queries
from raydr.encoders.factory import EncoderFactory
from raydr.stages.mine import examples_of_file, mine_negatives, training_data
from raydr.stages.pictures_on_ray import preparation
from raydr.verbs.config import RunConfig


def mine(config: RunConfig) -> Artifact:
    """The training examples in `out/examples`. Raises `ArtifactError` when there is no index yet."""
    out = config.out / "examples"
    if config.mine.source_file is not None:
        return examples_of_file(config.mine, out).artifact
    corpus = Corpus.open(config.out / "corpus")
    data = training_data(config.data, config.mine)
    queries_out = config.out / f"queries_{config.mine.split}"
    queries = ingest_queries(data, corpus, queries_out, prepare=preparation(config.runtime))
    use_ray = runtime.uses_ray(config.runtime, num_passages=corpus.num_passages)
    if use_ray:
        runtime.connect()
    return mine_negatives(
        config.out / "index",
        queries,
        EncoderFactory(config.method),
        config.mine,
        out,
        use_ray=use_ray,
        search=config.search,
    )
