"""Served raydr on a head and a worker of `ray start`, the head of which can be killed and started again.

Notable: the head takes no work (`--num-cpus=0`), so replicas and an HAProxy are on the worker, on a port of its own;
Serve's controller is on the head, as always. Both nodes ask for a token. The application comes by `serve deploy`, from
another process: nothing here is a driver that would die with the head. What a node has started is known by a variable
in its environment, so nothing else on the machine is touched.

    with HeadSite(index, storage="redis") as site:
        site.kill("head"); site.start_head()
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from fire_load import Load, outcomes, told
from fire_site import PARTS
from interleaved import markdown

from raydr.serve import haproxy

MARK = "RAYDR_FIRE_NODE"
STORAGES = ("none", "redis", "rocksdb")
"""Where the head keeps the state of the cluster: in its memory, in a Redis beside it, in files on its disk."""

_RAY = Path(sys.executable).parent


def fixed_port() -> int:
    """A port that is free and stays so: none of those that the system hands to whoever asks for any."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class HeadSite:
    """The application over `index`, with `replicas` of each part, all on the worker."""

    def __init__(
        self, index: Path, *, storage: str = "none", replicas: int = 1, reconnect_s: int | None = None
    ) -> None:
        self.index, self.storage, self.replicas, self._reconnect_s = index, storage, replicas, reconnect_s
        self.folder = Path(tempfile.mkdtemp(prefix="fh", dir="/tmp"))  # short: it holds sockets
        self._token, self._password = secrets.token_hex(32), secrets.token_hex(16)
        names = ("gcs", "dashboard", "client", "head", "worker", "fallback", "redis")
        self._ports = dict(zip(names, random.sample([fixed_port() for _ in range(40)], len(names)), strict=True))
        self._redis: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.address = f"http://127.0.0.1:{self._ports['worker']}"

    def __enter__(self) -> HeadSite:
        try:
            if self.storage == "redis":
                self._start_redis()
            self.start_head()
            self.start_worker()
            self.deploy()
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in ("worker", "head"):
            self.kill(node)
        if self._redis:
            self._redis.kill()
            self._redis.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- its nodes

    def start_head(self) -> float:
        """Seconds until Ray says that it has started."""
        named = {"port": "gcs", "dashboard-port": "dashboard", "ray-client-server-port": "client"}
        ports = [f"--{option}={self._ports[name]}" for option, name in named.items()]
        redis = [f"--redis-password={self._password}", "--redis-username=default"] if self.storage == "redis" else []
        return self._start("head", "--head", "--num-cpus=0", *ports, *redis)

    def start_worker(self) -> float:
        return self._start("worker", f"--address=127.0.0.1:{self._ports['gcs']}", "--num-cpus=4")

    def _start(self, name: str, *arguments: str) -> float:
        """On a busy machine Ray gives up after half a minute, so it has three tries."""
        began = time.monotonic()
        log = self.folder / f"{name}.log"
        fixed = ["--block", "--disable-usage-stats", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        for _ in range(3):
            # A folder of its own each time, as a new Pod or machine has: Ray refuses to start a head where its last
            # one's address is noted and a raylet on this machine (the worker's) still holds on to it.
            self._starts += 1
            places = [f"--temp-dir={self.folder / str(self._starts)}", f"--dashboard-agent-listen-port={fixed_port()}"]
            command = [str(_RAY / "ray"), "start", *fixed, *places, *arguments]
            own = self._environment(name)
            with log.open("w") as output:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=own)
            while process.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return time.monotonic() - began
                time.sleep(0.1)
            print(f"{name} did not start, once more", flush=True)
            self.kill(name)
        raise SystemExit(f"{name} did not start:\n{log.read_text()[-3000:]}")

    def _environment(self, name: str) -> dict[str, str]:
        places = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "admin.sock", "METRICS_SOCKET_PATH": "metrics.sock"}
        places |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "state"}  # Serve makes a folder in it for each node
        settings = {f"RAY_SERVE_HAPROXY_{key}": str(self.folder / "proxies" / file) for key, file in places.items()}
        settings |= {f"RAY_SERVE_HAPROXY_{which}_PORT": str(fixed_port()) for which in ("STATS", "METRICS")}
        settings |= {
            MARK: f"{self.folder}/{name}",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            haproxy.BINARY: haproxy.installed() or "",  # what callers are told where nobody is behind it
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self._ports["worker"]),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(self._ports["fallback"]),
        }
        if self._reconnect_s is not None:
            settings["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(self._reconnect_s)
        if name == "head" and self.storage == "redis":
            settings["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{self._ports['redis']}"
        if name == "head" and self.storage == "rocksdb":
            settings |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "gcs")}
        return self._client() | settings

    def _client(self) -> dict[str, str]:
        outside = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        return outside | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def _start_redis(self) -> None:
        where = ["--bind", "127.0.0.1", "--port", str(self._ports["redis"]), "--requirepass", self._password]
        quiet = ["--save", "", "--dir", str(self.folder), "--logfile", "redis.log"]
        self._redis = subprocess.Popen(["redis-server", *where, *quiet])

    # --- its processes

    def processes(self, node: str) -> list[psutil.Process]:
        """All that a node has started and that still runs."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == f"{self.folder}/{node}" and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, node: str) -> None:
        """SIGKILLs all of a node; the raylet first, which would clear up otherwise."""
        while own := self.processes(node):
            for process in sorted(own, key=lambda process: process.name() != "raylet"):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(own, timeout=2)

    def has_raylet(self, node: str) -> bool:
        return any(process.name() == "raylet" for process in self.processes(node))

    def replicas_of(self, part: str) -> list[psutil.Process]:
        """Of a deployment; Ray writes into a process's name what it is."""
        title, found = f"ray::ServeReplica:raydr:{part}", []
        for process in self.processes("worker"):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_replica(self, part: str) -> set[int]:
        """SIGKILLs one; the process ids of those that there were."""
        before = self.replicas_of(part)
        before[0].kill()
        return {process.pid for process in before}

    def replaced(self, before: set[int], part: str = "Shard1", limit_s: float = 60) -> float | None:
        """Seconds until there is a replica that was not there before."""
        began = time.monotonic()
        while time.monotonic() < began + limit_s:
            if any(process.pid not in before for process in self.replicas_of(part)):
                return time.monotonic() - began
            time.sleep(0.1)
        return None

    # --- its application

    def deploy(self) -> None:
        """`serve deploy`, as an operator gives it."""
        deployments: list[dict[str, Any]] = [
            {"name": part, "num_replicas": self.replicas, "ray_actor_options": {"num_cpus": 0.1}}
            for part in PARTS["apart"]
        ]
        deployments[0]["user_config"] = {"index": str(self.index)}
        application = {
            "name": "raydr",
            "route_prefix": "/",
            "import_path": "raydr.serve.app:build_app",
            "args": {"index": str(self.index), "bm25": False},
            "deployments": deployments,
        }
        config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1", "port": self._ports["head"]},
            "applications": [application],
        }
        file = self.folder / "serve.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")
        command = [
            str(_RAY / "serve"),
            "deploy",
            str(file),
            "--address",
            f"http://127.0.0.1:{self._ports['dashboard']}",
        ]
        done = subprocess.run(command, env=self._client(), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise SystemExit(f"serve deploy: {done.stderr[-2000:]}")

    def status(self) -> str:
        """What Serve's controller says of the application; empty where nobody answers."""
        address = f"http://127.0.0.1:{self._ports['dashboard']}/api/serve/applications/"
        try:
            answer = httpx.get(address, headers={"Authorization": f"Bearer {self._token}"}, timeout=5)
            return answer.json()["applications"].get("raydr", {}).get("status", "unknown") if answer.is_success else ""
        except (httpx.HTTPError, ValueError, KeyError):
            return ""

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.address}/ready", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def wait_ready(self, timeout_s: float = 180) -> float:
        began = time.monotonic()
        while not self.ready() or self.status() != "RUNNING":
            if time.monotonic() > began + timeout_s:
                raise SystemExit(f"the application did not come up: {self.status() or 'nobody answers'}")
            time.sleep(0.2)
        return time.monotonic() - began


