"""evaluate: measures `out/search/run.trec` against the judgements of the split (`out/evaluate`).

python jobs/evaluate.py jobs/configs/zero_shot.yaml data.path=DIR data.split=test out=OUT
raydr evaluate qrels.txt bm25.trec dense.trec        any run files: a table with a significance test
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from raydr.artifacts import Artifact, is_finished, open_artifact
from raydr.data.corpus import Corpus
from raydr.errors import DataError
from raydr.evaluation.comparison import compare_runs, comparison_table
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.evaluate import evaluate_run
from raydr.evaluation.metrics import without_excluded
from raydr.evaluation.tasks import in_question
from raydr.evaluation.trec import read_qrels, read_run
from raydr.index.reader import IndexReader
from raydr.types import Modality
from raydr.verbs.config import RunConfig


def evaluate(
    config: RunConfig,
    *,
    name: str = "search",
    label: str | None = None,
    to: str = "evaluate",
    baselines: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Measures the run in `out/<name>`, called `label` (the search mode), into `out/<to>`; `baselines` stand beside it,
    the first of them being what the others are tested against.
    """
    corpus = Corpus.open(config.out / "corpus")
    if not corpus.has_qrels:
        raise DataError(f"{config.data.path}: has no judgements (qrels), so there is nothing to evaluate against")
    artifacts = {**(baselines or {}), label or config.search.mode: open_artifact(config.out / name, kind="run")}
    excluded = corpus.excluded()
    runs = {key: without_excluded(read_run(one.path / "run.trec"), excluded) for key, one in artifacts.items()}
    *_, last = runs
    qrels = corpus.qrels()
    modalities = _modalities(config.out / "index", corpus, in_question(runs, qrels))
    return evaluate_run(
        runs.pop(last),
        qrels,
        config.evaluate,
        config.out / to,
        name=last,
        baselines=runs,
        queries=corpus.queries(),
        title=f"{Path(config.data.path).name}, {config.data.split or 'judged queries'}",
        inputs={"corpus": corpus.artifact, **{f"run {key}": artifact for key, artifact in artifacts.items()}},
        tasks=corpus.tasks(),
        modalities=modalities,
    )


def _modalities(index: Path, corpus: Corpus, passage_ids: Collection[str]) -> dict[str, Modality] | None:
    """What these passages are made of; None where the corpus has no pictures, or its index is not there to say so."""
    if not is_finished(index):
        return None
    reader = IndexReader.open(index)
    if reader.artifact.manifest.inputs["corpus"] != corpus.artifact.fingerprint or not reader.has_pictures:
        return None
    return reader.modalities_of(passage_ids)


def compare_files(qrels: Path, runs: Sequence[Path], config: EvaluateConfig) -> str:
    """A table of run files measured against a qrels file; the first run is the reference of the test."""
    labels = [path.name for path in runs] if len({path.name for path in runs}) == len(runs) else list(map(str, runs))
    read = {label: read_run(path) for label, path in zip(labels, runs, strict=True)}
    return comparison_table(compare_runs(read, read_qrels(qrels), config))
