"""Changing an index in use: what a new reader sees, what an old reader keeps, what is refused."""

from __future__ import annotations

import fcntl

import numpy as np
import pytest

from raydr.errors import ArtifactError, DataError
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig, SearchParameters
from raydr.index.reader import IndexReader
from tests.corpora import as_pairs, brute_force, embedded_corpus, integers

IDS = [f"p{number:02d}" for number in range(40)]
EMBEDDINGS = integers(40, 5, seed=1)
NEW_IDS = ["n0", "n1", "p03"]
NEW_EMBEDDINGS = integers(3, 5, seed=9)
QUERIES = integers(8, 5, seed=2)


def passage(id_):
    return {"title": "", "text": f"words about {id_}", "year": 2000}


@pytest.fixture
def index(tmp_path):
    embedded = embedded_corpus(tmp_path / "old", {id_: passage(id_) for id_ in IDS}, EMBEDDINGS)
    build_index(*embedded, IndexConfig(num_shards=2), tmp_path / "index", use_ray=False)
    return tmp_path / "index"


@pytest.fixture
def addition(tmp_path):
    return embedded_corpus(tmp_path / "new", {id_: passage(id_) for id_ in NEW_IDS}, NEW_EMBEDDINGS)


def found(reader, k=50):
    return as_pairs(reader.search(QUERIES, k), reader.passage_ids)


def expected(ids, embeddings, k=50):
    return brute_force(ids, embeddings, QUERIES, k)


def without(dead):
    alive = [row for row, id_ in enumerate(IDS) if id_ not in dead]
    return [IDS[row] for row in alive], EMBEDDINGS[alive]


def test_deleted_passages_are_gone_for_new_readers_and_stay_for_old_ones(index):
    old = IndexReader.open(index)
    store.delete(index, ["p00", "p39"])
    store.delete(index, ["p20"])
    new = IndexReader.open(index)
    assert new.num_passages == 37
    assert found(new) == expected(*without({"p00", "p39", "p20"}))
    assert found(old) == expected(IDS, EMBEDDINGS)
    assert old.version != new.version
    assert new.search_bm25(["p20 p21"], 5).rows.tolist() == [[21, -1, -1, -1, -1]]
    assert not new.select(allow_ids=["p20"]).any()
    new.artifact.verify()


def test_what_was_deleted_cannot_be_deleted_again(index):
    store.delete(index, ["p00"])
    with pytest.raises(DataError, match=r"2 of the ids to delete are not there \('p00', 'x'\)"):
        store.delete(index, ["p00", "p01", "x"])
    assert IndexReader.open(index).num_passages == 39, "nothing was deleted"
    store.delete(index, ["p00", "p01", "x"], missing_ok=True)
    assert IndexReader.open(index).num_passages == 38


def test_added_passages_are_found_by_both_sides(index, addition):
    store.delete(index, ["p03"])
    store.add(index, *addition)
    reader = IndexReader.open(index)
    reader.artifact.verify()
    ids, embeddings = without({"p03"})
    assert found(reader) == expected(ids + NEW_IDS, np.concatenate([embeddings, NEW_EMBEDDINGS]))
    assert [reader.passage_ids[row] for row in reader.search_bm25(["n1"], 1).rows[0]] == ["n1"]


def test_a_passage_that_is_there_is_replaced_only_when_asked(index, addition):
    with pytest.raises(DataError, match=r"holds 1 of these passages already \('p03'\); use on_duplicate=replace"):
        store.add(index, *addition)
    assert found(IndexReader.open(index)) == expected(IDS, EMBEDDINGS)
    store.add(index, *addition, on_duplicate="replace")
    ids, embeddings = without({"p03"})
    assert found(IndexReader.open(index)) == expected(ids + NEW_IDS, np.concatenate([embeddings, NEW_EMBEDDINGS]))


def test_another_encoders_embeddings_are_refused(index, tmp_path):
    corpus, other = embedded_corpus(tmp_path / "x", {"n": passage("n")}, NEW_EMBEDDINGS[:1], encoder_version="other-2")
    with pytest.raises(ArtifactError, match="made by encoder other-2, but .* by word-count-1; embed the new passages"):
        store.add(index, corpus, other)


def test_other_columns_are_refused(index, tmp_path):
    embedded = embedded_corpus(tmp_path / "x", {"n": "only text"}, NEW_EMBEDDINGS[:1])
    with pytest.raises(DataError, match="columns .*year"):
        store.add(index, *embedded)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF2,Flat", "SQ8,RFlat"])
def test_compact_rewrites_without_the_dead(tmp_path, factory, addition):
    embedded = embedded_corpus(tmp_path / "old", {id_: passage(id_) for id_ in IDS}, EMBEDDINGS)
    thorough = SearchParameters(nprobe=2, ef_search=100, rescore_factor=20)
    config = IndexConfig(factory=factory, num_shards=2, search=thorough, recall=None)
    index = tmp_path / "index"
    build_index(*embedded, config, index, use_ray=False)
    dead = {"p01", "p02", *IDS[20:]}  # two of the first shard, all of the second
    store.delete(index, sorted(dead))
    store.add(index, *addition, on_duplicate="replace")
    before = IndexReader.open(index)
    hits = found(before)
    ids, embeddings = without(dead | {"p03"})
    assert [dict(line) for line in hits] == [
        dict(line) for line in expected(ids + NEW_IDS, np.concatenate([embeddings, NEW_EMBEDDINGS]))
    ]
    store.compact(index)
    after = IndexReader.open(index)
    after.artifact.verify()
    assert found(after) == hits
    assert after.num_rows == after.num_passages == 20
    assert [after.passage_ids[row] for row in after.search_bm25(["p19"], 1).rows[0]] == ["p19"]
    assert found(before) == hits, "a reader of the old state goes on"


def test_cleared_away_is_what_is_old_and_in_no_state(index):
    reader = IndexReader.open(index)
    hits = found(reader)  # everything is mapped now
    store.delete(index, ["p00"])
    store.compact(index)
    assert (index / "shards" / "00000").is_dir(), "within the grace"
    assert store.clear_away(index, grace_s=0.0) > 0
    assert sorted(path.name for path in (index / "shards").iterdir()) == ["00001", "00002"]
    assert not any((index / "deleted").iterdir())
    assert found(reader) == hits, "mapped files outlive their names"
    IndexReader.open(index).artifact.verify()
    assert store.clear_away(index, grace_s=0.0) == 0


def test_a_second_writer_is_refused(index):
    with (index / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another process is writing"):
            store.delete(index, ["p00"])


def test_a_change_that_fails_leaves_the_index_as_it_was(index, addition, monkeypatch):
    before = (index / "manifest.json").read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("raydr.index.store.build_bm25", fails)
    with pytest.raises(OSError, match="disk full"):
        store.add(index, *addition, on_duplicate="replace")
    assert (index / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    store.add(index, *addition, on_duplicate="replace")
    assert IndexReader.open(index).num_passages == 42


def test_an_empty_index_is_not_compacted(index):
    store.delete(index, IDS)
    reader = IndexReader.open(index)
    assert found(reader) == [[]] * len(QUERIES)
    assert (reader.search_bm25(["p00"], 3).rows == -1).all()
    with pytest.raises(DataError, match="every passage is deleted"):
        store.compact(index)
