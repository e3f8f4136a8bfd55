"""A training whose disk is full when it checkpoints, then has room again. Run by `test_full_disk.py`.

The disk is a tmpfs in a mount namespace of this process, which the Ray that it starts is in as well.

    unshare --mount --map-root-user python tests/storage/full_disk_in_training.py FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from raydr.artifacts import file_sha256, open_artifact
from raydr.config import Component
from raydr.methods.contrastive import Contrastive
from raydr.train.config import TrainConfig
from raydr.train.metrics import METRICS, read_metrics
from raydr.train.trainer import train_model
from tests.storage.full_disk import fill, refused
from tests.train.tiny import SETTINGS, tiny_checkpoint, write_topic_examples

DISK_BYTES = 128 << 20
FULL_AT = 5
"""The step at which the disk is full; the checkpoint of step 4 is there, that of step 6 has no room."""


class Filling(Contrastive):
    """Fills the disk that `FILLED_DISK` names at one step, where a file there asks for it."""

    def build_objective(self) -> Any:
        objective = super().build_objective()
        loss, steps = objective.loss, [0]

        def filling(*arguments: Any, **named: Any) -> Any:
            steps[0] += 1
            disk = Path(os.environ["FILLED_DISK"])
            if steps[0] == FULL_AT and (disk / "armed").exists():
                while len(list(disk.glob("out/train/.ray_train/*/checkpoint_*/state"))) > 1:
                    time.sleep(0.02)  # Ray Train removes the one before the last beside the training
                fill(disk)
            return loss(*arguments, **named)

        objective.loss = filling
        return objective


def main(folder: Path) -> None:
    import ray

    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=True)
    examples = write_topic_examples(folder / "examples")
    args = {"model": str(tiny_checkpoint(folder / "checkpoint")), "num_negatives": 2, "precision": "float32"}
    method = Component(import_path="tests.storage.full_disk_in_training:Filling", args=args)
    config = TrainConfig(**{**SETTINGS, "num_workers": 1, "max_steps": 8, "checkpoint_every": 2, "max_failures": 0})
    os.environ["FILLED_DISK"] = str(disk)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    whole = train_model(method, config, examples, folder / "whole")
    out = disk / "out/train"
    (disk / "armed").touch()
    found = {"full": refused(lambda: train_model(method, config, examples, out))}
    found["then"] = refused(lambda: open_artifact(out))
    found["checkpoints"] = len(list(out.glob(".ray_train/*/checkpoint_*/state/mp_rank_00_model_states.pt")))
    found["scratch"] = [folder.name for folder in out.glob(".last.*")]
    for name in ("armed", "filler"):
        (disk / name).unlink()
    again = train_model(method, config, examples, out)
    found["same"] = all(
        file_sha256(again.path / name) == file_sha256(whole.path / name)
        for name in whole.manifest.files
        if name.startswith("model/")
    )
    found["steps"] = [record["step"] for record in read_metrics(out / METRICS) if "loss" in record]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
