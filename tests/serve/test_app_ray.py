"""The application on Ray Serve: the same answers as in one process, real clients, and swaps under load.

Notable: it is deployed and changed the way `serve deploy` does it, by a config; the index changes through the
Ingress's `user_config` alone.
"""

import asyncio
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_pictures import PASSAGES, embedding, picture, sent, stored
from tiny_serving import ANIMALS, INSTRUMENTS

from raydr.encoders.factory import EncoderFactory
from raydr.index.reader import IndexReader
from raydr.types import Query
from tests.servers import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]


NARROW = {"name": "Reranker_slow", "num_replicas": 1, "max_ongoing_requests": 1, "max_queued_requests": 1}
"""One request in work, one waiting."""


class Server:
    """A Serve instance on a free port, deployed by config."""

    def __init__(self, port: int, index: Path, *, colocate: bool, num_replicas: int) -> None:
        import httpx

        self.colocate = colocate
        parts = ["Ingress"] if colocate else ["Ingress", "Encoder", "Shard0", "Bm25"]
        self.deployments = [
            {"name": part, "num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 0.1}} for part in parts
        ]
        self.address = f"http://127.0.0.1:{port}"
        self.index = index
        self.http = httpx.Client(base_url=self.address, timeout=60)

    def deploy(self, index: Path, **user_config) -> None:
        """`serve deploy` of a config that differs only in the Ingress's user_config."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        config = {
            "applications": [
                {
                    "name": "raydr",
                    "route_prefix": "/",
                    "import_path": "raydr.serve.app:build_app",
                    "runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
                    "args": {
                        "index": str(self.index),
                        "colocate": self.colocate,
                        "rerankers": {
                            "lexical": {"import_path": "tiny_serving:LexicalReranker"},
                            "slow": {"import_path": "tiny_serving:SlowReranker"},
                        },
                    },
                    "deployments": [
                        {**deployment, "user_config": {"index": str(index), **user_config}}
                        if deployment["name"] == "Ingress"
                        else deployment
                        for deployment in [*self.deployments, NARROW]
                    ],
                }
            ]
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def wait_for(self, version: str, timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            # Until the application is known, Serve's proxy answers 404 in plain text; then, as soon as it runs.
            response = self.http.get("/ready", timeout=left_s)
            if response.status_code == 200 and response.json()["index_version"] == version:
                return
            time.sleep(0.1)
        raise AssertionError(f"version {version} did not go live: {self.http.get('/ready').text}")

    def search(self, **body):
        response = self.http.post("/v1/search", json=body)
        assert response.status_code == 200, response.text
        return response.json()


LAYOUTS = {"colocated": (True, 1), "replicated": (False, 2)}
"""Whether all parts are in one process, and how many of each; one of each is what the other tests here deploy."""


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def server(request, ray_cluster, animals, tmp_path_factory):
    from ray import serve

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    colocate, num_replicas = request.param
    server = Server(port, animals, colocate=colocate, num_replicas=num_replicas)
    try:
        server.deploy(animals)
        server.wait_for(IndexReader.open(animals).version)
        yield server
    finally:  # or the next test's server would be this one
        serve.shutdown()


def _expected(index: Path, texts: list[str], k: int) -> tuple[str, dict[str, list[tuple[str, float]]]]:
    """The version of an index, and what the bare pipeline finds in it."""
    reader = IndexReader.open(index)
    top = reader.search(EncoderFactory(reader.method)().encode_queries([Query("", text) for text in texts]), k)
    hits = {
        text: list(zip(reader.passage_ids.take(rows).tolist(), scores.tolist(), strict=True))
        for text, scores, rows in zip(texts, top.scores, top.rows, strict=True)
    }
    return reader.version, hits


def test_serve_gives_what_the_pipeline_gives(server, animals):
    texts = ["who hunts mice", "the largest animal", "honey"]
    version, expected = _expected(animals, texts, 4)
    answer = server.search(queries=texts, k=4)
    assert answer["index_version"] == version
    for result in answer["results"]:
        ids = [hit["id"] for hit in result["hits"]]
        assert ids == [id_ for id_, _ in expected[result["query"]]]
        scores = [score for _, score in expected[result["query"]]]
        assert [hit["score"] for hit in result["hits"]] == pytest.approx(scores, abs=1e-5)


def test_errors_of_deployments_reach_the_caller_as_json(server):
    response = server.http.post("/v1/search", json={"query": "x", "filters": {"colour": 1}})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "filters.colour")
    response = server.http.post("/v1/embeddings", json={"input": [10**8]})  # raised in the Encoder's replica
    assert (response.status_code, response.json()["error"]["param"]) == (422, "input")
    response = server.http.post("/v1/search", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_pictures_go_from_the_caller_to_the_encoder_and_from_the_shards_to_the_caller(server, animals, pictures):
    """Through the Ingress, to a deployment and from one, behind a swap to an index whose encoder reads them."""
    server.deploy(pictures)
    server.wait_for(IndexReader.open(pictures).version)
    body = {"query": "the same in blue", "image": sent(picture("red")), "k": 6, "fields": ["image"]}
    answer = server.search(**body)
    top = IndexReader.open(pictures).search(embedding("the same in blue", stored(picture("red")))[None], 6)
    assert [hit["id"] for hit in answer["hits"]] == [PASSAGES[row][0] for row in top.rows[0]]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(top.scores[0].tolist(), abs=1e-5)
    shown = {hit["id"]: hit["image"] for hit in answer["hits"] if "image" in hit}
    urls = {id_: f"data:image/png;base64,{sent(stored(picture(colour)))}" for id_, _, _, colour in PASSAGES if colour}
    assert shown == urls
    assert server.search(**body, rerank=True)["reranking"]["applied"] is True
    response = server.http.post("/v1/search", json={"image": body["image"], "rerank": True})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "image")  # its replica says what it reads
    server.deploy(animals)
    server.wait_for(IndexReader.open(animals).version)


def test_a_request_id_goes_there_and_back(server):
    response = server.http.post("/v1/search", json={"query": "x"}, headers={"X-Request-ID": "trace-7"})
    assert response.json()["request_id"] == "trace-7"
    assert response.headers.get_list("X-Request-ID") == ["trace-7"]
    response = server.http.post("/v1/search", json={"query": "x"})
    assert response.json()["request_id"] == response.headers["X-Request-ID"]


def test_a_request_id_stands_in_the_log_of_every_part(server):
    import ray

    parts = {deployment["name"] for deployment in server.deployments}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    deadline = time.monotonic() + 120
    while True:  # each search is one replica's; with several, a few searches reach the one that is looked for
        server.http.post(
            "/v1/search", json={"query": "mice", "mode": "hybrid"}, headers={"X-Request-ID": "in-the-log-7"}
        )
        found = {
            part
            for part in parts
            for log in logs.glob(f"replica_raydr_{part}_*.log")
            if "in-the-log-7" in log.read_text(errors="replace")
        }
        if found == parts:
            return
        assert time.monotonic() < deadline, parts - found
        time.sleep(1)


def test_raydrs_series_stand_beside_serves_own(server):
    import httpx
    import ray

    server.search(query="who hunts mice", mode="hybrid")
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        'ray_raydr_requests_total{.*route="/v1/search".*status="200"',
        'ray_raydr_stage_latency_ms_bucket{.*stage="encode"',
        'ray_raydr_shard_search_ms_count{.*shard="1"',
        'ray_raydr_batch_texts_count{.*side="query"',
        f'ray_raydr_index_info{{.*index_version="{IndexReader.open(server.index).version}"',
        "ray_serve_num_ongoing_requests_at_replicas",
    }
    deadline = time.monotonic() + 180
    while missing := {series for series in wanted if not re.search(series, httpx.get(address, timeout=10).text)}:
        assert time.monotonic() < deadline, missing
        time.sleep(1)  # replicas report every few seconds


def test_the_openai_client_works(server, animals):
    openai = pytest.importorskip("openai")

    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="unused")
    reader = IndexReader.open(animals)
    texts = ["first text", "second"]
    expected = EncoderFactory(reader.method)().encode_queries([Query("", text) for text in texts])
    by_default = client.embeddings.create(model="minilm", input=texts, extra_body={"input_type": "query"})  # base64
    as_float = client.embeddings.create(
        model="minilm", input=texts, encoding_format="float", extra_body={"input_type": "query"}
    )
    for answer in (by_default, as_float):
        np.testing.assert_allclose([item.embedding for item in answer.data], expected, atol=1e-5)
        assert answer.usage.prompt_tokens > 0
    assert len(client.embeddings.create(model="minilm", input="x", dimensions=32).data[0].embedding) == 32
    assert [model.id for model in client.models.list()] == ["minilm", "lexical", "slow"]
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.embeddings.create(model="gpt-9", input="x")
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(model="minilm", input=["x"] * 1000)


def test_the_cohere_client_works(server):
    cohere = pytest.importorskip("cohere")

    client = cohere.ClientV2(api_key="unused", base_url=server.address)
    documents = ["the sea", "a furry animal", "a furry cat"]
    answer = client.rerank(model="lexical", query="a furry cat", documents=documents, top_n=2)
    assert [item.index for item in answer.results] == [2, 1]
    assert answer.results[0].relevance_score == pytest.approx(1.0)
    assert answer.meta.api_version.version == "2"


def test_more_than_a_reranker_takes_is_refused_at_once_or_keeps_its_order(server):
    import httpx

    body = {"query": "mice", "k": 3, "rerank": True, "reranker": "slow"}

    async def at_once(**changes) -> list:
        async with httpx.AsyncClient(base_url=server.address, timeout=60) as http:
            return await asyncio.gather(*(http.post("/v1/search", json=body | changes) for _ in range(12)))

    answers = asyncio.run(at_once())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and len(refused) < 12
    assert all(answer.status_code in (200, 429) for answer in answers)
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert int(answer.headers["Retry-After"]) >= 1
    kept = [answer.json() for answer in asyncio.run(at_once(on_rerank_failure="keep_order"))]
    assert {answer["reranking"]["applied"] for answer in kept} == {True, False}
    assert len({tuple(hit["id"] for hit in answer["hits"]) for answer in kept}) == 1


@pytest.mark.parametrize("route", ["search", "rerank"])
def test_a_caller_that_leaves_takes_its_work_along(server, tmp_path, route):
    import httpx

    mark = tmp_path / "cancelled"
    body = {"query": f"mark {mark}"}
    body |= {"rerank": True, "reranker": "slow"} if route == "search" else {"documents": ["a"], "model": "slow"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.address}/v1/{route}", json=body, timeout=1)
    deadline = time.monotonic() + 10  # sooner than any limit would end it
    while not mark.exists():
        assert time.monotonic() < deadline, "the reranker goes on"
        time.sleep(0.05)


def test_swaps_under_load_fail_nobody_and_mix_nothing(server, animals, instruments):
    texts = ["who hunts mice at night", "an instrument with strings", "a large animal"]
    expected = dict(_expected(index, texts, 3) for index in (animals, instruments))
    contents = {
        version: set(ANIMALS if "cat" in {id_ for hits in found.values() for id_, _ in hits} else INSTRUMENTS)
        for version, found in expected.items()
    }
    dims = {IndexReader.open(index).version: IndexReader.open(index).dim for index in (animals, instruments)}
    assert len(expected) == len(set(dims.values())) == 2
    stop, faults, seen = threading.Event(), [], []

    def ask(number: int) -> None:
        import httpx

        with httpx.Client(base_url=server.address, timeout=60) as http:
            turn = number
            while not stop.is_set():
                turn += 1
                text, mode = texts[turn % 3], ("dense", "hybrid", "bm25")[turn // 3 % 3]
                response = http.post("/v1/search", json={"query": text, "k": 3, "mode": mode})
                if response.status_code != 200:
                    faults.append(response.text)
                    continue
                answer = response.json()
                version, hits = answer["index_version"], answer["hits"]
                seen.append(version)
                if not {hit["id"] for hit in hits} <= contents[version]:
                    faults.append(f"{mode}: hits {[hit['id'] for hit in hits]} under version {version}")
                if mode == "dense":
                    found = [(hit["id"], pytest.approx(hit["score"], abs=1e-5)) for hit in hits]
                    if expected[version][text] != found:
                        faults.append(f"{version} {text!r}: {found} instead of {expected[version][text]}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for index in (instruments, animals, instruments, animals):
            server.deploy(index)
            server.wait_for(IndexReader.open(index).version)
            time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert set(seen) == set(expected)
    changes = sum(a != b for a, b in zip(seen, seen[1:]))
    assert changes >= 4
    assert len(seen) > 40


def test_an_index_that_cannot_be_used_leaves_the_old_one_serving(server, animals, tmp_path):
    version = IndexReader.open(animals).version
    server.wait_for(version)
    for faulty in ({"index": tmp_path / "nothing"}, {"index": animals, "version": "0123"}):
        server.deploy(**faulty)
        deadline = time.monotonic() + 180
        while "error" not in (ready := server.http.get("/ready").json()):
            assert time.monotonic() < deadline, ready
            time.sleep(0.1)
        assert ready["status"] == "ready"
        assert ready["index_version"] == version
        assert server.search(query="who hunts mice")["index_version"] == version
    server.deploy(animals, version=version)
    deadline = time.monotonic() + 180
    while "error" in server.http.get("/ready").json():
        assert time.monotonic() < deadline
        time.sleep(0.1)
