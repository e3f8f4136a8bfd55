"""W6 and the serving half of W11: what a request costs, and what Ray Serve adds to it.

    python benchmarks/serve.py --index runs/demo/index --rounds 5 --requests 200
    python benchmarks/serve.py --index runs/demo/index --only bare asgi --clients 1 --requests 20 --rounds 1

Contenders over one index with the same encoder settings, interleaved; each server is a process of its own with a
cluster of its own, and all that take part are up during the whole run (on two cores: one Serve contender a run, beside
`asgi`, because an idle cluster is not for nothing):
    bare               the pipeline called in a process of its own, one query after the other: the floor
    asgi               the same HTTP routes and searcher under uvicorn, without Ray: what HTTP and JSON cost
    colocated          Ray Serve as `raydr serve` starts it: one replica behind HAProxy, Serve's throughput settings
    colocated-default  one replica behind Serve's own Python proxy
    apart              a deployment per part, behind HAProxy, with the throughput settings: search.yaml
    apart-default      a deployment per part behind the Python proxy, no settings
Others' servers join for /v1/embeddings: start them on the same machine with the same model files and threads, and give
`--peer infinity=http://127.0.0.1:7997,MODEL` (repeatable; the path /embeddings is added). `peers/embeddings_server.py`
is the server people write themselves. The answers of all must agree before a speed counts.

Closed loops of 1, 8 and 32 clients (each asks again as soon as it is answered), then an open loop at 70 % of the
throughput reached with 8 clients, arrivals independent of the answers. Errors are counted, never left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, quantile, write

_FAST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SERVERS: dict[str, dict[str, str]] = {
    "asgi": {},
    "colocated": _FAST,
    "colocated-default": {},
    "apart": _FAST,
    "apart-default": {},
}
WORDS = "array index sort merge column tensor gradient model cluster task actor table file parse string date".split()  # noqa: SIM905


@dataclass(frozen=True)
class Target:
    """A server and how it names the model."""

    name: str
    address: str
    model: str | None = None
    process: subprocess.Popen[Any] | None = None


def texts(count: int, seed: int) -> list[str]:
    """Queries of 3 to 8 words, the same for every contender."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 8))) for _ in range(count)]


def body(workload: str, target: Target, number: int) -> tuple[str, dict[str, Any]]:
    if workload == "search":
        return "/v1/search", {"query": texts(1, number)[0], "k": 10, "fields": ["title", "text"]}
    count = int(workload.removeprefix("embed "))
    content: dict[str, Any] = {"input": texts(count, number), "encoding_format": "base64"}
    if target.model:
        content["model"] = target.model
    return ("/v1/embeddings" if target.process else "/embeddings"), content


async def ask(http: httpx.AsyncClient, workload: str, target: Target, number: int) -> tuple[float, bool]:
    """Seconds, and whether the answer was 200."""
    path, content = body(workload, target, number)
    started = time.perf_counter()
    try:
        response = await http.post(target.address + path, json=content)
        good = response.status_code == 200
    except httpx.HTTPError:
        good = False
    return time.perf_counter() - started, good


async def closed_loop(workload: str, target: Target, clients: int, requests: int) -> dict[str, Any]:
    """`clients` ask again as soon as they are answered, `requests` times in all."""
    numbers = iter(range(requests))
    results: list[tuple[float, bool]] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=60) as http:

        async def client() -> None:
            for number in numbers:
                results.append(await ask(http, workload, target, number))

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return summary(results, time.perf_counter() - started)


async def open_loop(workload: str, target: Target, rate_per_s: float, requests: int) -> dict[str, Any]:
    """Requests at random times (exponential gaps), however long answers take."""
    rng = random.Random(0)
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as http:
        started, due, tasks = time.perf_counter(), 0.0, []
        for number in range(requests):
            due += rng.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(http, workload, target, number)))
        results = await asyncio.gather(*tasks)
        return summary(list(results), time.perf_counter() - started)


def summary(results: list[tuple[float, bool]], seconds: float) -> dict[str, Any]:
    times = [1000 * value for value, good in results if good]
    quantiles = {f"p{share}": quantile(times, share / 100) if times else float("nan") for share in (50, 95, 99)}
    return {"per_s": len(times) / seconds, "errors": len(results) - len(times), **quantiles}


