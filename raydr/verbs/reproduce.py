"""reproduce: all verbs of a config in order, skipping what is finished.

    python jobs/reproduce.py jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT

leaves `OUT/search/run.trec` and, where the data has judgements, `OUT/evaluate/metrics.json`.
"""

from __future__ import annotations

from raydr.artifacts import Artifact
from raydr.data.corpus import Corpus
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.evaluate import evaluate
from raydr.verbs.index import index
from raydr.verbs.search import search
from raydr.verbs.train import trained


def reproduce(config: RunConfig) -> Artifact:
    """Runs train (where configured), embed, index, search and (with judgements) evaluate; the last one's artifact."""
    config = trained(config)
    embed(config)
    index(config)
    run = search(config)
    if not Corpus.open(config.out / "corpus").has_qrels:
        return run
    return evaluate(config)
