"""Runs task by task, and how many hits are of the wrong modality: for benchmarks of many tasks, such as M-BEIR.

Notable:
- A task has a measure of its own, the first of `measures` unless `task_measures` names another (M-BEIR: Hit@5, but
  Hit@10 for Fashion200K and FashionIQ). `TaskMean` is the mean of these over the tasks, each task counted once.
- `WrongModality@k` is the share of the first k hits that are of a modality which no relevant passage of their query
  has. It is 0 whatever the retriever does where the pool holds one modality only: measure it in the global pool
  (docs/evaluation.md).

    tasks = by_task(comparison, runs, qrels, {"q1": "cirr", "q2": "fashioniq"}, modalities)
    tasks.own_values[-1].mean()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from raydr.errors import DataError
from raydr.evaluation.comparison import Comparison, text_table
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.metrics import measure_name, measure_run
from raydr.types import Modality, Qrels, Run

DEPTHS = (1, 5)
"""First hits of which the share of the wrong modality is given."""
WRONG_MODALITY = [f"WrongModality@{depth}" for depth in DEPTHS]
MEAN = "TaskMean"


@dataclass(frozen=True)
class WrongModality:
    """Of each run and judged query: how many of its first hits have a known modality, and how many a wrong one."""

    hits: Int64[np.ndarray, "run query depth"]
    wrong: Int64[np.ndarray, "run query depth"]

    def shares(self, queries: Int64[np.ndarray, " some"] | None = None) -> Float64[np.ndarray, "run depth"]:
        """Of the hits of these queries (None: of all) together; NaN where there are none."""
        own = slice(None) if queries is None else queries
        return _ratio(self.wrong[:, own].sum(axis=1), self.hits[:, own].sum(axis=1))

    @property
    def per_query(self) -> Float64[np.ndarray, "run query depth"]:
        return _ratio(self.wrong, self.hits)


@dataclass(frozen=True)
class Tasks:
    """Runs by tasks, the tasks in alphabetical order; means over the judged queries of each."""

    names: list[str]
    of_query: list[str]
    """The task of each judged query; empty where it has none."""
    num_queries: list[int]
    own: list[str]
    """The measure of its own of each task."""
    own_values: Float64[np.ndarray, "run task"]
    values: Float64[np.ndarray, "run task measure"]
    """The measures of the comparison."""
    wrong_modality: Float64[np.ndarray, "run task depth"] | None
    """At the depths of `DEPTHS`; None where modalities are not known."""

    def as_dict(self, measures: list[str], run: int) -> dict[str, Any]:
        """The figures of one run by task; what is undefined is left out."""
        found: dict[str, Any] = {}
        for t, task in enumerate(self.names):
            values = {self.own[t]: self.own_values[run, t], **dict(zip(measures, self.values[run, t], strict=True))}
            if self.wrong_modality is not None:
                values |= dict(zip(WRONG_MODALITY, self.wrong_modality[run, t], strict=True))
            found[task] = {"queries": self.num_queries[t], "measure": self.own[t]}
            found[task] |= {name: float(value) for name, value in values.items() if not np.isnan(value)}
        return {MEAN: float(self.own_values[run].mean()), "by_task": found}

    def metrics(self, measures: list[str], run: int = -1) -> dict[str, float]:
        """The same under flat names, such as `cirr/Hit@5`."""
        figures = self.as_dict(measures, run)
        flat = {
            f"{task}/{name}": value
            for task, own in figures["by_task"].items()
            for name, value in own.items()
            if isinstance(value, float)
        }
        return {MEAN: figures[MEAN], **flat}


def by_task(
    comparison: Comparison,
    runs: Mapping[str, Run],
    qrels: Qrels,
    tasks: Mapping[str, str],
    wrong: WrongModality | None = None,
) -> Tasks | None:
    """The runs of a comparison task by task; `tasks` says the task of each query that has one. None where none has.

    Raises `DataError` when `task_measures` names a task that no query has.
    """
    config = comparison.config
    known = sorted(set(tasks.values()))
    if unknown := config.task_measures.keys() - set(known):
        there = f"the tasks are {', '.join(known)}" if known else "the queries have no tasks"
        raise DataError(f"evaluate.task_measures names the task {min(unknown)!r}, which no query has: {there}")
    of_query = [tasks.get(query_id, "") for query_id in comparison.query_ids]
    names = sorted({task for task in of_query if task})
    if not names:
        return None
    own = [own_measure(task, config) for task in names]
    per_query = _values_of(list(dict.fromkeys(own)), comparison, runs, qrels)
    queries = [np.flatnonzero(np.array(of_query) == task) for task in names]
    return Tasks(
        names=names,
        of_query=of_query,
        num_queries=[len(rows) for rows in queries],
        own=own,
        own_values=np.stack(
            [per_query[measure][:, rows].mean(axis=1) for measure, rows in zip(own, queries, strict=True)], axis=1
        ),
        values=np.stack([comparison.per_query[:, rows].mean(axis=1) for rows in queries], axis=1),
        wrong_modality=None if wrong is None else np.stack([wrong.shares(rows) for rows in queries], axis=1),
    )


def own_measure(task: str, config: EvaluateConfig) -> str:
    """The measure that a task is judged by."""
    return measure_name(config.task_measures.get(task, config.measures[0]), config.relevance_level)


def _values_of(
    measures: list[str], comparison: Comparison, runs: Mapping[str, Run], qrels: Qrels
) -> dict[str, Float64[np.ndarray, "run query"]]:
    """Each measure of each run and query; those that the comparison lacks are computed."""
    found = {m: comparison.per_query[:, :, c] for c, m in enumerate(comparison.measures) if m in measures}
    if further := [measure for measure in measures if measure not in found]:
        config = comparison.config.model_copy(update={"measures": further})
        measured = np.stack([measure_run(run, qrels, config).values for run in runs.values()])
        found |= {measure: measured[:, :, column] for column, measure in enumerate(further)}
    return found


def in_question(runs: Mapping[str, Run], qrels: Qrels) -> set[str]:
    """The passages whose modality decides: the first hits of every judged query, and what was judged."""
    depth = max(DEPTHS) + 1  # one of them may be dropped for having the query's own id
    hits = (hit for run in runs.values() for query_id in qrels for hit in run.get(query_id, [])[:depth])
    return {hit.passage_id for hit in hits} | {id_ for grades in qrels.values() for id_ in grades}


def wrong_modality(
    runs: Mapping[str, Run], qrels: Qrels, modalities: Mapping[str, Modality], config: EvaluateConfig
) -> WrongModality:
    """Counts hits of the wrong modality, in the order that runs and judgements have.

    Hits and relevant passages that `modalities` lacks are not counted, nor are the hits of queries of which no relevant
    passage is known.
    """
    shape = (len(runs), len(qrels), len(DEPTHS))
    hits, wrong = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for q, (query_id, grades) in enumerate(qrels.items()):
        relevant = [passage_id for passage_id, grade in grades.items() if grade >= config.relevance_level]
        right = {modalities[passage_id] for passage_id in relevant if passage_id in modalities}
        if not right:
            continue
        for r, run in enumerate(runs.values()):
            ids = [hit.passage_id for hit in run.get(query_id, [])]
            if config.remove_identical_ids and query_id in ids:
                ids.remove(query_id)
            found = [modalities.get(passage_id) for passage_id in ids[: max(DEPTHS)]]
            for d, depth in enumerate(DEPTHS):
                known = [modality for modality in found[:depth] if modality is not None]
                hits[r, q, d] = len(known)
                wrong[r, q, d] = sum(modality not in right for modality in known)
    return WrongModality(hits, wrong)


def task_table(tasks: Tasks, comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: tasks by runs, and the mean over the tasks."""
    others = [measure for measure in comparison.measures if set(tasks.own) != {measure}]
    head = ["task", "run", "measure", "value", "queries", *others]
    head += [] if tasks.wrong_modality is None else WRONG_MODALITY
    rows = []
    for t, task in enumerate(tasks.names):
        for r, name in enumerate(comparison.names):
            values = dict(zip(comparison.measures, tasks.values[r, t], strict=True))
            row = [task if r == 0 else "", name, tasks.own[t], f"{tasks.own_values[r, t]:.4f}"]
            row += [f"{tasks.num_queries[t]:,}", *(f"{values[measure]:.4f}" for measure in others)]
            if tasks.wrong_modality is not None:
                row += [_percent(share) for share in tasks.wrong_modality[r, t]]
            rows.append(row)
    for r, name in enumerate(comparison.names):
        mean = f"{tasks.own_values[r].mean():.4f}"
        rows.append([f"mean of {len(tasks.names)} tasks" if r == 0 else "", name, "", mean])
    return head, rows


def modality_table(wrong: WrongModality, comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: the shares of each run over all queries."""
    rows = [[name, *map(_percent, shares)] for name, shares in zip(comparison.names, wrong.shares(), strict=True)]
    return ["run", *WRONG_MODALITY], rows


def task_text(tasks: Tasks | None, wrong: WrongModality | None, comparison: Comparison) -> str:
    """Both tables as text for a terminal, as far as there are any."""
    parts = []
    if wrong is not None:
        parts.append(text_table(*modality_table(wrong, comparison), num_names=1))
    if tasks is not None:
        parts.append(text_table(*task_table(tasks, comparison), num_names=3))
    return "".join(f"\n{part}\n" for part in parts)


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{share:.1%}"


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
