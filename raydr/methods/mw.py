"""MW loss: every positive score against every negative score of the batch, so that one threshold fits all queries.

"Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval", Nima Sheikholeslami, Erfan Hosseini, Patrice
Bechard, Srivatsava Daruru, Sai Rajeswar, 2025, arXiv 2510.00137. InfoNCE compares a positive with negatives of its own
query only, so it does not see when all scores of a query are shifted; this loss bounds the area over the pooled ROC
curve, the Mann-Whitney statistic. Use it where scores are cut at a threshold rather than only sorted.

1. draw a positive and 5 mined negatives for each query
2. embed all queries and passages of the batch, of length 1
3. the scores of queries with their positives are the positives, all other scores of all queries are the pool
4. loss = mean over positives and over the pool of softplus((negative - positive) / temperature)

| equation | function |
| --- | --- |
| eq. 3, with the temperature of Lemma 2 | `mann_whitney` |
| its gradients | `AllPairs.backward` |
| AUC of a batch (section 4) | `pooled_area`; of a run: `raydr.evaluation.curves` |

Departures from the paper:

- `reduction: mean` divides by the size of the pool, which eq. 3 sums over: the loss then has the size of other losses
  whatever the batch, so that clipping and weight decay mean the same. `paper` is eq. 3 to the letter.
- A passage known to be relevant for a query, or a copy of one (`ExampleSet.relevant`), is never one of its negatives;
  the paper takes every other passage.
- Several positives of a query in a batch share its weight.
- `within: query` (RankNet) is an addition; so is `within="cluster"` of the objective (mixed datasets, whose scores need
  no common scale), for a method whose batches carry clusters.
- The paper trains plain pretrained checkpoints; name one in `model` to reproduce it.

Numbers to reproduce, MiniLM, contrastive -> MW, in-domain (Table 1): NQ, AUC .70 -> .84, MRR@10 .35 -> .36; SQuAD, AUC
.72 -> .85, MRR@10 .39 -> .37. Temperature .01, 5 negatives, batches of 64, 500 steps of warm-up. No code of the authors
was found, and the averages that table prints are not those of its columns: the direction is the claim.

    method: {import_path: "raydr.methods.mw:MwLoss", args: {temperature: 0.01, num_negatives: 5}}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raydr.errors import ConfigError
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput

Reduction: TypeAlias = Literal["mean", "paper"]
Within: TypeAlias = Literal["batch", "cluster", "query"]


class MwConfig(DualEncoderConfig):
    """Settings of the loss beside those of the encoder; the defaults are the paper's."""

    normalize: bool | None = True
    """Embeddings of length 1, so that scores are cosines, as the paper's figures show them."""
    num_negatives: int = Field(default=5, ge=0)
    """Mined negatives of each query (section 5.1)."""
    temperature: float = Field(default=0.01, gt=0)
    """Differences of scores are divided by it (section 5.1)."""
    reduction: Reduction = "mean"
    """`mean` over all pairs, or `paper`: a mean over positives of the sum over the pool (eq. 3)."""
    within: Literal["batch", "query"] = "batch"
    """Whose negatives a positive is compared with: those of the whole batch (the paper), or of its own query."""
    chunk_size: int = Field(default=16, ge=1)
    """Positives compared with the pool at once; changes memory, not the loss."""


def mann_whitney(
    scores: Float[Tensor, "query passage"],
    positives: Bool[Tensor, "query passage"],
    *,
    temperature: float = 0.01,
    reduction: Reduction = "mean",
    clusters: Int[Tensor, " query"] | None = None,
    chunk_size: int = 16,
) -> Float[Tensor, ""]:
    """Logistic loss on the difference of every positive score and every negative score of the matrix.

    Mean over queries that have a positive; with `clusters`, pairs of queries of different clusters are left out. Where
    there is nothing to compare, the loss is 0. Source: eq. 3.
    """
    scores = scores.float()  # cosines in bfloat16 are 0.4 temperatures apart
    negatives = ~positives
    rows, negative_rows = positives.nonzero()[:, 0], negatives.nonzero()[:, 0]
    per_query = positives.sum(dim=1)
    weights = 1 / (per_query[rows] * per_query.count_nonzero())
    if reduction == "mean":
        pool = negatives.sum(dim=1).float()
        pool = pool.sum().expand_as(pool) if clusters is None else (clusters[:, None] == clusters).float().mv(pool)
        weights = weights / pool[rows].clamp(min=1)
    labels = None if clusters is None else (clusters[rows], clusters[negative_rows])
    return AllPairs.apply(scores[positives], scores[negatives], weights, labels, temperature, chunk_size)


