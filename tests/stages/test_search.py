"""Batch search: equal to `pipeline.py`, to brute force and to itself on Ray; runs, documents, filters, refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import write_artifact
from raydr.config import Component
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ArtifactError, DataError
from raydr.evaluation.trec import read_run
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.filters import FilterError
from raydr.index.reader import IndexReader
from raydr.index.shard import VectorIndex
from raydr.pipeline import Pipeline
from raydr.stages.config import SearchConfig
from raydr.stages.search import _cpu_share, search_corpus
from raydr.types import Hit, Passage, Query
from tests.corpora import METHOD, WordCounts, embedded_corpus

RNG = np.random.default_rng(0)
TEXTS = {f"p{n:02d}": " ".join(RNG.choice(WordCounts.VOCABULARY, size=RNG.integers(1, 9))) for n in RNG.permutation(60)}
QUERIES = [Query(f"q{n}", " ".join(RNG.choice(WordCounts.VOCABULARY, size=3))) for n in range(25)]
ENCODER = EncoderFactory(Component.model_validate(METHOD))


class AddBest:
    """Adds the words of the best passage to the query, and wants two passages to choose from."""

    num_feedback = 2
    reads = "passages"

    def refine(self, queries, embeddings, found):
        assert all(len(own.hits) == len(own.passages) == 2 for own in found)
        assert all(own.hits[0].score >= own.hits[1].score for own in found)
        return embeddings + WordCounts().encode_passages([own.passages[0] for own in found])


class ByLength:
    """Prefers short passages."""

    def rerank(self, query, hits, passages):
        ranked = sorted(hits, key=lambda hit: (len(passages[hit.passage_id].text), hit.passage_id))
        return [Hit(hit.passage_id, -float(len(passages[hit.passage_id].text))) for hit in ranked]


def build_refiner(encoder):
    assert encoder.version == WordCounts.version
    return AddBest()


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    passages = {id_: {"text": text, "even": n % 2 == 0} for n, (id_, text) in enumerate(TEXTS.items())}
    embedded = embedded_corpus(folder / "c", passages, WordCounts().count(list(TEXTS.values())))
    build_index(*embedded, IndexConfig(num_shards=3), folder / "index", use_ray=False)
    return folder / "index"


def searched(index, out, config=None, *, queries=QUERIES, use_ray=False, **parts):
    config = config or SearchConfig(k=10)
    return search_corpus(index, queries, ENCODER, config, out, use_ray=use_ray, **parts)


def hits_of(artifact):
    table = pq.read_table(artifact.path / "hits.parquet")
    hits: dict[str, list[Hit]] = {}
    for row in table.to_pylist():
        hits.setdefault(row["query_id"], []).append(Hit(row["passage_id"], row["score"]))
    return hits


def pipeline(**parts):
    flat = VectorIndex()
    flat.add(list(TEXTS), WordCounts().count(list(TEXTS.values())))
    return Pipeline(WordCounts(), flat, {id_: Passage(id_, text) for id_, text in TEXTS.items()}, **parts)


PARTS = [
    ({}, {}),
    ({"build_refiner": build_refiner}, {"refiner": AddBest()}),
    ({"build_refiner": build_refiner, "reranker": ByLength()}, {"refiner": AddBest(), "reranker": ByLength()}),
]


@pytest.mark.parametrize(("parts", "plain"), PARTS)
@pytest.mark.parametrize("query_batch", [1, 7, 1000])
def test_the_hits_are_the_pipelines(index, tmp_path, parts, plain, query_batch):
    artifact = searched(index, tmp_path / "out", SearchConfig(k=10, rerank=10, query_batch=query_batch), **parts)
    assert hits_of(artifact) == pipeline(**plain).search(QUERIES, k=10)
    assert artifact.manifest.counts == {"queries": 25, "hits": 250, "unanswered": 0}


def test_only_the_first_hits_are_reranked(index, tmp_path):
    plain = hits_of(searched(index, tmp_path / "plain", reranker=ByLength()))
    assert plain == pipeline().search(QUERIES, k=10)  # a reranker that nobody asks for
    reranked = hits_of(searched(index, tmp_path / "out", SearchConfig(k=10, rerank=4), reranker=ByLength()))
    passages = {id_: Passage(id_, text) for id_, text in TEXTS.items()}
    for query in QUERIES:
        hits = reranked[query.query_id]
        expected = ByLength().rerank(query, plain[query.query_id][:4], passages)
        assert hits[:4] == expected
        assert [hit.passage_id for hit in hits[4:]] == [hit.passage_id for hit in plain[query.query_id][4:]]
        assert all(before.score > after.score for before, after in pairwise(hits[3:]))


class NamedRanker(EncoderFactory):
    def __call__(self):
        return ENCODER()


def test_what_a_ranker_reordered_is_reordered_again_when_the_ranker_was_trained_again(index, tmp_path):
    """Its folder has the same name, and the index is the same: only the ranker's artifact says so."""
    method = Component(import_path="some:Method", args={"trained_ranker": str(tmp_path / "ranker/model")})

    def reranked(steps: int) -> str:
        with write_artifact(tmp_path / "ranker", kind="model", config={"steps": steps}) as writer:
            (writer.path / "model").mkdir()
        config = SearchConfig(k=10, rerank=4)
        out = tmp_path / "out"
        run = search_corpus(index, QUERIES, NamedRanker(method), config, out, use_ray=False, reranker=ByLength())
        return run.manifest.fingerprint

    first = reranked(1)
    assert reranked(1) == first
    assert reranked(2) != first


