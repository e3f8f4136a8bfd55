"""Measures: hand-worked values, trec_eval's own code on random data, and the conventions that change numbers."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import pytrec_eval

from raydr.config import validate
from raydr.errors import ConfigError, DataError
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.metrics import measure_run
from raydr.evaluation.trec import read_qrels, read_run, write_qrels, write_run
from raydr.types import Hit

# ir_measures name -> what to ask of trec_eval, what it calls the answer, and how deep a run it may see.
TREC_EVAL = {
    "nDCG@10": ("ndcg_cut.10", "ndcg_cut_10", None),
    "nDCG": ("ndcg", "ndcg", None),
    "RR@10": ("recip_rank", "recip_rank", 10),
    "RR": ("recip_rank", "recip_rank", None),
    "R@5": ("recall.5", "recall_5", None),
    "R@100": ("recall.100", "recall_100", None),
    "AP": ("map", "map", None),
    "AP@20": ("map_cut.20", "map_cut_20", None),
    "P@5": ("P.5", "P_5", None),
    "Success@1": ("success.1", "success_1", None),
}


def hits(*ids):
    return [Hit(passage_id, float(-rank)) for rank, passage_id in enumerate(ids)]


def means(run, qrels, *measures, **settings):
    return measure_run(run, qrels, EvaluateConfig(measures=list(measures), **settings)).means()


def random_collection(seed, *, num_queries=40, depth=60, num_scores=9):
    """Graded, with negative grades, ties in nearly every list, unanswered queries, and queries nobody judged."""
    rng = np.random.default_rng(seed)
    qrels, run = {}, {}
    for number in range(num_queries):
        pool = [f"d{i}" for i in rng.permutation(300)]
        qrels[f"q{number}"] = {passage: int(rng.integers(-2, 4)) for passage in pool[:25]}
        retrieved = list(rng.permutation(pool[:10] + pool[20 : 20 + depth]))
        run[f"q{number}"] = [Hit(str(p), float(rng.integers(num_scores) / 7)) for p in retrieved]
    qrels["unanswered"] = {"d1": 1}
    qrels["nothing relevant"] = {"d1": 0, "d2": -1}
    run["nothing relevant"] = hits("d1", "d2")
    run["nobody judged"] = hits("d1")
    return run, qrels


def trec_eval_order(run):
    return {q: sorted(h, key=lambda hit: (np.float32(hit.score), hit.passage_id), reverse=True) for q, h in run.items()}


def test_hand_worked_values():
    qrels = {"q1": {"a": 3, "b": 1, "c": 0, "d": 2}, "q2": {"x": 1}}
    run = {"q1": hits("c", "b", "a", "u"), "q2": hits("y", "z")}
    # q1: gains 0 1 3 0 at ranks 1..4, ideal 3 2 1.
    dcg = 1 / math.log2(3) + 3 / math.log2(4)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    result = means(run, qrels, "nDCG@10", "RR@10", "R@2", "R@100", "AP", "P@2", "AP(rel=2)")
    assert result == pytest.approx(
        {
            "nDCG@10": dcg / ideal / 2,
            "RR@10": (1 / 2 + 0) / 2,
            "R@2": (1 / 3 + 0) / 2,
            "R@100": (2 / 3 + 0) / 2,
            "AP": ((1 / 2 + 2 / 3) / 3 + 0) / 2,
            "P@2": (1 / 2 + 0) / 2,
            "AP(rel=2)": ((1 / 3) / 2 + 0) / 2,
        },
        abs=1e-12,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("relevance_level", [1, 2])
def test_equals_trec_eval_on_random_data(tmp_path, seed, relevance_level):
    """The whole way: a run file with ties, read by raydr, against trec_eval's code on the scores in that file."""
    run, qrels = random_collection(seed)
    lines = [f"{q.replace(' ', '_')} Q0 {h.passage_id} 0 {h.score!r} x\n" for q, hs in run.items() for h in hs]
    (tmp_path / "run.trec").write_text("".join(lines))
    qrels = {query_id.replace(" ", "_"): grades for query_id, grades in qrels.items()}
    ours = measure_run(
        read_run(tmp_path / "run.trec"), qrels,
        EvaluateConfig(measures=list(TREC_EVAL), relevance_level=relevance_level),
    )  # fmt: skip
    ranked = {q.replace(" ", "_"): h for q, h in trec_eval_order(run).items()}
    for column, (asked, answer, depth) in enumerate(TREC_EVAL.values()):
        evaluator = pytrec_eval.RelevanceEvaluator(qrels, {asked}, relevance_level=relevance_level)
        theirs = evaluator.evaluate({q: {h.passage_id: h.score for h in hs[:depth]} for q, hs in ranked.items()})
        for row, query_id in enumerate(ours.query_ids):
            expected = theirs[query_id][answer] if query_id in theirs else 0.0
            assert ours.values[row, column] == pytest.approx(expected, abs=1e-6), (query_id, asked)


