"""Better query embeddings from a reranker's opinion, at inference: the query moves, nothing else.

A teacher has scored the passages of a first search. The query's embedding is moved by gradient descent until the scores
it gives these passages agree with the teacher's, and searches again: what lies near the good ones is found too.

| stage | teacher | loss of P q, scaled by c / 2 |
| --- | --- | --- |
| A | a cross-encoder's scores t | KL(softmax(t) || softmax(c/2 P q)), 100 steps of Adam, rate 0.005 |
| B | a listwise reranker's order | weighted RankNet(c/2 P q, ranks), 20 steps of Adam, rate 0.001 |

c is the range of the teacher's scores over the range of P q at the start of the stage, fixed afterwards. Source: FIRST
(arXiv 2406.15657) section on relevance feedback, its released code; the idea is ReFIT's (arXiv 2305.11744).

Notable: all queries move at once, each with Adam's own state; a query whose scores have no range, or without passages,
stays where it is (the released code divides by zero, and loses the query).

    queries = towards_scores(queries, passages, cross_encoder_scores, mask)
    queries = towards_order(queries, passages, scores_in_new_order, ranks, mask)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from raydr.losses import ranknet_per_group


def towards_scores(
    queries: Float[Tensor, "query dim"],
    passages: Float[Tensor, "query group dim"],
    teacher_scores: Float[Tensor, "query group"],
    mask: Bool[Tensor, "query group"],
    *,
    learning_rate: float = 0.005,
    steps: int = 100,
) -> Float[Tensor, "query dim"]:
    """Stage A. `mask` is false at padding."""
    low = torch.finfo(torch.float32).min
    target = teacher_scores.masked_fill(~mask, low).log_softmax(dim=1)

    def losses(scores: Tensor) -> Tensor:
        student = scores.masked_fill(~mask, low).log_softmax(dim=1)
        return (functional.kl_div(student, target, reduction="none", log_target=True) * mask).sum(dim=1)

    return _moved(queries, passages, teacher_scores, mask, losses, learning_rate, steps)


def towards_order(
    queries: Float[Tensor, "query dim"],
    passages: Float[Tensor, "query group dim"],
    teacher_scores: Float[Tensor, "query group"],
    ranks: Int[Tensor, "query group"],
    mask: Bool[Tensor, "query group"],
    *,
    learning_rate: float = 0.001,
    steps: int = 20,
) -> Float[Tensor, "query dim"]:
    """Stage B. `ranks` are the teacher's, from 1; `teacher_scores` give the scale alone: the scores of the first search
    handed out in the new order, or the teacher's own.
    """

    def losses(scores: Tensor) -> Tensor:
        return ranknet_per_group(scores, ranks, mask)

    return _moved(queries, passages, teacher_scores, mask, losses, learning_rate, steps)


def _moved(
    queries: Tensor,
    passages: Tensor,
    teacher_scores: Tensor,
    mask: Tensor,
    losses: Callable[[Tensor], Tensor],
    learning_rate: float,
    steps: int,
) -> Tensor:
    moving = queries.detach().clone().requires_grad_()
    start = _range(torch.einsum("qgd,qd->qg", passages, queries), mask)
    scale = _range(teacher_scores, mask) / start
    # No range, no direction: such a query gets no gradient, so Adam leaves it alone.
    movable = torch.isfinite(scale) & (scale > 0)
    scale = torch.where(movable, scale, 0.0)
    optimizer = torch.optim.Adam([moving], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = torch.einsum("qgd,qd->qg", passages, moving) * (scale / 2)[:, None]
        (losses(scores) * movable).sum().backward()  # a sum: each query's gradient is its own
        optimizer.step()
    return moving.detach()


def _range(scores: Tensor, mask: Tensor) -> Tensor:
    largest = scores.masked_fill(~mask, float("-inf")).amax(dim=1)
    return largest - scores.masked_fill(~mask, float("inf")).amin(dim=1)
