"""BM25: what is a hit, ties, masks, safe files, and the published figure on real data."""

from __future__ import annotations

import gzip
import json

import bm25s
import ir_measures
import numpy as np
import pytest

from raydr.errors import ArtifactError, ConfigError
from raydr.index.bm25 import BM25
from raydr.index.config import BM25Config

TEXTS = ["the cat sat", "cats and big dogs", "a dog barks", "the cat sat", "moon"]
IDS = np.array(["d4", "d3", "d2", "d1", "d0"], dtype=object)


def test_ties_go_by_id_and_only_matches_are_hits():
    top = BM25.build(TEXTS, BM25Config()).search(["cat", "zebra", "the", ""], 4, ids_of=IDS.__getitem__)
    assert top.rows.tolist() == [[3, 0, 1, -1], [-1] * 4, [-1] * 4, [-1] * 4]
    assert top.scores[0, 0] == top.scores[0, 1] > top.scores[0, 2] > 0


def test_masks_and_saved_files(tmp_path):
    index = BM25.build(TEXTS, BM25Config())
    index.save(tmp_path / "bm25")
    opened = BM25.open(tmp_path / "bm25")
    allowed = np.array([True, True, True, False, True])
    for k in (1, 2, 10):
        for mask in (None, allowed):
            a = index.search(["cat dog", "moon"], k, ids_of=IDS.__getitem__, allowed=mask)
            b = opened.search(["cat dog", "moon"], k, ids_of=IDS.__getitem__, allowed=mask)
            np.testing.assert_array_equal(a.rows, b.rows)
            np.testing.assert_array_equal(a.scores, b.scores)
            assert mask is None or 3 not in b.rows
    assert isinstance(opened._scorer.scores["data"].base, np.memmap)
    assert not [file for file in (tmp_path / "bm25").iterdir() if file.read_bytes()[:1] == b"\x80"]  # a pickle's mark
    (tmp_path / "bm25" / "data.csc.index.npy").write_bytes(b"")
    with pytest.raises(ArtifactError, match="not a readable BM25 index"):
        BM25.open(tmp_path / "bm25")


def test_settings_that_cannot_work_are_named():
    with pytest.raises(ConfigError, match=r"bm25.stemmer 'klingon': known are .*english"):
        BM25.build(TEXTS, BM25Config(stemmer="klingon"))
    with pytest.raises(ConfigError, match=r"bm25.stop_words: klingon"):
        BM25.build(TEXTS, BM25Config(stop_words="klingon"))
    with pytest.raises(ConfigError, match="no word to index"):
        BM25.build(["", "a"], BM25Config())


def test_without_stop_words_and_stemmer_words_stay_as_they_are():
    index = BM25.build(TEXTS, BM25Config(stop_words=None, stemmer=None))
    assert index.search(["the cats"], 5, ids_of=IDS.__getitem__).rows.tolist() == [[1, 3, 0, -1, -1]]


@pytest.fixture(scope="module")
def scifact(collection):
    folder = collection("scifact")
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as stream:
        passages = [json.loads(line) for line in stream]
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]
    qrels = [ir_measures.Qrel(q, p, int(grade)) for q, p, grade in (line.split("\t") for line in lines)]
    judged = {qrel.query_id for qrel in qrels}
    return passages, [query for query in queries if query["_id"] in judged], qrels


def test_scifact_reaches_the_published_figure(scifact):
    """0.679: Lucene's BM25 over title and text, English stop words, Snowball stemmer."""
    passages, queries, qrels = scifact
    ids = np.array([passage["_id"] for passage in passages], dtype=object)
    index = BM25.build((f"{p['title']} {p['text']}" for p in passages), BM25Config())
    top = index.search([query["text"] for query in queries], 100, ids_of=ids.__getitem__)
    run = {
        query["_id"]: {ids[row]: float(score) for row, score in zip(rows, scores, strict=True) if row >= 0}
        for query, rows, scores in zip(queries, top.rows, top.scores, strict=True)
    }
    measured = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, run)[ir_measures.nDCG @ 10]
    assert measured == pytest.approx(0.679, abs=0.003)


def test_scores_are_those_of_bm25s(scifact):
    passages, queries, _ = scifact
    texts = [passage["text"] for passage in passages[:500]]
    words = [query["text"] for query in queries[:20]]
    index = BM25.build(texts, BM25Config(stemmer=None))
    top = index.search(words, 10, ids_of=lambda rows: rows)
    plain = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    plain.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    _, scores = plain.retrieve(bm25s.tokenize(words, show_progress=False), k=10, show_progress=False)
    np.testing.assert_allclose(np.where(top.rows >= 0, top.scores, 0), scores, rtol=1e-6)


def test_very_many_ties_are_decided_by_id():
    ids = np.array([f"p{999 - row:03d}" for row in range(1000)], dtype=object)
    top = BM25.build(["same words"] * 1000, BM25Config()).search(["words"], 3, ids_of=ids.__getitem__)
    assert ids[top.rows[0]].tolist() == ["p000", "p001", "p002"]
