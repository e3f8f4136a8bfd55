"""The evaluation artifact: its files agree with one another and with the comparison; the report stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import open_artifact
from raydr.errors import DataError
from raydr.evaluation.comparison import compare_runs, comparison_table
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.evaluate import evaluate_run
from raydr.types import Hit, Query

CONFIG = EvaluateConfig(measures=["nDCG@10", "RR@10", "R@100"], num_resamples=500, num_permutations=2000)


def make_runs(num_queries=40, seed=0):
    """Three runs of rising quality over the same judgements."""
    rng = np.random.default_rng(seed)
    qrels = {f"q{q}": {f"d{q}-{i}": int(rng.integers(1, 4)) for i in range(3)} for q in range(num_queries)}
    runs = {}
    for name, skill in (("BM25", 0.0), ("dense", 0.2), ("hybrid", 2.0)):
        runs[name] = {}
        for query_id, grades in qrels.items():
            passages = [*grades, *(f"x{i}" for i in range(30))]
            scores = {p: float(rng.normal()) + skill * grades.get(p, 0) for p in passages}
            runs[name][query_id] = [Hit(p, s) for p, s in sorted(scores.items(), key=lambda item: -item[1])]
    return runs, qrels


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    runs, qrels = make_runs()
    hybrid = runs.pop("hybrid")
    queries = [Query(query_id, f"text of <{query_id}> & more") for query_id in qrels]
    out = tmp_path_factory.mktemp("evaluation") / "evaluate"
    artifact = evaluate_run(
        hybrid, qrels, CONFIG, out, name="hybrid", baselines=runs, queries=queries, title="A <test>"
    )
    return artifact, {**runs, "hybrid": hybrid}, qrels


def test_files_of_the_artifact(written):
    artifact, _, _ = written
    assert artifact.manifest.kind == "evaluation"
    assert sorted(artifact.manifest.files) == [
        "metrics.json", "per_query.parquet", "report.html", "report.png", "roc.parquet", "summary.json", "summary.txt",
    ]  # fmt: skip
    artifact.verify()
    open_artifact(artifact.path, kind="evaluation")
    assert artifact.manifest.counts["queries"] == 40


def test_metrics_are_flat_and_of_the_run_itself(written):
    artifact, runs, qrels = written
    metrics = json.loads((artifact.path / "metrics.json").read_text())
    comparison = compare_runs(runs, qrels, CONFIG)
    assert [*metrics] == ["nDCG@10", "RR@10", "R@100"]
    assert [*metrics.values()] == comparison.values[2].tolist()
    assert metrics["nDCG@10"] > comparison.values[0, 0] + 0.2


def test_summary_and_per_query_agree_with_metrics(written):
    artifact, _, _ = written
    metrics = json.loads((artifact.path / "metrics.json").read_text())
    summary = json.loads((artifact.path / "summary.json").read_text())
    assert summary["reference"] == "BM25"
    assert [run["name"] for run in summary["runs"]] == ["BM25", "dense", "hybrid"]
    hybrid = summary["runs"][2]
    assert {name: cell["value"] for name, cell in hybrid["measures"].items()} == metrics
    cell = hybrid["measures"]["nDCG@10"]
    assert cell["interval"][0] < cell["value"] < cell["interval"][1]
    assert cell["difference_interval"][0] < cell["difference"] < cell["difference_interval"][1]
    assert cell["p"] <= cell["p_corrected"] < 0.05
    assert "p" not in summary["runs"][0]["measures"]["nDCG@10"]
    assert summary["settings"]["remove_identical_ids"] is False
    rows = pq.read_table(artifact.path / "per_query.parquet").to_pandas()
    assert len(rows) == 3 * 40
    means = rows[rows["run"] == "hybrid"][[*metrics]].mean().to_dict()
    assert means == pytest.approx(metrics)
    assert hybrid["roc"]["mean_area_per_query"] == pytest.approx(rows[rows["run"] == "hybrid"]["area_under_roc"].mean())
    roc = pq.read_table(artifact.path / "roc.parquet").to_pandas()
    curve = roc[roc["run"] == "hybrid"]
    area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
    assert area == pytest.approx(hybrid["roc"]["pooled_area"], abs=2e-3)


def test_comparison_is_against_the_first_run_and_corrected(written):
    _, runs, qrels = written
    c = compare_runs(runs, qrels, CONFIG)
    assert c.differences == pytest.approx(c.values - c.values[0])
    assert (c.differences[0] == 0).all()
    assert (c.p_values[0] == 1).all()
    alone = compare_runs({"BM25": runs["BM25"], "dense": runs["dense"]}, qrels, CONFIG)
    assert alone.p_values[1] == pytest.approx(c.p_values[1])
    assert alone.p_corrected[1] == pytest.approx(alone.p_values[1])  # one comparison needs no correction
    for measure in range(3):
        low, high = sorted(c.p_values[1:, measure])
        assert sorted(c.p_corrected[1:, measure]) == pytest.approx([min(1, 2 * low), max(high, min(1, 2 * low))])


def test_table_for_the_terminal(written):
    artifact, runs, qrels = written
    table = comparison_table(compare_runs(runs, qrels, CONFIG))
    assert table == (artifact.path / "summary.txt").read_text()
    lines = table.splitlines()
    assert re.split(r"\s{2,}", lines[0]) == ["measure", "run", "value", "95% interval", "vs BM25", "p"]
    assert re.match(r"nDCG@10 +BM25 +0\.\d{4} +0\.\d{3} - 0\.\d{3}$", lines[2])
    assert re.match(r" +hybrid +0\.\d{4} +0\.\d{3} - 0\.\d{3} +\+0\.\d{4} +(< )?0\.0\d\d \*$", lines[4])
    assert "40 judged queries; the mean is over all of them, an unanswered query scores zero." in lines
    assert max(map(len, lines)) <= 120


def test_table_tells_what_was_left_out():
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 0}, "a": {"b": 1}}
    run = {"q1": [Hit("a", 1.0)], "zz": [Hit("a", 1.0)], "a": [Hit("a", 2.0), Hit("b", 1.0)]}
    config = CONFIG.model_copy(update={"remove_identical_ids": True})
    table = comparison_table(compare_runs({"mine": run}, qrels, config))
    kept = comparison_table(compare_runs({"mine": run}, qrels, CONFIG))
    assert "mine: 1 hits with the query's own id kept (remove_identical_ids is off)." in kept
    assert "vs" not in table.splitlines()[0]
    assert "1 of them have no relevant passage and score zero." in table
    assert "mine: 2 queries unanswered." in table
    assert "mine: 1 queries without judgements left out." in table
    assert "mine: 1 hits with the query's own id removed." in table


class Assets(HTMLParser):
    """Collects what a browser would fetch or run, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.fetched, self.tags, self.open = [], set(), []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.fetched += [value for name, value in attributes if name in {"src", "srcset", "href"}]
        if tag not in {"meta", "img", "source", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_stands_alone_and_escapes(written):
    artifact, _, _ = written
    html = (artifact.path / "report.html").read_text(encoding="utf-8")
    page = Assets()
    page.feed(html)
    assert page.open == []
    assert len(page.fetched) == 2  # the light and the dark picture
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.fetched)
    assert page.fetched[0] != page.fetched[1]
    assert "script" not in page.tags
    assert "url(" not in html
    assert "A &lt;test&gt;" in html
    assert "text of &lt;q" in html
    assert "<test>" not in html
    assert html.count("Queries that gain most") == 1