def head_dies(
    site: HeadSite, load: Load, away_s: float, *, also_killed: str | None = None, leftovers: bool = False
) -> dict[str, Any]:
    """The head is killed, and started again after `away_s`; what came of it.

    Args:
        site: the application, under `load`.
        load: what its answers are read from.
        away_s: seconds for which there is no head.
        also_killed: a part of which one replica dies meanwhile.
        leftovers: what an ended worker leaves is not cleared before it is started again.
    """
    record: dict[str, Any] = {"away_s": away_s}
    killed = time.monotonic()
    site.kill("head")
    record["worker_ended_s"], late = None, None
    while (since := time.monotonic() - killed) < away_s:
        if record["worker_ended_s"] is None and not site.has_raylet("worker"):
            record["worker_ended_s"] = since
        if also_killed and late is None and since > away_s / 4:
            late = site.kill_replica(also_killed)
        time.sleep(0.25)
    if also_killed:
        record["replaced_meanwhile"] = len(site.replicas_of(also_killed)) == site.replicas
    if record["worker_ended_s"] is not None:
        record["left_by_the_worker"] = sorted(process.name() for process in site.processes("worker"))
    meanwhile = [answer for answer in load.answers if answer.done >= killed]
    record["last_right_s"] = max((answer.done for answer in meanwhile if answer.good), default=killed) - killed
    record["meanwhile"] = outcomes(meanwhile)
    returned = time.monotonic()
    record["head_up_s"] = site.start_head()
    record |= come_back(site, returned, leftovers=leftovers)
    time.sleep(5)
    record["after"] = told(load, returned)
    if record["whole_s"] is not None:  # whether somebody is in charge again
        record["replaced_s"] = site.replaced(site.kill_replica("Shard1"))
    return record


