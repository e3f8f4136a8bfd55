"""What an operator sees of raydr: a real Prometheus collects it, the Grafana dashboard's queries find it there, traces
show a query on its way.

Notable: a small corpus goes through everything once (train, embed, index, search, rerank, serve), with the failures
that the dashboard has charts for; Prometheus reads what Ray's agents publish with the committed configuration, and
every query of the committed dashboard is put to it. It comes behind the jobs on nodes of their own, which Ray does not
take while the tests' cluster is there. Needs Debian's `prometheus`; skipped without, but not in CI.

    pytest tests/cluster/test_watching.py
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.render import DASHBOARD, HERE, ROOT
from raydr import series
from raydr.artifacts import open_artifact, write_artifact
from raydr.config import Component
from raydr.index.config import IndexConfig
from raydr.llm.small import small_causal_lm
from raydr.serve import metrics as served
from raydr.serve.config import AppArgs
from raydr.stages.config import EmbedConfig, RerankConfig, SearchConfig
from raydr.storage import place
from raydr.train.config import TrainConfig
from raydr.train.trainer import train_model
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.rerank import rerank
from raydr.verbs.search import search
from tests.conftest import write_beir
from tests.servers import free_port, wait_until_ready
from tests.train.tiny import SETTINGS, tiny_checkpoint, write_topic_examples

CHARTS = [panel for panel in json.loads((HERE / DASHBOARD).read_text())["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in CHARTS for target in panel["targets"]]
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None and "CI" not in os.environ, reason="needs `apt-get install prometheus`"
)
EMPTY = "Calls that a shard did not answer"
"""A chart for which no traffic is made here: tests/storage/test_shards_on_nodes_of_their_own.py stops a shard."""
FAILING = "tests.serve.tiny_serving:FailingReranker"


def asked(query: str) -> str:
    """A query as Grafana sends it."""
    return query.replace("$__rate_interval", "30s").replace("$application", ".*")


def test_the_dashboard_names_series_that_exist_and_leaves_none_out():
    own = {*series.names(), *(metric.info["name"] for metric in served._metrics().values())}
    found = {name for _, query in QUERIES for name in re.findall(r"ray_(raydr_\w+)", query)}
    shown = {name if name in own else re.sub(r"_(bucket|count|sum)$", "", name) for name in found}
    assert shown == own
    page = (ROOT / "docs/watching.md").read_text(encoding="utf-8")
    assert [name for name in own if f"ray_{name}" not in page] == []


@needs_prometheus
def test_the_configuration_is_valid_for_prometheus():
    checked = subprocess.run(["promtool", "check", "config", HERE / "prometheus.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


class Prometheus:
    """A running one."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=30)
        self.since = time.time()

    def values(self, query: str) -> list[float]:
        """What a chart would draw of a query, all its lines one after another. Fails for a query with an error."""
        span = {"start": self.since, "end": time.time(), "step": "1"}
        answer = self.http.post("/api/v1/query_range", data={"query": query, **span}).json()
        assert answer["status"] == "success", (query, answer)
        return [float(value) for line in answer["data"]["result"] for _, value in line["values"]]


