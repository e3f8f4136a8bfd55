"""A bucket: moto's S3 server on localhost, in a process of its own, and the environment that leads there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_port, wait_until_ready

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server; the environment says so, also to processes that tests start."""
    import boto3

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    before = dict(os.environ)
    os.environ.update(VARIABLES, AWS_ENDPOINT_URL=address)
    try:
        wait_until_ready(f"{address}/moto-api/data.json", server, log, timeout_s=120)
        boto3.client("s3").create_bucket(Bucket="raydr-tests")
        yield address
    finally:
        server.terminate()
        server.wait()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def url(s3: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the bucket for this test alone, on a machine (a cache) of its own."""
    monkeypatch.setenv("RAYDR_CACHE", str(tmp_path / "machine"))
    return f"s3://raydr-tests/{request.node.name}"
