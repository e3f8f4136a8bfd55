"""Training as people start it: as a job on a cluster, and by a command that is killed and given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydr.artifacts import open_artifact
from raydr.config import Component
from raydr.train.trainer import read_metrics
from tests.train.tiny import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tiny_beir, tmp_path) -> list[str]:
    (tiny_beir / "qrels/train.tsv").write_text((tiny_beir / "qrels/test.tsv").read_text())
    return [
        "jobs/configs/contrastive.yaml",
        f"data.path={tiny_beir}",
        f"method.args.model={tiny_checkpoint(tmp_path / 'model')}",
        "method.args.num_negatives=1",
        "method.args.max_passage_tokens=48",
        "mine.num_negatives=4",
        "mine.fraction=null",
        "index.bm25=null",
        "train.batch_size=2",
        "train.worker_cpus=0.5",
        "train.learning_rate=1.0e-3",
        "train.checkpoint_every=2",
        "train.log_every=1",
    ]


def test_as_a_submitted_job(settings, tmp_path, ray_cluster):
    """It trains, searches with what it learned, and the job's status is the verb's."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address", ray_cluster, "--working-dir", ".", "--", sys.executable]
    command += ["jobs/reproduce.py", *settings, f"out={tmp_path}/out", "train.max_steps=4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert json.loads((tmp_path / "out/evaluate/metrics.json").read_text())["RR@10"] > 0
    method = Component.model_validate(open_artifact(tmp_path / "out/method").manifest.details["method"])
    embedded = open_artifact(tmp_path / "out/embed").manifest.details["encoder_version"]
    assert embedded == method.build().encoder().version
    assert embedded != open_artifact(tmp_path / "out/base/embed").manifest.details["encoder_version"]


def test_a_command_that_was_killed_goes_on_when_it_is_given_again(settings, tmp_path):
    """SIGKILL for the driver and everything it started: the curve is that of a run that nobody disturbed."""

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "jobs/train.py", *settings, f"out={out}", "train.max_steps=10"]
        log = (tmp_path / f"{out.name}.log").open("ab")
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    process = start(killed)
    metrics = killed / "train/metrics.jsonl"
    deadline = time.monotonic() + 200
    while max((record["step"] for record in read_metrics(metrics)), default=0) < 5:
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = max(record["step"] for record in read_metrics(metrics))
    assert not (killed / "train/manifest.json").exists()
    assert start(killed).wait(timeout=300) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    again = {record["step"]: record["loss"] for record in read_metrics(metrics) if "loss" in record}
    once = {
        record["step"]: record["loss"] for record in read_metrics(whole / "train/metrics.jsonl") if "loss" in record
    }
    assert 5 <= reached < 10
    assert again == pytest.approx(once, abs=1e-6)