def test_all_measures_judge_the_order_of_the_run():
    """ir_measures alone would break this tie by ascending id for RR@k and by descending id for the others."""
    qrels = {"q": {"a": 1}}
    for order in (["a", "b"], ["b", "a"]):
        run = {"q": [Hit(passage_id, 1.0) for passage_id in order]}
        first = 1.0 if order[0] == "a" else 0.5
        assert means(run, qrels, "RR@10", "RR", "AP") == {"RR@10": first, "RR": first, "AP": first}


def test_what_is_written_is_measured_the_same_again(tmp_path):
    run, qrels = random_collection(7)
    run = {q.replace(" ", "_"): sorted(h, key=lambda hit: (-hit.score, hit.passage_id)) for q, h in run.items()}
    qrels = {q.replace(" ", "_"): grades for q, grades in qrels.items()}
    write_run(run, tmp_path / "run.trec")
    write_qrels(qrels, tmp_path / "qrels")
    names = list(TREC_EVAL)
    assert means(read_run(tmp_path / "run.trec"), read_qrels(tmp_path / "qrels"), *names) == means(run, qrels, *names)


@pytest.mark.skipif(shutil.which("trec_eval") is None, reason="no trec_eval on the path")
def test_equals_the_trec_eval_program(tmp_path):
    run, qrels = random_collection(11)
    run = {q.replace(" ", "_"): sorted(h, key=lambda hit: (-hit.score, hit.passage_id)) for q, h in run.items()}
    qrels = {q.replace(" ", "_"): grades for q, grades in qrels.items()}
    write_run(run, tmp_path / "run.trec")
    write_qrels(qrels, tmp_path / "qrels")
    for name, (asked, _, depth) in TREC_EVAL.items():
        if depth is not None:
            continue  # trec_eval has no cut-off for this one
        command = ["trec_eval", "-c", "-q", "-m", asked, "qrels", "run.trec"]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        theirs = {line.split()[1]: float(line.split()[2]) for line in printed.splitlines()}
        ours = measure_run(run, qrels, EvaluateConfig(measures=[name]))
        assert theirs["all"] == pytest.approx(ours.means()[name], abs=6e-5)  # it prints four digits
        for row, query_id in enumerate(ours.query_ids):
            assert theirs.get(query_id, 0.0) == pytest.approx(ours.values[row, 0], abs=6e-5)


