"""A cluster whose nodes share a bucket and nothing else.

Each node has a cache of its own, so what one writes the others have to bring. Embeds, indexes, searches, serves and
trains there, and takes a node away while it embeds and while it trains. Prints what it found as JSON.

    python tests/storage/nodes_without_a_shared_disk.py s3://bucket/run DATA CACHES PORT
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from ray.cluster_utils import Cluster

from raydr.artifacts import Artifact
from raydr.storage import bucket_of, place
from raydr.train.config import TrainConfig
from raydr.train.metrics import METRICS, read_metrics
from raydr.train.trainer import train_model
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.search import search
from raydr.verbs.serve import serving
from tests.train.conftest import contrastive
from tests.train.tiny import SETTINGS, tiny_checkpoint, write_topic_examples


class Nodes:
    """A head without CPUs and two nodes of two."""

    def __init__(self, caches: Path) -> None:
        self._caches, self._count = caches, 0
        head = {"num_cpus": 0, "object_store_memory": 100_000_000, "env_vars": self._environment("head")}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[Path, Any] = {}
        self.add()
        self.add()

    def _environment(self, name: str) -> dict[str, str]:
        return {**os.environ, "RAYDR_CACHE": str(self._caches / name)}

    def add(self) -> None:
        self._count += 1
        name = f"node{self._count}"
        own = self._environment(name)
        node = self.cluster.add_node(
            num_cpus=2, object_store_memory=200_000_000, env_vars=own, labels={"raydr/group": name}
        )
        self._nodes[Path(own["RAYDR_CACHE"])] = node

    def holding(self, pattern: str) -> dict[str, int]:
        """How many files of that pattern lie in each node's cache."""
        counts = {cache.name: len(list(cache.glob(f"s3/*/*/{pattern}"))) for cache in self._nodes}
        return {name: count for name, count in counts.items() if count}

    def settle(self) -> None:
        """Waits until Ray knows which nodes are alive: it counts a dead one's CPUs for half a minute."""
        while sum(node["Alive"] for node in ray.nodes()) != 1 + len(self._nodes):
            time.sleep(0.5)

    def take_one_away(self, when: Callable[[Path], bool]) -> threading.Event:
        """Ends the first node for whose cache `when` holds, at once; says when it holds."""
        held = threading.Event()

        def act() -> None:
            while not (found := [cache for cache in self._nodes if when(cache)]):
                time.sleep(0.05)
            node = self._nodes.pop(found[0])
            held.set()
            self.cluster.remove_node(node, allow_graceful=False)

        threading.Thread(target=act, daemon=True).start()
        return held


def trained(nodes: Nodes, folder: Path, scratch: Path) -> tuple[Artifact, bool]:
    """A tiny model in the bucket; whether the node that trained it was taken away meanwhile."""
    method = contrastive(tiny_checkpoint(scratch / "checkpoint"))
    config = TrainConfig(**{**SETTINGS, "num_workers": 1, "worker_cpus": 2, "max_steps": 40, "max_failures": 3})
    log = folder.relative_to(os.environ["RAYDR_CACHE"]) / "train" / METRICS
    taken = nodes.take_one_away(lambda cache: len(read_metrics(cache / log)) >= 8)  # the node that trains
    model = train_model(method, config, write_topic_examples(folder / "examples"), folder / "train")
    return model, taken.is_set()


def main(url: str, data: str, caches: Path, port: int) -> dict[str, Any]:
    nodes = Nodes(caches)
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    settings = {
        "out": url,
        "runtime": "ray",
        "data": {"path": data, "split": "test"},
        "method": {"import_path": "raydr.methods.zero_shot:ZeroShot", "args": {"precision": "float32"}},
        "embed": {"passages_per_block": 20, "num_workers": [1, 2]},
        "index": {"num_shards": 4, "factory": "IVF4,Flat", "bm25": {}, "labels": {"raydr/group": "node3"}},
        "search": {"k": 10, "mode": "hybrid"},
    }
    run = RunConfig.model_validate(settings)
    files = bucket_of(run.out / "embed/embeddings")
    assert files is not None
    taken = nodes.take_one_away(lambda _: len(files.sizes()) >= 3)
    found: dict[str, Any] = {"embedded": embed(run).manifest.counts, "taken while embedding": taken.is_set()}
    nodes.add()
    nodes.settle()
    built = index(run)
    found["indexed"] = built.manifest.counts
    found["built on"] = nodes.holding("index/shards/*/vectors.faiss")
    found["run"] = (search(run).path / "run.trec").read_text()
    found["here"] = sorted(path.name for path in (run.out / "embed/embeddings").glob("*.parquet"))
    found["searched on"] = nodes.holding("index/shards/*/vectors.faiss")
    with serving(built.path, host="127.0.0.1", port=port) as address:
        queries = [json.loads(line)["text"] for line in Path(data, "queries.jsonl").read_text().splitlines()]
        asked = {"queries": queries, "k": 10, "mode": "hybrid"}
        answer = httpx.post(f"{address}/v1/search", json=asked, timeout=60).raise_for_status().json()
        found["served"] = [[(hit["id"], hit["score"]) for hit in result["hits"]] for result in answer["results"]]
    model, found["taken while training"] = trained(nodes, place(url), caches)
    found["model"], found["steps"] = sorted(model.manifest.files), model.manifest.details["steps"]
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))), flush=True)
    os._exit(0)  # nodes were killed: Ray's own clearing up at exit would wait for them
