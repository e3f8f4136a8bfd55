"""sentence-transformers' trainer on the batches of benchmarks/training.py; prints losses and seconds as JSON.

python benchmarks/peers/st_training.py FOLDER SCRATCH '{"batch": 16, "steps": 9, "mini_batch": 16}'
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds, self.losses, self._started = [], [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


class InOrder(SentenceTransformerTrainer):
    def get_batch_sampler(self, dataset, batch_size, drop_last, **kwargs):
        return torch.utils.data.BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def main(folder: Path, scratch: Path, settings: dict) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = json.loads((folder / "rows.json").read_text())
    columns = ["anchor", "positive", *(f"negative_{n}" for n in range(1, len(rows[0]) - 1))]
    dataset = Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
    model = SentenceTransformer(
        str(folder / "model"), device="cuda" if settings.get("gpu") else "cpu", local_files_only=True
    )
    model.max_seq_length = 128
    if "mini_batch" in settings:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=settings["mini_batch"])
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    clock = Clock()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(scratch / "st"),
        per_device_train_batch_size=settings["batch"],
        max_steps=settings["steps"],
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=settings.get("bf16", False),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not settings.get("gpu"),
    )
    InOrder(model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[clock]).train()
    print(json.dumps({"losses": clock.losses, "seconds": clock.seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
