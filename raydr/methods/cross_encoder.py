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

from raydr.config import part_of
from raydr.encoders.cross_encoder import CrossEncoderReranker, PairConfig, PairEncoding, load_cross_encoder
from raydr.encoders.texts import Texts
from raydr.errors import ConfigError
from raydr.losses import listwise, pointwise
from raydr.methods.base import RankerConfig, RankerMethod
from raydr.train.grad_cache import outputs
from raydr.train.objective import LossOutput, TrainBatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from raydr.protocols import Reranker
    from raydr.train.batches import GroupTokenizer, Tokenized
    from raydr.types import Passage, Query

_LOSSES = {"listwise": listwise, "pointwise": pointwise}


@dataclass(frozen=True)
class PairTokenizer:
    """A `GroupTokenizer` of pairs."""

    config: PairConfig

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        pairs = [(query, passage) for query, group in zip(queries, groups, strict=True) for passage in group]
        return {"pairs": Texts(_encoding(self.config).encode(pairs))}

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


class CrossEncoderRanker(RankerMethod):
    """Trains the ranker; what it leaves is served as a `CrossEncoderReranker`."""

    class Config(RankerConfig, PairConfig):
        loss: Literal["listwise", "pointwise"] = "listwise"
        """Softmax over the group, or every pair on its own."""

    config: Config

    @property
    def pair_config(self) -> PairConfig:
        return part_of(PairConfig, self.config)

    def build_reranker(self) -> Reranker:
        return CrossEncoderReranker(CrossEncoderReranker.Config(**self.pair_config.model_dump()))

    def build_model(self) -> nn.Module:
        return load_cross_encoder(self.pair_config)

    def build_objective(self) -> Ranking:
        return Ranking(self.config.loss)

    def build_tokenizer(self) -> GroupTokenizer:
        return PairTokenizer(self.pair_config)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.cross_encoder import save_cross_encoder

        save_cross_encoder(model, self.config.model, folder)  # type: ignore[arg-type]
