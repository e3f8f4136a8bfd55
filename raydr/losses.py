"""Formulas shared by several papers, side by side, on score matrices. They know no model, no file and no cluster.

Notable: a score is larger for a better passage and is divided by `temperature`; `positives` is a boolean matrix, so one
positive, many positives and a passage that occurs twice in the batch are the same input; every loss is a mean over
queries (but for online_contrastive, a sum) and computed in float32 whatever it is given.

| function | what it pulls together |
| --- | --- |
| contrastive | a positive and the softmax over it and everything that is not one (InfoNCE) |
| pointwise | each candidate and its label, independently |
| listwise | a group's softmax and where its positives are |
| margin_mse | differences of scores and the teacher's differences |
| kl_distillation | a group's softmax and the teacher's |
| online_contrastive | the hard pairs of a batch: like ones together, others a margin apart |
| ranknet, lambdarank, listnet | a group's scores and the order a teacher gives it |
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
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


def online_contrastive(
    distances: Float[Tensor, " pair"], positives: Bool[Tensor, " pair"], *, margin: float = 0.5
) -> Float[Tensor, ""]:
    """Squared distances of the hard positive pairs, and squared shortfalls to `margin` of the hard negative ones.

    Hard are negatives nearer than the farthest positive, and positives farther than the nearest negative; where there
    are fewer than two positives (negatives), than the mean of the negatives (positives) themselves. A sum, not a mean:
    easy pairs contribute nothing and dilute nothing. Source: sentence-transformers' OnlineContrastiveLoss, which
    chooses among the pairs of Hadsell et al. 2006.
    """
    distances = distances.float()
    near, far = distances[positives], distances[~positives]
    with torch.no_grad():
        nothing = distances.new_tensor(float("nan"))  # nothing is above or below it
        mean_near, mean_far = (own.mean() if len(own) else nothing for own in (near, far))
        farthest = near.max() if len(near) > 1 else mean_far
        nearest = far.min() if len(far) > 1 else mean_near
    hard_far, hard_near = far[far < farthest], near[near > nearest]
    return hard_near.square().sum() + (margin - hard_far).clamp(min=0).square().sum()


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


def ranknet(
    group_scores: Float[Tensor, "query group"], ranks: Int[Tensor, "query group"], *, weighted: bool = True
) -> Float[Tensor, ""]:
    """Logistic loss of every pair that a teacher orders: mean over the pairs of a group, then over groups.

    `ranks` are the teacher's, from 1; equal ranks make no pair. `weighted` multiplies a pair's loss by one over the sum
    of its ranks, so that mistakes at the top cost most. Source: Burges et al. 2005; FIRST (arXiv 2406.15657).
    """
    everything = torch.ones_like(ranks, dtype=torch.bool)
    return ranknet_per_group(group_scores.float(), ranks, everything, weighted=weighted).mean()


def ranknet_per_group(
    group_scores: Float[Tensor, "query group"],
    ranks: Int[Tensor, "query group"],
    mask: Bool[Tensor, "query group"],
    *,
    weighted: bool = True,
) -> Float[Tensor, " query"]:
    """`ranknet` of every group on its own, in the scores' precision; `mask` is false at candidates that are padding."""
    is_pair = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    losses = functional.softplus(group_scores[:, None, :] - group_scores[:, :, None])
    if weighted:
        losses = losses / (ranks[:, :, None] + ranks[:, None, :])
    return (losses * is_pair).sum(dim=(1, 2)) / is_pair.sum(dim=(1, 2)).clamp(min=1)


def lambdarank(group_scores: Float[Tensor, "query group"], ranks: Int[Tensor, "query group"]) -> Float[Tensor, ""]:
    """RankNet whose pairs weigh what swapping them would change in nDCG, by the distance of their present places.

    Gains fall linearly from 1 at rank 1 to 0 at the last. Weights are constants. Source: Wang et al. 2018 (LambdaLoss,
    NDCG-Loss2), logarithms to base 2.
    """
    scores = group_scores.float()
    size = scores.shape[1]
    gains = (ranks.max(dim=1, keepdim=True).values - ranks).float()
    gains = gains / gains.max(dim=1, keepdim=True).values.clamp(min=1)
    ideal = gains.sort(dim=1, descending=True).values
    discounts = torch.log2(torch.arange(2, size + 2, device=scores.device).float())
    gains = gains / (ideal / discounts).sum(dim=1, keepdim=True).clamp(min=1e-9)
    places = (-scores.detach()).argsort(dim=1, stable=True).argsort(dim=1)
    distance = (places[:, :, None] - places[:, None, :]).abs()
    inverse = torch.cat([1 / discounts, 1 / torch.log2(torch.tensor([size + 2.0], device=scores.device))])
    change = (inverse[(distance - 1).clamp(min=0)] - inverse[distance]).abs() * (distance > 0)
    weights = change * (gains[:, :, None] - gains[:, None, :]).abs()
    is_pair = ranks[:, :, None] < ranks[:, None, :]
    losses = weights * functional.softplus(scores[:, None, :] - scores[:, :, None]) / math.log(2)
    return ((losses * is_pair).sum(dim=(1, 2)) / is_pair.sum(dim=(1, 2)).clamp(min=1)).mean()


def listnet(group_scores: Float[Tensor, "query group"], ranks: Int[Tensor, "query group"]) -> Float[Tensor, ""]:
    """Cross-entropy of a group's softmax with that of the same scores handed out in the teacher's order, a constant.

    Source: Cao et al. 2007 (ListNet); the target as in FIRST's released code, but detached.
    """
    scores = group_scores.float()
    target = scores.detach().sort(dim=1, descending=True).values.gather(1, ranks.long() - 1).softmax(dim=1)
    return -(target * functional.log_softmax(scores, dim=1)).sum(dim=1).mean()
