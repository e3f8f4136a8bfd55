"""`/v1/search` while a shard is slow, dead or full: an error that says so, or the hits of the others, marked."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import BackPressureError
from tiny_serving import check_error

from raydr.config import Component
from raydr.serve.config import Limits
from raydr.serve.errors import ApiError
from raydr.serve.fanout import ask

LIMIT_S = 2
SLOW = "slow"
DIED = ActorUnavailableError("the replica died", None)
FULL = BackPressureError(num_queued_requests=1, max_queued_requests=1)


class Faulty:
    """A handle whose first `times` calls of `method` end in `fault`; what is asked of it stands in `asked`."""

    def __init__(self, handle, fault, *, method: str = "search", times: int = 1000) -> None:
        self._handle, self._fault, self._method, self._left = handle, fault, method, times
        self.asked: list[str] = []
        self.cancelled = 0

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments, **named: self._call(method, *arguments, **named))

    async def _call(self, method, *arguments, **named):
        self.asked.append(method)
        if method == self._method and self._left:
            self._left -= 1
            if self._fault != SLOW:
                raise self._fault
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return await getattr(self._handle, method).remote(*arguments, **named)


@pytest.fixture(scope="module")
def application(serve_in_process):
    """Six animals: three in Shard0, three in Shard1."""
    rerankers = {"lexical": Component(import_path="tiny_serving:LexicalReranker")}
    return serve_in_process(rerankers=rerankers, limits={"shard_timeout_s": LIMIT_S})


@pytest.fixture
def broken(application, monkeypatch):
    """`broken(fault, ...)` puts it into Shard1."""

    def put(fault, number: int = 1, **how) -> Faulty:
        shards = list(application.searcher._shards)
        shards[number] = Faulty(shards[number], fault, **how)
        monkeypatch.setattr(application.searcher, "_shards", shards)
        return shards[number]

    return put


def search(application, **body):
    response = application.post("/v1/search", json={"query": "who hunts mice at night", "k": 6, **body})
    assert response.status_code == 200, response.text
    return response.json()


def held_by_shard0(answer) -> list:
    return [hit for hit in answer["hits"] if hit["id"] in ("cat", "dog", "cow")]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [(SLOW, 503, "shard_timeout"), (DIED, 503, "unavailable"), (FULL, 429, "overloaded")],
    ids=["slow", "dead", "full"],
)
def test_a_shard_that_does_not_answer_is_an_error_worth_another_try(application, broken, fault, status, code):
    shard = broken(fault)
    started = time.monotonic()
    response = application.post("/v1/search", json={"query": "mice", "k": 6})
    assert time.monotonic() - started < LIMIT_S + 10
    message = check_error(response, status, code)["message"]
    assert int(response.headers["Retry-After"]) >= 1
    if fault == SLOW:
        assert "Shard1 did not answer within 2 s" in message
        assert shard.cancelled == 1


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
@pytest.mark.parametrize("fault", [SLOW, DIED, FULL], ids=["slow", "dead", "full"])
def test_the_hits_of_the_others_are_a_partial_answer_where_it_is_asked_for(application, broken, fault, mode):
    whole = search(application, mode=mode, on_shard_failure="partial")
    assert "partial" not in whole and "missing_shards" not in whole
    shard = broken(fault)
    answer = search(application, mode=mode, on_shard_failure="partial")
    assert answer["partial"] is True
    (missing,) = answer["missing_shards"]
    assert (missing["shard"], missing["num_passages"]) == (1, 3)
    assert missing["reason"]
    assert [hit["id"] for hit in answer["hits"]] == [hit["id"] for hit in held_by_shard0(whole)]
    assert all(hit["text"] for hit in answer["hits"])
    if mode == "dense":
        assert answer["hits"] == held_by_shard0(whole)
    assert set(shard.asked) == {"search"}  # it is not asked for passages as well


def test_a_replica_that_dies_under_a_call_is_asked_for_once_more(application, broken):
    whole = search(application)
    shard = broken(DIED, times=1)
    answer = search(application)
    assert answer["hits"] == whole["hits"] and "partial" not in answer
    assert shard.asked == ["search", "search"]
    encoder = Faulty(application.searcher._encoder, DIED, method="encode", times=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(application.searcher, "_encoder", encoder)
        assert search(application)["hits"] == whole["hits"]
    full = Faulty(None, FULL)
    with pytest.raises(ApiError, match="at its limit"):
        asyncio.run(ask(full.search))
    assert full.asked == ["search"]  # one that is full is left alone


def test_passages_that_do_not_come_take_their_hits_with_them(application, broken):
    queries = ["mice", "milk", "sea", "honey", "house", "night", "bird", "insect", "grass", "air", "hive"]
    body = {"query": None, "queries": queries, "mode": "dense"}  # too many hits to ride along with the search
    whole = search(application, **body)["results"]
    shard = broken(SLOW, method="passages")
    response = application.post("/v1/search", json={"queries": queries, "k": 6})
    check_error(response, 503, "shard_timeout")
    answer = search(application, **body, on_shard_failure="partial")
    assert [missing["shard"] for missing in answer["missing_shards"]] == [1]
    assert [found["hits"] for found in answer["results"]] == [held_by_shard0(found) for found in whole]
    assert "partial" not in search(application, **body, fields=[], on_shard_failure="partial")  # nothing was missed
    assert shard.asked.count("passages") == 2


def test_what_follows_the_search_does_without_the_shard_too(application, broken):
    body = {"rerank": True, "on_shard_failure": "partial", "on_rerank_failure": "keep_order"}
    whole = search(application, **body)
    moved = search(application, **body, feedback={"scores": "lexical"})
    assert moved["feedback"]["applied"] and "partial" not in moved
    shard = broken(SLOW)
    answer = search(application, **body)
    assert answer["reranking"]["applied"]
    assert answer["hits"] == held_by_shard0(whole)
    answer = search(application, **body, feedback={"scores": "lexical"})
    assert answer["feedback"]["applied"] and answer["partial"]
    assert {hit["id"] for hit in answer["hits"]} == {"cat", "dog", "cow"}
    assert shard.asked == ["search", "search"]  # once for each request
    broken(SLOW, method="embeddings")
    application.searcher._shards[1]._handle = shard._handle
    answer = search(application, **body, feedback={"scores": "lexical"})
    assert not answer["feedback"]["applied"]
    assert "did not answer" in answer["feedback"]["reason"]


def test_an_answer_from_nobody_is_an_error_all_the_same(application, broken):
    broken(SLOW, 0)
    broken(DIED, 1)
    body = {"query": "mice", "on_shard_failure": "partial", "mode": "hybrid"}
    response = application.post("/v1/search", json=body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] in ("unavailable", "shard_timeout")


def test_what_is_wrong_with_the_request_or_the_index_is_no_missing_shard(application, broken):
    broken(ApiError(503, "version_gone", "the index is now another"))
    response = application.post("/v1/search", json={"query": "mice", "on_shard_failure": "partial"})
    check_error(response, 503, "version_gone")
    response = application.post("/v1/search", json={"query": "mice", "on_shard_failure": "perhaps"})
    check_error(response, 422, "invalid_value", "on_shard_failure")


def test_a_word_side_that_does_not_answer_is_an_error(application, monkeypatch):
    monkeypatch.setattr(application.searcher, "_bm25", Faulty(application.searcher._bm25, SLOW))
    response = application.post("/v1/search", json={"query": "mice", "mode": "hybrid", "on_shard_failure": "partial"})
    assert "the word side" in check_error(response, 503, "shard_timeout")["message"]


def test_the_limit_leaves_time_to_answer():
    assert Limits().answering_s == 5
    assert Limits(request_timeout_s=3).answering_s == 0.5
    with pytest.raises(ValueError, match="shard_timeout_s"):
        Limits(shard_timeout_s=30)