@pytest.fixture(scope="module")
def prometheus(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Reads the tests' cluster as `prometheus.yaml` says, but every second."""
    import ray

    folder = tmp_path_factory.mktemp("prometheus")
    session = ray._private.worker._global_node.get_session_dir_path()
    given = (HERE / "prometheus.yaml").read_text(encoding="utf-8")
    assert given.count("/tmp/ray/session_latest/") == 1
    text = given.replace("/tmp/ray/session_latest/", f"{session}/").replace("10s", "1s")
    (folder / "prometheus.yaml").write_text(text, encoding="utf-8")
    address, log = f"127.0.0.1:{free_port()}", folder / "log"
    own = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with log.open("w") as out:
        process = subprocess.Popen(["prometheus", *own, f"--web.listen-address={address}"], stdout=out, stderr=out)
    try:
        wait_until_ready(f"http://{address}/-/ready", process, log, timeout_s=30)
        yield Prometheus(f"http://{address}")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def run(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run whose steps have all been done on Ray."""
    folder = tmp_path_factory.mktemp("watched")
    small = small_causal_lm("minilm", folder / "small")
    engine = {"model": str(small), "backend": "transformers", "dtype": "float32", "max_model_tokens": 1024}
    windows = Component(import_path="raydr.methods.first:First", args={"engine": engine, "window_size": 4, "stride": 2})
    config = RunConfig(
        out=folder / "run",
        runtime="ray",
        data={"path": str(write_beir(folder / "tiny")), "split": "test"},
        method=Component(import_path="raydr.methods.zero_shot:ZeroShot", args={"backend": "torch", "num_threads": 1}),
        # In many blocks: what an actor counts right before it is killed, no report tells.
        embed=EmbedConfig(passages_per_block=1, num_workers=(1, 1)),
        index=IndexConfig(num_shards=2),
        search=SearchConfig(k=6),
        rerank=RerankConfig(reranker=windows, depth=6, num_workers=(1, 1)),
    )
    for step in (embed, index, search, rerank):
        step(config)
    return config


@pytest.fixture(scope="module")
def trained(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name under which Ray Train knows a training that has been done."""
    folder = tmp_path_factory.mktemp("trained")
    args = {"model": str(tiny_checkpoint(folder / "start")), "num_negatives": 2, "precision": "float32"}
    method = Component(import_path="raydr.methods.contrastive:Contrastive", args=args)
    settings = TrainConfig(**{**SETTINGS, "num_workers": 1, "max_steps": 6})
    train_model(method, settings, write_topic_examples(folder / "examples"), folder / "tiny_run" / "train")
    return "tiny_run-train"


@pytest.fixture(scope="module")
def cached(ray_cluster: str) -> None:
    """An artifact has been put into a bucket and brought back, in part twice."""
    there = place("memory://watched/artifact")
    with write_artifact(there, kind="corpus", config={}) as writer:
        (writer.path / "part").write_bytes(b"some" * 100)
    (there / "part").unlink()
    for _ in range(2):
        open_artifact(there, kind="corpus")


class Site:
    """The application, and somebody who uses it all the time."""

    def __init__(self, address: str, traces: Path) -> None:
        self.traces = traces
        self.http = httpx.Client(base_url=address, timeout=60)
        self._ended = threading.Event()
        self._user = threading.Thread(target=self._use)

    def search(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/search", json=body)

    def _use(self) -> None:
        while not self._ended.wait(0.05):
            self.search(query="which pet catches mice", mode="hybrid")
            self.search(query="why does the sea rise", rerank=True, rerank_depth=6)
            self.search(query="no model", rerank=True, reranker="failing")
            self.search(query="no model", rerank=True, reranker="failing", on_rerank_failure="keep_order")
            self.search(query="", k=0)

    def __enter__(self) -> Site:
        self._user.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._user.join()
        self.http.close()


@pytest.fixture(scope="module")
def site(ray_cluster: str, run: RunConfig) -> Iterator[Site]:
    """Served by deployments of their own, and traced."""
    import ray
    from ray import serve

    from raydr.serve.app import build_app

    port = free_port()
    traces = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve/traces"
    tracing = {"enabled": True, "exporter_import_path": "raydr.serve.tracing:exporter", "sampling_ratio": 1.0}
    serve.start(http_options={"host": "127.0.0.1", "port": port}, tracing_config=tracing)
    rerankers = {"windows": run.rerank.reranker, "failing": Component(import_path=FAILING)}
    args = AppArgs(index=run.out / "index", rerankers=rerankers, shard_deployments=1)
    serve.run(build_app(args), name="raydr", route_prefix="/")
    with Site(f"http://127.0.0.1:{port}", traces) as site:
        yield site
    serve.shutdown()


@needs_prometheus
@pytest.mark.ray
@pytest.mark.slow
def test_every_chart_of_the_dashboard_has_something_to_draw(prometheus, run, trained, cached, site):
    deadline = time.monotonic() + 180
    waiting = [(title, asked(query)) for title, query in QUERIES if title != EMPTY]
    for query in (query for title, query in QUERIES if title == EMPTY):
        prometheus.values(asked(query))  # which Prometheus understands
    waiting.append(("Ray Train's own", f'{{__name__=~"ray_train_.+", ray_train_run_name="{trained}"}}'))
    while waiting := [(title, query) for title, query in waiting if not prometheus.values(query)]:
        assert time.monotonic() < deadline, waiting
        time.sleep(1)


@pytest.mark.ray
@pytest.mark.slow
def test_rays_dashboard_knows_datasets_by_name(ray_cluster, run, trained, monkeypatch):
    import ray
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray_cluster)  # before RAY_ADDRESS, which names another kind of address
    client = JobSubmissionClient()  # which sends the cluster's token
    job = ray.get_runtime_context().get_job_id()
    datasets = client._do_request("GET", f"/api/data/datasets/{job}").json()["datasets"]
    names = {dataset["dataset"].rsplit("_", 2)[0] for dataset in datasets}
    assert {"embed tiny", "rerank run", "batches of training worker 0"} <= names


@pytest.mark.ray
@pytest.mark.slow
def test_a_trace_follows_a_query_through_its_deployments(site):
    request_id = secrets.token_hex(16)
    headers = {"X-Request-ID": request_id}
    body = {"query": "why does the sea rise and fall", "mode": "hybrid", "rerank": True, "rerank_depth": 6}
    assert site.http.post("/v1/search", json=body, headers=headers).json()["reranking"]["applied"]
    inside = {  # what a deployment does: which one, and the stage of the ingress that it belongs to
        "raydr.batch": ("Encoder", "raydr.encode"),
        "raydr.faiss": ("Shard0", "raydr.search"),
        "raydr.words": ("Bm25", "raydr.bm25"),
        "raydr.reranker": ("Reranker_windows", "raydr.rerank"),
    }
    wanted = Counter(["raydr.faiss", *inside, *(stage for _, stage in inside.values())])  # there are two shards
    deadline = time.monotonic() + 120
    while missing := wanted - Counter(span["name"] for span in _spans_of(request_id, site.traces)):
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
    time.sleep(1.5)  # spans of the request's whole way are written by other processes, once a second
    spans = _spans_of(request_id, site.traces)
    assert len({span["context"]["trace_id"] for span in spans}) == 1
    by_id = {span["context"]["span_id"]: span for span in spans}

    def above(span: dict[str, Any]) -> Iterator[str]:
        while (parent := by_id.get(span["parent_id"])) is not None:
            span = parent
            yield span["name"]

    for span in spans:
        if span["name"] in inside:
            deployment, stage = inside[span["name"]]
            handling, on_the_way, asking, ingress = list(above(span))[:4]
            assert handling.startswith(f"replica_handle_request {deployment} ")
            assert on_the_way.startswith(f"route_to_replica {deployment} ")
            assert (asking, ingress) == (stage, "replica_handle_request Ingress __call__")


def _spans_of(request_id: str, folder: Path) -> list[dict[str, Any]]:
    """All spans of the trace that a request is in."""
    written = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().split("\n")[:-1]]
    traces = {span["context"]["trace_id"] for span in written if span["attributes"].get("request_id") == request_id}
    return [span for span in written if span["context"]["trace_id"] in traces]