def test_picture_is_a_png_of_useful_size(written):
    from matplotlib.image import imread

    artifact, _, _ = written
    pixels = imread(artifact.path / "report.png")
    assert pixels.shape[1] > 1500
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_equal_evaluations_are_equal_files(written, tmp_path):
    artifact, runs, qrels = written
    baselines = {name: runs[name] for name in ("BM25", "dense")}
    queries = [Query(query_id, f"text of <{query_id}> & more") for query_id in qrels]
    again = evaluate_run(
        runs["hybrid"], qrels, CONFIG, tmp_path / "again", name="hybrid", baselines=baselines, queries=queries,
        title="A <test>",
    )  # fmt: skip
    assert again.fingerprint == artifact.fingerprint
    assert again.manifest.files == artifact.manifest.files


def test_single_run_without_a_relevant_hit(tmp_path):
    artifact = evaluate_run({}, {"q": {"a": 0}}, CONFIG, tmp_path / "out")
    assert json.loads((artifact.path / "metrics.json").read_text()) == {"nDCG@10": 0.0, "RR@10": 0.0, "R@100": 0.0}
    summary = json.loads((artifact.path / "summary.json").read_text())
    assert summary["runs"][0]["roc"]["pooled_area"] is None
    assert pq.read_table(artifact.path / "per_query.parquet")["area_under_roc"].to_pylist() == [None]
    assert "Weakest queries" in (artifact.path / "report.html").read_text()


def test_nothing_is_written_for_a_run_that_does_not_fit(tmp_path):
    with pytest.raises(DataError, match="no query of the run is judged"):
        evaluate_run({"other": [Hit("a", 1.0)]}, {"q": {"a": 1}}, CONFIG, tmp_path / "out")
    with pytest.raises(DataError, match="the name of the run, 'run'"):
        evaluate_run({"q": []}, {"q": {"a": 1}}, CONFIG, tmp_path / "out", baselines={"run": {}})
    assert not (tmp_path / "out").exists()
