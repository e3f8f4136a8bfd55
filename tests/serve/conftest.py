"""Two real indexes of different content, shards and encoders, and the whole serving path in one process.

Notable: `client` is the application without Ray: the same Searcher over the same Encoder, Shard and Bm25 objects that
Serve would put into replicas; the tests of the HTTP contract need nothing else. Tests marked `ray` start Serve.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# `tiny_serving` is named by import path, as a user's own reranker would be.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_pictures import build_pictures
from tiny_serving import ANIMALS, INSTRUMENTS, build_run

from raydr.config import Component


@pytest.fixture(scope="session")
def animals(tmp_path_factory) -> Path:
    """Six animals in two shards, 384 dimensions."""
    return build_run(tmp_path_factory.mktemp("serve") / "animals", ANIMALS, num_shards=2)


@pytest.fixture(scope="session")
def instruments(tmp_path_factory) -> Path:
    """Seven instruments in three shards, 128 dimensions: another encoder version."""
    return build_run(tmp_path_factory.mktemp("serve") / "instruments", INSTRUMENTS, num_shards=3, dimensions=128)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Words, pictures, and both, in two shards, by an encoder of colours."""
    method = Component(import_path="tiny_pictures:Colours")
    return build_pictures(tmp_path_factory.mktemp("serve") / "pictures", method)


@pytest.fixture(scope="session")
def serve_in_process(animals) -> Callable[..., Any]:
    """`serve_in_process(limits=..., api_keys=[...])` is a test client of the whole application over `animals`."""
    from starlette.testclient import TestClient

    from raydr.serve.colocated import colocated_searcher
    from raydr.serve.config import AppArgs
    from raydr.serve.http import build_http

    def start(*, base_url: str = "http://127.0.0.1", index: Path = animals, **values: Any) -> TestClient:
        args = AppArgs(index=index, **values)
        searcher = colocated_searcher(args, num_shard_deployments=2)
        client = TestClient(build_http(searcher, args), base_url=base_url)
        client.__enter__()  # one event loop for the loading below and all requests
        client.portal.call(searcher.use, str(index))
        client.searcher = searcher
        return client

    return start


@pytest.fixture(scope="session")
def client(serve_in_process) -> Any:
    """A client of the application with default settings."""
    client = serve_in_process()
    yield client
    client.__exit__()


CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]  # the rest is Playwright's default


@pytest.fixture(scope="module")
def browser() -> Any:
    """A real Chromium; skipped where there is none, failed for it in CI. Not for the session: while Playwright is at
    work no other test could run an event loop.
    """
    if CHROMIUM is None:
        missing = "no Chromium (apt-get install chromium, or its path in CHROMIUM)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()
