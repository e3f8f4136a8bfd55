"""FIRST on vLLM behind Ray Serve: the scores of a forward pass, and what happens when vLLM's process is killed.

The network is the one that `first_small.yaml` makes out of MiniLM, untrained.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from contextlib import suppress

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
from tiny_serving import ANIMALS

from raydr.config import Component
from raydr.llm.small import small_causal_lm
from raydr.methods.first import First
from raydr.stages.config import RerankConfig
from raydr.stages.rerank import rerank_run
from raydr.types import Hit, Passage, Query
from raydr.verbs.serve import serving
from tests.servers import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUERY = "who hunts mice"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return str(small_causal_lm("minilm", tmp_path_factory.mktemp("small") / "start"))


@pytest.fixture(scope="module")
def site(ray_cluster, animals, small):
    engine = {"model": small, "dtype": "float32", "max_model_tokens": 1024}
    rerankers = {
        "first": Component(
            import_path="raydr.methods.first:First", args={"engine": engine, "window_size": 4, "stride": 2}
        )
    }
    with serving(animals, host="127.0.0.1", port=free_port(), rerankers=rerankers) as address:
        yield address


def expected(small: str, ids: list[str]) -> list[Hit]:
    """The same list ranked with a transformers forward pass."""
    engine = {"model": small, "dtype": "float32", "backend": "transformers", "max_model_tokens": 1024}
    reranker = First(First.Config(engine=engine, window_size=4, stride=2)).build_reranker()
    passages = {id_: Passage(id_, ANIMALS[id_][1], ANIMALS[id_][0]) for id_ in ids}
    return asyncio.run(reranker.rerank_async(Query("q", QUERY), [Hit(id_, 0.0) for id_ in ids], passages))


def test_a_search_is_ranked_as_a_forward_pass_ranks_it(site, small):
    plain = httpx.post(f"{site}/v1/search", json={"query": QUERY, "k": 6}, timeout=60).json()
    body = {"query": QUERY, "k": 6, "rerank": True}
    answer = httpx.post(f"{site}/v1/search", json=body, timeout=60).json()
    assert answer["reranking"] == {"model": "first", "depth": 20, "applied": True}
    ranked = expected(small, [hit["id"] for hit in plain["hits"]])
    assert [hit["id"] for hit in answer["hits"]] == [hit.passage_id for hit in ranked]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx([hit.score for hit in ranked], abs=1e-3)
    documents = [f"{title}. {text}" if title else text for title, text, *_ in ANIMALS.values()]
    again = httpx.post(f"{site}/v1/rerank", json={"query": QUERY, "documents": documents}, timeout=60).json()
    assert sorted(found["index"] for found in again["results"]) == list(range(6))


def test_a_batch_job_on_vllm_actors_gives_the_same(site, animals, small, tmp_path):
    texts = [QUERY, "what gives milk", "an animal of the sea"]
    queries = [Query(f"q{number}", text) for number, text in enumerate(texts)]
    body = {"queries": texts, "k": 6}
    plain = httpx.post(f"{site}/v1/search", json=body, timeout=60).json()["results"]
    served = httpx.post(f"{site}/v1/search", json={**body, "rerank": True}, timeout=60).json()["results"]
    engine = {"model": small, "dtype": "float32", "max_model_tokens": 1024}
    args = {"engine": engine, "window_size": 4, "stride": 2}
    component = Component(import_path="raydr.methods.first:First", args=args)
    run = {
        query.query_id: [Hit(hit["id"], hit["score"]) for hit in found["hits"]]
        for query, found in zip(queries, plain, strict=True)
    }
    config = RerankConfig(num_workers=(1, 1), queries_per_block=2)
    artifact = rerank_run(run, queries, animals, component, config, tmp_path / "run", use_ray=True)
    rows = pq.read_table(artifact.path / "hits.parquet").to_pylist()
    for query, found in zip(queries, served, strict=True):
        own = [row for row in rows if row["query_id"] == query.query_id]
        assert [row["passage_id"] for row in own] == [hit["id"] for hit in found["hits"]]
        assert [row["score"] for row in own] == pytest.approx([hit["score"] for hit in found["hits"]], abs=1e-4)


def test_killing_the_engine_under_load_gives_clear_errors_and_it_comes_back(site):
    stop, answers = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=site, timeout=60) as http:
            while not stop.is_set():
                body = {"query": QUERY, "k": 6, "rerank": True}
                answers.append(http.post("/v1/search", json=body))
                body["on_rerank_failure"] = "keep_order"
                answers.append(http.post("/v1/search", json=body))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        while len(answers) < len(threads):
            time.sleep(0.05)
        cores = []
        for process in psutil.Process().children(recursive=True):  # other engines on this machine are not ours
            with suppress(psutil.Error):
                if "EngineCore" in " ".join(process.cmdline()):
                    cores.append(process)
        (core,) = cores
        core.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 600
        failed = False
        while time.monotonic() < deadline:
            last = answers[-1]
            failed = failed or last.status_code == 503 or last.json().get("reranking", {}).get("applied") is False
            if failed and last.status_code == 200 and last.json()["reranking"]["applied"]:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"the reranker did not come back: {answers[-1].text}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    # While the replica is replaced a search waits for the new one, for as long as `rerank_timeout_s`.
    assert {answer.status_code for answer in answers} <= {200, 503, 504}
    for answer in answers:
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] in ("reranker_unavailable", "unavailable", "rerank_timeout")
            assert int(answer.headers["Retry-After"]) >= 1
        else:
            assert len(answer.json()["hits"]) == 6
    assert any(answer.status_code == 503 for answer in answers)