def test_queries_counted_and_left_out():
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 0}, "q4": {"a": 1}}
    run = {"q1": hits("a", "b"), "q3": hits("a"), "q4": [], "unjudged": hits("a")}
    measured = measure_run(run, qrels, EvaluateConfig(measures=["RR@10"]))
    assert measured.query_ids == ["q1", "q2", "q3", "q4"]
    assert measured.values[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert measured.means() == {"RR@10": 0.25}
    assert measured.counts.as_dict() == {
        "queries": 4, "unanswered": 2, "without_relevant": 1, "unjudged_queries": 1, "hits": 3,
        "identical_ids": 0,
    }  # fmt: skip


def test_identical_ids_are_removed_only_when_asked():
    qrels, run = {"d1": {"d2": 1}, "d3": {"d3": 1}}, {"d1": hits("d1", "d2"), "d3": hits("d3")}
    kept = measure_run(run, qrels, EvaluateConfig(measures=["RR@10"]))
    assert kept.values[:, 0].tolist() == [0.5, 1.0]
    assert kept.counts.identical_ids == 2
    removed = measure_run(run, qrels, EvaluateConfig(measures=["RR@10"], remove_identical_ids=True))
    assert removed.values[:, 0].tolist() == [1.0, 0.0]
    assert (removed.counts.identical_ids, removed.counts.unanswered) == (2, 1)


def test_relevance_level_shows_in_the_name_and_leaves_ndcg_alone():
    qrels, run = {"q": {"a": 1, "b": 2}}, {"q": hits("a", "b")}
    result = means(run, qrels, "nDCG@10", "RR@10", "AP(rel=1)", relevance_level=2)
    assert [*result] == ["nDCG@10", "RR(rel=2)@10", "AP"]
    assert result["RR(rel=2)@10"] == 0.5
    assert result["AP"] == 1.0
    assert result["nDCG@10"] == means(run, qrels, "nDCG@10")["nDCG@10"]


def test_judged_counts_the_holes():
    assert means({"q": hits("a", "u", "v", "b")}, {"q": {"a": 1, "b": 0}}, "Judged@4") == {"Judged@4": 0.5}


def test_names_come_out_as_ir_measures_writes_them():
    assert [*means({"q": hits("a")}, {"q": {"a": 1}}, "MRR@10", "NDCG@10", "MAP")] == ["RR@10", "nDCG@10", "AP"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nDGC@10"], "'nDGC@10' is not a measure"),
        (["nDCG@0"], "a cut-off is at least 1"),
        (["R"], "'R' is not a measure: it needs a cutoff"),
        (["P@x"], "'P@x' is not a measure"),
        (["nDCG(rel=2)@10"], "'nDCG\\(rel=2\\)@10' is not a measure"),
        (["NumRet"], "a count, not a mean"),
        (["RR@10", "MRR@10"], "named twice: RR@10"),
        ([], "measures"),
    ],
)
def test_measures_that_cannot_be_computed(names, message):
    with pytest.raises(ConfigError, match=message):
        validate(EvaluateConfig, {"measures": names}, where="config.yaml")


def test_run_and_qrels_that_do_not_belong_together():
    with pytest.raises(DataError, match="no query of the run is judged: the run has 'a'"):
        means({"a": hits("x")}, {"b": {"x": 1}}, "RR@10")
    with pytest.raises(DataError, match="empty qrels"):
        means({"a": hits("x")}, {}, "RR@10")
    with pytest.raises(DataError, match="query 'q': the run lists a passage twice"):
        means({"q": hits("x", "x")}, {"q": {"x": 1}}, "RR@10")
    assert means({}, {"q": {"x": 1}}, "RR@10", "nDCG@10") == {"RR@10": 0.0, "nDCG@10": 0.0}


def test_official_bm25_list_of_trec_dl_2020(collection):
    """The list that scores 0.4796 on all official judgements; on those whose passages the collection has, 0.4827."""
    folder = collection("dl20")
    run = {}
    with gzip.open(folder / "candidates.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["retriever"] == "BM25":
                run[record["query_id"]] = [Hit(passage_id, score) for passage_id, score in record["docs"]]
    qrels = read_qrels(folder / "qrels" / "test.tsv")
    assert means(run, qrels, "nDCG@10")["nDCG@10"] == pytest.approx(0.4827, abs=5e-5)
    # The same list with its ties broken as trec_eval breaks them, by trec_eval's code.
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate({q: dict(h) for q, h in run.items()})
    expected = sum(values["ndcg_cut_10"] for values in theirs.values()) / len(qrels)
    assert means(trec_eval_order(run), qrels, "nDCG@10")["nDCG@10"] == pytest.approx(expected, abs=1e-9)
