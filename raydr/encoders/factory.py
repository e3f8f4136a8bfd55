"""An encoder as something that can be sent to a Ray actor or a Serve replica: configuration now, weights there.

build_encoder = EncoderFactory(Component(import_path="raydr.methods.zero_shot:ZeroShot"))
build_encoder().encode_queries([Query("q1", "how do I join two frames")])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from raydr.config import Component, import_object
from raydr.errors import ConfigError
from raydr.protocols import Encoder, Reranker

BuildEncoder: TypeAlias = Callable[[], Encoder]


@dataclass(frozen=True)
class EncoderFactory:
    """A picklable `() -> Encoder`: names a method, builds its encoder (preprocessing included) where it is called."""

    method: Component
    is_preprocessed: bool = False
    """Whether passages come as the method's preprocessing leaves them (raydr/stages/preprocess.py)."""

    def __call__(self) -> Encoder:
        # Asked before it is built: an index's manifest names it, and anything importable would be called.
        if not hasattr(import_object(self.method.import_path), "encoder"):
            raise ConfigError(f"method {self.method.import_path}: is not a raydr Method")
        built = self.method.build()
        return built.encoder(is_preprocessed=True) if self.is_preprocessed else built.encoder()


def build_ranker(component: Component) -> Any:
    """What a config names to rank with: a reranker, or that of a method, which knows how its trained ranker is used."""
    named: Any = component.build()
    return named.build_reranker() if hasattr(named, "build_reranker") else named


def build_reranker(component: Component, *, where: str) -> Any:
    """`build_ranker` of what has to be a `Reranker`. Raises `ConfigError` naming the setting `where` it stands."""
    built = build_ranker(component)
    if not isinstance(built, Reranker):
        raise ConfigError(f"{where}: {component.import_path} has no reranker")
    return built
