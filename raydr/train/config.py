"""Settings of a training run, whatever the method: batches, optimiser, DeepSpeed, checkpoints, evaluation.

Notable: one typed schema, in raydr's words; `raydr/train/engine.py` turns it into DeepSpeed's. A combination that
cannot work is refused here, before anything starts, with the reason and the way out.

    train: {num_workers: 2, batch_size: 64, max_steps: 1000, learning_rate: 2.0e-5, zero_stage: 1}
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from raydr.config import Config
from raydr.runtime import Placement


class LoraConfig(Config):
    """Low-rank adapters (peft) in place of training every weight; they are merged into the weights that are saved."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update of each adapted matrix."""
    alpha: int = Field(default=32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt; null: what peft knows for the architecture."""


class TrainConfig(Placement):
    """One training run. A step is one update of the weights."""

    # --- workers
    num_workers: int = Field(default=1, ge=1)
    """Training processes, each with a model (or, in ZeRO, its part of one)."""
    worker_cpus: float = Field(default=1.0, gt=0)
    """CPUs Ray reserves for each; also its threads."""
    worker_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each; 0 trains on the CPU over gloo, 1 on a GPU over NCCL."""
    max_failures: int = Field(default=3, ge=0)
    """How often Ray Train replaces dead workers and goes on from the last checkpoint."""

    # --- batches
    batch_size: int = Field(default=64, ge=1)
    """Queries in a batch, those of all workers together: whose passages are each other's negatives."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Batches per step. The mean of their gradients is taken; their negatives are not shared."""
    chunk_tokens: int | None = Field(default=None, ge=16)
    """Tokens (padding included) that go through the network at once, with gradient caching, which gives the gradient of
    the whole batch in the memory of one chunk; null: the whole batch at once."""
    max_steps: int = Field(default=1000, ge=1)
    """Steps in all."""
    seed: int = 0
    """Of batches, drawn negatives, dropout and new weights."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of values that are left out at random; null: what the checkpoint is configured with. On CPUs drawing them
    takes long: half of a pass over texts of 192 tokens (`benchmarks/results.md`, W9)."""

    # --- optimiser
    learning_rate: float = Field(default=2e-5, gt=0)
    """Highest learning rate (AdamW)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What follows the warm-up: down to zero in a line, in half a cosine, or not at all."""
    warmup_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps in which the learning rate rises from zero."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Steps over which the schedule stretches; null: `max_steps`. More of them where a run is one part of many."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Not applied to biases and normalisation weights."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's averages of gradients and of their squares."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second average."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a layer relative to that of the one above it; 1: the same everywhere."""

    # --- DeepSpeed
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; in bfloat16 the optimiser keeps float32 copies."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is split over the workers: 0 nothing, 1 the optimiser's state, 2 the gradients too, 3 the weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the host's memory instead of the GPU's: the optimiser's state, or the weights as well."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""

    # --- evaluation and checkpoints
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between two evaluations on the dev examples; 0: only at the end, where there are any."""
    metric: Literal["nDCG@10", "RR@10", "R@100"] = "nDCG@10"
    """What decides which weights are the best."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without a gain after which training stops; 0: never."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two checkpoints: what a dead worker costs at most."""
    keep: Literal["best", "last"] = "best"
    """Which weights are handed on: the best by `metric` (where there is an evaluation), or the last."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of the metrics."""

    @model_validator(mode="after")
    def _possible(self) -> TrainConfig:
        if self.batch_size % self.num_workers:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared evenly by {self.num_workers} workers; "
                f"take {self.batch_size // self.num_workers * self.num_workers or self.num_workers}"
            )
        if self.num_workers > 1 and self.worker_gpus % 1:
            raise ValueError(
                f"worker_gpus {self.worker_gpus:g}: NCCL lets no two workers share a GPU; set worker_gpus: 1, or "
                "num_workers: 1"
            )
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs ZeRO: set zero_stage to 1 or more (3 for offload: all)")
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "in bfloat16 the float32 weights are kept by ZeRO's optimiser; set zero_stage: 1, which on one worker "
                "splits nothing"
            )
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("offload: all moves the weights, which only zero_stage 3 splits; set zero_stage: 3")
        if self.offload != "none" and not self.worker_gpus:
            raise ValueError("offload moves state from a GPU to the host; without worker_gpus it is there already")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts evaluations; set evaluate_every")
        if self.schedule_steps is not None and self.schedule_steps < self.max_steps:
            raise ValueError(
                f"schedule_steps ({self.schedule_steps}) must not be less than max_steps ({self.max_steps})"
            )
        return self

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0), before `layer_decay`."""
        total = self.schedule_steps or self.max_steps
        warmup = round(self.warmup_share * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warmup) / max(1, total - warmup)
        factor = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * factor
