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

    refined = refine(queries, passages, mask, cross_encoder=scores, order=ranks)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydr.config import Config


class FeedbackConfig(Config):
    """How far a query is moved; the paper's values."""

    learning_rate: float = Field(default=0.005, gt=0)
    """Of the cross-encoder's stage."""
    steps: int = Field(default=100, ge=0)
    """Of the cross-encoder's stage."""
    order_learning_rate: float = Field(default=0.001, gt=0)
    """Of the listwise stage."""
    order_steps: int = Field(default=20, ge=0)
    """Of the listwise stage."""


def towards_scores(
    queries: Float[Tensor, "query dim"],
    passages: Float[Tensor, "query group dim"],
    teacher_scores: Float[Tensor, "query group"],
    mask: Bool[Tensor, "query group"],
    config: FeedbackConfig,
) -> Float[Tensor, "query dim"]:
    """Stage A. `mask` is false at padding."""
    low = torch.finfo(torch.float32).min
    target = teacher_scores.masked_fill(~mask, low).log_softmax(dim=1)

    def losses(scores: Tensor) -> Tensor:
        student = scores.masked_fill(~mask, low).log_softmax(dim=1)
        return (functional.kl_div(student, target, reduction="none", log_target=True) * mask).sum(dim=1)

    return _moved(queries, passages, teacher_scores, mask, losses, config.learning_rate, config.steps)


def towards_order(
    queries: Float[Tensor, "query dim"],
    passages: Float[Tensor, "query group dim"],
    teacher_scores: Float[Tensor, "query group"],
    ranks: Int[Tensor, "query group"],
    mask: Bool[Tensor, "query group"],
    config: FeedbackConfig,
) -> Float[Tensor, "query dim"]:
    """Stage B. `ranks` are the teacher's, from 1; `teacher_scores` give the scale alone: the scores of the first search
    handed out in the new order, or the teacher's own.
    """
    is_pair = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    weights = is_pair / (ranks[:, :, None] + ranks[:, None, :])
    num_pairs = is_pair.sum(dim=(1, 2)).clamp(min=1)

    def losses(scores: Tensor) -> Tensor:
        return (functional.softplus(scores[:, None, :] - scores[:, :, None]) * weights).sum(dim=(1, 2)) / num_pairs

    return _moved(queries, passages, teacher_scores, mask, losses, config.order_learning_rate, config.order_steps)


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
