"""TREC files: what trec_eval reads back is what was in memory, and bad files are named with their line."""

from __future__ import annotations

import gzip
import logging

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given
from hypothesis import strategies as st

from raydr.errors import DataError
from raydr.evaluation.trec import read_qrels, read_run, write_qrels, write_run
from raydr.types import Hit


def ids(run):
    return {query_id: [hit.passage_id for hit in hits] for query_id, hits in run.items()}


def file_order(path):
    """The order in which trec_eval 9 ranks a file: float32 scores, then ids as bytes, both descending."""
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    ranked = sorted(rows, key=lambda row: (np.float32(row[4]), row[2].encode()), reverse=True)
    return [row[2] for row in ranked], [int(row[3]) for row in ranked]


def test_written_file_is_the_strict_form(tmp_path):
    write_run({"q1": [Hit("d2", 0.1), Hit("d1", -3.0)], "q2": []}, tmp_path / "run.trec", tag="mine")
    assert (tmp_path / "run.trec").read_text() == "q1 Q0 d2 1 0.1 mine\nq1 Q0 d1 2 -3 mine\n"


def test_ties_by_ascending_id_survive_trec_eval(tmp_path):
    # In memory ties go by ascending id; trec_eval would turn them round.
    run = {"q": [Hit("a", 2.0), Hit("b", 2.0), Hit("c", 2.0), Hit("d", 1.0)]}
    write_run(run, tmp_path / "run.trec")
    order, ranks = file_order(tmp_path / "run.trec")
    assert order == ["a", "b", "c", "d"]
    assert ranks == [1, 2, 3, 4]
    scores = [hit.score for hit in read_run(tmp_path / "run.trec")["q"]]
    assert scores[0] == 2.0
    assert scores[3] == 1.0
    assert np.float32(scores[1]) == np.nextafter(np.float32(2), np.float32(0))
    assert np.float32(scores[2]) == np.nextafter(np.float32(scores[1]), np.float32(0))


def test_ties_by_descending_id_keep_their_score(tmp_path):
    write_run({"q": [Hit("c", 0.5), Hit("b", 0.5), Hit("a", 0.5)]}, tmp_path / "run.trec")
    assert [hit.score for hit in read_run(tmp_path / "run.trec")["q"]] == [0.5, 0.5, 0.5]


# Few distinct scores, so that ties, zeros of both signs, subnormals and neighbours in float32 abound.
scores = st.one_of(
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 1.0 + 1e-12, float(np.nextafter(np.float32(1), np.float32(2))), 1e-45, -1e-45]
    ),
    st.floats(-1e6, 1e6),
)
passage_ids = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=3)


@given(st.dictionaries(passage_ids, scores, max_size=12))
def test_any_ranking_survives_the_file(tmp_path_factory, hits):
    path = tmp_path_factory.mktemp("run") / "run.trec"
    run = {"q": [Hit(p, s) for p, s in sorted(hits.items(), key=lambda item: (-np.float32(item[1]), item[0]))]}
    write_run(run, path)
    order, ranks = file_order(path)
    assert order == ids(run)["q"]
    assert ranks == list(range(1, len(order) + 1))
    back = read_run(path)
    assert ids(back) == (ids(run) if hits else {})
    for before, after in zip(run["q"], back.get("q", []), strict=True):
        # Lowered by no more float32 steps than there are hits.
        assert after.score <= np.float32(before.score)
        assert after.score == pytest.approx(before.score, rel=2e-6, abs=1e-40)


def test_random_run_is_ranked_by_trec_eval_as_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    run, qrels = {}, {}
    for q in range(30):
        passages = [f"d{i}" for i in rng.permutation(200)[:60]]
        values = np.sort(rng.integers(0, 8, 60) / 7)[::-1]  # mostly ties
        run[f"q{q}"] = [
            Hit(p, float(v)) for p, v in sorted(zip(passages, values, strict=True), key=lambda x: (-x[1], x[0]))
        ]
        qrels[f"q{q}"] = {passages[rng.integers(60)]: 1}
    write_run(run, tmp_path / "run.trec")
    written = {}
    for line in (tmp_path / "run.trec").read_text().splitlines():
        query_id, _, passage_id, _, score, _ = line.split()
        written.setdefault(query_id, {})[passage_id] = float(score)
    found = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(written)
    for query_id, hits in run.items():
        rank = [hit.passage_id for hit in hits].index(next(iter(qrels[query_id]))) + 1
        assert found[query_id]["recip_rank"] == pytest.approx(1 / rank)


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_round_trip(tmp_path, name):
    run = {"q2": [Hit("a", 1 / 3), Hit("b", 1e-7)], "q1": [Hit("a", -1.5)]}
    write_run(run, tmp_path / name)
    back = read_run(tmp_path / name)
    assert ids(back) == ids(run)
    assert all(np.float32(h.score) == np.float32(g.score) for q in run for h, g in zip(run[q], back[q], strict=True))