def bare(index: Path, workload: str, requests: int) -> dict[str, Any]:
    """The pipeline, called in this process."""
    from raydr.encoders.factory import EncoderFactory
    from raydr.index.reader import IndexReader
    from raydr.types import Passage, Query

    if not hasattr(bare, "loaded"):
        reader = IndexReader.open(index, num_threads=1)
        bare.loaded = reader, EncoderFactory(reader.method)()
    reader, encoder = bare.loaded

    def once(number: int) -> None:
        if workload == "search":
            top = reader.search(encoder.encode_queries([Query("", texts(1, number)[0])]), 10)
            reader.passages(top.rows[0][top.rows[0] >= 0])
        else:
            count = int(workload.removeprefix("embed "))
            encoder.encode_passages([Passage("", text) for text in texts(count, number)])

    once(0)
    results = []
    started = time.perf_counter()
    for number in range(requests):
        before = time.perf_counter()
        once(number)
        results.append((time.perf_counter() - before, True))
    return summary(results, time.perf_counter() - started)


@contextmanager
def running(name: str, index: Path, timeout_s: float = 240) -> Iterator[Target]:
    """A contender's server in a process group of its own, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", **SERVERS[name]}
    command = [sys.executable, __file__, "--index", str(index), "--run-server", name, "--port", str(port)]
    log = (Path(tempfile.gettempdir()) / f"raydr-benchmark-{name}-{port}.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + timeout_s
        address = f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start; see {log.name}")
            try:
                if httpx.get(f"{address}/ready", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield Target(name, address, process=process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def run_server(name: str, index: Path, port: int) -> None:
    """The child's side: serves until SIGINT."""
    from raydr.serve.config import AppArgs, Limits

    args = AppArgs(index=index, colocate=name.startswith("colocated"), limits=Limits(concurrent_requests=512))
    if name == "asgi":
        import uvicorn

        from raydr.serve.colocated import colocated_searcher
        from raydr.serve.http import build_http

        async def serve_asgi() -> None:
            searcher = colocated_searcher(args)
            await searcher.use(str(index))
            config = uvicorn.Config(build_http(searcher, args), port=port, log_level="warning", loop="uvloop")
            await uvicorn.Server(config).serve()

        asyncio.run(serve_asgi())
        return
    import ray
    from ray import serve

    from raydr.serve.app import build_app

    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(args), name="raydr", route_prefix="/")
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
        ray.shutdown()


def check_agreement(targets: list[Target], index: Path) -> None:
    """All servers give the embeddings of the bare pipeline (cosine 0.999: bf16 is allowed), searches the same ids."""
    from base64 import b64decode

    from raydr.encoders.factory import EncoderFactory
    from raydr.index.reader import IndexReader
    from raydr.types import Passage

    reader = IndexReader.open(index)
    sample = texts(5, 123)
    expected = EncoderFactory(reader.method)().encode_passages([Passage("", text) for text in sample])
    found_ids = set()
    for target in targets:
        path, content = body("embed 5", target, 123)
        answer = httpx.post(target.address + path, json=content, timeout=60).raise_for_status().json()
        rows = [np.frombuffer(b64decode(item["embedding"]), dtype="<f4") for item in answer["data"]]
        cosines = [row @ want / np.linalg.norm(row) / np.linalg.norm(want) for row, want in zip(rows, expected)]
        if min(cosines) < 0.999:
            raise SystemExit(f"{target.name}: other embeddings than the bare pipeline's (cosine {min(cosines):.4f})")
        if target.process is not None:
            request = {"queries": sample, "k": 5, "fields": []}
            results = httpx.post(f"{target.address}/v1/search", json=request, timeout=60).raise_for_status().json()
            found_ids.add(json.dumps([[hit["id"] for hit in r["hits"]] for r in results["results"]]))
    if len(found_ids) > 1:
        raise SystemExit("the servers found different passages")