@pytest.mark.ray
@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_on_ray_the_files_are_the_same(index, tmp_path, ray_cluster, mode):
    config = SearchConfig(k=10, mode=mode, filters={"even": True})
    local = searched(index, tmp_path / "local", config, build_refiner=build_refiner)
    remote = searched(index, tmp_path / "ray", config, build_refiner=build_refiner, use_ray=True)
    assert remote.manifest.files == local.manifest.files


def test_the_run_file_ranks_as_the_hits_do(index, tmp_path):
    artifact = searched(index, tmp_path / "out", SearchConfig(k=10, run_tag="mine", query_batch=4))
    lines = [line.split(" ") for line in (artifact.path / "run.trec").read_text().splitlines()]
    assert [line[0] for line in lines[::10]] == [query.query_id for query in QUERIES]
    assert {(line[1], line[5]) for line in lines} == {("Q0", "mine")}
    assert [int(line[3]) for line in lines] == list(range(1, 11)) * 25
    read = read_run(artifact.path / "run.trec")
    assert {q: [hit.passage_id for hit in hits] for q, hits in read.items()} == {
        q: [hit.passage_id for hit in hits] for q, hits in hits_of(artifact).items()
    }


def test_bm25_needs_no_encoder(index, tmp_path):
    def no_encoder():
        raise AssertionError("bm25 encodes nothing")

    queries = [*QUERIES, Query("nothing", "unknown words")]
    artifact = search_corpus(index, queries, no_encoder, SearchConfig(mode="bm25", k=5), tmp_path / "o", use_ray=False)
    assert artifact.manifest.counts["unanswered"] == 1
    reader = IndexReader.open(index)
    top = reader.search_bm25([query.text for query in QUERIES], 5)
    expected = [[reader.passage_ids[row] for row in rows if row >= 0] for rows in top.rows]
    assert [[hit.passage_id for hit in hits] for hits in hits_of(artifact).values()] == expected


def test_hybrid_finds_what_either_side_finds(index, tmp_path):
    found = {
        mode: hits_of(searched(index, tmp_path / mode, SearchConfig(mode=mode, k=60, candidates=60)))
        for mode in ("dense", "bm25", "hybrid")
    }
    for query in QUERIES:
        ranks = [
            {hit.passage_id: rank for rank, hit in enumerate(found[mode][query.query_id], start=1)}
            for mode in ("dense", "bm25")
        ]
        for hit in found["hybrid"][query.query_id]:
            gain = sum(1 / (60 + rank[hit.passage_id]) for rank in ranks if hit.passage_id in rank)
            assert hit.score == pytest.approx(gain, rel=1e-6)


def test_filters_and_id_lists(index, tmp_path):
    config = SearchConfig(k=60, filters={"even": True}, allow_ids=tuple(TEXTS)[:20], exclude_ids=tuple(TEXTS)[:5])
    expected = {id_ for n, id_ in enumerate(TEXTS) if n % 2 == 0 and 5 <= n < 20}
    for mode in ("dense", "bm25", "hybrid"):
        artifact = searched(index, tmp_path / mode, config.model_copy(update={"mode": mode}))
        found = {hit.passage_id for hits in hits_of(artifact).values() for hit in hits}
        assert found == expected
    with pytest.raises(FilterError, match=r"filters.odd: no such column"):
        searched(index, tmp_path / "x", SearchConfig(filters={"odd": True}))


