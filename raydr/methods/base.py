"""A method: the few objects a paper changes, handed to verbs that exist once.

Notable: every part has a default, so a method overrides only what its paper invented; a method is built from its
import path and arguments wherever it is needed (driver, Ray actor, Serve replica), so it travels as configuration and
never as a pickled object. `examples/add_a_method.py` writes one.

    method:
      import_path: raydr.methods.zero_shot:ZeroShot
      args: {model: sentence-transformers/all-MiniLM-L6-v2}
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from raydr.config import Component, Config, ConfigClass, part_of
from raydr.data.examples import ExampleSet
from raydr.encoders.multimodal import MultimodalCheckpoint, MultimodalEncoder, MultimodalEncoderConfig
from raydr.encoders.text import TextEncoder, TextEncoderConfig
from raydr.errors import ConfigError
from raydr.protocols import Encoder, QueryRefiner, Reranker
from raydr.train.batches import BatchTokenizer, GroupTokenizer, MultimodalTokenizer, Tokenized
from raydr.train.learner import Learner
from raydr.train.sampling import BatchSampler, RandomBatches
from raydr.train.trainer import MODEL
from raydr.types import Embeddings, Passage, Query

if TYPE_CHECKING:  # torch takes seconds to import, and only training needs it
    from torch import nn

    from raydr.steps import Steps


class Method(Learner, ABC):
    """Base of every method. Subclasses set `Config` and override what their paper changes."""

    @abstractmethod
    def build_encoder(self) -> Encoder:
        """The encoder of queries and passages."""

    def encoder(self, *, is_preprocessed: bool = False) -> Encoder:
        """`build_encoder` with the method's preprocessing in front: what every verb and deployment encodes with.

        With `is_preprocessed`, passages come as `preprocess_passages` leaves them.
        """
        return MethodEncoder(self, is_preprocessed=is_preprocessed)

    @property
    def preprocessing_version(self) -> str:
        """Stamp of what `preprocess_queries` and `preprocess_passages` do. It is part of the encoder's version, so an
        index of texts that were changed in another way refuses this method's queries. Empty: they change nothing that
        matters.
        """
        return ""

    def preprocess_queries(self, queries: Sequence[Query]) -> list[Query]:
        """What is done to queries before they are encoded; the very same code runs in batch search and serving."""
        return list(queries)

    def preprocess_passages(self, passages: Sequence[Passage]) -> list[Passage]:
        """What is done to passages before they are encoded; the index keeps the original text."""
        return list(passages)

    def tokenizer(self) -> GroupTokenizer:
        """`build_tokenizer` with the method's preprocessing in front: what training reads."""
        return MethodTokenizer(self, self.build_tokenizer())

    def fit(self, steps: Steps) -> Component:
        """The whole training, as steps that are each made once; gives the method with what it learned.

        By default: negatives are mined with the model it starts from, for the training and (where the config names a
        dev split) the dev queries, and the model is trained on them once. A method that trains in rounds writes its
        own.
        """
        examples, dev = steps.examples(self.component)
        model = steps.train(self.component, steps.train_config, examples, "train", dev=dev)
        return self.trained(str((model.path / MODEL).resolve()))

    def build_refiner(self, encoder: Encoder) -> QueryRefiner | None:
        """Pseudo-relevance feedback between a first and a second search; None searches once."""
        return None

    def build_reranker(self) -> Reranker | None:
        """Reorders the hits of the last search; None keeps the retriever's order."""
        return None


class DualEncoderConfig(TextEncoderConfig):
    """An encoder's settings, and what it is trained with."""

    num_negatives: int = Field(default=7, ge=0)
    """Negatives of each query in a batch, beside the other queries' passages."""
    negative_depth: int | None = Field(default=None, ge=1)
    """Negatives are drawn from so many of the hardest candidates; null: from all."""


class DualEncoderMethod(Method):
    """A method that trains a dual encoder: the network, its tokens and its encoder; a paper adds its objective.

    One that changes something else inherits from `Contrastive` (raydr.methods.contrastive), which has the usual one.
    """

    Config: ClassVar[ConfigClass] = DualEncoderConfig

    config: Any
    """An instance of this class's own `Config`."""

    @property
    def encoder_config(self) -> TextEncoderConfig:
        """The settings of the encoder alone."""
        return part_of(TextEncoderConfig, self.config)

    def build_encoder(self) -> Encoder:
        return TextEncoder(self.encoder_config)

    def build_model(self) -> nn.Module:
        return TextEncoder(self.encoder_config).load_network("float32")

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.export import save_dual_encoder
        from raydr.models.dual_encoder import DualEncoder

        if not isinstance(model, DualEncoder):
            raise TypeError(f"{type(self).__name__} saves a DualEncoder, not a {type(model).__name__}")
        save_dual_encoder(model, TextEncoder(self.encoder_config), folder)

    def build_tokenizer(self) -> GroupTokenizer:
        return BatchTokenizer(self.encoder_config)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        return RandomBatches(
            examples,
            batch_size=batch_size,
            num_negatives=self.config.num_negatives,
            depth=self.config.negative_depth,
            seed=seed,
        )


class MultimodalConfig(MultimodalEncoderConfig):
    """A multimodal encoder's settings, and what it is trained with."""

    train_vision: bool = False
    """Whether the vision tower is trained; the projector behind it and the pooling head always are."""
    num_negatives: int = Field(default=0, ge=0)
    """Negatives of each query in a batch, beside the other queries' passages."""
    negative_depth: int | None = Field(default=None, ge=1)
    """Negatives are drawn from so many of the hardest candidates; null: from all."""


