"""Ray nodes that are machines to one another (tests/machines.py): embed, train and serve, each losing a node.

A head without CPUs and nodes of two, each with an address of its own; the disk is one. While embedding a node is cut
off the network and later joined to it again, while training one is killed, while serving the one with a shard is cut
off; each time another one joins. Prints what it found as JSON. Runs on the first of the machines.

    python tests/storage/nodes_in_namespaces.py OWNER DATA SCRATCH
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pyarrow as pa
import pyarrow.dataset as ds
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from raydr.artifacts import Artifact, open_artifact
from raydr.train.config import TrainConfig
from raydr.train.metrics import METRICS, read_metrics
from raydr.train.trainer import train_model
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from tests.machines import Machines
from tests.train.conftest import contrastive
from tests.train.tiny import SETTINGS, tiny_checkpoint, write_topic_examples

HEAD, A, B, C, D, E = "head", "a", "b", "c", "d", "e"
QUERY = "number 7"


class Nodes:
    """A Ray node on each machine, the driver on the head's."""

    def __init__(self, machines: Machines, scratch: Path) -> None:
        self.machines, self._scratch = machines, scratch
        self._address = f"{machines.address(HEAD)}:6379"
        self.alive = 1
        self._start(HEAD, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        for name in (A, B):
            self.join(name)
        ray.init(address=self._address, log_to_driver=False)
        os.environ["RAY_ADDRESS"] = self._address  # parts of Ray would look for another cluster on this machine
        self.settle()

    def join(self, name: str, group: str = "any") -> None:
        """Another node, on a machine that is new where there is none of that name."""
        self._start(name, f"--address={self._address}", "--num-cpus=2", f"--labels=raydr/group={group},machine={name}")
        self.alive += 1

    def _start(self, name: str, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--object-store-memory=100000000"]
        folder = self._scratch / name  # of its own, or they unpack a job's files over one another
        log = self._scratch / f"{name}.log"
        for _ in range(3):  # on a busy machine Ray gives up after half a minute
            process = self.machines.start(name, [*command, f"--temp-dir={folder}", *arguments], log)
            wait_for(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, 180)  # noqa: B023
            if process.poll() is None:
                return
            if name == HEAD:  # where this runs as well
                break
            self.machines.kill(name)
        raise AssertionError(log.read_text()[-3000:])

    def settle(self) -> None:
        """Waits until Ray knows which nodes are alive."""
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == self.alive, 120)

    def lose(self, act: Callable[[], None], when: Callable[[], bool]) -> Losing:
        self.alive -= 1
        return Losing(act, when)


class Losing:
    """Does `act` as soon as `when` holds."""

    def __init__(self, act: Callable[[], None], when: Callable[[], bool]) -> None:
        self.at: float | None = None

        def run() -> None:
            wait_for(when, 300, every_s=0.02)
            self.at = time.monotonic()
            act()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def seconds_since(self) -> float:
        assert self.at is not None, "nothing was taken away"
        return time.monotonic() - self.at


def wait_for(holds: Callable[[], Any], limit_s: float, every_s: float = 0.1) -> float:
    """Seconds until it holds."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() > began + limit_s:
            raise AssertionError(f"not within {limit_s:g} s: {holds.__qualname__}")
        time.sleep(every_s)
    return time.monotonic() - began


def embedded(artifact: Artifact) -> pa.Table:
    return ds.dataset(artifact.path / "embeddings", format="parquet").to_table().sort_by("position")


def embedding(nodes: Nodes, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    alone = embed(RunConfig.model_validate({**settings, "out": str(scratch / "alone"), "runtime": "local"}))
    run = RunConfig.model_validate({**settings, "out": str(scratch / "out"), "runtime": "ray"})
    files = run.out / "embed/embeddings"
    lost = nodes.lose(lambda: nodes.machines.cut(B), lambda: len(list(files.glob("*.parquet"))) >= 3)
    found: dict[str, Any] = {"passages": embed(run).manifest.counts["passages"], "seconds": lost.seconds_since()}
    ours, undisturbed = embedded(open_artifact(files.parent)), embedded(alone)
    found["bit-equal"] = ours.select(undisturbed.column_names).equals(undisturbed)
    nodes.settle()
    assert nodes.machines.processes(B)
    nodes.machines.mend(B)  # it learns that it was given up
    found["given up and gone after"] = wait_for(lambda: not nodes.machines.processes(B), 120)
    return found


def training(nodes: Nodes, scratch: Path) -> dict[str, Any]:
    """Two workers on two nodes, which speak over the wire; undisturbed, then losing a node."""
    method = contrastive(tiny_checkpoint(scratch / "checkpoint"))
    config = TrainConfig(**{**SETTINGS, "num_workers": 2, "worker_cpus": 2, "max_steps": 24, "max_failures": 3})
    examples = write_topic_examples(scratch / "examples")
    whole = train_model(method, config, examples, scratch / "whole")
    log = scratch / "train" / METRICS

    def lose() -> None:
        nodes.machines.kill(C)
        nodes.machines.add(D)
        nodes.join(D, group="shard")

    lost = nodes.lose(lose, lambda: len(read_metrics(log)) >= 10)
    model = train_model(method, config, examples, scratch / "train")
    weights = [(artifact.path / "model/model.safetensors").read_bytes() for artifact in (whole, model)]
    steps = [int(record["step"]) for record in read_metrics(log) if "loss" in record]
    return {"steps": steps, "bit-equal": weights[0] == weights[1], "seconds": lost.seconds_since()}


class Answer(NamedTuple):
    """What came, and when."""

    sent: float
    done: float
    outcome: str


class Asker:
    """Asks an address again and again, in a thread of its own."""

    def __init__(self, address: str, whole: list[str], **more: str) -> None:
        self.answers: list[Answer] = []
        self._body, self._whole = {"query": QUERY, "k": 10, **more}, whole
        self._http = httpx.Client(base_url=address, timeout=60)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            sent, outcome = time.monotonic(), self._ask()
            self.answers.append(Answer(sent, time.monotonic(), outcome))

    def is_well(self) -> bool:
        """Whether what came in the last three seconds is right."""
        recent = [answer.outcome for answer in self.answers.copy() if answer.done > time.monotonic() - 3]
        return len(recent) > 3 and set(recent) == {"right"}

    def _ask(self) -> str:
        try:
            response = self._http.post("/v1/search", json=self._body)
        except httpx.TransportError as error:
            return type(error).__name__
        try:
            answer = response.json()
        except ValueError:
            return f"{response.status_code} (no JSON)"
        if response.status_code != 200:
            again = "again" if "Retry-After" in response.headers else "not again"
            return f"{response.status_code} {answer['error']['code']}, {again}"
        ids = [hit["id"] for hit in answer["hits"]]
        if answer.get("partial"):
            return "partial"
        return "right" if ids == self._whole else "wrong"


def application(folder: Path) -> dict[str, Any]:
    """Two Ingress replicas on two nodes; the encoder and a shard on the one that stays, a shard on the other."""

    def on(**labels: str) -> dict[str, Any]:
        return {"ray_actor_options": {"num_cpus": 0.1, "label_selector": labels}}

    deployments = [
        {"name": "Ingress", "num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0.1}},
        {"name": "Encoder", **on(machine=A)},
        {"name": "Shard0", **on(machine=A)},
        {"name": "Shard1", **on(**{"raydr/group": "shard"})},
    ]
    deployments[0]["user_config"] = {"index": str(folder)}
    limits = {"shard_timeout_s": 1, "request_timeout_s": 5}
    args = {"index": str(folder), "bm25": False, "shard_deployments": 2, "allowed_hosts": ["*"], "limits": limits}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000, "request_timeout_s": 10},
        "applications": [
            {
                "name": "raydr",
                "route_prefix": "/",
                "import_path": "raydr.serve.app:build_app",
                "args": args,
                "deployments": deployments,
            }
        ],
    }


def serving(nodes: Nodes, folder: Path) -> dict[str, Any]:
    config = application(folder)
    serve.start(proxy_location="EveryNode", http_options=config["http_options"])
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    addresses = [f"http://{nodes.machines.address(name)}:8000" for name in (A, D)]

    def whole(address: str) -> bool:
        try:
            answer = httpx.post(f"{address}/v1/search", json={"query": QUERY, "k": 10}, timeout=10)
            return answer.is_success
        except httpx.TransportError:
            return False

    found: dict[str, Any] = {"up after": wait_for(lambda: all(whole(address) for address in addresses), 420)}
    right = httpx.post(f"{addresses[0]}/v1/search", json={"query": QUERY, "k": 10}, timeout=10).json()
    ids = [hit["id"] for hit in right["hits"]]
    with Asker(addresses[0], ids) as strict, Asker(addresses[0], ids, on_shard_failure="partial") as lenient:
        time.sleep(2)
        cut = time.monotonic()
        nodes.machines.cut(D)
        time.sleep(3)
        nodes.machines.add(E)
        nodes.join(E, group="shard")
        found["joined after"] = time.monotonic() - cut
        wait_for(lambda: strict.is_well() and lenient.is_well(), 180)
    for name, asker in (("error", strict), ("partial", lenient)):
        after = [answer for answer in asker.answers if answer.done > cut]
        bad = [answer.done for answer in after if answer.outcome != "right"]
        found[name] = {
            "before": sorted({answer.outcome for answer in asker.answers if answer.done <= cut}),
            "outcomes": Counter(answer.outcome for answer in after),
            "slowest": max(answer.done - answer.sent for answer in after),
            "right again after": max(bad, default=cut) - cut,
        }
    return found


def main(owner: int, data: str, scratch: Path) -> dict[str, Any]:
    began = time.monotonic()

    def note(what: str) -> None:
        print(f"{time.monotonic() - began:.1f} {what}", file=sys.stderr, flush=True)

    machines = Machines(HEAD, A, B, owner=owner)
    nodes = Nodes(machines, scratch)
    note("up")
    settings = {
        "data": {"path": data},
        # As many threads here as there, and batches of one size: both change how the last digit is rounded.
        "method": {
            "import_path": "raydr.methods.zero_shot:ZeroShot",
            "args": {"precision": "float32", "num_threads": 1, "batch_tokens": 512},
        },
        "embed": {"passages_per_block": 20, "num_workers": [1, 2]},
        "index": {"num_shards": 2},
    }
    found: dict[str, Any] = {"embedding": embedding(nodes, settings, scratch)}
    note(str(found))
    machines.add(C)
    nodes.join(C)
    nodes.settle()
    found["training"] = training(nodes, scratch)
    note(str(found["training"]))
    built = index(RunConfig.model_validate({**settings, "out": str(scratch / "out"), "runtime": "local"}))
    nodes.settle()
    found["serving"] = serving(nodes, built.path)
    note(str(found["serving"]))
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))), flush=True)
    os._exit(0)  # nodes were killed: Ray's own clearing up at exit would wait for them
