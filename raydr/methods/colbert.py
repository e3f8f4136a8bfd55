"""ColBERT trained on a ranker's margins: a scorer cheap enough to judge every pair of a batch, for TAS-Balanced.

"Efficiently Teaching an Effective Dense Retriever with Balanced Topic Aware Sampling" (arXiv 2104.06967, section 4.2)
trains its in-batch teacher so; the model is of "ColBERT", Khattab and Zaharia 2020, arXiv 2004.12832.

1. score a query's passages with a cross-encoder, once
2. score them token by token: the sum over query tokens of the best passage token
3. loss: squared error between the margins of the two

| equation | function |
| --- | --- |
| late interaction | `raydr.models.colbert.group_interaction` |
| Margin-MSE | `raydr.losses.margin_mse` |

It is a teacher: it neither embeds a corpus nor searches. It reads the token ids of its student, so both need
checkpoints of one vocabulary.

    method: {import_path: "raydr.methods.colbert:ColBertTeacher", args: {scores: runs/tas/scores}}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from raydr.encoders.colbert import load_colbert, save_colbert
from raydr.errors import ConfigError
from raydr.losses import margin_mse
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod
from raydr.models.colbert import ColBert, group_interaction
from raydr.train.objective import LossOutput, TrainBatch
from raydr.train.sampling import BatchSampler, ScoredBatches

if TYPE_CHECKING:
    from raydr.data.examples import ExampleSet
    from raydr.protocols import Encoder


class ColBertConfig(DualEncoderConfig):
    """Which checkpoint and which lengths; pooling and normalisation are a dual encoder's and unused here."""

    max_query_tokens: int | None = 30
    max_passage_tokens: int | None = 200
    num_negatives: int = 1
    """Of each query; 1 is the pair (positive, negative) of Margin-MSE."""
    scores: Path | None = None
    """The cross-encoder's scores of the training examples, an artifact of `raydr.stages.score`. Needed for training."""


class LateInteraction:
    """An `Objective`: margins of each query's own group against the teacher's."""

    def __call__(self, model: Any, batch: TrainBatch) -> LossOutput:
        queries, passages = batch.sides
        if batch.labels.teacher_scores is None:
            raise ConfigError("scores: ColBERT learns from a ranker's scores; name them")
        scores = group_interaction(
            model(queries.ids, queries.mask), model(passages.ids, passages.mask), queries.full_mask, passages.full_mask
        )
        is_right = (scores[:, :1] > scores[:, 1:]).all(dim=1).float().mean()
        return LossOutput(margin_mse(scores, batch.labels.teacher_scores), {"accuracy": is_right.detach()})


class ColBertTeacher(DualEncoderMethod):
    """Trains the teacher."""

    Config: ClassVar[type[ColBertConfig]] = ColBertConfig

    config: ColBertConfig

    def build_encoder(self) -> Encoder:
        raise ConfigError("ColBertTeacher gives an embedding of every token; name a retriever as the run's method")

    def build_model(self) -> ColBert:
        return load_colbert(self.config.model, dimensions=self.config.dimensions)

    def save_model(self, model: torch.nn.Module, folder: Path) -> None:
        save_colbert(model, self.config.model, folder)  # type: ignore[arg-type]

    def build_objective(self) -> LateInteraction:
        return LateInteraction()

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config = self.config
        if config.scores is None:
            raise ConfigError("scores: ColBERT learns from a ranker's scores of the same examples; name them")
        return ScoredBatches(
            examples,
            scores=config.scores,
            batch_size=batch_size,
            num_negatives=config.num_negatives,
            depth=config.negative_depth,
            seed=seed,
        )
