"""Runs by task, hits of the wrong modality, and Hit@k, on judgements small enough to work out by hand."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from raydr.config import validate
from raydr.errors import ConfigError, DataError
from raydr.evaluation.comparison import compare_runs
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.evaluate import evaluate_run
from raydr.evaluation.metrics import measure_run
from raydr.evaluation.tasks import by_task, in_question, wrong_modality
from raydr.types import Hit

SMALL = {"num_resamples": 100, "num_permutations": 100}
CONFIG = EvaluateConfig(measures=["Hit@5", "RR@10"], task_measures={"fashioniq": "Hit@10"}, **SMALL)


def hits(*ids):
    return [Hit(passage_id, float(-rank)) for rank, passage_id in enumerate(ids)]


QRELS = {
    "c1": {"i1": 1, "i2": 1, "i3": 1},
    "c2": {"i4": 1},
    "f1": {"i5": 1},
    "f2": {"t1": 2, "i9": 0},
    "x1": {"t2": 1},
}
TASKS = {"c1": "cirr", "c2": "cirr", "f1": "fashioniq", "f2": "fashioniq", "other": "webqa"}
MODALITIES = {f"i{n}": "image" for n in range(1, 20)} | {f"t{n}": "text" for n in range(1, 20)} | {"b1": "image,text"}
RUN = {
    "c1": hits("t9", "i2", "t8", "b1", "i18", "i1"),
    "c2": hits("i1", "t9", "t8", "t7", "t6", "i4"),
    "f1": hits("t1", "t2", "t3", "t4", "t5", "t6", "t7", "i5"),
    "f2": hits("t1", "t3"),
}


def test_hit_is_not_recall():
    """Three relevant passages of which one is found: M-BEIR's "recall" is 1, recall is a third."""
    measured = measure_run({"c1": RUN["c1"]}, {"c1": QRELS["c1"]}, EvaluateConfig(measures=["Hit@5", "R@5", "Hit@1"]))
    assert measured.means() == {"Hit@5": 1.0, "R@5": pytest.approx(1 / 3), "Hit@1": 0.0}


