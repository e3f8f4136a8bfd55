"""`/v1/search` with `feedback`: the hits of batch search, what the response says, and judges that do not answer."""

import pyarrow.parquet as pq
import pytest
from tiny_serving import check_error

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.encoders.factory import EncoderFactory
from raydr.stages.config import FeedbackConfig, SearchConfig
from raydr.stages.search import search_corpus
from raydr.types import Query

RERANKERS = {
    name: Component(import_path=f"tiny_serving:{kind}Reranker")
    for name, kind in {"lexical": "Lexical", "gone": "Failing"}.items()
}
QUERY = "the animal that guards the house at night"


@pytest.fixture(scope="module")
def judged(serve_in_process):
    limits = {"rerank_timeout_s": 2, "documents": 50}
    return serve_in_process(rerankers=RERANKERS, limits=limits, feedback={"depth": 4})


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
@pytest.mark.parametrize("judges", [["scores"], ["order"], ["scores", "order"]], ids="+".join)
def test_the_hits_are_those_of_batch_search(judged, animals, tmp_path, judges, mode):
    names = dict.fromkeys(judges, "lexical")
    body = {"queries": [QUERY, "honey"], "k": 5, "mode": mode, "feedback": {**names, "depth": 3}}
    answer = judged.post("/v1/search", json=body).json()
    assert answer["feedback"] == {**names, "depth": 3, "applied": True}
    assert answer["timings_ms"]["feedback"] > 0
    method = Component.model_validate(open_artifact(animals, kind="index").manifest.details["method"])
    settings = SearchConfig(
        k=5, mode=mode, feedback=FeedbackConfig(depth=3, **dict.fromkeys(judges, RERANKERS["lexical"]))
    )
    queries = [Query("0", QUERY), Query("1", "honey")]
    run = search_corpus(animals, queries, EncoderFactory(method), settings, tmp_path / "run", use_ray=False)
    rows = pq.read_table(run.path / "hits.parquet").to_pylist()
    for number, result in enumerate(answer["results"]):
        expected = [(row["passage_id"], row["score"]) for row in rows if row["query_id"] == str(number)]
        assert [hit["id"] for hit in result["hits"]] == [id_ for id_, _ in expected]
        assert [hit["score"] for hit in result["hits"]] == pytest.approx([s for _, s in expected], abs=1e-5)


def test_the_moved_hits_can_be_reranked(judged):
    body = {"query": QUERY, "k": 3, "feedback": {"scores": "lexical"}, "rerank": True, "rerank_depth": 3}
    answer = judged.post("/v1/search", json=body).json()
    assert answer["feedback"]["depth"] == 4  # the server's
    assert answer["reranking"]["applied"] is True
    moved = judged.post("/v1/search", json={k: v for k, v in body.items() if not k.startswith("rerank")}).json()
    plain = judged.post("/v1/search", json={"query": QUERY, "k": 3}).json()
    first = {hit["id"]: hit["score"] for hit in moved["hits"]}
    assert {hit["id"]: hit["retrieval_score"] for hit in answer["hits"]} == pytest.approx(first)
    assert first != {hit["id"]: hit["score"] for hit in plain["hits"]}


def test_a_judge_that_is_gone_is_an_error_or_leaves_the_embedding(judged):
    body = {"query": QUERY, "k": 3, "feedback": {"scores": "lexical", "order": "gone"}}
    check_error(judged.post("/v1/search", json=body), 503, "reranker_unavailable")
    kept = judged.post("/v1/search", json={**body, "on_rerank_failure": "keep_order"}).json()
    plain = judged.post("/v1/search", json={"query": QUERY, "k": 3}).json()
    assert kept["hits"] == plain["hits"]
    assert kept["feedback"]["applied"] is False
    assert "stopped" in kept["feedback"]["reason"]


@pytest.mark.parametrize(
    ("changes", "status", "code", "param"),
    [
        ({"feedback": {"scores": "other"}}, 404, "model_not_found", "feedback.scores"),
        ({"feedback": {"order": "other"}}, 404, "model_not_found", "feedback.order"),
        ({"feedback": {}}, 422, "invalid_value", "feedback"),
        ({"feedback": {"scores": "lexical", "depth": 1}}, 422, "invalid_value", "feedback.depth"),
        ({"feedback": {"scores": "lexical", "depth": 51}}, 422, "limit_exceeded", "feedback.depth"),
        ({"feedback": {"scores": "lexical"}, "mode": "bm25"}, 422, "invalid_value", None),
    ],
)
def test_feedback_that_cannot_be_is_named(judged, changes, status, code, param):
    check_error(judged.post("/v1/search", json={"query": "x", **changes}), status, code, param)


def test_without_rerankers_there_is_nobody_to_judge(client):
    body = {"query": "x", "feedback": {"scores": "lexical"}}
    check_error(client.post("/v1/search", json=body), 501, "reranker_not_configured")
