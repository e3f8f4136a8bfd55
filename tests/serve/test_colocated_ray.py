"""`raydr serve` as a person starts it: one replica behind HAProxy, for this machine alone, ended by Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.servers import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def served(animals, tmp_path):
    """`raydr serve` in a process of its own; its port, the process, where it writes, and where Ray does."""
    log, port = (tmp_path / "log").open("w"), free_port()
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the path of a socket has to stay short
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("raydr")), "serve", str(animals), "--port", str(port)],
        env={**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": str(ray_folder)},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 600
        while "Ctrl-C stops" not in (shown := (tmp_path / "log").read_text()):
            assert process.poll() is None and time.monotonic() < deadline, shown[-3000:]
            time.sleep(0.2)
        yield port, process, tmp_path / "log", ray_folder
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_raydr_serve_answers_from_one_replica_and_stops(served):
    import httpx

    port, process, log, ray_folder = served
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        for mode in ("dense", "bm25", "hybrid"):
            hits = http.post("/v1/search", json={"query": "who hunts mice", "mode": mode}).json()["hits"]
            assert {hit["id"] for hit in hits[:2]} == {"cat", "owl"}
        refused = http.post("/v1/search", json={"query": "x", "filters": {"colour": 1}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "filters.colour")
        traced = http.post("/v1/search", json={"query": "x"}, headers={"X-Request-ID": "trace-7"})
        assert (traced.json()["request_id"], traced.headers.get_list("X-Request-ID")) == ("trace-7", ["trace-7"])
        assert "<html" in http.get("/").text
        # HAProxy's front, and the replica's own port behind it.
        assert _listening(port) == {"127.0.0.1"}
        assert _listening_in_range(30000, 30100) <= {"127.0.0.1"}
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "failed" not in log.read_text()  # nothing on the way down looks like an error
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
    (replica_log,) = ray_folder.glob("ray/session_2*/logs/serve/replica_raydr_Ingress_*.log")
    records = [json.loads(line) for line in replica_log.read_text().splitlines()]  # every line is JSON
    assert "trace-7" in {record.get("http_request_id") for record in records}


def _listening(port: int) -> set[str]:
    return _listening_in_range(port, port)


def _listening_in_range(first: int, last: int) -> set[str]:
    """Addresses that TCP sockets of this machine listen on, by port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A" and first <= int(port, 16) <= last:
                is_v4 = len(address) == 8
                found.add(".".join(str(b) for b in reversed(bytes.fromhex(address))) if is_v4 else f"[{address}]")
    return found