def measure(arguments: argparse.Namespace, targets: list[Target]) -> list[dict[str, Any]]:
    records = []
    for workload in arguments.workloads:
        if workload == "memory":
            records += [memory_over_time(target, arguments.minutes) for target in targets]
            continue
        for target in targets:  # not counted: fills caches, opens connections
            if workload != "search" or target.process is not None:
                asyncio.run(closed_loop(workload, target, 4, 20))
        for number in range(arguments.rounds):
            turned = targets[number % len(targets) :] + targets[: number % len(targets)] if targets else []
            if "bare" in arguments.only:
                found = bare(arguments.index, workload, arguments.requests)
                records.append({"workload": workload, "contender": "bare", "load": "1 caller", **found})
            for target in turned:
                if workload == "search" and target.process is None:
                    continue
                at_8 = None
                for clients in arguments.clients:
                    found = asyncio.run(closed_loop(workload, target, clients, arguments.requests))
                    at_8 = found["per_s"] if clients == 8 else at_8
                    records.append(
                        {"workload": workload, "contender": target.name, "load": f"{clients} clients", **found}
                    )
                if at_8:
                    found = asyncio.run(open_loop(workload, target, 0.7 * at_8, arguments.requests))
                    records.append(
                        {"workload": workload, "contender": target.name, "load": "open, 70 % of 8 clients", **found}
                    )
    return records


def memory_over_time(target: Target, minutes: float) -> dict[str, Any]:
    """Four clients embed and search for `minutes`; the process group's memory at the start, half-way and the end, and
    which processes grew by more than a MiB.
    """
    assert target.process is not None
    marks = [memory_mib(target.process.pid)]
    finished = []
    for _ in range(2):
        end = time.monotonic() + 30 * minutes
        while time.monotonic() < end:
            for workload in ("embed 16", "search"):
                finished.append(asyncio.run(closed_loop(workload, target, 4, 200)))
        marks.append(memory_mib(target.process.pid))
    per_s = float(np.median([one["per_s"] for one in finished]))
    errors = sum(one["errors"] for one in finished)
    sums = ", ".join(f"{sum(mark.values()):.0f}" for mark in marks)
    growth = {name: size - marks[0].get(name, 0.0) for name, size in marks[-1].items()}
    growers = [f"{name} {size:+.0f}" for name, size in sorted(growth.items(), key=lambda item: -item[1]) if size > 1]
    load = f"4 clients, {minutes:g} min: MiB at start, half-way, end: {sums}; grown: {', '.join(growers)}"
    nothing = dict.fromkeys(("p50", "p95", "p99"), float("nan"))
    return {"workload": "memory", "contender": target.name, "load": load, "per_s": per_s, "errors": errors, **nothing}


def memory_mib(leader: int) -> dict[str, float]:
    """Proportional set size of a process and of all its descendants, added up by their names."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, todo = Counter[str](), [leader]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        words = [Path(word).name for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0") if word]
        scripts = [word for word in words if word.endswith(".py")]
        name = (scripts or words or ["?"])[0]
        found[name] += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return {name: kib / 1024 for name, kib in found.items()}


def table(records: list[dict[str, Any]]) -> str:
    """Medians over the rounds; the errors are added up."""
    rows = []
    groups = dict.fromkeys((r["workload"], r["load"], r["contender"]) for r in records)
    for workload, load, contender in sorted(groups):
        own = [r for r in records if (r["workload"], r["load"], r["contender"]) == (workload, load, contender)]
        middle = {name: float(np.median([r[name] for r in own])) for name in ("per_s", "p50", "p95", "p99")}
        figures = [f"{middle['per_s']:.1f}", *(f"{middle[name]:.2f}" for name in ("p50", "p95", "p99"))]
        rows.append([workload, load, contender, *figures, str(sum(r["errors"] for r in own))])
    return markdown(["workload", "load", "contender", "requests/s", "p50 ms", "p95 ms", "p99 ms", "errors"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["bare", "asgi", "colocated"], choices=["bare", *SERVERS])
    parser.add_argument("--peer", action="append", default=[], help="NAME=URL[,MODEL] of another embeddings server")
    parser.add_argument("--workloads", nargs="*", default=["search", "embed 1", "embed 16"], help="also: memory")
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="per contender, load and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10, help="of the workload `memory`")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/serve"), help="writes OUT.md and OUT.json")
    parser.add_argument("--run-server", choices=list(SERVERS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_server:
        run_server(arguments.run_server, arguments.index.resolve(), arguments.port)
        return
    peers = []
    for entry in arguments.peer:
        name, _, place = entry.partition("=")
        address, _, model = place.partition(",")
        peers.append(Target(name, address.rstrip("/"), model or None))
    with ExitStack() as stack:
        own = [stack.enter_context(running(n, arguments.index.resolve())) for n in SERVERS if n in arguments.only]
        check_agreement([*own, *peers], arguments.index)
        records = measure(arguments, [*own, *peers])
    write(arguments.out, "W6, W11: serving", table(records), records)


if __name__ == "__main__":
    main()
