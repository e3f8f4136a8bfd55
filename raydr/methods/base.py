"""A method: the few objects a paper changes, handed to verbs that exist once.

Notable: every part has a default, so a method overrides only what its paper invented; a method is built from its
import path and arguments wherever it is needed (driver, Ray actor, Serve replica), so it travels as configuration and
never as a pickled object. `examples/add_a_method.py` writes one.

    method:
      import_path: raydr.methods.zero_shot:ZeroShot
      args: {model: sentence-transformers/all-MiniLM-L6-v2}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from raydr.config import Component, Config
from raydr.errors import ConfigError
from raydr.protocols import Encoder, QueryRefiner, Reranker
from raydr.types import Embeddings, Passage, Query


class Method(ABC):
    """Base of every method. Subclasses set `Config` and override what their paper changes."""

    Config: ClassVar[type[Config]] = Config

    config: Any
    """An instance of this class's own `Config`; a subclass may declare it so."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def build_encoder(self) -> Encoder:
        """The encoder of queries and passages."""

    def encoder(self) -> Encoder:
        """`build_encoder` with the method's preprocessing in front: what every verb and deployment encodes with."""
        return MethodEncoder(self)

    def preprocess_query(self, query: Query) -> Query:
        """What is done to a query's text before it is encoded; the very same code runs in batch search and serving."""
        return query

    def preprocess_passage(self, passage: Passage) -> Passage:
        """What is done to a passage's text before it is encoded; the index keeps the original text."""
        return passage

    def build_refiner(self, encoder: Encoder) -> QueryRefiner | None:
        """Pseudo-relevance feedback between a first and a second search; None searches once."""
        return None

    def build_reranker(self) -> Reranker | None:
        """Reorders the hits of the last search; None keeps the retriever's order."""
        return None


def build_method(component: Component) -> Method:
    """The method a config names. Raises `ConfigError` when the class is not a `Method`."""
    method = component.build()
    if not isinstance(method, Method):
        raise ConfigError(f"method {component.import_path}: {type(method).__name__} is not a raydr Method")
    return method


class MethodEncoder:
    """A method's encoder with the method's preprocessing in front."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._encoder = method.build_encoder()

    @property
    def dim(self) -> int:
        return self._encoder.dim

    @property
    def version(self) -> str:
        return self._encoder.version

    @property
    def inner(self) -> Encoder:
        """The encoder without the preprocessing."""
        return self._encoder

    def encode_queries(self, queries: Sequence[Query]) -> Embeddings:
        return self._encoder.encode_queries([self._method.preprocess_query(q) for q in queries])

    def encode_passages(self, passages: Sequence[Passage]) -> Embeddings:
        return self._encoder.encode_passages([self._method.preprocess_passage(p) for p in passages])