def test_equal_runs_are_equal_gzip_files(tmp_path):
    for name in ("a.gz", "b.gz"):
        write_run({"q": [Hit("a", 1.0)]}, tmp_path / name)
    assert (tmp_path / "a.gz").read_bytes()[10:] == (tmp_path / "b.gz").read_bytes()[10:]


def test_writing_replaces_the_old_file_whole(tmp_path):
    path = tmp_path / "run.trec"
    write_run({"q": [Hit("a", 1.0)]}, path)
    with pytest.raises(DataError):
        write_run({"q": [Hit("a", 1.0), Hit("b", float("nan"))]}, path)
    assert path.read_text() == "q Q0 a 1 1 raydr\n"
    assert [p.name for p in tmp_path.iterdir()] == ["run.trec"]


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        ({"q 1": [Hit("a", 1.0)]}, "t", "query id 'q 1'"),
        ({"q": [Hit("a b", 1.0)]}, "t", "passage id of query 'q' 'a b'"),
        ({"q": [Hit("a", 1.0), Hit("", 0.5)]}, "t", "''"),
        ({"q": [Hit("a", 1.0)]}, "my tag", "tag"),
        ({"q": [Hit("a", float("inf"))]}, "t", "not a finite float32"),
        ({"q": [Hit("a", 1e39)]}, "t", "not a finite float32"),
        ({"q": [Hit("a", 1.0), Hit("b", 2.0)]}, "t", "not best first"),
        ({"q": [Hit("a", 1.0), Hit("a", 0.5)]}, "t", "a passage twice"),
    ],
)
def test_runs_that_cannot_be_written(tmp_path, run, tag, message):
    with pytest.raises(DataError, match=message):
        write_run(run, tmp_path / "run.trec", tag=tag)
    assert not (tmp_path / "run.trec").exists()


def test_reads_what_others_write(tmp_path):
    expected = {"q1": ["d2", "d1"], "q2": ["d1"]}
    forms = {
        "tabs and blanks": "q1\tQ0\td1\t2\t0.5\tx\n\nq1  Q0  d2 1   0.75 x  \r\nq2 Q0 d1 1 0.1 x",
        "rank 0 everywhere (BEIR)": "q1 Q0 d1 0 0.5 x\nq1 Q0 d2 0 0.75 x\nq2 Q0 d1 0 0.1 x\n",
        "Tevatron": "q1\td1\t0.5\nq1\td2\t0.75\nq2\td1\t3\n",
        "MS MARCO": "q1\td1\t2\nq1\td2\t1\nq2\td1\t1\n",
        "byte order mark": "\ufeffq1 Q0 d2 1 9 x\nq1 Q0 d1 2 8 x\nq2 Q0 d1 1 7 x\n",
    }
    for name, text in forms.items():
        path = tmp_path / "run.txt"
        path.write_text(text, encoding="utf-8", newline="")
        assert ids(read_run(path)) == expected, name
        path.write_bytes(gzip.compress(text.encode()))  # gzip without a .gz name
        assert ids(read_run(path)) == expected, name


def test_ranks_become_reciprocal_scores(tmp_path):
    (tmp_path / "run.tsv").write_text("q a 2\nq b 1\nq c 10\n")
    assert read_run(tmp_path / "run.tsv") == {"q": [Hit("b", 1.0), Hit("a", 0.5), Hit("c", 0.1)]}
    assert ids(read_run(tmp_path / "run.tsv", format="tevatron")) == {"q": ["c", "a", "b"]}


