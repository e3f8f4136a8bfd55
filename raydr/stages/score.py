"""score: a ranker's scores of every candidate of every training query, as one batch job; the supervision of a student.

Notable: a ranker that does not change while its student is trained needs to score each pair once, not at every visit.
Scores are stored beside the example set they belong to, in its order, and carry its fingerprint, so scores of other
examples are refused. In this process and on Ray the same blocks are scored, so the scores are the same.

| in the artifact (kind "scores") | columns |
| --- | --- |
| scores.parquet | row (of the example set), scores (of its positives, then of its negatives) |

    scores = score_examples(examples, ranker, ScoreConfig(), out, use_ray=True)
    open_scores(out, examples)[0]        # of query 0: positives first
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32

from raydr.artifacts import Artifact, artifacts_named_in, fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Component
from raydr.data.arrow_rows import readable
from raydr.data.examples import ExampleSet
from raydr.encoders.factory import build_ranker
from raydr.errors import ArtifactError, ConfigError
from raydr.progress import Progress
from raydr.stages.config import ScoreConfig
from raydr.stages.pool import over_pool
from raydr.storage import named

KIND = "scores"
SCORES = "scores.parquet"
_SCHEMA = pa.schema({"row": pa.int64(), "scores": pa.list_(pa.float32())})


@runtime_checkable
class PairScorer(Protocol):
    """A reranker that says what it thinks of a pair, such as `CrossEncoderReranker`."""

    def score(self, pairs: Any) -> Float32[np.ndarray, " pair"]: ...


def score_examples(
    examples: ExampleSet, ranker: Component, config: ScoreConfig, out: Path, *, use_ray: bool
) -> Artifact:
    """The scores of `ranker` in `out`; finished ones of the same examples and ranker stay.

    `ranker` is a reranker, or a method that builds one. With `use_ray`, a pool of actors scores block after block, and
    every node must see the same paths. `details["ordered_share"]` says how many of the pairs (positive, negative) of a
    query it puts in the right order; 0.5 is guessing. Raises `ConfigError` when `ranker` does not score pairs.
    """
    settings = {"ranker": ranker.model_dump(mode="json")}
    inputs = {"examples": examples.artifact, **artifacts_named_in(settings)}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"score: {named(out)} has these scores already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    starts = range(0, len(examples), config.queries_per_block)
    blocks = [pa.table({"row": range(start, min(start + config.queries_per_block, len(examples)))}) for start in starts]
    with (
        write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer,
        Progress("score", total=len(examples), unit="query") as progress,
        pq.ParquetWriter(out / SCORES, _SCHEMA) as file,
    ):
        num_right = num_pairs = 0
        build = functools.partial(_Scorer, ranker, examples.artifact.path.resolve())
        tables = over_pool(blocks, build, config, name=f"score {out.parent.name}") if use_ray else map(build(), blocks)
        for table in tables:
            file.write_table(table)
            for row, own in zip(table["row"].to_pylist(), table["scores"].to_pylist(), strict=True):
                positives, negatives = np.split(np.array(own), [len(examples.positives(row))])
                num_right += int((positives[:, None] > negatives).sum())
                num_pairs += positives.size * negatives.size
            progress.update(table.num_rows)
        writer.counts["queries"] = len(examples)
        writer.details["ordered_share"] = round(num_right / max(1, num_pairs), 4)
    return open_artifact(out, kind=KIND)


def open_scores(path: str | Path, examples: ExampleSet) -> list[Float32[np.ndarray, " candidate"]]:
    """For each query the scores of its positives, then of its negatives. Raises `ArtifactError` for other examples."""
    artifact = open_artifact(path, kind=KIND)
    if artifact.manifest.inputs["examples"] != examples.artifact.fingerprint:
        raise ArtifactError(f"{path}: scores other examples than those in {examples.artifact.path}; score these")
    with readable(artifact.path / SCORES):
        table = pq.read_table(artifact.path / SCORES).sort_by("row")
    return [np.asarray(value.values, dtype=np.float32) for value in table["scores"]]


class _Scorer:
    """Scores blocks of queries; built where it runs."""

    def __init__(self, ranker: Component, path: Path) -> None:
        scorer = build_ranker(ranker)
        if not isinstance(scorer, PairScorer):
            raise ConfigError(f"{ranker.import_path}: {type(scorer).__name__} has no method score(pairs)")
        self._scorer, self._examples = scorer, ExampleSet.open(path)

    def __call__(self, block: pa.Table) -> pa.Table:
        numbers = block["row"].to_pylist()
        rows = [np.concatenate([self._examples.positives(q), self._examples.negatives(q)]) for q in numbers]
        passages = iter(self._examples.passages(np.concatenate(rows)))
        queries = [self._examples.query(query) for query in numbers]
        pairs = [(query, next(passages)) for query, own in zip(queries, rows, strict=True) for _ in own]
        scores = np.split(self._scorer.score(pairs), np.cumsum([len(own) for own in rows])[:-1])
        return pa.table({"row": numbers, "scores": [own.tolist() for own in scores]}, schema=_SCHEMA)
