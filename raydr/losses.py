"""Formulas shared by several papers, side by side, on score matrices. They know no model, no file and no cluster.

Notable: a score is larger for a better passage and is divided by `temperature`; `positives` is a boolean matrix, so one
positive, many positives and a passage that occurs twice in the batch are the same input; every loss is a mean over
queries and computed in float32 whatever it is given.

| function | what it pulls together |
| --- | --- |
| contrastive | a positive and the softmax over it and everything that is not one (InfoNCE) |
| pointwise | each candidate and its label, independently |
| listwise | a group's softmax and where its positives are |
| margin_mse | differences of scores and the teacher's differences |
| kl_distillation | a group's softmax and the teacher's |
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def contrastive(
    scores: Float[Tensor, "query passage"], positives: Bool[Tensor, "query passage"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """-log of a positive's share against all that are not positive; mean over a query's positives, then over queries.

    Other positives of the same query are left out of the denominator: they are not to be pushed away. A query without
    a positive in the batch contributes nothing. Source: van den Oord et al. 2018 (arXiv 1807.03748), eq. 4.
    """
    scores = scores.float() / temperature
    negatives = torch.logsumexp(scores.masked_fill(positives, float("-inf")), dim=1, keepdim=True)
    losses = functional.softplus(negatives - scores)  # -log(e^s / (e^s + sum of negatives)), stable at both ends
    per_query = (losses * positives).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    return per_query.sum() / positives.any(dim=1).sum().clamp(min=1)


def pointwise(group_scores: Float[Tensor, "query group"], positives: Bool[Tensor, "query group"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of every candidate on its own."""
    return functional.binary_cross_entropy_with_logits(group_scores.float(), positives.float())


def listwise(
    group_scores: Float[Tensor, "query group"], positives: Bool[Tensor, "query group"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Cross-entropy between a group's softmax and the uniform distribution over its positives (ListNet with labels)."""
    log_shares = functional.log_softmax(group_scores.float() / temperature, dim=1)
    return -((log_shares * positives).sum(dim=1) / positives.sum(dim=1).clamp(min=1)).mean()


def margin_mse(
    group_scores: Float[Tensor, "query group"], teacher_scores: Float[Tensor, "query group"]
) -> Float[Tensor, ""]:
    """Squared error between the margins of the first candidate over the others and the teacher's margins.

    Scores live on the teacher's scale: no temperature, no normalised embeddings. Source: Hofstaetter et al. 2020 (arXiv
    2010.02666), eq. 4.
    """
    difference = group_scores.float() - teacher_scores.float()
    return (difference[:, :1] - difference[:, 1:]).square().mean()


def kl_distillation(
    group_scores: Float[Tensor, "query group"],
    teacher_scores: Float[Tensor, "query group"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher || student) over each group's softmax; `temperature` divides both."""
    student = functional.log_softmax(group_scores.float() / temperature, dim=1)
    teacher = functional.log_softmax(teacher_scores.float() / temperature, dim=1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