def test_ties_in_a_file_are_broken_as_trec_eval_does_and_said(tmp_path, caplog):
    # 1e-12 apart is a tie in float32, which is what trec_eval 9 compares.
    (tmp_path / "run.trec").write_text("q Q0 a 1 1.000000000001 x\nq Q0 b 2 1.0 x\nq Q0 c 3 0.5 x\n")
    with caplog.at_level(logging.WARNING):
        assert ids(read_run(tmp_path / "run.trec")) == {"q": ["b", "a", "c"]}
    assert "1 of 1 queries" in caplog.text


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("q Q0 d 1 0.5 x\nq Q0 d2 2 0.4\n", 2, "5 columns where a run has 6"),
        ("q Q0 d 1 0.5 x\n\nq Q0 d2 2 high x\n", 3, "'high' is not a number"),
        ("q Q0 d 1 nan x\n", 1, "not a finite float32"),
        ("q Q0 d 1 1e39 x\n", 1, "not a finite float32"),
        ("q Q0 d 1 2 x\nq Q0 d 2 1 x\n", 2, "'d' is listed twice for query 'q'"),
        ("q d\n", 1, "2 columns"),
        ("q d 1\nq d2\n", 2, "2 columns where a run has 3"),
    ],
)
def test_malformed_runs_are_named_with_their_line(tmp_path, text, line, message):
    path = tmp_path / "run.trec"
    path.write_text(text)
    with pytest.raises(DataError, match=f"run.trec, line {line}: .*{message}"):
        read_run(path)


@pytest.mark.parametrize("text", ["q a 0\nq b 1\n", "q a 1\nq b 1\n"])
def test_three_whole_columns_that_are_no_ranks(tmp_path, text):
    (tmp_path / "run.tsv").write_text(text)
    with pytest.raises(DataError, match='format="tevatron"'):
        read_run(tmp_path / "run.tsv")
    assert ids(read_run(tmp_path / "run.tsv", format="tevatron")) == {"q": ["b", "a"]}


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_run(tmp_path / "absent")
    (tmp_path / "latin").write_bytes("q Q0 d\xe9 1 1 x\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_run(tmp_path / "latin")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"q Q0 d 1 1 x\n")[:-10])
    with pytest.raises(DataError, match="a damaged gzip file"):
        read_run(tmp_path / "torn.gz")


def test_empty_files_are_empty(tmp_path):
    (tmp_path / "empty").write_text("\n")
    assert read_run(tmp_path / "empty") == {}
    assert read_qrels(tmp_path / "empty") == {}


def test_qrels_of_every_form(tmp_path):
    expected = {"q1": {"d1": 2, "d 2": -1}, "q2": {"d1": 0}}
    write_qrels(expected, tmp_path / "beir.tsv", format="beir")
    assert (tmp_path / "beir.tsv").read_text().startswith("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td 2\t-1\n")
    assert read_qrels(tmp_path / "beir.tsv") == expected
    forms = ["q1 0 d1 2\nq1 Q0 d2 -1\nq2 0 d1 0\n", "q1\t0\td1\t2\r\nq1\t0\td2\t-1\r\nq2\t0\td1\t0\r\n",
             "q1 d1 2\nq1 d2 -1\nq2 d1 0\n", "q1 0 d1\t2\nq1 0 d2\t-1\nq2 0 d1\t0"]  # fmt: skip
    for text in forms:
        (tmp_path / "qrels.txt").write_text(text, newline="")
        assert read_qrels(tmp_path / "qrels.txt") == {"q1": {"d1": 2, "d2": -1}, "q2": {"d1": 0}}
    write_qrels({"q1": {"d1": 3}}, tmp_path / "qrels.gz")
    assert gzip.decompress((tmp_path / "qrels.gz").read_bytes()) == b"q1 0 d1 3\n"
    with pytest.raises(DataError, match="holds whitespace"):
        write_qrels(expected, tmp_path / "qrels.txt")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("q 0 d 1\nq 0 d 2\n", 2, "judged twice"),
        ("q 0 d 1\nq 0 e yes\n", 2, "'yes' is not a whole number"),
        ("q 0 d 1.5\n", 1, "'1.5' is not a whole number"),
        ("q 0 d 1\nq d 1\n", 2, "3 columns"),
        ("query-id\tcorpus-id\tscore\nq\t\t1\n", 2, "empty query or passage id"),
        ("q 0 d 1 x\n", 1, "5 columns"),
    ],
)
def test_malformed_qrels_are_named_with_their_line(tmp_path, text, line, message):
    (tmp_path / "qrels.tsv").write_text(text)
    with pytest.raises(DataError, match=f"qrels.tsv, line {line}: .*{message}"):
        read_qrels(tmp_path / "qrels.tsv")
