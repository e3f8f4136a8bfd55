"""`/v1/search` with `rerank`: the order, the depth, and a reranker that does not answer."""

import asyncio
import time

import pytest
from tiny_serving import FailingReranker, check_error

from raydr.config import Component
from raydr.serve.config import Limits
from raydr.serve.rerank import Reranker
from raydr.types import Passage, Query


@pytest.fixture(scope="module")
def reranking(serve_in_process):
    rerankers = {
        name: Component(import_path=f"tiny_serving:{kind}Reranker")
        for name, kind in {"lexical": "Lexical", "gone": "Failing"}.items()
    }
    return serve_in_process(rerankers=rerankers, rerank_depth=4, limits={"rerank_timeout_s": 2})


def test_a_search_is_reordered_by_the_reranker_that_is_asked_for(reranking):
    plain = reranking.post("/v1/search", json={"query": "guards the house", "k": 6}).json()
    assert "reranking" not in plain and "retrieval_score" not in plain["hits"][0]
    body = {"query": "guards the house", "k": 6, "rerank": True, "rerank_depth": 3}
    answer = reranking.post("/v1/search", json=body).json()
    assert answer["reranking"] == {"model": "lexical", "depth": 3, "applied": True}
    assert answer["timings_ms"]["rerank"] >= 0
    ids, found = [hit["id"] for hit in answer["hits"]], [hit["id"] for hit in plain["hits"]]
    words = ["guards", "the", "house"]
    shares = {hit["id"]: sum(w in hit["text"].lower().split() for w in words) / 3 for hit in plain["hits"]}
    assert ids == [*sorted(found[:3], key=lambda id_: -shares[id_]), *found[3:]]
    first = {hit["id"]: hit["score"] for hit in plain["hits"]}
    for hit in answer["hits"][:3]:
        assert hit["score"] == pytest.approx(shares[hit["id"]])
        assert hit["retrieval_score"] == pytest.approx(first[hit["id"]])
    assert all("retrieval_score" not in hit for hit in answer["hits"][3:])
    for hit in answer["hits"][3:]:
        assert hit["score"] == pytest.approx(first[hit["id"]])


def test_hits_from_below_k_can_rise_into_it(reranking):
    body = {"queries": ["guards the house", "honey"], "k": 1, "rerank": True, "fields": [], "mode": "hybrid"}
    answer = reranking.post("/v1/search", json=body).json()
    assert answer["reranking"]["depth"] == 4  # the server's
    assert [len(result["hits"]) for result in answer["results"]] == [1, 1]
    assert set(answer["results"][0]["hits"][0]) == {"id", "score", "retrieval_score"}
    assert answer["results"][0]["hits"][0]["id"] == "dog"


def test_a_reranker_that_is_gone_is_an_error_or_keeps_the_order(reranking):
    body = {"query": "guards the house", "k": 3, "rerank": True, "reranker": "gone"}
    response = reranking.post("/v1/search", json=body)
    assert "stopped" in check_error(response, 503, "reranker_unavailable")["message"]
    assert int(response.headers["Retry-After"]) >= 1
    kept = reranking.post("/v1/search", json={**body, "on_rerank_failure": "keep_order"}).json()
    plain = reranking.post("/v1/search", json={"query": "guards the house", "k": 3}).json()
    assert kept["hits"] == plain["hits"]
    assert kept["reranking"]["applied"] is False
    assert "stopped" in kept["reranking"]["reason"]
    slow = {**body, "query": "slow"}
    check_error(reranking.post("/v1/search", json=slow), 504, "rerank_timeout")
    late = reranking.post("/v1/search", json={**slow, "on_rerank_failure": "keep_order"}).json()
    assert "within 2 s" in late["reranking"]["reason"]
    response = reranking.post("/v1/rerank", json={"query": "q", "documents": ["a"], "model": "gone"})
    check_error(response, 503, "reranker_unavailable")


def test_what_else_goes_wrong_in_a_reranker_is_said_and_keeps_the_order_too(reranking):
    body = {"query": "nothing fits", "k": 3, "rerank": True, "reranker": "gone"}
    error = check_error(reranking.post("/v1/search", json=body), 500, "reranker_failed")
    assert "the prompt does not fit" in error["message"]
    kept = reranking.post("/v1/search", json={**body, "on_rerank_failure": "keep_order"}).json()
    assert kept["reranking"]["applied"] is False
    assert "does not fit" in kept["reranking"]["reason"]


def test_one_list_that_fails_takes_the_others_out_of_the_engine(reranking):
    FailingReranker.cancelled.clear()
    body = {"queries": ["slow one", "gone", "slow two"], "k": 3, "rerank": True, "reranker": "gone"}
    check_error(reranking.post("/v1/search", json=body), 503, "reranker_unavailable")
    assert sorted(FailingReranker.cancelled) == ["slow one", "slow two"]


def test_rerankers_that_follow_each_other_share_one_limit(reranking):
    """Feedback's and the list's: twice the limit would be more than the request may take."""
    body = {"query": "slow", "k": 3, "on_rerank_failure": "keep_order", "rerank": True, "reranker": "gone"}
    started = time.monotonic()
    answer = reranking.post("/v1/search", json={**body, "feedback": {"scores": "gone"}}).json()
    assert time.monotonic() - started < 4
    assert answer["feedback"]["applied"] is answer["reranking"]["applied"] is False
    with pytest.raises(ValueError, match="must be less than request_timeout_s"):
        Limits(rerank_timeout_s=20, request_timeout_s=20)
    assert Limits().judging_s == 20
    assert Limits(request_timeout_s=3).judging_s == 2


def test_a_caller_that_leaves_does_not_let_the_next_one_in_beside_its_thread():
    running, most = [], []

    class Blocking:
        def rerank(self, query, hits, passages):
            running.append(query)
            most.append(len(running))
            time.sleep(0.2)
            running.pop()
            return list(hits)

    async def ask() -> None:
        replica = Reranker.__new__(Reranker)
        replica._reranker, replica._is_async, replica._turn = Blocking(), False, asyncio.Lock()
        first = asyncio.ensure_future(replica.rerank(Query("", "a"), [Passage("0", "x")], request_id="1"))
        await asyncio.sleep(0.05)
        first.cancel()
        second = asyncio.ensure_future(replica.rerank(Query("", "b"), [Passage("0", "x")], request_id="2"))
        with pytest.raises(asyncio.CancelledError):
            await first
        assert await second == [(0, 0.0)]

    asyncio.run(ask())
    assert most == [1, 1]


def test_what_cannot_be_reranked_is_named(reranking, client):
    body = {"query": "x", "rerank": True}
    check_error(client.post("/v1/search", json=body), 501, "reranker_not_configured")
    check_error(reranking.post("/v1/search", json={**body, "reranker": "other"}), 404, "model_not_found", "reranker")
    check_error(
        reranking.post("/v1/search", json={**body, "rerank_depth": 5000}), 422, "limit_exceeded", "rerank_depth"
    )
    many = {"queries": ["x"] * 20, "rerank": True, "rerank_depth": 900}
    check_error(reranking.post("/v1/search", json=many), 422, "limit_exceeded", "rerank_depth")
    check_error(reranking.post("/v1/search", json={**body, "rerank_depth": 0}), 422, "invalid_value", "rerank_depth")
    models = {card["id"]: card["capabilities"] for card in reranking.get("/v1/models").json()["data"]}
    assert models["lexical"] == models["gone"] == ["rerank"]
