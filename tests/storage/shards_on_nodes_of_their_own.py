"""An index served from nodes that each hold a part of it: serve_configs/spread.yaml on three Ray nodes and a bucket.

Each node has a cache of its own. A shard's replica is stopped, then its node is killed and another one joins. Prints
what it found as JSON.

    python tests/storage/shards_on_nodes_of_their_own.py s3://bucket/run/index CACHES PORT
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from raydr.config import read_yaml

CONFIG = Path(__file__).resolve().parents[2] / "serve_configs/spread.yaml"
QUERY = {"query": "who hunts mice at night", "k": 13}


def started(caches: Path, cluster: Cluster | None, name: str, shards: str) -> Any:
    """A node with a cache of its own; the head where there is no cluster yet."""
    size = {"num_cpus": 2, "object_store_memory": 80_000_000, "labels": {"raydr/shards": shards}}
    size["env_vars"] = {**os.environ, "RAYDR_CACHE": str(caches / name)}
    if cluster is None:
        return Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    return cluster.add_node(**size)


def replica(deployment: str) -> psutil.Process:
    pattern = rf"ray::ServeReplica:raydr:{deployment}\b"
    (found,) = (p for p in psutil.Process().children(recursive=True) if re.match(pattern, " ".join(p.cmdline())))
    return found


def shards_in(lines: list[str]) -> list[str]:
    """Numbers of the shards of which files are named."""
    return sorted({match[1] for line in lines if (match := re.search(r"shards/0*(\d+)/\w+\.(?:faiss|arrow)", line))})


def until(ask: Callable[[], httpx.Response], good: Callable[[dict[str, Any]], bool], limit_s: float = 90) -> float:
    """Seconds until an answer is a good one."""
    began = time.monotonic()
    while time.monotonic() < began + limit_s:
        try:
            response = ask()
            if response.status_code == 200 and good(response.json()):
                return time.monotonic() - began
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not within {limit_s:g} s")


def main(index: str, caches: Path, port: int) -> dict[str, Any]:
    config = read_yaml(CONFIG)
    config["applications"][0]["args"] |= {"index": index, "bm25": False}
    config["applications"][0]["args"]["limits"]["shard_timeout_s"] = 1
    deployments = {part["name"]: part for part in config["applications"][0]["deployments"]}
    deployments["Ingress"] |= {"num_replicas": 1, "user_config": {"index": index}}
    config["applications"][0]["deployments"] = [part for name, part in deployments.items() if name != "Bm25"]
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": port}}

    cluster = started(caches, None, "front", "none")
    started(caches, cluster, "a", "0")
    b = started(caches, cluster, "b", "1")
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options=config["http_options"])
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def ask(**more: str) -> httpx.Response:
        return http.post("/v1/search", json={**QUERY, **more})

    def partial() -> httpx.Response:
        return ask(on_shard_failure="partial")

    found: dict[str, Any] = {"up after": until(lambda: http.get("/ready"), lambda answer: True, 180)}
    found["whole"] = ask().json()
    names = ("front", "a", "b", "c")
    files = {name: [str(path) for path in (caches / name).rglob("*") if path.is_file()] for name in names}
    found["brought"] = {name: shards_in(own) for name, own in files.items()}
    found["mapped"] = {
        name: shards_in(Path(f"/proc/{replica(name).pid}/maps").read_text().splitlines())
        for name in ("Ingress", "Encoder", "Shard0", "Shard1")
    }

    stopped = replica("Shard1")
    stopped.send_signal(signal.SIGSTOP)
    try:
        error = ask()
        found["error"] = [error.status_code, error.json()["error"]["code"], error.headers.get("Retry-After")]
        found["partial"] = partial().json()
    finally:
        stopped.send_signal(signal.SIGCONT)
    found["on again after"] = until(partial, lambda answer: "partial" not in answer)

    (raylet,) = (psutil.Process(info.process.pid) for info in b.all_processes["raylet"])
    for process in [raylet, *raylet.children(recursive=True)]:
        process.kill()
    found["partial without the node"] = partial().json()
    started(caches, cluster, "c", "1")
    found["whole again after"] = until(partial, lambda answer: "partial" not in answer)
    found["whole again"] = ask().json()
    found["brought by the new node"] = shards_in([str(path) for path in (caches / "c").rglob("*")])
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))), flush=True)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)  # a node was killed: Ray's own clearing up at exit would wait for it
