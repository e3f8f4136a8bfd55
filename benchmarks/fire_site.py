"""A really served raydr application on loopback, over Ray nodes of this machine, and its processes by what they are.

Notable: it is deployed by a Serve config, as `serve deploy` does; nodes carry the custom resources `front` (Ingress,
Encoder) and `shards` (Shard0, Shard1), so that the one with the shards can be taken away. What is killed is always
found among the descendants of this process: nothing else on the machine is touched.

    with Site(index, layout="apart", replicas=1, folder=scratch) as site:
        site.pids("Shard1"); site.deploy(other_index)
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from raydr.serve import haproxy

PARTS = {"apart": ("Ingress", "Encoder", "Shard0", "Shard1"), "colocated": ("Ingress",)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def build_index(collection: Path, out: Path, num_shards: int = 2) -> Path:
    """The index over a collection with the packaged MiniLM at full precision; made once."""
    from raydr.verbs.config import RunConfig
    from raydr.verbs.embed import embed
    from raydr.verbs.index import index

    settings = {
        "out": str(out),
        "runtime": "local",
        "data": {"path": str(collection), "on_error": "skip"},
        "method": {
            "import_path": "raydr.methods.zero_shot:ZeroShot",
            "args": {"backend": "torch", "precision": "float32", "num_threads": 1},
        },
        "index": {"num_shards": num_shards},
    }
    run = RunConfig.model_validate(settings)
    embed(run)
    return index(run).path


class Site:
    """The application over `index`: a head node, one for the front, and `shard_nodes` for the shards."""

    def __init__(
        self,
        index: Path,
        *,
        layout: str = "apart",
        replicas: int = 1,
        shard_nodes: int = 1,
        args: dict[str, Any] | None = None,
        deployments: list[dict[str, Any]] | None = None,
    ) -> None:
        self.layout, self.replicas, self.index = layout, replicas, index
        self._args, self._more, self._shard_nodes = args or {}, deployments or [], shard_nodes
        self._folder = Path(tempfile.mkdtemp(prefix="fire-", dir="/tmp"))  # short: it holds a socket
        self.address = f"http://127.0.0.1:{free_port()}"
        self.shard_nodes: list[Any] = []

    def __enter__(self) -> Site:
        os.environ |= {
            "RAY_ADDRESS": "local",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            haproxy.BINARY: haproxy.installed() or "",  # what callers are told where nobody is behind it
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self._folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self._folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(self._folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(self._folder / "state"),
        }
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        head = {
            "include_dashboard": False,
            "num_cpus": 4,
            "object_store_memory": 100_000_000,
            "resources": {"front": 100},
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            if self.layout == "apart":
                for _ in range(self._shard_nodes):
                    self.add_shard_node()
            ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
            port = int(self.address.rpartition(":")[2])
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            self.deploy(self.index)
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        ours = psutil.Process().children(recursive=True)
        ray.shutdown()
        self.cluster.shutdown()
        for process in [*ours, *self._haproxies()]:
            if process.is_running():
                process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_shard_node(self) -> None:
        """A node for shards; what runs on a node that goes moves to another of them."""
        size = {"num_cpus": 2, "object_store_memory": 80_000_000, "resources": {"shards": 100}}
        self.shard_nodes.append(self.cluster.add_node(**size))

    def deploy(self, index: Path) -> None:
        """What `serve deploy` does, for a config whose live index is this one."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        deployments = []
        for part in PARTS[self.layout]:
            where = {"shards": 1} if part.startswith("Shard") else {"front": 1}
            options = {"num_cpus": 0.1, "resources": where}
            deployments.append({"name": part, "num_replicas": self.replicas, "ray_actor_options": options})
        deployments[0]["user_config"] = {"index": str(index)}
        args = {"index": str(self.index), "colocate": self.layout == "colocated", "bm25": False, **self._args}
        application = {
            "name": "raydr",
            "route_prefix": "/",
            "import_path": "raydr.serve.app:build_app",
            "args": args,
            "deployments": [*deployments, *self._more],
        }
        config = {"applications": [application]}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)

    def ready(self) -> dict[str, Any] | None:
        try:
            response = httpx.get(f"{self.address}/ready", timeout=5)
            return response.json() if response.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    def wait_ready(self, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        wanted = len(PARTS[self.layout]) * self.replicas
        while self.ready() is None or sum(len(self.pids(part)) for part in PARTS[self.layout]) < wanted:
            if time.monotonic() > deadline:
                raise SystemExit(f"the application did not come up: {self.ready()}, see /tmp/ray/session_latest/logs")
            time.sleep(0.2)

    # --- its processes

    def pids(self, part: str) -> list[int]:
        """Of a deployment's replicas, or of `controller`, `proxy` (its manager), `haproxy`, `gcs`, `engine`."""
        pattern = {
            "controller": r"ray::ServeController\b",
            "proxy": r"ray::(HAProxyManager|ProxyActor)\b",
            "gcs": r".*gcs_server ",
            "engine": r".*EngineCore",
        }.get(part, rf"ray::ServeReplica:raydr:{part}\b")
        if part == "haproxy":
            return [process.pid for process in self._haproxies()]
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if re.match(pattern, " ".join(process.cmdline())):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def _haproxies(self) -> list[psutil.Process]:
        """One that its manager has left is no descendant any more, but its config lies in this site's folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.exe()).name == "haproxy" and any(str(self._folder) in a for a in process.cmdline()):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def kill(self, part: str) -> None:
        """SIGKILLs the first process of that kind."""
        os.kill(self.pids(part)[0], signal.SIGKILL)

    def kill_shard_node(self) -> None:
        """SIGKILLs a node on which replicas run, with all that is on it."""
        for node in self.shard_nodes:
            (raylet,) = (info.process.pid for info in node.all_processes["raylet"])
            own = psutil.Process(raylet).children(recursive=True)
            if any("ServeReplica" in " ".join(process.cmdline()) for process in own):
                for process in [psutil.Process(raylet), *own]:  # the raylet first: it must not clear up
                    process.kill()
                self.shard_nodes.remove(node)
                return
        raise SystemExit("no node has a shard's replica")

    def rss_mib(self) -> dict[str, float]:
        """Resident memory of each replica and of Serve's own processes."""
        found = {}
        for part in (*PARTS[self.layout], "controller", "proxy", "haproxy"):
            for number, pid in enumerate(sorted(self.pids(part))):
                try:
                    found[f"{part}#{number}"] = psutil.Process(pid).memory_info().rss / 2**20
                except psutil.Error:
                    continue
        return found


def what_runs_beside() -> str:
    """Load average, for tables made on a machine that others use too."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
