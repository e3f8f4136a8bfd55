"""One worker of the parity test: the same batch under every ZeRO stage, plain and cached; saves the weights it ends at.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 python parity_worker.py OUT

Adam with an epsilon of 1 moves a weight by g / (|g| + 1) in its first step: unlike its usual sign-like step, that is
one-to-one and smooth in the gradient, so equal weights mean equal gradients.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from raydr.methods.contrastive import InBatchContrastive
from raydr.methods.tas_balanced import DualTeacher, TokenTeacher
from raydr.train import grad_cache
from raydr.train.config import TrainConfig
from raydr.train.engine import Engine
from tests.train.tiny import part_of, random_batch, tiny_colbert, tiny_network

CASES = [
    (stage, chunk_tokens, accumulation)
    for stage in (0, 1, 2, 3)
    for chunk_tokens in (None, 40)
    for accumulation in (1, 2)
]
BFLOAT16 = [(stage, chunk_tokens) for stage in (1, 2, 3) for chunk_tokens in (None, 40)]
VARIANTS = {
    "bfloat16": {"precision": "bfloat16"},
    "checkpointed": {"activation_checkpointing": True},
    "decayed": {"layer_decay": 0.5},
}
TAUGHT = [(stage, chunk_tokens) for stage in (0, 2, 3) for chunk_tokens in (None, 40)]
"""With an in-batch teacher, which judges every worker's passages for the queries of all."""


def main(out: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    losses = {}
    cases = [(*case, "") for case in CASES] + [(stage, chunk, 1, "taught") for stage, chunk in TAUGHT]
    cases += [(2, 40, 1, variant) for variant in VARIANTS if variant != "bfloat16"]
    cases += [(stage, chunk, 1, "bfloat16") for stage, chunk in BFLOAT16]
    for stage, chunk_tokens, accumulation, variant in cases:
        is_taught = variant == "taught"
        config = TrainConfig(
            num_workers=world_size,
            batch_size=8,
            zero_stage=stage,
            learning_rate=1.0,
            adam_eps=1.0,
            weight_decay=0.0,
            clip_norm=0.0,
            accumulation_steps=accumulation,
            chunk_tokens=chunk_tokens,
            **VARIANTS.get(variant, {}),
        )
        engine = Engine(tiny_network(), config, is_gpu=False)
        objective = InBatchContrastive(temperature=0.05, symmetric=True)
        if is_taught:
            objective = DualTeacher(pairwise_weight=0.0)
            objective.in_batch_teacher = TokenTeacher(tiny_colbert())
        share = 8 // world_size
        found = []
        for number in range(accumulation):
            own = part_of(random_batch(8, 2 if is_taught else 3, seed=number), rank * share, (rank + 1) * share)
            output = grad_cache.backward(engine, objective, own, chunk_tokens=chunk_tokens, weight=1 / accumulation)
            found.append(float(output.loss))
        engine.step(1.0)
        name = f"stage{stage}-chunk{chunk_tokens}-" + (variant or f"accumulation{accumulation}")
        losses[name] = found
        weights = engine.weights()
        assert (weights is None) == (rank > 0)
        if weights is not None:
            save_file({key: value.contiguous() for key, value in weights.items()}, out / f"{name}.safetensors")
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