def come_back(site: HeadSite, returned: float, *, leftovers: bool, limit_s: float = 240) -> dict[str, Any]:
    """What it takes after the head is there: a worker that has ended is started again, an application that Serve does
    not know after 15 s is deployed anew. Seconds are counted from `returned`.
    """
    found: dict[str, Any] = {"worker_gone_s": None, "deployed_s": None, "whole_s": None}
    unknown = None
    while found["whole_s"] is None and time.monotonic() < returned + limit_s:
        if not site.has_raylet("worker"):
            found["worker_gone_s"] = time.monotonic() - returned
            if not leftovers:
                site.kill("worker")
            site.start_worker()
        status, now = site.status(), time.monotonic()
        unknown = (unknown or now) if status == "unknown" else None
        if unknown and now > unknown + 15 and found["deployed_s"] is None:
            found["deployed_s"] = now - returned
            site.deploy()
        if status == "RUNNING" and site.ready() and len(site.replicas_of("Shard1")) == site.replicas:
            found["whole_s"] = time.monotonic() - returned
        time.sleep(0.25)
    return found


def head_table(records: list[dict[str, Any]]) -> str:
    def counts(found: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    rows = []
    for record in records:
        reconnect, after = record.get("reconnect_s"), record["after"]
        rows.append(
            [
                record["storage"] + (f", waited for {reconnect} s" if reconnect else ""),
                seconds(record["away_s"]),
                counts(record["meanwhile"]),
                *(seconds(record[name]) for name in ("last_right_s", "worker_ended_s", "head_up_s", "deployed_s")),
                seconds(record["whole_s"]) or "never",
                counts(after["outcomes"]),
                f"{after['gap_s']:.1f}",
                seconds(record.get("replaced_s")),
            ]
        )
    head = ["state in", "head away (s)", "answers meanwhile", "last right one after (s)", "worker ended after (s)"]
    head += ["head started in (s)", "deployed anew after (s)", "whole after (s)", "answers from then on"]
    return markdown([*head, "longest gap (s)", "killed replica replaced in (s)"], rows)
