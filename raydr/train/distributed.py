"""The batch of all workers in each of them, with exact gradients and no communication in the backward pass.

Notable: every worker computes the loss of the whole joined batch, but only its own rows carry a gradient; the workers'
gradients of the weights then add up to the gradient of that loss. DeepSpeed averages over workers, so the loss is
multiplied by their number. Any loss is exact in this way, also one that compares across queries of
different workers, and nothing about it has to be known here; the price is that the loss, which is small beside the
network, is computed by everyone.

    queries, passages = join(own_queries), join(own_passages)
    (loss(queries, passages) * num_workers()).backward()
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raydr.train.objective import Labels, Tokens


def num_workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def join(own: Tensor) -> Tensor:
    """The rows of all workers in the order of their ranks; the own ones are `own` itself, with its gradient.

    Every worker must give the same number of rows.
    """
    if num_workers() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(num_workers())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[worker_rank()] = own
    return torch.cat(parts)


def all_parts(own: Tensor) -> list[Tensor]:
    """Every worker's rows, which may differ in number; without gradients."""
    if num_workers() == 1:
        return [own]
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(num_workers())]
    dist.all_gather(counts, torch.tensor([len(own)], device=own.device))
    sizes = [int(count) for count in counts]
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def join_labels(own: Labels) -> Labels:
    """The labels of the joined batch."""
    if num_workers() == 1:
        return own
    widest = most_of_all_workers(own.positive_rows.shape[1], own.positive_rows.device)
    padded = torch.nn.functional.pad(own.positive_rows, (0, widest - own.positive_rows.shape[1]), value=-1)
    changes: dict[str, Any] = {"positive_rows": join(padded), "passage_rows": join(own.passage_rows)}
    for field in ("teacher_scores", "clusters"):
        value = getattr(own, field)
        changes[field] = None if value is None else join(value)
    return dataclasses.replace(own, **changes)


def join_tokens(own: Tokens) -> Tokens:
    """The texts of the joined batch, padded to the longest of them."""
    if num_workers() == 1:
        return own
    missing = most_of_all_workers(own.ids.shape[1], own.ids.device) - own.ids.shape[1]
    ids, mask = (torch.nn.functional.pad(part, (0, missing)) for part in (own.ids, own.full_mask))
    return Tokens(join(ids), join(mask), side=own.side)


def mean_over_workers(values: dict[str, float]) -> dict[str, float]:
    """The mean of every figure; all workers must give the same names."""
    if num_workers() == 1 or not values:
        return values
    names = sorted(values)
    summed = torch.tensor([values[name] for name in names], dtype=torch.float64)
    summed = summed.to(_device())
    dist.all_reduce(summed)
    return dict(zip(names, (summed / num_workers()).tolist(), strict=True))


def most_of_all_workers(value: int, device: torch.device) -> int:
    """The highest of the workers' values."""
    if num_workers() == 1:
        return value
    highest = torch.tensor(value, device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest)


def _device() -> torch.device:
    is_cuda = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
