"""Pictures from a corpus to its index, and through search, mining, reranking and scoring; here and on Ray the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.data.corpus import Corpus
from raydr.data.examples import ExampleSet
from raydr.data.passages import passages_of
from raydr.data.positives import positive_examples
from raydr.encoders.factory import EncoderFactory
from raydr.errors import DataError
from raydr.evaluation.trec import read_run
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import BM25Config, IndexConfig
from raydr.index.reader import IndexReader
from raydr.stages.config import EmbedConfig, MineConfig, RerankConfig, ScoreConfig, SearchConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.mine import mine_negatives
from raydr.stages.rerank import rerank_run
from raydr.stages.score import open_scores, score_examples
from raydr.stages.search import search_corpus
from tests.pictures import METHOD, PASSAGES, QUERIES, Colours, ColourScorer, picture_corpus

COLOURS = Component.model_validate(METHOD)
BUILD = EncoderFactory(COLOURS)
SCORER = Component(import_path="tests.pictures:ColourScorer")
BY_ID = {passage.passage_id: passage for passage in PASSAGES}
ASKED = [case[0] for case in QUERIES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return picture_corpus(tmp_path_factory.mktemp("pictures") / "corpus")


@pytest.fixture(scope="module")
def index(corpus) -> Path:
    out = corpus.path.parent
    config = EmbedConfig(passages_per_block=3)
    embeddings = embed_corpus(corpus, BUILD, config, out / "embed", use_ray=False, method=COLOURS)
    return build_index(corpus, embeddings, IndexConfig(num_shards=2), out / "index", use_ray=False).path


def searched(index: Path, out: Path, **config) -> dict[str, list[str]]:
    artifact = search_corpus(index, ASKED, BUILD, SearchConfig(**{"k": 8, **config}), out, use_ray=False)
    return {
        query_id: [hit.passage_id for hit in hits] for query_id, hits in read_run(artifact.path / "run.trec").items()
    }


def by_definition() -> dict[str, list[str]]:
    scores = Colours().encode_queries(ASKED) @ Colours().encode_passages(PASSAGES).T
    ids = [passage.passage_id for passage in PASSAGES]
    return {
        query.query_id: [ids[row] for row in sorted(range(len(ids)), key=lambda row: (-own[row], ids[row]))]
        for query, own in zip(ASKED, scores, strict=True)
    }


def vectors(embed: Path) -> np.ndarray:
    table = pq.read_table(embed / "embeddings").sort_by("position")
    return np.array(table["embedding"].to_pylist(), np.float32)


def test_encoders_see_the_pictures_and_the_index_keeps_them(corpus, index):
    assert (vectors(corpus.path.parent / "embed") == Colours().encode_passages(PASSAGES)).all()
    reader = IndexReader.open(index)
    assert reader.has_pictures
    assert passages_of(reader.take(range(8))) == PASSAGES
    assert reader.modalities_of(BY_ID) == {id_: passage.modality for id_, passage in BY_ID.items()}


def test_dense_search_is_the_definition(index, tmp_path):
    assert searched(index, tmp_path / "a") == by_definition()


def test_words_alone_and_both(index, tmp_path):
    """BM25 needs words; in hybrid search a picture without words is looked for by its embedding alone."""
    with pytest.raises(DataError, match=r"query 'colour' is a picture without words.*search\.mode=dense"):
        searched(index, tmp_path / "bm25", mode="bm25")
    hybrid = searched(index, tmp_path / "hybrid", mode="hybrid", k=3)
    assert hybrid["colour"] == by_definition()["colour"][:3]
    assert hybrid["both"][0] == "meadow"


def test_pictures_and_instructions_decide_what_is_current(index, tmp_path, capsys):
    config = SearchConfig(k=2)
    for change, again in (
        ({}, False),
        ({}, True),
        ({"image": QUERIES[2][0].image}, False),
        ({"instruction": "x"}, False),
    ):
        queries = [ASKED[0], ASKED[1]._replace(**change)]
        capsys.readouterr()
        search_corpus(index, queries, BUILD, config, tmp_path / "run", use_ray=False)
        assert ("has this run already" in capsys.readouterr().err) == again


def test_rerankers_see_the_pictures(corpus, index, tmp_path):
    run = read_run(
        search_corpus(index, ASKED, BUILD, SearchConfig(k=8), tmp_path / "s", use_ray=False).path / "run.trec"
    )
    upside_down = {query_id: hits[::-1] for query_id, hits in run.items()}
    out = rerank_run(upside_down, ASKED, index, SCORER, RerankConfig(), tmp_path / "r", use_ray=False)
    found = {query_id: [hit.passage_id for hit in hits] for query_id, hits in read_run(out.path / "run.trec").items()}
    assert found == by_definition()
    searched_and_reranked = search_corpus(
        index, ASKED, BUILD, SearchConfig(k=8, rerank=8), tmp_path / "both", use_ray=False, reranker=ColourScorer()
    )
    hits = read_run(searched_and_reranked.path / "run.trec")
    assert {id_: [hit.passage_id for hit in own] for id_, own in hits.items()} == by_definition()


def test_mined_examples_have_everything(corpus, index, tmp_path, monkeypatch):
    monkeypatch.setattr("raydr.stages.mine._PICTURES_AT_ONCE", 2)
    # A hand-made corpus is its own set of queries; a mined one names the corpus that it was judged over.
    monkeypatch.setitem(corpus.artifact.manifest.inputs, "corpus", corpus.artifact.fingerprint)
    config = MineConfig(sources=("model", "bm25"), num_negatives=7)
    examples = ExampleSet(mine_negatives(index, corpus, BUILD, config, tmp_path / "out", use_ray=False))
    assert examples.query_ids == ["words", "colour", "both"]
    assert [examples.query(row) for row in range(3)] == ASKED[:3]
    assert examples.instructions(0) == QUERIES[0][1]
    assert [examples.task(row) for row in range(3)] == ["text to image", "image to text", None]
    assert [examples.copies(row) for row in range(3)] == [3, 1, 1]
    assert examples.passages(range(examples.num_passages)) == [BY_ID[id_] for id_ in examples.passage_ids]
    assert {p.modality for p in examples.passages(examples.negatives(0))} == {"text", "image", "image,text"}
    negatives = [examples.passage_ids[row] for row in examples.negatives(0)]
    assert "p-red-again" in negatives, "nobody judged it"
    assert {examples.passage_ids[row] for row in examples.relevant(0)} == {"p-red", "p-red-again"}


def test_scorers_see_the_pictures(corpus, tmp_path):
    examples = positive_examples(corpus, corpus, tmp_path / "examples")
    artifact = score_examples(examples, SCORER, ScoreConfig(), tmp_path / "scores", use_ray=False)
    for row, scores in enumerate(open_scores(artifact.path, examples)):
        pairs = [(examples.query(row), passage) for passage in examples.passages(examples.positives(row))]
        np.testing.assert_array_equal(scores, ColourScorer().score(pairs))


def test_a_compacted_index_keeps_its_pictures(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("raydr.index.store._REWRITTEN_ROWS", 3)
    embeddings = open_artifact(corpus.path.parent / "embed")
    config = IndexConfig(bm25=BM25Config())
    path = build_index(corpus, embeddings, config, tmp_path / "index", use_ray=False).path
    store.delete(path, ["p-green", "sea"])
    store.compact(path, grace_s=0.0)
    left = [passage for passage in PASSAGES if passage.passage_id not in ("p-green", "sea")]
    assert passages_of(IndexReader.open(path).take(range(6))) == left


@pytest.mark.ray
def test_ray_gives_the_same(ray_cluster, corpus, index, tmp_path):
    out = embed_corpus(corpus, BUILD, EmbedConfig(passages_per_block=3), tmp_path / "e", use_ray=True, method=COLOURS)
    assert (vectors(out.path) == Colours().encode_passages(PASSAGES)).all()
    run = read_run(
        search_corpus(index, ASKED, BUILD, SearchConfig(k=8), tmp_path / "s", use_ray=True).path / "run.trec"
    )
    upside_down = {query_id: hits[::-1] for query_id, hits in run.items()}
    ranked = rerank_run(upside_down, ASKED, index, SCORER, RerankConfig(), tmp_path / "r", use_ray=True)
    found = read_run(ranked.path / "run.trec")
    assert {id_: [hit.passage_id for hit in own] for id_, own in found.items()} == by_definition()