class MultimodalMethod(Method):
    """A method that trains an encoder of texts and pictures: its network, its tokens; a paper adds its objective."""

    Config: ClassVar[ConfigClass] = MultimodalConfig

    config: Any
    """An instance of this class's own `Config`, which is a `MultimodalConfig`."""

    @property
    def encoder_config(self) -> MultimodalEncoderConfig:
        """The settings of the encoder alone."""
        return part_of(MultimodalEncoderConfig, self.config)

    def build_encoder(self) -> Encoder:
        return MultimodalEncoder(self.encoder_config)

    def build_model(self) -> nn.Module:
        network = MultimodalCheckpoint(self.encoder_config).load("float32")
        network.vision_tower.requires_grad_(self.config.train_vision)
        return network

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.multimodal_weights import save

        save(model, MultimodalCheckpoint(self.encoder_config), folder)

    def build_tokenizer(self) -> GroupTokenizer:
        return MultimodalTokenizer(self.encoder_config)

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        return RandomBatches(
            examples,
            batch_size=batch_size,
            num_negatives=self.config.num_negatives,
            depth=self.config.negative_depth,
            seed=seed,
        )


class DualStart(MultimodalMethod):
    """A method that trains a dual encoder once, which may have to be made of a text encoder first.

    Its `Config` is a `raydr.llm.small_multimodal:DualStartConfig` as well.
    """

    def fit(self, steps: Steps) -> Component:
        """With the negatives that the config mines or, without `num_negatives`, with the batch's own."""
        from raydr.llm.small_multimodal import small_dual_encoder

        method = self
        if self.config.start == "encoder":
            seed = steps.train_config.seed
            model = small_dual_encoder(self.config.model, steps.config.out / "start", self.config.vision, seed=seed)
            method = type(self)(self.config.model_copy(update={"model": str(model.resolve()), "start": "checkpoint"}))
        if self.config.num_negatives:
            return MultimodalMethod.fit(method, steps)
        examples = steps.positives("examples")
        model = steps.train(method.component, steps.train_config, examples, "train").path / MODEL
        return method.trained(str(model.resolve()))


class RankerConfig(Config):
    """What the training of any ranker needs beside its network."""

    num_negatives: int = Field(default=15, ge=1)
    """Negatives in a group (AR2, table 8)."""
    negative_depth: int | None = Field(default=None, ge=1)
    """Negatives are drawn from so many of the hardest candidates; null: from all."""
    retriever: Component = Component(import_path="raydr.methods.zero_shot:ZeroShot")
    """Whose hits it learns to reorder, and reorders."""


class RankerMethod(Method):
    """A method that trains a reranker of another method's hits; it encodes with that one's encoder."""

    config: Any
    """An instance of this class's own `Config`, which is a `RankerConfig`."""

    def fit(self, steps: Steps) -> Component:
        """Trained once, on what the retriever finds."""
        examples, dev = steps.examples(self.config.retriever)
        model = steps.train(self.component, steps.train_config, examples, "train", dev=dev)
        return self.trained(str((model.path / MODEL).resolve()))

    def build_encoder(self) -> Encoder:
        """The retriever's."""
        return build_method(self.config.retriever).encoder()

    def build_batches(self, examples: ExampleSet, *, batch_size: int, seed: int) -> BatchSampler:
        return RandomBatches(
            examples,
            batch_size=batch_size,
            num_negatives=self.config.num_negatives,
            depth=self.config.negative_depth,
            seed=seed,
        )


def build_method(component: Component) -> Method:
    """The method a config names. Raises `ConfigError` when the class is not a `Method`."""
    method = component.build()
    if not isinstance(method, Method):
        raise ConfigError(f"method {component.import_path}: {type(method).__name__} is not a raydr Method")
    return method


class MethodEncoder:
    """A method's encoder with the method's preprocessing in front."""

    def __init__(self, method: Method, *, is_preprocessed: bool = False) -> None:
        self._method, self._is_preprocessed = method, is_preprocessed
        self._encoder = method.build_encoder()

    @property
    def dim(self) -> int:
        return self._encoder.dim

    @property
    def version(self) -> str:
        """The encoder's own stamp; where texts are changed before, one of both."""
        before, own = self._method.preprocessing_version, self._encoder.version
        return hashlib.sha256(f"{before} {own}".encode()).hexdigest() if before else own

    @property
    def inner(self) -> Encoder:
        """The encoder without the preprocessing; that of a ranker is its retriever's, which may be wrapped as well."""
        return getattr(self._encoder, "inner", self._encoder)

    def encode_queries(self, queries: Sequence[Query]) -> Embeddings:
        return self._encoder.encode_queries(self._method.preprocess_queries(queries))

    def encode_passages(self, passages: Sequence[Passage]) -> Embeddings:
        changed = passages if self._is_preprocessed else self._method.preprocess_passages(passages)
        return self._encoder.encode_passages(changed)


@dataclass(frozen=True)
class MethodTokenizer:
    """A method's tokenizer with the method's preprocessing in front."""

    method: Method
    inner: GroupTokenizer

    @property
    def pad_id(self) -> int:
        return self.inner.pad_id

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        passages = iter(self.method.preprocess_passages(list(chain.from_iterable(groups))))
        changed = [list(islice(passages, len(group))) for group in groups]
        return self.inner.tokenize(self.method.preprocess_queries(queries), changed)
