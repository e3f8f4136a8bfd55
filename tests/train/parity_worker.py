"""One worker of the parity test: the same batch under every ZeRO stage, plain and cached; saves the weights it ends at.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 python parity_worker.py OUT

Adam with an epsilon of 1 moves a weight by g / (|g| + 1) in its first step: unlike its usual sign-like step, that is
one-to-one and smooth in the gradient, which `gradients` therefore reads off the weights.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from raydr.methods.ar2 import Adversarial, Ar2Config
from raydr.methods.contrastive import InBatchContrastive
from raydr.methods.cross_encoder import Ranking
from raydr.methods.mw import MannWhitney
from raydr.methods.tas_balanced import DualTeacher, TokenTeacher
from raydr.methods.vdr import VdrConfig, VocabularyContrastive
from raydr.train import grad_cache
from raydr.train.config import TrainConfig
from raydr.train.distributed import mean_over_workers
from raydr.train.engine import Engine
from raydr.train.objective import EmbeddingObjective, TrainBatch
from tests.train.tiny import (
    as_pairs,
    part_of,
    random_batch,
    tiny_colbert,
    tiny_cross_encoder,
    tiny_network,
    tiny_towers,
)

CASES = [
    (stage, chunk_tokens, accumulation)
    for stage in (0, 1, 2, 3)
    for chunk_tokens in (None, 40)
    for accumulation in (1, 2)
]
BFLOAT16 = [(stage, chunk_tokens) for stage in (1, 2, 3) for chunk_tokens in (None, 40)]
CLIP_NORM = 0.1
VARIANTS = {
    "bfloat16": {"precision": "bfloat16"},
    "checkpointed": {"activation_checkpointing": True},
    "decayed": {"layer_decay": 0.5},
    "clipped": {"clip_norm": CLIP_NORM},
}
TAUGHT = [(stage, chunk_tokens) for stage in (0, 2, 3) for chunk_tokens in (None, 40)]
"""With an in-batch teacher, which judges every worker's passages for the queries of all."""
SPLIT = (0, 2, 3)
"""ZeRO stages of the cases that do not depend on caching."""
LABELLED = ("mw-mean", "mw-paper", "mw-cluster", "pair-teacher", "both-teachers", "ar2")
"""Losses that compare across queries, and those that need what a batch knows beside its texts; AR2's is of
each worker's own queries, not of the joined batch."""
LABELLED_CASES = [(name, stage, chunk_tokens) for name in LABELLED for stage, chunk_tokens in ((0, None), (2, 40))]

TOWERS = [(stage, chunk_tokens) for stage in (0, 2, 3) for chunk_tokens in (None, 40)]
"""Two towers, and a loss that reads the texts of the joined batch (VDR's)."""


