"""Training a tagger: a token classifier that finds persons, organisations, places and other names (CoNLL's labels).

Notable: it goes through the trainer that everything goes through; an example is a text with an annotation and has no
passages. Where an annotation says that only some kinds were looked for, what is not marked may be outside, or in an
entity of another kind: the loss is -log of the share that all labels have together which the annotation allows, so
collections that mark different things are trained on together. For a fully marked text it is plain cross-entropy. All
tokens of a word are trained on the word's label, because a word gets the label of its surest token.

    model = train_tagger(TaggerTraining(sources=[...]), TrainConfig(batch_size=32, max_steps=400), Path("runs/tagger"))
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from raydr.config import Component, Config, part_of
from raydr.data.entities import KINDS, LABELS, Score, allowed_labels, entity_scores, on_tokens
from raydr.data.examples import ExampleSet
from raydr.data.tagged import NoiseConfig, TaggedSource, TaggedText, tagged_examples
from raydr.encoders.checkpoint import MINILM, open_checkpoint
from raydr.encoders.texts import Texts
from raydr.encoders.tokenization import load_tokenizer
from raydr.errors import ConfigError
from raydr.train.batches import GroupTokenizer, Tokenized
from raydr.train.config import TrainConfig
from raydr.train.learner import Learner
from raydr.train.sampling import Group, shuffled
from raydr.train.trainer import MODEL, train_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from raydr.encoders.tagger import EntityTagger
    from raydr.train.objective import LossOutput, TrainBatch
    from raydr.types import Passage, Query


class TaggerLearnerConfig(Config):
    """Which network becomes a tagger, and how much of a text it is trained on."""

    model: str = MINILM
    """Folder or hub name of an encoder, which gets a new head, or of a tagger with CoNLL's nine labels."""
    max_tokens: int = Field(default=192, ge=8)
    """Longest text in training, in tokens; the rest of a longer one is not trained on."""


@dataclass(frozen=True)
class TagTokenizer:
    """A `GroupTokenizer` of marked texts: each token's label is the labels it may have, as bits (`allowed_labels`);
    none for special tokens.
    """

    config: TaggerLearnerConfig

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        tokenizer, _ = _tokenizer(self.config)
        ids, labels = [], []
        for query, encoding in zip(queries, tokenizer.encode_batch([q.text for q in queries]), strict=True):
            if query.annotation is None:
                raise ConfigError(f"query {query.query_id!r} has no annotation; a tagger is trained on marked texts")
            starts: dict[int, int] = {}
            for word, (start, _) in zip(encoding.word_ids, encoding.offsets, strict=True):
                if word is not None:
                    starts.setdefault(word, start)
            ends = {word: end for word, (_, end) in zip(encoding.word_ids, encoding.offsets) if word is not None}
            words = sorted(starts)
            allowed = allowed_labels([(starts[word], ends[word]) for word in words], query.annotation)
            of_word = dict(zip(words, allowed, strict=True))
            ids.append(encoding.ids)
            labels.append([0 if word is None else of_word[word] for word in encoding.word_ids])
        return {"queries": Texts(ids, labels=labels)}

    @property
    def pad_id(self) -> int:
        return _tokenizer(self.config)[1]


@functools.lru_cache(maxsize=4)
def _tokenizer(config: TaggerLearnerConfig) -> tuple[Tokenizer, int]:
    checkpoint = open_checkpoint(config.model)
    tokenizer, pad_id = load_tokenizer(checkpoint.path, lowercase=checkpoint.lowercase)
    tokenizer.enable_truncation(config.max_tokens)
    tokenizer.no_padding()
    return tokenizer, pad_id


@dataclass(frozen=True)
class TextBatches:
    """A `BatchSampler` of texts alone: every one once an epoch, in random order."""

    examples: ExampleSet
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[list[Group]]:
        rows = shuffled(range(len(self.examples)), np.random.default_rng(self.seed))
        while True:
            yield [Group(next(rows), ()) for _ in range(self.batch_size)]


class Tagging:
    """An `Objective`: -log of what the allowed labels of a token have together, the mean over tokens."""

    def __call__(self, model: Any, batch: TrainBatch) -> LossOutput:
        import torch

        from raydr.models.tokens import Tokens
        from raydr.train.objective import LossOutput

        told = batch.labels.token_labels
        if not isinstance(batch.queries, Tokens) or told is None:
            raise ConfigError("a tagger is trained on marked texts; its learner must build a TagTokenizer")
        log_shares = model(*batch.queries.inputs).float().log_softmax(dim=-1)
        allowed = (told[:, :, None] >> torch.arange(log_shares.shape[-1], device=told.device)) & 1
        is_trained = told > 0
        losses = -log_shares.masked_fill(allowed == 0, float("-inf")).logsumexp(dim=-1)[is_trained]
        best = log_shares.argmax(dim=-1, keepdim=True)
        right = allowed.gather(-1, best)[..., 0][is_trained].float().mean()
        return LossOutput(losses.mean(), {"accuracy": right.detach()})


class TaggerLearner(Learner):
    """Trains the tagger; raydr/encoders/tagger.py runs it."""

    Config: ClassVar[type[TaggerLearnerConfig]] = TaggerLearnerConfig
    is_measured_on_dev = False

    config: TaggerLearnerConfig

    def build_model(self) -> nn.Module:
        from raydr.encoders.tagger import load_tagger

        names = dict(enumerate(LABELS))
        checkpoint = open_checkpoint(self.config.model)
        return load_tagger(
            checkpoint,
            num_labels=len(LABELS),
            id2label=names,
            label2id={label: number for number, label in names.items()},
            warnings=False,
        )

    def build_objective(self) -> Tagging:
        return Tagging()

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> TextBatches:
        return TextBatches(examples, batch_size, seed)

    def build_tokenizer(self) -> GroupTokenizer:
        return TagTokenizer(self.config)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.export import save_transformer

        save_transformer(model.transformer, open_checkpoint(self.config.model).path, folder)


class TaggerTraining(TaggerLearnerConfig):
    """A tagger's training: what it learns from, and how long."""

    sources: tuple[TaggedSource, ...] = Field(min_length=1)
    """Files of texts with marked entities."""
    noise: NoiseConfig = NoiseConfig()
    """Misread copies of the texts, so that a tagger of clean texts finds names in those that a machine read."""
    train: TrainConfig = TrainConfig(batch_size=32, max_steps=1000, learning_rate=1e-4)
    """The training itself. The paper's tagger: learning rate 4.7e-5, batches of 128, 184 epochs."""

    @property
    def learner(self) -> Component:
        """What is trained, as configuration."""
        return TaggerLearner(part_of(TaggerLearnerConfig, self)).component


def train_tagger(training: TaggerTraining, out: Path) -> Path:
    """The folder of a trained tagger below `out`; what is finished there stays as it is."""
    examples = tagged_examples(training.sources, out / "examples", noise=training.noise, seed=training.train.seed)
    return (train_model(training.learner, training.train, examples, out / "train").path / MODEL).resolve()


def measure_tagger(tagger: EntityTagger, texts: Sequence[TaggedText]) -> dict[str, Score]:
    """Precision, recall and F1 of a tagger on marked texts, for the kinds that were looked for in all of them.

    An entity that ends inside of a token of the annotation is moved to its end, because tags can say no more.
    """
    found = tagger.tag([marked.text for marked in texts])
    labels = [kind for kind in KINDS if all(kind in marked.annotation.labels for marked in texts)]
    moved = [on_tokens(own, marked.offsets) for own, marked in zip(found, texts, strict=True)]
    return entity_scores([marked.annotation.entities for marked in texts], moved, labels)