def test_a_finished_run_stays_until_the_index_changes(index, tmp_path):
    first = searched(index, tmp_path / "out")
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    searched(index, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    best = hits_of(first)["q0"][0].passage_id
    store.delete(index, [best])
    try:
        again = searched(index, tmp_path / "out")
        assert best not in {hit.passage_id for hits in hits_of(again).values() for hit in hits}
        assert again.fingerprint != first.fingerprint
    finally:
        _restore(index)


def _restore(index):
    """Takes the deletion back, for the tests that follow."""
    from raydr.artifacts import update_artifact
    from raydr.index.layout import read_details

    with update_artifact(index, kind="index") as update:
        details = read_details(update.artifact)
        shards = [shard.model_copy(update={"deleted": None, "num_deleted": 0}) for shard in details.shards]
        update.files -= {shard.deleted for shard in details.shards if shard.deleted}
        update.details = details.model_copy(update={"shards": shards}).with_version().as_details()


def test_another_encoder_is_refused_with_both_stamps(index, tmp_path):
    class Other(WordCounts):
        version = "other-2"

    with pytest.raises(ArtifactError, match="made by encoder word-count-1, but these queries' encoder is other-2"):
        search_corpus(index, QUERIES, Other, SearchConfig(), tmp_path / "out", use_ray=False)


def test_queries_that_cannot_be_told_apart(index, tmp_path):
    with pytest.raises(DataError, match="no queries"):
        searched(index, tmp_path / "out", queries=[])
    with pytest.raises(DataError, match="query id 'q1' occurs twice"):
        searched(index, tmp_path / "out", queries=[Query("q1", "alpha"), Query("q1", "beta")])


@pytest.fixture(scope="module")
def split_index(tmp_path_factory):
    """Documents of 1, 2, 4, ... passages, as the splitter leaves them."""
    from raydr.data.config import DataConfig, SplitDocuments
    from raydr.data.ingest import ingest

    folder = tmp_path_factory.mktemp("split")
    words = np.random.default_rng(1).choice(WordCounts.VOCABULARY, size=2000)
    lines = [
        f'{{"_id": "d{n}", "text": "{" ".join(words[:length])}"}}' for n, length in enumerate((3, 9, 20, 40, 200, 800))
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    corpus = ingest(
        DataConfig(path=str(folder / "corpus.jsonl"), split_documents=SplitDocuments(max_tokens=12, overlap_tokens=2)),
        folder / "corpus",
    )
    assert corpus.is_split
    embeddings = _embed(corpus, folder / "embed")
    build_index(corpus, embeddings, IndexConfig(num_shards=2), folder / "index", use_ray=False)
    return corpus, folder / "index"


def _embed(corpus, path):
    import pyarrow as pa

    from raydr.artifacts import open_artifact, write_artifact

    with write_artifact(path, kind="embeddings", config={}, inputs={"corpus": corpus.artifact}) as writer:
        table = pa.concat_tables(corpus.passages(["passage_id", "position", "text"]))
        counts = WordCounts().count(table["text"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(counts.ravel()), WordCounts.dim)
        pq.write_table(table.drop_columns(["text"]).append_column("embedding", column), path / "part.parquet")
        writer.details.update({"encoder_version": WordCounts.version, "dim": WordCounts.dim, "method": METHOD})
    return open_artifact(path)


@pytest.mark.parametrize("k", [1, 3, 6, 10])
def test_documents_are_ranked_by_their_best_passage(split_index, tmp_path, k):
    corpus, index = split_index
    artifact = searched(index, tmp_path / "out", SearchConfig(k=k), corpus=corpus)
    rows = [row for table in corpus.passages(["document_id", "text"]) for row in table.to_pylist()]
    counts = WordCounts().count([row["text"] for row in rows])
    run = read_run(artifact.path / "run.trec")
    for query in QUERIES:
        scores = counts @ WordCounts().encode_queries([query])[0]
        best: dict[str, float] = {}
        for row, score in zip(rows, scores.tolist(), strict=True):
            best[row["document_id"]] = max(best.get(row["document_id"], score), score)
        expected = sorted(best, key=lambda id_: (-best[id_], id_))[:k]
        assert [hit.passage_id for hit in run[query.query_id]] == expected
    table = pq.read_table(artifact.path / "hits.parquet")
    assert table.column_names == ["query_id", "passage_id", "document_id", "score"]


def test_passages_can_be_asked_for_instead(split_index, tmp_path):
    corpus, index = split_index
    artifact = searched(index, tmp_path / "out", SearchConfig(k=30, aggregate=False), corpus=corpus)
    assert pq.read_table(artifact.path / "hits.parquet").column_names == ["query_id", "passage_id", "score"]
    assert all(len(hits) == 30 for hits in read_run(artifact.path / "run.trec").values())


def test_an_index_of_another_corpus_is_refused(split_index, index, tmp_path):
    with pytest.raises(ArtifactError, match="not an index of the corpus in"):
        searched(index, tmp_path / "out", corpus=split_index[0])


@pytest.mark.parametrize(
    ("nodes", "wanted", "share"),
    [
        ([2.0, 2.0], 5 * [1.0], 0.666),  # 0.8 each would be the cluster's CPUs, and leave one without a place
        ([2.0, 2.0], 4 * [1.0], 1.0),
        ([1.0], 2 * [1.0], 0.5),
        ([8.0, 0.5], 3 * [1.0], 1.0),
        ([2.0], [2.0, 1.0, 1.0], 0.333),
    ],
)
def test_every_actor_of_a_search_finds_a_place_on_some_node(nodes, wanted, share):
    found = _cpu_share(wanted, nodes)
    assert found == pytest.approx(share)
    free = list(nodes)
    for cpus in wanted:  # on whichever node comes first
        free[next(number for number, left in enumerate(free) if left >= cpus * found)] -= cpus * found