def gradients(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient of every weight, from where the step began and where it ended."""
    moves = {name: value - end[name] for name, value in start.items()}
    return {name: move / (1 - move.abs()) for name, move in moves.items()}


def objective_of(variant: str) -> EmbeddingObjective:
    if variant.startswith("mw"):
        return MannWhitney(
            temperature=10.0 if variant == "mw-paper" else 0.1,  # whose sum over the pool makes gradients large
            reduction="paper" if variant == "mw-paper" else "mean",
            within="cluster" if variant == "mw-cluster" else "batch",
            chunk_size=3,
        )
    if variant == "vdr":
        config = VdrConfig(semi=True, contrastive_mask=True, train_topk=8, sides="mean")
        return VocabularyContrastive(config, shift=5, normalize=False, special=[])
    if variant == "ar2":
        return Adversarial(Ar2Config(score_scale=5.0))
    if variant in ("taught", "pair-teacher", "both-teachers"):
        weights = {"taught": (0.0, 0.75), "pair-teacher": (1.0, 0.0), "both-teachers": (1.0, 0.75)}[variant]
        objective = DualTeacher(pairwise_weight=weights[0], in_batch_weight=weights[1])
        objective.in_batch_teacher = TokenTeacher(tiny_colbert()) if weights[1] else None
        return objective
    return InBatchContrastive(temperature=0.05, symmetric=True)


def batch_of(variant: str, number: int) -> TrainBatch:
    """Eight queries, with a teacher's scores and with clusters that both workers have queries of."""
    group = 2 if "taught" in variant or "teacher" in variant else 3
    batch = random_batch(8, group, seed=number)
    scores = 3 * torch.randn(8, group, generator=torch.Generator().manual_seed(number))
    labels = dataclasses.replace(
        batch.labels, teacher_scores=scores, clusters=torch.tensor([0, 1, 0, 2, 1, 0, 2, 1]) + number
    )
    if variant == "vdr":
        queries, passages = batch.sides
        queries, passages = queries._replace(side="query"), passages._replace(side="passage")
        batch = dataclasses.replace(batch, queries=queries, passages=passages)
    return dataclasses.replace(batch, labels=labels)


def own_part(batch: TrainBatch, start: int, end: int) -> TrainBatch:
    """One worker's share, labels included."""
    part, whole = part_of(batch, start, end), batch.labels
    labels = dataclasses.replace(
        part.labels, teacher_scores=whole.teacher_scores[start:end], clusters=whole.clusters[start:end]
    )
    return dataclasses.replace(part, labels=labels)


def resumed_apart(stage: int, rank: int, world_size: int, out: Path) -> float:
    """The largest difference of a weight after two steps in bfloat16 with a checkpoint between them, and without."""
    config = TrainConfig(num_workers=world_size, batch_size=8, zero_stage=stage, precision="bfloat16", clip_norm=0.1)
    share = 8 // world_size

    def step(engine: Engine, number: int) -> None:
        own = own_part(batch_of("", number), rank * share, (rank + 1) * share)
        grad_cache.backward(engine, objective_of(""), own, chunk_tokens=None)
        engine.step(1e-3)

    whole, first, second = (Engine(tiny_network(seed=seed), config, is_gpu=False) for seed in (0, 0, 1))
    step(whole, 0)
    step(whole, 1)
    step(first, 0)
    folder = out / f"resumed-{stage}"
    first.save(folder, {"step": 1})
    dist.barrier()
    assert second.load(folder)["step"] == 1
    step(second, 1)
    ends = [engine.weights() for engine in (whole, second)]
    return max((float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0] or {}), default=0.0)


def main(out: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    results = {}
    cases = [(*case, "") for case in CASES] + [(stage, chunk, 1, "taught") for stage, chunk in TAUGHT]
    cases += [(2, 40, 1, variant) for variant in ("checkpointed", "decayed")]
    cases += [(stage, None, 1, variant) for stage in SPLIT for variant in ("pairs", "clipped")]
    cases += [(stage, chunk, 1, "bfloat16") for stage, chunk in BFLOAT16]
    cases += [(stage, chunk, 1, variant) for variant, stage, chunk in LABELLED_CASES]
    cases += [(stage, chunk, 1, "vdr") for stage, chunk in TOWERS]
    for stage, chunk_tokens, accumulation, variant in cases:
        is_pairs = variant == "pairs"
        settings = {"clip_norm": 0.0, **VARIANTS.get(variant, {})}
        config = TrainConfig(
            num_workers=world_size,
            batch_size=8,
            zero_stage=stage,
            learning_rate=1.0,
            adam_eps=1.0,
            weight_decay=0.0,
            accumulation_steps=accumulation,
            chunk_tokens=chunk_tokens,
            **settings,
        )
        build = {"pairs": tiny_cross_encoder, "vdr": tiny_towers}.get(variant, tiny_network)
        engine = Engine(build(), config, is_gpu=False)
        objective = objective_of(variant)
        share = 8 // world_size
        found = []
        for number in range(accumulation):
            own = own_part(batch_of(variant, number), rank * share, (rank + 1) * share)
            if is_pairs:
                output = Ranking("listwise")(engine, as_pairs(own))
                engine.backward(output.loss)
            else:
                output = grad_cache.backward(engine, objective, own, chunk_tokens=chunk_tokens, weight=1 / accumulation)
            found.append(mean_over_workers({"loss": float(output.loss)})["loss"])
        norm = engine.step(1.0)
        name = f"stage{stage}-chunk{chunk_tokens}-" + (variant or f"accumulation{accumulation}")
        results[name] = {"losses": found, "norm": norm}
        weights = engine.weights()
        assert (weights is None) == (rank > 0)
        if weights is not None:
            save_file({key: value.contiguous() for key, value in weights.items()}, out / f"{name}.safetensors")
    results["resumed"] = {str(stage): resumed_apart(stage, rank, world_size, out) for stage in (1, 2, 3)}
    if rank == 0:
        (out / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
