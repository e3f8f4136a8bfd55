"""raydr's trainer on the batches of benchmarks/training.py; prints losses and seconds of the steps as JSON.

python benchmarks/peers/raydr_training.py FOLDER SCRATCH '{"batch": 16, "steps": 9}'
"""

import json
import sys
from pathlib import Path

from raydr import runtime
from raydr.config import Component
from raydr.data.examples import ExampleSet
from raydr.encoders.text import available_cpus
from raydr.train.config import TrainConfig
from raydr.train.trainer import read_metrics, train_model

sys.path.insert(0, str(Path(__file__).parent))
import in_order


def main(folder: Path, scratch: Path, settings: dict) -> None:
    runtime.connect(dashboard=False)
    args = {"model": str(folder / "model"), "num_negatives": 3, "max_query_tokens": 128, "max_passage_tokens": 128}
    method = Component(import_path="in_order:InOrder", args=args)
    config = TrainConfig(
        batch_size=settings["batch"],
        max_steps=settings["steps"],
        chunk_tokens=settings.get("chunk_tokens"),
        num_workers=settings.get("num_workers", 1),
        worker_cpus=float(settings.get("worker_cpus", available_cpus())),
        worker_gpus=float(settings.get("gpu", False)),
        zero_stage=settings.get("zero_stage", 1),
        precision=settings.get("precision", "float32"),
        learning_rate=2e-5,
        warmup_share=0.0,
        schedule="constant",
        clip_norm=1.0,
        log_every=1,
    )
    model = train_model(method, config, ExampleSet.open(folder / "examples"), scratch / "train")
    records = [record for record in read_metrics(model.path / "metrics.jsonl") if "loss" in record]
    losses, rates = [r["loss"] for r in records], [r["steps_per_s"] for r in records]
    print(json.dumps({"losses": losses, "seconds": [1 / rate for rate in rates]}))


if __name__ == "__main__":
    assert in_order.__file__
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
