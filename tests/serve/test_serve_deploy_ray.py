"""`serve deploy serve_configs/search.yaml` on a cluster that `ray start` made, with keys, as operations.md has it."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from raydr.config import read_yaml
from tests.servers import free_port, free_ports, wait_until_ready

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SEARCH = Path(__file__).parents[2] / "serve_configs" / "search.yaml"


@pytest.fixture
def cluster(tmp_path):
    """A head node of its own: the environment to talk to it in."""
    gcs, dashboard, *others = free_ports(7)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the path of a socket has to stay short
    names = (
        "ray-client-server-port",
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
        "metrics-export-port",
        "runtime-env-agent-port",
    )
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "RAY_AUTH_MODE": "token",
        "RAYDR_API_KEYS": str(tmp_path / "keys.yaml"),
        "HOME": str(tmp_path),  # where the cluster leaves its token
    }
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=3"),
        *(f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"),
        *(f"--{name}={port}" for name, port in zip(names, others, strict=True)),
    ]
    (tmp_path / ".ray").mkdir()
    subprocess.run([command[0], "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    yield {**environment, "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}"}, process
    for part in psutil.Process(process.pid).children(recursive=True):  # SIGTERM would have Ray wait half a minute
        with suppress(psutil.NoSuchProcess):  # one ends with another
            part.kill()
    process.kill()
    process.wait()
    log.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_the_config_for_several_callers_is_deployed_and_wants_keys(cluster, animals, tmp_path):
    import httpx

    environment, process = cluster
    made = subprocess.run(
        [sys.executable, "-m", "raydr.serve.auth", "alice"], env=environment, capture_output=True, text=True, check=True
    )
    (tmp_path / "keys.yaml").write_text(made.stdout)
    key = made.stderr.split()[-1]
    config, port = read_yaml(SEARCH), free_port()  # the file as it is, but for the port and the index
    config["http_options"]["port"] = port
    application = config["applications"][0]
    application["args"]["index"] = str(animals)
    application["deployments"][0]["user_config"]["index"] = str(animals)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).with_name("serve"))
    deadline = time.monotonic() + 300
    while (done := subprocess.run([serve, "deploy", str(tmp_path / "search.yaml")], env=environment)).returncode:
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        assert time.monotonic() < deadline, done
        time.sleep(2)  # until the dashboard listens
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        wait_until_ready(f"{http.base_url}/ready", process, tmp_path / "log")
        body = {"query": "who hunts mice", "mode": "hybrid"}
        assert http.post("/v1/search", json=body).status_code == 401
        answer = http.post("/v1/search", json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
        assert {hit["id"] for hit in answer.json()["hits"][:2]} == {"cat", "owl"}

        # Another key, for a part of the index, in the place of the first one; no replica restarts for it.
        made = subprocess.run(
            [sys.executable, "-m", "raydr.serve.auth", "bob"], capture_output=True, text=True, check=True
        )
        (tmp_path / "keys.yaml").write_text(f"{made.stdout}    filters: {{kind: farm}}\n")
        application["deployments"][0]["user_config"]["keys_as_of"] = 1
        (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
        subprocess.run([serve, "deploy", str(tmp_path / "search.yaml")], env=environment, check=True)
        tenant = {"Authorization": f"Bearer {made.stderr.split()[-1]}"}
        deadline = time.monotonic() + 180
        while (answer := http.post("/v1/search", json=body, headers=tenant)).status_code == 401:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        for mode in ("dense", "bm25", "hybrid"):
            answer = http.post("/v1/search", json={**body, "mode": mode, "query": "animal milk honey"}, headers=tenant)
            assert {hit["id"] for hit in answer.json()["hits"]} == {"cow", "bee"}, answer.text
        assert http.post("/v1/search", json=body, headers={"Authorization": f"Bearer {key}"}).status_code == 401
