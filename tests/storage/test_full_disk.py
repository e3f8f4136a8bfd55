"""A disk that is full, and one that is read-only: the message names it, nothing half-written counts, and it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
UNSHARED = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def run(script: str, folder: Path, *, timeout_s: float) -> dict:
    """What a script found on such a disk, which it has in `folder`."""
    try:
        subprocess.run([*UNSHARED, "mount", "-t", "tmpfs", "none", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {error}")
    command = [*UNSHARED, sys.executable, str(REPOSITORY / "tests/storage" / script), str(folder / "run")]
    own = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed, errors = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
    assert process.returncode == 0, errors[-4000:]
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What each verb said on such a disk."""
    folder = tmp_path_factory.mktemp("disk")
    said = run("full_disk.py", folder, timeout_s=600)
    return {name: {"out": str(folder / "run/disk/out"), **own} for name, own in said.items()}


@pytest.mark.parametrize("name", ["corpus", "embed", "index", "search", "examples", "rerank", "evaluate", "score"])
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


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_on_a_full_disk_goes_on_when_there_is_room(tmp_path):
    """From its last checkpoint, to the weights of one that nothing disturbed."""
    found = run("full_disk_in_training.py", tmp_path, timeout_s=1150)
    out = tmp_path / "run/disk/out/train"
    assert f"the disk of {out} has 0 MB left: free some, and give the command again" in found["full"]
    assert f"{out}: its step did not finish; run it again, it resumes" in found["then"]
    assert found["checkpoints"] == 1
    assert not found["scratch"]
    assert found["same"]
    assert found["steps"] == list(range(1, 9))
