"""A cross-encoder ranker: query and passage in one transformer, one score; trained pointwise or listwise.

It is the reranker behind a retriever, and the teacher of methods that distil. Per query a group of one positive and n
mined negatives is scored:

1. draw a positive and n negatives for each query
2. score each pair (query, passage)
3. listwise: -log softmax at the positive; pointwise: every pair against its label

| equation | function |
| --- | --- |
| listwise, AR2 (arXiv 2110.03611) eq. 7 | `raydr.losses.listwise` |
| pointwise, monoBERT (arXiv 1901.04085) | `raydr.losses.pointwise` |

    method: {import_path: "raydr.methods.cross_encoder:CrossEncoderRanker", args: {loss: listwise, num_negatives: 15}}
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from raydr.config import Component
from raydr.encoders.cross_encoder import CrossEncoderReranker, PairConfig, PairEncoding, load_cross_encoder
from raydr.errors import ConfigError
from raydr.losses import listwise, pointwise
from raydr.methods.base import Method, build_method
from raydr.train.grad_cache import outputs
from raydr.train.objective import LossOutput, TrainBatch
from raydr.train.sampling import BatchSampler, RandomBatches
from raydr.train.trainer import MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from raydr.data.examples import ExampleSet
    from raydr.protocols import Encoder, Reranker
    from raydr.steps import Steps
    from raydr.train.batches import GroupTokenizer
    from raydr.types import Passage, Query

_LOSSES = {"listwise": listwise, "pointwise": pointwise}


@dataclass(frozen=True)
class PairTokenizer:
    """A `GroupTokenizer` of pairs."""

    config: PairConfig

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> dict[str, list[list[int]]]:
        pairs = [(query, passage) for query, group in zip(queries, groups, strict=True) for passage in group]
        return {"pairs": _encoding(self.config).encode(pairs)}

    @property
    def pad_id(self) -> int:
        return _encoding(self.config).pad_id


@functools.lru_cache(maxsize=4)
def _encoding(config: PairConfig) -> PairEncoding:
    return PairEncoding(config)


class Ranking:
    """An `Objective`: a loss over the scores of each query's own group."""

    def __init__(self, loss: Literal["listwise", "pointwise"]) -> None:
        self._loss = _LOSSES[loss]

    def __call__(self, model: Any, batch: TrainBatch) -> LossOutput:
        if batch.pairs is None:
            raise ConfigError("a cross-encoder is trained on pairs; its method must build a PairTokenizer")
        scores = outputs(model, batch.pairs).view(-1, batch.labels.group_size)
        positives = batch.labels.groups(batch.labels.positives)
        accuracy = (scores[:, :1] > scores[:, 1:]).all(dim=1).float().mean()
        return LossOutput(self._loss(scores, positives), {"accuracy": accuracy.detach()})


class CrossEncoderRanker(Method):
    """Trains the ranker; what it leaves is served as a `CrossEncoderReranker`."""

    class Config(PairConfig):
        loss: Literal["listwise", "pointwise"] = "listwise"
        """Softmax over the group, or every pair on its own."""
        num_negatives: int = Field(default=15, ge=1)
        """Negatives in a group (AR2, table 8)."""
        negative_depth: int | None = Field(default=None, ge=1)
        """Negatives are drawn from so many of the hardest candidates; null: from all."""
        retriever: Component = Component(import_path="raydr.methods.zero_shot:ZeroShot")
        """Whose hits it learns to reorder, and reorders."""

    config: Config

    def fit(self, steps: Steps) -> Component:
        """Trained once, on what the retriever finds."""
        index = steps.base(self.config.retriever)
        examples = steps.mine(self.config.retriever, index, "examples")
        dev = steps.dev(self.config.retriever, index)
        model = steps.train(self.component, steps.train_config, examples, "train", dev=dev)
        return self.trained(str((model.path / MODEL).resolve()))

    @property
    def pair_config(self) -> PairConfig:
        return PairConfig(**{name: getattr(self.config, name) for name in PairConfig.model_fields})

    def build_encoder(self) -> Encoder:
        """The retriever's: a ranker reads pairs."""
        return build_method(self.config.retriever).encoder()

    def build_reranker(self) -> Reranker:
        return CrossEncoderReranker(CrossEncoderReranker.Config(**self.pair_config.model_dump()))

    def build_model(self) -> nn.Module:
        return load_cross_encoder(self.pair_config)

    def build_objective(self) -> Ranking:
        return Ranking(self.config.loss)

    def build_tokenizer(self) -> GroupTokenizer:
        return PairTokenizer(self.pair_config)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        config = self.config
        return RandomBatches(
            examples,
            batch_size=batch_size,
            num_negatives=config.num_negatives,
            depth=config.negative_depth,
            seed=seed,
        )

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.cross_encoder import save_cross_encoder

        save_cross_encoder(model, self.config.model, folder)  # type: ignore[arg-type]
