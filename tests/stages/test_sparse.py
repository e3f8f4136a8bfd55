"""Sparse embeddings end to end: what is written, sharded is whole, Ray is local, the four searches, changes, mining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.artifacts import Artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.ingest import ingest, ingest_queries
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ArtifactError, ConfigError
from raydr.evaluation.trec import read_run
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.postings import SparseIndex
from raydr.index.reader import IndexReader
from raydr.methods.base import build_method
from raydr.pipeline import Pipeline
from raydr.stages.config import EmbedConfig, MineConfig, SearchConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.mine import mine_negatives, training_data
from raydr.stages.search import search_corpus
from tests.conftest import write_beir
from tests.train.tiny import moved_towers

VDR = "raydr.methods.vdr:Vdr"
K = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return moved_towers(tmp_path_factory.mktemp("vdr"), layers=1, hidden=16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return ingest(DataConfig(path=str(write_beir(folder / "beir")), split="test"), folder / "out")


def vdr(model: str, **settings: Any) -> Component:
    small = {"query_topk": 2000, "passage_topk": 2000, "device": "cpu", "num_threads": 1, "precision": "float32"}
    return Component(import_path=VDR, args={"model": model, **small, **settings})


def embed(corpus: Corpus, method: Component, out: Path, *, use_ray: bool = False) -> Artifact:
    config = EmbedConfig(passages_per_block=4, num_workers=(1, 1), worker_cpus=1)
    return embed_corpus(corpus, EncoderFactory(method), config, out, use_ray=use_ray, method=method)


def indexed(corpus: Corpus, method: Component, out: Path, *, num_shards: int = 1, use_ray: bool = False) -> Path:
    embeddings = embed(corpus, method, out / "embed", use_ray=use_ray)
    config = IndexConfig(num_shards=num_shards)
    return build_index(corpus, embeddings, config, out / "index", use_ray=use_ray).path


def run_of(index: Path, corpus: Corpus, method: Component, out: Path, *, use_ray: bool = False, **settings: Any):
    built = build_method(method)
    config = SearchConfig(**{"k": K, "encoder_cpus": 0.5, "shard_cpus": 0.5, **settings})
    reranker = built.build_reranker() if config.rerank else None
    run = search_corpus(
        index, corpus.queries(), EncoderFactory(method), config, out, use_ray=use_ray, corpus=corpus, reranker=reranker
    )
    return read_run(run.path / "run.trec")


def pipeline(corpus: Corpus, method: Component) -> Pipeline:
    """The same in plain Python."""
    encoder, index = build_method(method).encoder(), SparseIndex()
    passages = {passage.passage_id: passage for table in corpus.passages() for passage in passages_in(table)}
    index.add(list(passages), encoder.encode_passages(list(passages.values())))
    return Pipeline(encoder, index, passages)


def passages_in(table: pa.Table):
    from raydr.data.passages import passages_of

    return passages_of(table)


@pytest.fixture(scope="module")
def index(corpus, model, tmp_path_factory) -> Path:
    return indexed(corpus, vdr(model), tmp_path_factory.mktemp("index"), num_shards=3)


def same(found, expected):
    assert found.keys() == expected.keys()
    for query_id, hits in expected.items():
        assert [hit.passage_id for hit in found[query_id]] == [hit.passage_id for hit in hits]
        assert [hit.score for hit in found[query_id]] == pytest.approx([hit.score for hit in hits], rel=1e-4)


@pytest.mark.parametrize(("settings", "kind"), [({}, pa.float32()), ({"weights": "float16"}, pa.float16())])
def test_embeddings_are_two_lists_of_what_is_not_zero(corpus, model, tmp_path, settings, kind):
    method = vdr(model, **settings)
    artifact = embed(corpus, method, tmp_path / "embed")
    tables = [pq.read_table(file) for file in sorted((artifact.path / "embeddings").glob("*.parquet"))]
    table = pa.concat_tables(tables).sort_by("position")
    assert table.column_names == ["passage_id", "position", "dimensions", "weights"]
    assert table.schema.field("dimensions").type == pa.list_(pa.int32())
    assert table.schema.field("weights").type == pa.list_(kind)
    expected = build_method(method).encoder().encode_passages(passages_in(next(corpus.passages())))
    for row, line in enumerate(table.to_pylist()):
        assert line["dimensions"] == expected[[row]].indices.tolist()
        np.testing.assert_allclose(line["weights"], expected[[row]].data, rtol=1e-3)
    assert artifact.manifest.details["weight_type"] == ("float16" if settings else "float32")


def test_bags_are_written_without_weights(corpus, model, tmp_path):
    artifact = embed(corpus, vdr(model, passage_view="bag"), tmp_path / "embed")
    file = next((artifact.path / "embeddings").glob("*.parquet"))
    assert pq.read_schema(file).names == ["passage_id", "position", "dimensions"]


def test_sharded_is_whole_and_batch_search_is_the_pipeline(corpus, model, index, tmp_path):
    expected = pipeline(corpus, vdr(model)).search(corpus.queries(), K)
    assert {len(hits) for hits in expected.values()} == {10}
    same(run_of(index, corpus, vdr(model), tmp_path / "three"), expected)
    whole = indexed(corpus, vdr(model), tmp_path / "whole")
    assert run_of(whole, corpus, vdr(model), tmp_path / "one") == run_of(index, corpus, vdr(model), tmp_path / "again")


@pytest.mark.ray
def test_on_ray_is_local(corpus, model, index, tmp_path, ray_cluster):
    on_ray = indexed(corpus, vdr(model), tmp_path, num_shards=3, use_ray=True)
    local, other = IndexReader.open(index), IndexReader.open(on_ray)
    for mine, theirs in zip(local.details.shards, other.details.shards, strict=True):
        assert mine.files == theirs.files
    found = run_of(on_ray, corpus, vdr(model), tmp_path / "run", use_ray=True)
    assert found == run_of(index, corpus, vdr(model), tmp_path / "local")


def test_the_searches_of_the_card(corpus, model, index, tmp_path):
    """Alpha has the index of vectors, beta and late parametric that of bags; the latter ends at the parametric one."""
    every = {"query_topk": None}  # so that a query shares a dimension with every passage
    parametric = run_of(index, corpus, vdr(model, **every), tmp_path / "parametric")
    alpha = vdr(model, query_view="bag")
    found = run_of(index, corpus, alpha, tmp_path / "alpha")
    same(found, pipeline(corpus, alpha).search(corpus.queries(), K))
    assert found != parametric
    beta = vdr(model, passage_view="bag", **every)
    bags = indexed(corpus, beta, tmp_path / "bags", num_shards=2)
    assert IndexReader.open(bags).details.weight_type == "ones"
    found = run_of(bags, corpus, beta, tmp_path / "beta", k=100)
    encoder = build_method(beta).encoder()
    passages = passages_in(next(corpus.passages()))
    scores = (encoder.encode_queries(corpus.queries()) @ encoder.encode_passages(passages).T).toarray()
    for query, row in zip(corpus.queries(), scores, strict=True):
        hits = {passage.passage_id: score for passage, score in zip(passages, row.tolist(), strict=True) if score > 0}
        assert {hit.passage_id: hit.score for hit in found[query.query_id]} == pytest.approx(hits, rel=1e-4)
        assert [hit.passage_id for hit in found[query.query_id]] == sorted(hits, key=lambda id_: (-hits[id_], id_))
    late = run_of(bags, corpus, beta, tmp_path / "late", rerank=len(passages))
    same(late, parametric)


def test_an_index_refuses_another_spaces_queries(corpus, model, index, tmp_path):
    with pytest.raises(ArtifactError, match="made by encoder"):
        run_of(index, corpus, vdr(model, passage_view="bag"), tmp_path / "run")
    feedback = {"scores": {"import_path": "raydr.methods.cross_encoder:CrossEncoderRanker"}}
    with pytest.raises(ConfigError, match="feedback"):
        run_of(index, corpus, vdr(model), tmp_path / "run", feedback=feedback)
    embeddings = embed(corpus, vdr(model), tmp_path / "embed")
    with pytest.raises(ConfigError, match="inverted index"):
        build_index(corpus, embeddings, IndexConfig(factory="HNSW32"), tmp_path / "index", use_ray=False)


def test_passages_are_added_replaced_deleted_and_compacted(corpus, model, tmp_path):
    method = vdr(model, weights="float16")
    path = indexed(corpus, method, tmp_path / "start", num_shards=2)
    queries = build_method(method).encoder().encode_queries(corpus.queries())

    def found() -> list[tuple[str, float]]:
        reader = IndexReader.open(path)
        top = reader.search(queries, 20)
        ids = reader.passage_ids.take(top.rows[top.rows >= 0]).tolist()
        return list(zip(ids, top.scores[top.rows >= 0].tolist(), strict=True))

    before = found()
    store.delete(path, ["moon", "cat"])
    fewer = [pair for pair in before if pair[0] not in ("moon", "cat")]
    assert found() == fewer
    store.compact(path, grace_s=0.0)
    assert IndexReader.open(path).num_rows == 8
    assert found() == fewer
    (tmp_path / "new").mkdir()
    lines = (f'{{"_id": "{i}", "title": "{t}", "text": "{x}"}}' for i, t, x in [
        ("moon", "Moon", "The natural satellite of the Earth; its pull causes the tides."),
        ("cat", "Cat", "A small furry animal that purrs and hunts mice at night."),
    ])  # fmt: skip
    (tmp_path / "new/corpus.jsonl").write_text("\n".join(lines) + "\n")
    new = ingest(DataConfig(path=str(tmp_path / "new")), tmp_path / "new_corpus")
    store.add(path, new, embed(new, method, tmp_path / "new_embed"))
    ids, scores = zip(*sorted(found()), strict=True)
    expected_ids, expected = zip(*sorted(before), strict=True)
    assert ids == expected_ids
    assert scores == pytest.approx(expected, rel=1e-3)  # in half precision, from another batch


def test_negatives_are_mined_in_it(corpus, model, index, tmp_path):
    source = corpus.path.parent / "beir"
    data = training_data(DataConfig(path=str(source), split="test"), MineConfig(split="test"))
    queries = ingest_queries(data, corpus, tmp_path / "queries")
    config = MineConfig(split="test", num_negatives=3, sources=("model", "bm25"), margin=0.0)
    mined = mine_negatives(index, queries, EncoderFactory(vdr(model)), config, tmp_path / "mined", use_ray=False)
    from raydr.data.examples import ExampleSet

    examples, expected = ExampleSet(mined), run_of(index, corpus, vdr(model), tmp_path / "run")
    assert len(examples) == 3
    for row in range(3):
        query = examples.query(row)
        scores = {hit.passage_id: hit.score for hit in expected[query.query_id]}
        positive = min(scores[examples.passage_ids[place]] for place in examples.positives(row))
        for place in examples.negatives(row):
            assert scores[examples.passage_ids[place]] < positive or examples.passage_ids[place] not in scores
