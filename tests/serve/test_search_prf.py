"""`/v1/search` with `prf`: the hits of batch search, what the response says, a switch per request, and refusals."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_serving import check_error, with_details

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.encoders.factory import EncoderFactory
from raydr.index.reader import IndexReader
from raydr.methods.ance_prf import AncePrf, AncePrfConfig
from raydr.serve.errors import ApiError
from raydr.stages.config import PrfConfig, SearchConfig
from raydr.stages.search import search_corpus
from raydr.types import Query

TEXTS = ["who hunts mice at night", "a large animal"]


@pytest.fixture(scope="module")
def retriever(animals):
    return Component.model_validate(open_artifact(animals, kind="index").manifest.details["method"])


@pytest.fixture(scope="module")
def refiner(retriever, tmp_path_factory):
    """ANCE-PRF as it starts, saved as a checkpoint of k = 2; its method."""
    folder = tmp_path_factory.mktemp("prf") / "model"
    folder.mkdir()
    method = AncePrf(AncePrfConfig(retriever=retriever, num_feedback=2, max_tokens=96))
    method.save_model(method.build_model(), folder)
    return method.trained(str(folder))


@pytest.fixture(scope="module")
def served(serve_in_process, refiner):
    client = serve_in_process(prf={"method": "none", "refiner": refiner.model_dump()})
    yield client
    client.__exit__()


def expected(animals, retriever, out, **settings):
    queries = [Query(str(number), text) for number, text in enumerate(TEXTS)]
    run = search_corpus(animals, queries, EncoderFactory(retriever), SearchConfig(k=5, **settings), out, use_ray=False)
    rows = pq.read_table(run.path / "hits.parquet").to_pylist()
    return [[(r["passage_id"], r["score"]) for r in rows if r["query_id"] == str(number)] for number in range(2)]


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
@pytest.mark.parametrize(
    ("prf", "k"), [({"method": "average"}, 3), ({"method": "rocchio", "k": 2}, 2), ({"method": "learned"}, 2), ({}, 2)]
)
def test_the_hits_are_those_of_batch_search(served, animals, retriever, refiner, tmp_path, prf, k, mode):
    answer = served.post("/v1/search", json={"queries": TEXTS, "k": 5, "mode": mode, "prf": prf}).json()
    method = prf.get("method", "learned")
    assert answer["prf"] == {"method": method, "k": k, "applied": True}
    assert answer["timings_ms"]["prf"] > 0
    settings = PrfConfig(method=method, k=prf.get("k"), refiner=refiner)
    lists = expected(animals, retriever, tmp_path / "run", mode=mode, prf=settings)
    plain = served.post("/v1/search", json={"queries": TEXTS, "k": 5, "mode": mode}).json()
    assert "prf" not in plain
    assert "prf" not in plain["timings_ms"]
    for result, unrefined, hits in zip(answer["results"], plain["results"], lists, strict=True):
        assert [hit["id"] for hit in result["hits"]] == [id_ for id_, _ in hits]
        assert [hit["score"] for hit in result["hits"]] == pytest.approx([s for _, s in hits], abs=1e-5)
        if mode == "dense":
            assert [hit["score"] for hit in result["hits"]] != [hit["score"] for hit in unrefined["hits"]]


def test_an_index_of_the_method_itself_is_refined_unless_asked_not_to_be(serve_in_process, animals, refiner, tmp_path):
    index = with_details(animals, tmp_path / "refined", method=refiner.model_dump(), version="refined")
    client = serve_in_process(index=index)
    body = {"query": TEXTS[0], "k": 3}
    refined, plain = (client.post("/v1/search", json=own).json() for own in (body, {**body, "prf": {"method": "none"}}))
    assert refined["prf"] == {"method": "learned", "k": 2, "applied": True}
    assert "prf" not in plain
    assert [hit["score"] for hit in refined["hits"]] != [hit["score"] for hit in plain["hits"]]
    assert "prf" not in client.post("/v1/search", json={**body, "mode": "bm25"}).json()
    (card, *_) = client.get("/v1/models").json()["data"]
    version = refiner.build().build_feedback_encoder().version
    assert card["prf"] == {
        "methods": ["learned", "average", "rocchio", "none"], "learned_k": 2, "learned_version": version
    }  # fmt: skip


def test_the_refined_hits_can_be_moved_and_reranked(serve_in_process, refiner):
    judge = {"import_path": "tiny_serving:LexicalReranker"}
    client = serve_in_process(prf={"refiner": refiner.model_dump()}, rerankers={"lexical": judge})
    body = {"query": TEXTS[0], "k": 3, "feedback": {"scores": "lexical", "depth": 3}, "rerank": True}
    answer = client.post("/v1/search", json=body).json()
    assert answer["prf"]["applied"] and answer["feedback"]["applied"] and answer["reranking"]["applied"]
    assert {"encode", "prf", "feedback", "search", "rerank"} <= set(answer["timings_ms"])


def test_a_query_that_finds_too_little_keeps_its_first_hits_and_the_answer_says_so(served):
    body = {"queries": TEXTS, "k": 3, "allow_ids": ["cat"]}
    plain = served.post("/v1/search", json=body).json()
    for method, k in (("learned", 2), ("rocchio", 5)):
        answer = served.post("/v1/search", json={**body, "prf": {"method": method}}).json()
        assert answer["prf"]["applied"] is False
        assert answer["prf"]["reason"] == f"2 of 2 queries found fewer than {k} passages and were not refined"
        assert answer["results"] == plain["results"]


@pytest.mark.parametrize(
    ("prf", "code", "param"),
    [
        ({"method": "learned", "k": 3}, "invalid_value", "prf.k"),
        ({"method": "rocchio", "k": 0}, "invalid_value", "prf.k"),
        ({"method": "mean"}, "invalid_value", "prf.method"),
        ({"method": "average", "k": 100_000}, "limit_exceeded", "prf.k"),
        ({"methd": "average"}, None, None),
    ],
)
def test_what_cannot_be_is_named(served, prf, code, param):
    answer = served.post("/v1/search", json={"query": "x", "prf": prf})
    assert answer.status_code == 422
    if code is not None:
        check_error(answer, 422, code, param)


def test_words_alone_have_no_embedding_to_refine(served):
    body = {"query": "x", "mode": "bm25", "prf": {"method": "average"}}
    assert "mode bm25 has none" in check_error(served.post("/v1/search", json=body), 422, "invalid_value")["message"]


def test_without_a_learned_refiner_there_are_the_others(client):
    check_error(client.post("/v1/search", json={"query": "x", "prf": {}}), 422, "invalid_value", "prf.method")
    assert client.post("/v1/search", json={"query": "x", "prf": {"method": "average"}}).json()["prf"]["applied"]
    assert client.get("/v1/models").json()["data"][0]["prf"] == {"methods": ["average", "rocchio", "none"]}


def test_a_refiner_of_another_encoder_or_k_is_refused_before_the_index_goes_live(
    serve_in_process, instruments, refiner, retriever
):
    with pytest.raises(ApiError) as refused:
        serve_in_process(index=instruments, prf={"refiner": refiner.model_dump()})
    assert (refused.value.status, refused.value.code) == (503, "encoder_mismatch")
    assert "the index was made by" in refused.value.message
    wrong = refiner.model_copy(update={"args": {**refiner.args, "num_feedback": 3}})
    for prf, said in (
        ({"refiner": wrong.model_dump()}, "was trained with 2, not with 3"),
        ({"refiner": refiner.model_dump(), "k": 4}, "learned to read the first 2 hits"),
        ({"refiner": retriever.model_dump()}, "refines no queries"),
        ({"method": "learned"}, "nor the index's method has learned"),
    ):
        with pytest.raises(ApiError, match=said):
            serve_in_process(prf=prf)


def test_the_vectors_of_the_hits_are_the_indexes(served, animals):
    """By hand, without the code that batch search shares."""
    reader = IndexReader.open(animals)
    encoder = EncoderFactory(reader.method)()
    query = encoder.encode_queries([Query("", TEXTS[0])])
    rows = reader.search(query, 2).rows[0]
    moved = 0.4 * query + 0.6 * reader.embeddings(rows).mean(axis=0)
    top = reader.search(moved.astype(np.float32), 3)
    body = {"query": TEXTS[0], "k": 3, "prf": {"method": "rocchio", "k": 2}}
    hits = served.post("/v1/search", json=body).json()["hits"]
    assert [hit["id"] for hit in hits] == reader.passage_ids.take(top.rows[0]).tolist()
    assert [hit["score"] for hit in hits] == pytest.approx(top.scores[0].tolist(), abs=1e-5)