def pooled_area(positives: Float[Tensor, " positive"], negatives: Float[Tensor, " negative"]) -> Float[Tensor, ""]:
    """The chance that a positive scores above a negative, a tie counting half; by rank, without the matrix of pairs."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives)
    not_above = torch.searchsorted(ordered, positives, right=True)
    return (below + not_above).float().mean() / (2 * max(1, len(negatives)))


class AllPairs(torch.autograd.Function):
    """Sum over positives of their weight times the sum over negatives of softplus((negative - positive) / temperature).

    The matrix of pairs exists for `chunk_size` positives at a time and is made again in the backward pass, so memory is
    linear in the number of negatives: of 512 queries with 5 negatives each the whole matrix takes 3.2 GB, 16 rows 0.1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        positives: Float[Tensor, " positive"],
        negatives: Float[Tensor, " negative"],
        weights: Float[Tensor, " positive"],
        labels: tuple[Int[Tensor, " positive"], Int[Tensor, " negative"]] | None,
        temperature: float,
        chunk_size: int,
    ) -> Float[Tensor, ""]:
        ctx.save_for_backward(positives, negatives, weights)
        ctx.settings = (labels, temperature, chunk_size)
        total = positives.new_zeros(())
        for part, differences in _differences(positives, negatives, labels, temperature, chunk_size):
            total += (functional.softplus(differences).sum(dim=1) * weights[part]).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:  # type: ignore[bad-override]
        """Of a pair: sigmoid(difference) / temperature at the negative, and minus that at the positive."""
        positives, negatives, weights = ctx.saved_tensors
        labels, temperature, chunk_size = ctx.settings
        at_positives, at_negatives = torch.zeros_like(positives), torch.zeros_like(negatives)
        for part, differences in _differences(positives, negatives, labels, temperature, chunk_size):
            pulls = differences.sigmoid_().mul_(weights[part, None])
            at_positives[part] = -pulls.sum(dim=1)
            at_negatives += pulls.sum(dim=0)
        scale = gradient / temperature
        return at_positives * scale, at_negatives * scale, None, None, None, None


def _differences(
    positives: Tensor, negatives: Tensor, labels: tuple[Tensor, Tensor] | None, temperature: float, chunk_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """(negative - positive) / temperature for consecutive positives; -inf, which costs nothing, for pairs left out."""
    for start in range(0, len(positives), chunk_size):
        part = slice(start, start + chunk_size)
        differences = (negatives - positives[part, None]).div_(temperature)
        if labels is not None:
            differences.masked_fill_(labels[0][part, None] != labels[1], float("-inf"))
        yield part, differences


class MannWhitney(EmbeddingObjective):
    """The loss over all queries and passages of a batch, those of all workers: every worker sees the whole pool."""

    def __init__(
        self,
        *,
        temperature: float = 0.01,
        reduction: Reduction = "mean",
        within: Within = "batch",
        chunk_size: int = 16,
    ) -> None:
        self._temperature, self._reduction = temperature, reduction
        self._within, self._chunk_size = within, chunk_size

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        scores, positives = queries @ passages.T, batch.positives
        loss = mann_whitney(
            scores,
            positives,
            temperature=self._temperature,
            reduction=self._reduction,
            clusters=self._clusters(batch),
            chunk_size=self._chunk_size,
        )
        return LossOutput(loss, {"area": pooled_area(scores.detach()[positives], scores.detach()[~positives])})

    def _clusters(self, batch: Labels) -> Int[Tensor, " query"] | None:
        if self._within == "batch":
            return None
        if self._within == "query":
            return torch.arange(len(batch.positive_rows), device=batch.positive_rows.device)
        if batch.clusters is None:
            raise ConfigError("within: cluster needs batches that carry clusters; a method gives them in build_batches")
        return batch.clusters


class MwLoss(DualEncoderMethod):
    """A dual encoder trained with the MW loss."""

    Config: ClassVar[type[MwConfig]] = MwConfig
    config: MwConfig

    def build_objective(self) -> EmbeddingObjective:
        return MannWhitney(
            temperature=self.config.temperature,
            reduction=self.config.reduction,
            within=self.config.within,
            chunk_size=self.config.chunk_size,
        )
