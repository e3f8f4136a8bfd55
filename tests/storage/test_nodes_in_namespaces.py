"""embed, train and serve on nodes that are machines to one another, each losing one: cut off, killed, cut off."""

import json
import os
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
QUICK = {  # a machine that says nothing any more is given up after seconds, docs/clusters.md
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "2000",
    "RAY_grpc_client_keepalive_timeout_ms": "2000",
}
SERVE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_that_speak_over_a_network_and_lose_it(tmp_path):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    texts = [f"number {n} of {'many ' * (n % 13)}" for n in range(NUM_PASSAGES)]
    rows = [json.dumps({"_id": f"p{n}", "text": text}) for n, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    scratch = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # short: Ray's sockets lie in it
    own = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    own |= {"PYTHONPATH": str(REPOSITORY), **token, **QUICK, **SERVE}
    try:
        with Machines("head", "a", "b") as machines:
            script = [
                sys.executable,
                "tests/storage/nodes_in_namespaces.py",
                str(os.getpid()),
                str(tmp_path),
                str(scratch),
            ]
            done = subprocess.run(
                machines.inside("head", script), cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=560
            )
        assert done.returncode == 0, done.stderr[-6000:]
    finally:
        if os.environ.get("KEEP"):
            print(scratch, done.stderr[-5000:])
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
