"""embed, train and serve on nodes that are machines to one another, each losing one: cut off, killed, cut off.

RAYDR_FIRE=1 pytest tests/storage/test_nodes_in_namespaces.py -s       root, iproute2; prints what it found
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.machines import Machines, why_not

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_PASSAGES = 400
QUICK = {  # a machine that says nothing any more is given up after seconds, docs/reliability.md
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
}
ONE_MEMORY = {"RAY_memory_monitor_refresh_ms": "0"}  # no node is to act on what others on this machine take
SERVE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "8",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
}


LOST = {"ConnectError", "ConnectTimeout", "ReadError", "RemoteProtocolError"}
"""What httpx calls a connection that a dying replica or HAProxy takes along; such a request is sent again."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("RAYDR_FIRE" not in os.environ, reason="minutes of two cores; RAYDR_FIRE=1 asks for it")
def test_nodes_that_speak_over_a_network_and_lose_it(tmp_path):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    texts = [f"number {n} of {'many ' * (n % 13)}" for n in range(NUM_PASSAGES)]
    rows = [json.dumps({"_id": f"p{n}", "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    scratch = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # short: Ray's sockets lie in it
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own |= {"PYTHONPATH": str(REPOSITORY), **token, **QUICK, **ONE_MEMORY, **SERVE}
    script = [sys.executable, "tests/storage/nodes_in_namespaces.py", str(os.getpid()), str(tmp_path), str(scratch)]
    try:
        with Machines("head", "a", "b") as machines:
            done = subprocess.run(
                machines.inside("head", script), cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=1750
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stdout)  # the figures of docs/reliability.md, with -s
    found = json.loads(done.stdout.splitlines()[-1])

    embedding, training, serving = found["embedding"], found["training"], found["serving"]
    assert embedding["passages"] == NUM_PASSAGES
    assert embedding["bit-equal"]
    assert embedding["given up and gone after"] < 60

    assert training["steps"] == list(range(1, 25))
    assert training["bit-equal"]

    for name, may_be in (("error", set()), ("partial", {"partial"})):
        said = serving[name]
        assert said["before"] == ["right"]
        others = {kind for kind in said["outcomes"] if re.fullmatch(r"50[34] \w+, again", kind) is None}
        assert "right" in others <= {"right", *LOST, *may_be}
        assert said["slowest"] < 20  # HAProxy gives a machine up that is silent, after 8 s
