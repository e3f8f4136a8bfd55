"""ColBERT: a ranker that embeds every token and compares token by token, cheap enough to judge all pairs of a batch.

"ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over BERT", Khattab and Zaharia,
SIGIR 2020, arXiv 2004.12832. It is the in-batch teacher of TAS-Balanced (arXiv 2104.06967, section 4.2), trained there
on a cross-encoder's margins, and a ranker for AR2 where there is little to train one from: the tokens of a sentence
encoder rank well before any training.

1. embed every token of query and passage, apart
2. score: the sum over query tokens of the best passage token
3. margin_mse: squared error between the margins of this score and of a cross-encoder's; listwise: -log softmax at the
   positive of a group

| equation | function |
| --- | --- |
| late interaction | `raydr.models.colbert.group_interaction` |
| Margin-MSE | `raydr.losses.margin_mse` |
| listwise | `raydr.losses.listwise` |

Departures: no [MASK] tokens are added to queries and no markers to texts, as in TAS-Balanced's; it reorders hits and
has no index of its own. As a teacher it reads the token ids of its student, so both need one vocabulary.

    method: {import_path: "raydr.methods.colbert:ColBertRanker", args: {loss: listwise, normalize: true}}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field

from raydr.encoders.colbert import ColBertReranker, load_colbert, save_colbert
from raydr.errors import ConfigError
from raydr.losses import listwise, margin_mse
from raydr.methods.base import DualEncoderConfig, DualEncoderMethod, RankerConfig, RankerMethod
from raydr.models.colbert import ColBert, group_interaction
from raydr.storage import Location
from raydr.train.objective import LossOutput, TrainBatch
from raydr.train.sampling import BatchSampler, ScoredBatches

if TYPE_CHECKING:
    from raydr.data.examples import ExampleSet
    from raydr.protocols import Reranker


class ColBertConfig(RankerConfig, DualEncoderConfig):
    """Which checkpoint, which lengths, which loss; `pooling` is a dual encoder's and means nothing here."""

    normalize: bool | None = None
    """Whether token embeddings have length 1: ColBERT's do, those of TAS-Balanced's teacher do not. Null: as the
    checkpoint has it, and no where it does not say."""
    max_query_tokens: int | None = 30
    """Longest query in tokens, special ones included."""
    max_passage_tokens: int | None = 200
    """Longest passage in tokens, special ones included."""
    num_negatives: int = Field(default=1, ge=1)
    """Of each query; 1 is the pair (positive, negative) of Margin-MSE."""
    loss: Literal["margin_mse", "listwise"] = "margin_mse"
    """`margin_mse`: the margins of a cross-encoder (`scores`); `listwise`: softmax over the group, from judgements."""
    scores: Location | None = None
    """The cross-encoder's scores of the training examples, an artifact of `raydr.stages.score`; for `margin_mse`."""


class LateInteraction:
    """An `Objective` over the scores of each query's own group."""

    def __init__(self, loss: Literal["margin_mse", "listwise"] = "margin_mse") -> None:
        self._loss = loss

    def __call__(self, model: Any, batch: TrainBatch) -> LossOutput:
        queries, passages = batch.texts
        scores = group_interaction(
            model(queries.ids, queries.mask), model(passages.ids, passages.mask), queries.full_mask, passages.full_mask
        )
        if self._loss == "listwise":
            loss = listwise(scores, batch.labels.groups(batch.labels.positives))
        elif batch.labels.teacher_scores is None:
            raise ConfigError("scores: margin_mse learns from a ranker's scores; name them")
        else:
            loss = margin_mse(scores, batch.labels.teacher_scores)
        is_right = (scores[:, :1] > scores[:, 1:]).all(dim=1).float().mean()
        return LossOutput(loss, {"accuracy": is_right.detach()})


class ColBertRanker(RankerMethod, DualEncoderMethod):
    """Trains the ranker; what it leaves is served as a `ColBertReranker`."""

    Config: ClassVar[type[ColBertConfig]] = ColBertConfig

    config: ColBertConfig
    is_measured_on_dev = False

    def build_reranker(self) -> Reranker:
        return ColBertReranker(ColBertReranker.Config(**self.encoder_config.model_dump()))

    def build_model(self) -> ColBert:
        return load_colbert(self.config.model, dimensions=self.config.dimensions, normalize=self.config.normalize)

    def save_model(self, model: torch.nn.Module, folder: Path) -> None:
        save_colbert(model, self.config.model, folder)  # type: ignore[arg-type]

    def build_objective(self) -> LateInteraction:
        return LateInteraction(self.config.loss)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config = self.config
        if config.loss == "listwise":
            return super().build_batches(examples, batch_size=batch_size, seed=seed)
        if config.scores is None:
            raise ConfigError("scores: margin_mse learns from a ranker's scores of the same examples; name them")
        return ScoredBatches(
            examples,
            scores=config.scores,
            batch_size=batch_size,
            num_negatives=config.num_negatives,
            depth=config.negative_depth,
            seed=seed,
        )
