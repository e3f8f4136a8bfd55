"""The RayJobs' entrypoints as jobs on several real Ray nodes, which cluster/local.sh starts.

Notable: what is submitted is the manifest's own command; only the paths of the image and the storage are exchanged for
the checkout and a folder, and GPUs left out. The jobs share their folder as they do on the storage, so each starts from
what another left, and the whole costs little more than one of them. Training and reranking, which want what two cores
do not have, show their configuration only.

    pytest tests/cluster/test_jobs.py
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from cluster.render import HERE, ROOT, read_values
from raydr.artifacts import MANIFEST
from tests.conftest import write_beir
from tests.jobs import submitted_to

pytestmark = [pytest.mark.ray, pytest.mark.slow]

VALUES = read_values()
SPREAD = """
import ray, time

@ray.remote(num_cpus=1, scheduling_strategy="SPREAD", label_selector={"raydr/group": "cpu"})
def node():
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

ray.init()
print("nodes:", len(set(ray.get([node.remote() for _ in range(4)]))))
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared storage, with a corpus where the manifests have theirs."""
    folder = tmp_path_factory.mktemp("storage")
    (folder / "data").mkdir()
    write_beir(folder / "data/scifact")
    return folder


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """A head and two workers; the environment in which `ray` finds them, with a home (Ray's token) of its own."""
    home = Path(tempfile.mkdtemp(prefix="raydr-"))  # not pytest's folder: Ray's sockets want short paths
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = {"HOME": str(home), "PATH": path, "RAYDR_LOCAL": f"{home}/c", "RAYDR_LOCAL_PORT": str(port)}
    script = ["sh", str(HERE / "local.sh")]
    try:
        environment = {**os.environ, **place}
        up = subprocess.run([*script, "up", "2"], env=environment, capture_output=True, text=True, timeout=800)
        assert up.returncode == 0, up.stderr
        yield place | dict(word.split("=", 1) for word in shlex.split(up.stdout) if "=" in word)
    finally:
        subprocess.run([*script, "down"], env={**os.environ, **place}, check=True, timeout=300)
        shutil.rmtree(home)


def test_no_folder_is_removed_that_was_not_made(tmp_path):
    (tmp_path / "mine").write_text("stays", encoding="utf-8")
    place = {**os.environ, "RAYDR_LOCAL": str(tmp_path)}
    down = subprocess.run(["sh", str(HERE / "local.sh"), "down"], env=place, capture_output=True, text=True)
    assert down.returncode == 1 and "left alone" in down.stderr
    assert (tmp_path / "mine").exists()


def output_of(job: subprocess.CompletedProcess[str]) -> str:
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-4000:]
    return job.stdout


def entrypoint(verb: str, storage: Path) -> tuple[str, list[str]]:
    """The script and settings of a RayJob, with this machine's paths."""
    manifest = next(yaml.safe_load_all((HERE / f"ray-job.{verb}.yaml").read_text(encoding="utf-8")))
    command = manifest["spec"]["entrypoint"].replace(VALUES["code"], str(ROOT))
    _, script, *settings = shlex.split(command.replace(VALUES["storage"]["path"], str(storage)))
    return script, [*settings, "embed.worker_gpus=0", "embed.num_workers=[1,1]"]


def test_the_jobs_do_on_several_nodes_what_their_manifests_say(nodes, storage, tmp_path):
    out = storage / "runs/zero_shot"

    def made() -> dict[str, int]:
        return {file.parent.name: file.stat().st_mtime_ns for file in out.glob(f"*/{MANIFEST}")}

    def run(verb: str, *more: str) -> str:
        script, settings = entrypoint(verb, storage)
        return output_of(submitted_to(nodes, script, [*settings, *more]))

    run("embed")
    embedded = made()
    assert embedded.keys() == {"corpus", "embed"}
    run("reproduce")
    whole = made()
    assert whole.keys() == {"corpus", "embed", "index", "search", "evaluate"}
    assert whole.items() >= embedded.items()  # what the first job had finished was not made anew
    (tmp_path / "spread.py").write_text(SPREAD, encoding="utf-8")
    with ThreadPoolExecutor() as at_once:
        shown = at_once.map(lambda verb: run(verb, "--dry-run"), ["train", "rerank"])
        spread = at_once.submit(submitted_to, nodes, str(tmp_path / "spread.py"), [])
        for verb in ("index", "evaluate"):  # they find their work done: their manifests name the same run
            run(verb)
        assert made() == whole
        assert all(f"out: {storage}" in text for text in shown)
        assert "nodes: 2\n" in output_of(spread.result())
    assert {"embed", "reproduce", "index", "evaluate", "train", "rerank"} == VALUES["jobs"].keys()
