"""Training as people start it: as a job on a cluster, and by a command that is killed and given again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydr.artifacts import MANIFEST, open_artifact
from raydr.config import Component
from raydr.train.trainer import read_metrics
from tests.jobs import submitted
from tests.train.tiny import tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
PLAYERS = ("ranker", "retriever")


def started(settings: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`jobs/train.py` as a process of its own, which starts a cluster of its own."""
    command = [sys.executable, "jobs/train.py", *settings]
    with log.open("ab") as stream:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=stream, stderr=stream, start_new_session=True)


def finished(settings: list[str], log: Path) -> None:
    assert started(settings, log).wait(timeout=300) == 0, log.read_text()[-3000:]


def killed_at(step: int, metrics: Path, settings: list[str], log: Path) -> int:
    """SIGKILL for the driver and everything it started, once `metrics` is at `step`; the step it had reached."""

    def reached() -> int:
        return max((int(record["step"]) for record in read_metrics(metrics)), default=0)

    process = started(settings, log)
    deadline = time.monotonic() + 300
    while reached() < step:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not metrics.with_name(MANIFEST).exists()
    return reached()


def test_ar2_that_was_killed_ends_as_one_that_was_a_job(tiny_beir, tmp_path, ray_cluster):
    """Two rounds as a submitted job, which searches with what it learned; then, in another folder, its second round
    once more, killed inside and given again: the same two models, by the curve of a ranker that nobody disturbed, and
    nothing of the first round anew.
    """
    for split in ("train", "dev"):
        (tiny_beir / f"qrels/{split}.tsv").write_text((tiny_beir / "qrels/test.tsv").read_text())
    model = tiny_checkpoint(tmp_path / "model")
    ranker = "{import_path: 'raydr.methods.cross_encoder:CrossEncoderRanker', args: {model: %s, max_pair_tokens: 48}}"
    settings = [
        "jobs/configs/ar2_small.yaml",
        "runtime=local",
        f"data.path={tiny_beir}",
        f"method.args.model={model}",
        f"method.args.ranker={ranker % model}",
        "method.args.max_passage_tokens=48",
        "method.args.precision=float32",
        "method.args.num_threads=1",
        "method.args.rounds=2",
        "method.args.ranker_warmup_steps=2",
        "method.args.ranker_steps=12",
        "method.args.retriever_steps=3",
        "mine.num_negatives=6",
        "mine.fraction=null",
        "mine.dev_split=dev",
        "index.bm25=null",
        "search.k=10",
        "train.batch_size=2",
        "train.worker_cpus=0.5",
        "train.learning_rate=1.0e-3",
        "train.checkpoint_every=4",
        "train.log_every=1",
    ]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed.log"
    job = submitted(ray_cluster, "jobs/reproduce.py", [*settings, f"out={tmp_path / 'first'}"])
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-4000:]
    learned = Component.model_validate(open_artifact(tmp_path / "first/method").manifest.details["method"]).build()
    searched = open_artifact(tmp_path / "first/embed").manifest.details["encoder_version"]
    assert searched == learned.encoder().version
    assert searched != open_artifact(tmp_path / "first/base/embed").manifest.details["encoder_version"]
    assert open_artifact(tmp_path / "first/embed").manifest.counts["passages"] == 10
    assert json.loads((tmp_path / "first/evaluate/metrics.json").read_text())["RR@10"] > 0
    shutil.copytree(tmp_path / "first", killed)
    (tmp_path / "first").rename(whole)
    for part in ("round-02", "method"):
        shutil.rmtree(killed / part)
    reached = killed_at(17, killed / "round-02/ranker/metrics.jsonl", [*settings, f"out={killed}"], log)
    assert 17 <= reached < 24  # of 24; the second round began at 12 and left a checkpoint at 16
    before = {file: file.stat().st_mtime_ns for file in killed.rglob(MANIFEST)}
    assert {file.parent.name for file in before if "round-01" in file.parts} >= {"ranker", "scores", "retriever"}
    finished([*settings, f"out={killed}"], log)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for name in ("ranker-warmup", *(f"round-0{number}/{player}" for number in (1, 2) for player in PLAYERS)):
        ours, theirs = open_artifact(killed / name), open_artifact(whole / name)
        ours.verify()  # no later step touched a player that stood still
        weights = "model/model.safetensors"
        assert ours.manifest.files[weights] == theirs.manifest.files[weights], name
    curves = (
        {
            record["step"]: record["loss"]
            for record in read_metrics(out / "round-02/ranker/metrics.jsonl")
            if "loss" in record
        }
        for out in (killed, whole)
    )
    assert next(curves) == pytest.approx(next(curves), abs=1e-6)
    figures = [
        [json.loads((out / f"{name}/evaluate/metrics.json").read_text()) for name in ("base", "round-01", "round-02")]
        for out in (killed, whole)
    ]
    assert figures[0] == figures[1]
    method = Component.model_validate(open_artifact(killed / "method").manifest.details["method"]).build()
    indexed = open_artifact(killed / "round-02/index").manifest.details["encoder_version"]
    assert (
        indexed
        == method.encoder().version
        != open_artifact(killed / "round-01/index").manifest.details["encoder_version"]
    )
    assert type(method.build_reranker()).__name__ == "CrossEncoderReranker"
