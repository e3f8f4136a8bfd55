"""evaluate: measures `out/search/run.trec` against the judgements of the split (`out/evaluate`).

    python jobs/evaluate.py jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT
"""

from __future__ import annotations

from collections.abc import Mapping

from raydr.artifacts import Artifact, open_artifact
from raydr.data.corpus import Corpus
from raydr.errors import DataError
from raydr.evaluation.evaluate import evaluate_run
from raydr.evaluation.trec import read_run
from raydr.verbs.config import RunConfig


def evaluate(config: RunConfig, *, name: str = "search", baselines: Mapping[str, Artifact] | None = None) -> Artifact:
    """Measures the run in `out/<name>`; `baselines` are further runs shown beside it with a significance test."""
    corpus = Corpus.open(config.out / "corpus")
    if not corpus.has_qrels:
        raise DataError(f"{config.data.path}: has no judgements (qrels), so there is nothing to evaluate against")
    artifact = open_artifact(config.out / name, kind="run")
    return evaluate_run(
        read_run(artifact.path / "run.trec"),
        corpus.qrels(),
        config.evaluate,
        config.out / "evaluate",
        baselines={label: read_run(other.path / "run.trec") for label, other in (baselines or {}).items()},
    )
