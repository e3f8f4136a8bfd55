"""A disk that is full, and one that is read-only: the message names it, nothing half-written counts, and it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
UNSHARED = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What each verb said on such a disk."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        subprocess.run([*UNSHARED, "mount", "-t", "tmpfs", "none", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    command = [*UNSHARED, sys.executable, str(REPOSITORY / "tests/storage/full_disk.py"), str(folder / "run")]
    own = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: {"out": str(folder / "run/disk/out"), **own} for name, own in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", ["corpus", "embed", "index", "search", "examples"])
def test_a_full_disk(found, name):
    said = found[name]
    assert f"{said['out']}/{name}: the disk is full: free some space" in said["full"]
    assert "give the same command again" in said["full"]
    assert "did not finish; run it again" in said["then"]
    assert said["same"] >= {"index": 0.3}.get(name, 1)  # BM25 numbers its words in another order each time


def test_an_index_that_cannot_grow_stays_as_it_was(found):
    said = found["update"]
    assert f"{said['out']}/index: the disk is full" in said["full"]
    assert said["passages"] in (said["was"], said["was"] / 2)


def test_a_read_only_disk(found):
    said = found["read-only"]
    assert said["read"] == 400
    assert f"{said['out']}/s: the disk is read-only" in said["written"]
    assert f"{said['out']}/index: the disk is read-only" in said["changed"]
