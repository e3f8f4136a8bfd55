"""Reordering a run as a batch job: in this process and on Ray, by a reranker for one list or for many."""

from __future__ import annotations

from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from raydr.config import Component
from raydr.errors import ConfigError, DataError
from raydr.evaluation.trec import read_run
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.stages.config import RerankConfig
from raydr.stages.rerank import rerank_run
from raydr.types import Hit, Query
from tests.corpora import WordCounts, embedded_corpus

TEXTS = {f"p{n:02d}": "word " * (1 + n * 7 % 11) + str(n) for n in range(40)}
QUERIES = [Query(f"q{n}", f"a query {n}") for n in range(9)]
RUN = {q.query_id: [Hit(f"p{(n * 3 + k) % 40:02d}", 30.0 - k) for k in range(12)] for n, q in enumerate(QUERIES)}


class ByLength:
    """Prefers short texts; its scores are on another scale for every query."""

    def rerank(self, query, hits, passages):
        shift = 100.0 * int(query.text.split()[-1])
        ranked = sorted(hits, key=lambda hit: (len(passages[hit.passage_id].text), hit.passage_id))
        return [Hit(hit.passage_id, shift - len(passages[hit.passage_id].text)) for hit in ranked]


class ManyAtOnce(ByLength):
    """The same for all lists of a block, with scores that do not descend, as those of windows."""

    def rerank(self, query, hits, passages):
        raise AssertionError("not asked one by one")

    def rerank_many(self, lists, passages):
        ranked = [ByLength().rerank(query, hits, passages) for query, hits in lists]
        return [[hit._replace(score=hit.score + place % 2) for place, hit in enumerate(hits)] for hits in ranked]


ONE = Component(import_path="tests.stages.test_rerank:ByLength")
MANY = Component(import_path="tests.stages.test_rerank:ManyAtOnce")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    embedded = embedded_corpus(
        folder / "c", {id_: {"text": text} for id_, text in TEXTS.items()}, WordCounts().count(list(TEXTS.values()))
    )
    build_index(*embedded, IndexConfig(num_shards=2), folder / "index", use_ray=False)
    return folder / "index"


def reranked(index, out, component=ONE, *, run=RUN, use_ray=False, **settings):
    config = RerankConfig(depth=8, queries_per_block=2, **settings)
    artifact = rerank_run(run, QUERIES, index, component, config, out, use_ray=use_ray)
    hits: dict[str, list[Hit]] = {}
    for row in pq.read_table(artifact.path / "hits.parquet").to_pylist():
        hits.setdefault(row["query_id"], []).append(Hit(row["passage_id"], row["score"]))
    return artifact, hits


def test_the_first_hits_are_reordered_and_the_others_follow(index, tmp_path):
    artifact, hits = reranked(index, tmp_path / "out")
    assert list(hits) == list(RUN)
    for query_id, found in hits.items():
        head = sorted((hit.passage_id for hit in RUN[query_id][:8]), key=lambda id_: (len(TEXTS[id_]), id_))
        assert [hit.passage_id for hit in found] == [*head, *(hit.passage_id for hit in RUN[query_id][8:])]
        assert all(a.score >= b.score for a, b in pairwise(found))
    written = read_run(artifact.path / "run.trec")
    assert {q: [h.passage_id for h in own] for q, own in written.items()} == {
        q: [h.passage_id for h in own] for q, own in hits.items()
    }


def test_many_lists_at_once_give_the_same_order_and_scores_that_descend(index, tmp_path):
    _, one = reranked(index, tmp_path / "one")
    _, many = reranked(index, tmp_path / "many", MANY)
    for query_id, found in many.items():
        assert [hit.passage_id for hit in found] == [hit.passage_id for hit in one[query_id]]
        assert all(a.score >= b.score for a, b in pairwise(found))


@pytest.mark.ray
def test_on_ray_it_is_the_same(index, tmp_path, ray_cluster):
    assert reranked(index, tmp_path / "ray", use_ray=True)[1] == reranked(index, tmp_path / "local")[1]


def test_what_is_finished_stays_and_another_reranker_is_another_run(index, tmp_path, capsys):
    first, _ = reranked(index, tmp_path / "out")
    made = (first.path / "manifest.json").stat().st_mtime_ns
    assert reranked(index, tmp_path / "out")[0].path.joinpath("manifest.json").stat().st_mtime_ns == made
    assert "has this run already" in capsys.readouterr().err
    assert reranked(index, tmp_path / "out", MANY)[0].path.joinpath("manifest.json").stat().st_mtime_ns != made


def test_what_cannot_be_reordered_is_named(index, tmp_path):
    with pytest.raises(DataError, match="'nobody'.*not among"):
        reranked(index, tmp_path / "out", run={"nobody": [Hit("p01", 1.0)]})
    with pytest.raises(DataError, match="'p99'.*not in"):
        reranked(index, tmp_path / "out", run={"q1": [Hit("p99", 1.0)]})
    with pytest.raises(ConfigError, match="no reranker"):
        reranked(index, tmp_path / "out", Component(import_path="builtins:dict"))
    assert not (tmp_path / "out" / "manifest.json").exists()
