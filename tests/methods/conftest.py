"""Fixtures of the tests that run a whole `fit`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import Checkpoint

from raydr.artifacts import MANIFEST
from raydr.data.examples import ExampleSet
from raydr.train import trainer
from raydr.train.loop import LAST, Job


@pytest.fixture
def instant_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a `fit` is the real one, but for what Ray Train does: the weights that a training starts from are
    moved by something that depends on its settings and on its first batch, a teacher's scores included. Pictures are
    files without content: two thirds of the time would go into drawing them.
    """

    def fit(job: Job, storage: Path) -> Any:
        method = job.method.build()
        method.build_objective()
        batches = method.build_batches(ExampleSet.open(job.examples), batch_size=2, seed=job.train.seed)
        torch.manual_seed(job.train.seed)
        network = method.build_model()
        torch.manual_seed(zlib.crc32(f"{job.train} {job.method} {next(iter(batches))}".encode()))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
        method.save_model(network, job.out / LAST)
        (storage / "checkpoint").mkdir(parents=True)
        (storage / "checkpoint/state").write_text(str(job.train.max_steps))
        return Checkpoint.from_directory(str(storage / "checkpoint"))

    monkeypatch.setattr(trainer, "_fit", fit)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).write_bytes(b""))
    monkeypatch.setattr("raydr.steps.runtime.connect", lambda **_: "")


@pytest.fixture
def made() -> Callable[[Path], set[str]]:
    """`made(out)` names the steps in `out` that were made since it was last asked."""
    seen: dict[str, int] = {}

    def new(out: Path) -> set[str]:
        times = {str(file.parent.relative_to(out)): file.stat().st_mtime_ns for file in out.rglob(MANIFEST)}
        changed = {name for name, time in times.items() if seen.get(name) != time}
        seen.update(times)
        return changed

    return new
