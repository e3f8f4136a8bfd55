"""Evaluates a run, alone or beside baselines, and writes the `evaluation` artifact.

metrics.json       {"nDCG@10": 0.645, ...}: the run's means, flat, under ir_measures names; of tasks {"cirr/Hit@5": ...}
summary.json       intervals, differences, p-values, areas under ROC, counts and settings of every run
summary.txt        the same as a table for the terminal
per_query.parquet  run, query_id, one column per measure, area_under_roc (null where undefined); task, WrongModality@k
roc.parquet        run, threshold, false_positive_rate, true_positive_rate (pooled over queries, thinned)
report.html        the report, one self-contained file
report.png         its picture

evaluate_run(hybrid, qrels, EvaluateConfig(), "out/evaluate", name="hybrid", baselines={"BM25": bm25})
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.errors import DataError
from raydr.evaluation.comparison import Comparison, compare_runs, comparison_table
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.curves import RocCurve, ScorePool, area_per_query, pooled_curve, score_pools
from raydr.evaluation.plots import save_plot
from raydr.evaluation.report import render_report
from raydr.evaluation.tasks import WRONG_MODALITY, Tasks, WrongModality, by_task, task_text, wrong_modality
from raydr.storage import named
from raydr.types import QUERY_ID, TASK, Modality, Qrels, Query, Run

KIND = "evaluation"
_MAX_ROC_POINTS = 2000


def evaluate_run(
    run: Run,
    qrels: Qrels,
    config: EvaluateConfig,
    out: str | Path,
    *,
    name: str = "run",
    baselines: Mapping[str, Run] | None = None,
    queries: Sequence[Query] = (),
    title: str = "Evaluation",
    inputs: Mapping[str, Artifact] | None = None,
    tasks: Mapping[str, str] | None = None,
    modalities: Mapping[str, Modality] | None = None,
) -> Artifact:
    """Measures `run`; with `baselines` the first of them is the reference and `run` comes last.

    `queries` lets the report show texts beside ids; `inputs` are the artifacts that run and judgements came from;
    `tasks` (query id to task) adds figures for each task, `modalities` (of the passages that `tasks.in_question` names)
    the shares of the wrong modality.
    Raises `DataError` where a run does not fit the judgements, before anything is written.
    """
    baselines = baselines or {}
    if name in baselines:
        raise DataError(f"a baseline has the name of the run, {name!r}; give one of them another name")
    runs = {**baselines, name: run}
    # What is not asked for is left out: an evaluation from before there was such a thing is still the same.
    settings = {**config.model_dump(mode="json", exclude=None if tasks else {"task_measures"}), "runs": list(runs)}
    settings |= {"by_modality": True} if modalities is not None else {}
    # Without the artifacts they came from, nothing says whether the runs are still the same ones.
    prints = {key: artifact.fingerprint for key, artifact in (inputs or {}).items()}
    if prints and is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"evaluate: {named(out)} has this evaluation already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    comparison = compare_runs(runs, qrels, config)
    pools = {
        label: score_pools(one, qrels, num_negatives=config.roc_num_negatives, relevance_level=config.relevance_level)
        for label, one in runs.items()
    }
    curves = {label: pooled_curve(pool) for label, pool in pools.items()}
    wrong = wrong_modality(runs, qrels, modalities, config) if modalities is not None else None
    table = by_task(comparison, runs, qrels, tasks or {}, wrong)
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer:
        metrics = dict(zip(comparison.measures, comparison.values[-1].tolist(), strict=True))
        metrics |= _defined(WRONG_MODALITY, wrong.shares()[-1]) if wrong is not None else {}
        metrics |= table.metrics(comparison.measures) if table is not None else {}
        _write_json(writer.path / "metrics.json", metrics)
        _write_json(writer.path / "summary.json", _summary(comparison, curves, pools, table, wrong))
        summary = comparison_table(comparison) + task_text(table, wrong, comparison)
        (writer.path / "summary.txt").write_text(summary, encoding="utf-8")
        pq.write_table(_per_query_table(comparison, pools, table, wrong), writer.path / "per_query.parquet")
        pq.write_table(_roc_table(curves), writer.path / "roc.parquet")
        report = render_report(comparison, curves, title=title, queries=queries, tasks=table, wrong=wrong)
        (writer.path / "report.html").write_text(report, encoding="utf-8")
        save_plot(comparison, curves, writer.path / "report.png")
        writer.counts.update(comparison.counts[-1].as_dict())
        writer.details["metrics"] = metrics
    return open_artifact(out, kind=KIND)


def _summary(
    c: Comparison,
    curves: Mapping[str, RocCurve | None],
    pools: Mapping[str, Mapping[str, ScorePool]],
    tasks: Tasks | None,
    wrong: WrongModality | None,
) -> dict[str, Any]:
    runs = []
    for r, name in enumerate(c.names):
        curve = curves[name]
        areas = [area for area in area_per_query(pools[name]).values() if not math.isnan(area)]
        measures = {
            measure: {
                "value": c.values[r, m],
                "interval": [c.low[r, m], c.high[r, m]],
                **(
                    {
                        "difference": c.differences[r, m],
                        "difference_interval": [c.difference_low[r, m], c.difference_high[r, m]],
                        "p": c.p_values[r, m],
                        "p_corrected": c.p_corrected[r, m],
                    }
                    if r
                    else {}
                ),
            }
            for m, measure in enumerate(c.measures)
        }
        roc = {
            "pooled_area": curve.area if curve else None,
            "mean_area_per_query": sum(areas) / len(areas) if areas else None,
            "relevant_not_retrieved": curve.num_missed if curve else None,
        }
        one = {"name": name, "measures": measures, "roc": roc, "counts": c.counts[r].as_dict()}
        one |= {"wrong_modality": _defined(WRONG_MODALITY, wrong.shares()[r])} if wrong is not None else {}
        one |= {"tasks": tasks.as_dict(c.measures, r)} if tasks is not None else {}
        runs.append(one)
    return {
        "reference": c.names[0],
        "runs": runs,
        "settings": c.config.model_dump(mode="json"),
        "conventions": {
            "means": "over all judged queries; an unanswered query scores zero",
            "ties": "hits count in the order of the run; a file is sorted by score (float32), then id, both descending",
            "gains": "nDCG uses the grades as they are; grades below relevance_level are not relevant in the others",
            "interval": "percentile bootstrap over queries, the same resamples for all runs",
            "p": "two-sided paired randomisation test against the reference; corrected: Holm over the runs",
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("raydr", "ir-measures", "pytrec-eval-terrier", "numpy")},
        },
    }


def _per_query_table(
    c: Comparison,
    pools: Mapping[str, Mapping[str, ScorePool]],
    tasks: Tasks | None,
    wrong: WrongModality | None,
) -> pa.Table:
    tables = []
    for r, name in enumerate(c.names):
        areas = area_per_query(pools[name])
        columns: dict[str, Any] = {"run": [name] * len(c.query_ids), QUERY_ID: c.query_ids}
        columns |= {measure: c.per_query[r, :, m] for m, measure in enumerate(c.measures)}
        columns["area_under_roc"] = pa.array([areas[query_id] for query_id in c.query_ids], from_pandas=True)
        if tasks is not None:
            columns[TASK] = pa.array([task or None for task in tasks.of_query], pa.string())
        if wrong is not None:
            shares = wrong.per_query[r]
            columns |= {name: pa.array(shares[:, d], from_pandas=True) for d, name in enumerate(WRONG_MODALITY)}
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _roc_table(curves: Mapping[str, RocCurve | None]) -> pa.Table:
    columns: dict[str, list[Any]] = {"run": [], "threshold": [], "false_positive_rate": [], "true_positive_rate": []}
    for name, curve in curves.items():
        if curve is not None:
            thin = curve.thinned(_MAX_ROC_POINTS)
            columns["run"] += [name] * len(thin.thresholds)
            columns["threshold"] += thin.thresholds.tolist()
            columns["false_positive_rate"] += thin.false_positive_rate.tolist()
            columns["true_positive_rate"] += thin.true_positive_rate.tolist()
    types = [pa.string(), pa.float64(), pa.float64(), pa.float64()]
    return pa.table({name: pa.array(values, kind) for (name, values), kind in zip(columns.items(), types, strict=True)})


def _defined(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True) if not math.isnan(value)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
