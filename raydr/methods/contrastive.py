"""Contrastive training of a dual encoder: in-batch and mined negatives under one softmax (InfoNCE). The default.

A batch holds Q queries, each with a group of one positive and n mined negatives. Every passage of the batch, on every
worker, is scored for every query, and each query's positive has to win:

1. draw a positive and n negatives for each query
2. embed all queries and all passages
3. scores = queries . passages / temperature
4. loss = -log softmax at the positive; other passages judged relevant for the query are left out
5. symmetric: the same from positives to queries; Matryoshka: the mean over several prefixes of the embedding

| equation | function |
| --- | --- |
| InfoNCE, arXiv 1807.03748 eq. 4; in-batch negatives, DPR (arXiv 2004.04906) eq. 2 | `raydr.losses.contrastive` |
| Matryoshka, arXiv 2205.13147 eq. 1 | `Contrastive.loss` |

    method: {import_path: "raydr.methods.contrastive:Contrastive", args: {temperature: 0.05, num_negatives: 7}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn import functional

from raydr.encoders.text import TextEncoder
from raydr.errors import ConfigError
from raydr.losses import contrastive
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput

if TYPE_CHECKING:
    from collections.abc import Sequence


class InBatchContrastive(EmbeddingObjective):
    """The loss over all queries and passages of a batch."""

    def __init__(
        self,
        *,
        temperature: float,
        symmetric: bool = False,
        matryoshka: Sequence[int] = (),
        in_batch: bool = True,
        normalize: bool = True,
    ) -> None:
        self._temperature, self._symmetric, self._matryoshka = temperature, symmetric, matryoshka
        self._in_batch, self._normalize = in_batch, normalize

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        whole = queries.shape[1]
        sizes = {whole, *(min(size, whole) for size in self._matryoshka)}
        losses = [self._one_size(queries, passages, batch, size) for size in sorted(sizes)]
        scores = queries @ passages.T
        own = scores.gather(1, batch.own_positive[:, None])
        wrong = scores.masked_fill(batch.positives, float("-inf")).amax(dim=1, keepdim=True)
        accuracy = (own > wrong).float().mean()
        return LossOutput(torch.stack(losses).mean(), {"accuracy": accuracy.detach()})

    def _one_size(self, queries: Tensor, passages: Tensor, batch: Labels, size: int) -> Tensor:
        if size < queries.shape[1]:
            queries, passages = queries[:, :size], passages[:, :size]
            if self._normalize:  # as the encoder does with the prefix that it serves
                queries, passages = functional.normalize(queries, dim=1), functional.normalize(passages, dim=1)
        scores = queries @ passages.T
        positives = batch.positives
        if not self._in_batch:
            scores, positives = batch.groups(scores), batch.groups(positives)
        loss = contrastive(scores, positives, temperature=self._temperature)
        if not self._symmetric:
            return loss
        own = batch.own_positive
        return (loss + contrastive(scores[:, own].T, positives[:, own].T, temperature=self._temperature)) / 2


class Contrastive(DualEncoderMethod):
    """A dual encoder trained with InfoNCE."""

    class Config(DualEncoderConfig):
        temperature: float = Field(default=0.05, gt=0)
        """Scores are divided by it: 0.05 suits normalised embeddings, 1 those of any length."""
        symmetric: bool = False
        """Whether positives have to find their queries as well."""
        matryoshka: list[PositiveInt] = Field(default_factory=list)
        """Prefixes of the embedding to train besides its whole, e.g. [128, 64]; empty: only the whole."""
        in_batch: bool = True
        """Whether other queries' passages are negatives as well, or only a query's own."""
        gather: bool = True
        """Whether the passages of all workers are negatives."""

        @model_validator(mode="after")
        def _possible(self) -> Contrastive.Config:
            if self.symmetric and not self.in_batch:
                raise ValueError("symmetric compares a positive with the batch's queries; set in_batch: true")
            if not self.in_batch and not self.num_negatives:
                raise ValueError("without in_batch a query needs negatives of its own; set num_negatives")
            return self

    config: Config

    def build_objective(self) -> EmbeddingObjective:
        encoder = TextEncoder(self.encoder_config)
        if too_long := [size for size in self.config.matryoshka if size > encoder.dim]:
            raise ConfigError(f"matryoshka: {too_long[0]} is more than the {encoder.dim} dimensions of the embedding")
        objective = InBatchContrastive(
            temperature=self.config.temperature,
            symmetric=self.config.symmetric,
            matryoshka=self.config.matryoshka,
            in_batch=self.config.in_batch,
            normalize=encoder.normalize,
        )
        objective.gather = self.config.gather
        return objective
