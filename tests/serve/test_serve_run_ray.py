"""`serve run` itself, in a process of its own: a config file, a cluster that it starts, an answer, Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raydr.config import read_yaml
from tests.servers import free_port, wait_until_ready

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LOCAL = Path(__file__).parents[2] / "serve_configs" / "local.yaml"


def test_serve_run_of_the_local_config_answers_and_stops(animals, tmp_path):
    import httpx

    config, port = read_yaml(LOCAL), free_port()
    config["http_options"]["port"] = port  # the file as it is, but for the port and the index
    config["applications"][0]["args"]["index"] = str(animals)
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(config))
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("serve")), "run", "local.yaml"],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": "local"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{address}/ready", process, tmp_path / "log", timeout_s=600)
        answer = httpx.post(f"{address}/v1/search", json={"query": "who hunts mice", "mode": "hybrid"}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert {hit["id"] for hit in answer.json()["hits"][:2]} == {"cat", "owl"}
        page = httpx.get(f"{address}/", timeout=60)
        files = set(re.findall(r'(?:src|href)="(ui/[^"]+)"', page.text))
        assert len(files) > 1
        assert {httpx.get(f"{address}/{file}", timeout=60).status_code for file in files} == {200}
        process.send_signal(signal.SIGINT)
        process.wait(90)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health", timeout=5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: nobody else's cluster
        log.close()