def test_hit_is_success_under_a_name_of_its_own():
    run, qrels = {"q": hits("b", "a")}, {"q": {"a": 2, "b": 1}}
    graded = measure_run(run, qrels, EvaluateConfig(measures=["Hit@1", "Hit@2"], relevance_level=2))
    assert graded.means() == {"Hit(rel=2)@1": 0.0, "Hit(rel=2)@2": 1.0}
    assert measure_run(run, qrels, EvaluateConfig(measures=["Success@1"])).measures == ["Success@1"]
    for names, message in (
        (["Hit@5", "Success@5"], "named twice"),
        (["Hit"], "needs a cutoff"),
        (["Hit@0"], "cut-off"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(EvaluateConfig, {"measures": names}, where="config.yaml")


def tables(run=RUN, config=CONFIG, tasks=TASKS):
    runs = {"mine": run}
    comparison = compare_runs(runs, QRELS, config)
    wrong = wrong_modality(runs, QRELS, MODALITIES, config)
    return by_task(comparison, runs, QRELS, tasks, wrong), wrong


def test_each_task_by_its_own_measure():
    found, _ = tables()
    assert found is not None
    assert (found.names, found.num_queries, found.own) == (["cirr", "fashioniq"], [2, 2], ["Hit@5", "Hit@10"])
    assert found.own_values.tolist() == [[0.5, 1.0]], "i4 at rank 6 is too late for cirr, i5 at 8 is not for fashioniq"
    assert found.values[0, :, 0].tolist() == [0.5, 0.5], "Hit@5 of both"
    assert found.of_query == ["cirr", "cirr", "fashioniq", "fashioniq", ""]
    assert found.metrics(["Hit@5", "RR@10"])["TaskMean"] == 0.75


def test_share_of_the_wrong_modality():
    found, wrong = tables()
    assert found is not None
    # cirr: t9 | i1; t9 t8 b1 | t9 t8 t7 t6. fashioniq: t1 | t1; t1 ... t5 | none of t1 t3, which are all there are.
    assert found.wrong_modality[0].tolist() == [[1 / 2, 7 / 10], [1 / 2, 5 / 7]]
    assert wrong.shares()[0].tolist() == [2 / 4, 12 / 17], "x1 was not answered"
    assert wrong.per_query[0, :4].tolist() == [[1, 3 / 5], [0, 4 / 5], [1, 1], [0, 0]]


def test_what_is_of_an_unknown_modality_is_not_counted():
    known = {passage_id: own for passage_id, own in MODALITIES.items() if passage_id not in ("t9", "i5")}
    wrong = wrong_modality({"mine": RUN}, QRELS, known, CONFIG)
    assert wrong.hits[0].tolist() == [[0, 4], [1, 4], [0, 0], [1, 2], [0, 0]]
    assert wrong.wrong[0].tolist() == [[0, 2], [0, 3], [0, 0], [0, 0], [0, 0]]


def test_a_hit_with_the_querys_own_id_is_no_hit():
    config = CONFIG.model_copy(update={"remove_identical_ids": True})
    run = {"t1": hits("t1", "i1", "t3", "t4", "t5", "i6", "t7")}
    wrong = wrong_modality({"mine": run}, {"t1": {"i1": 1}}, MODALITIES, config)
    assert wrong.wrong[0].tolist() == [[0, 3]]
    assert "i6" in in_question({"mine": run}, {"t1": {"i1": 1}})


def test_a_task_that_no_query_has_is_an_error():
    config = CONFIG.model_copy(update={"task_measures": {"fashionIQ": "Hit@10"}})
    with pytest.raises(DataError, match="'fashionIQ', which no query has: the tasks are cirr, fashioniq, webqa"):
        tables(config=config)
    with pytest.raises(DataError, match="the queries have no tasks"):
        tables(tasks={})
    with pytest.raises(ConfigError, match="'Hit@x' is not a measure"):
        validate(EvaluateConfig, {"task_measures": {"cirr": "Hit@x"}}, where="config.yaml")


def test_in_the_artifact(tmp_path):
    better = {**RUN, "c2": hits("i4")}
    artifact = evaluate_run(
        better, QRELS, CONFIG, tmp_path / "out", name="hard", baselines={"random": RUN}, tasks=TASKS,
        modalities=MODALITIES,
    )  # fmt: skip
    metrics = json.loads((artifact.path / "metrics.json").read_text())
    assert all(isinstance(value, float) for value in metrics.values()), "flat, as without tasks"
    assert (metrics["cirr/Hit@5"], metrics["fashioniq/Hit@10"], metrics["TaskMean"]) == (1.0, 1.0, 1.0)
    assert metrics["WrongModality@5"] == 8 / 13
    assert metrics["cirr/WrongModality@1"] == 0.5
    summary = json.loads((artifact.path / "summary.json").read_text())
    assert [run["tasks"]["TaskMean"] for run in summary["runs"]] == [0.75, 1.0]
    assert summary["runs"][0]["tasks"]["by_task"]["cirr"]["WrongModality@5"] == 7 / 10
    assert summary["runs"][1]["wrong_modality"]["WrongModality@5"] == 8 / 13
    rows = pq.read_table(artifact.path / "per_query.parquet").to_pylist()
    assert [row["task"] for row in rows[:5]] == ["cirr", "cirr", "fashioniq", "fashioniq", None]
    assert [row["WrongModality@5"] for row in rows[:5]] == [3 / 5, 4 / 5, 1.0, 0.0, None]
    text = (artifact.path / "summary.txt").read_text()
    assert "mean of 2 tasks" in text
    assert "61.5%" in text
    html = (artifact.path / "report.html").read_text(encoding="utf-8")
    for words in ("<h2>Tasks</h2>", "mean of 2 tasks", "<h2>Hits of the wrong modality</h2>", "61.5%"):
        assert words in html


def test_without_tasks_and_pictures_nothing_changes(tmp_path):
    config = EvaluateConfig(measures=["RR@10"], **SMALL)
    artifact = evaluate_run(RUN, QRELS, config, tmp_path / "out", tasks={}, modalities=None)
    assert [*json.loads((artifact.path / "metrics.json").read_text())] == ["RR@10"]
    assert "task_measures" not in artifact.manifest.config
    assert "Tasks" not in (artifact.path / "report.html").read_text()
    assert pq.read_schema(artifact.path / "per_query.parquet").names == ["run", "query_id", "RR@10", "area_under_roc"]
