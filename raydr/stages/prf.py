"""prf: which refiner a search moves its queries with, by `search.prf` or `prf` of a served application.

Notable: the choice is a plain object that is built where the query encoder is, in this process, in a Ray actor or in a
Serve replica. A learned refiner was trained with one number of hits and reads no other.

    build_refiner = chosen_refiner(PrfConfig(method="rocchio"), method.build_refiner)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raydr.config import Component
from raydr.errors import ConfigError
from raydr.prf import Average, Rocchio
from raydr.protocols import Encoder, QueryRefiner
from raydr.stages.config import PrfConfig
from raydr.stages.query_encoder import BuildRefiner


def chosen_refiner(config: PrfConfig | None, own: BuildRefiner | None) -> BuildRefiner | None:
    """What builds the refiner of a search; `own` builds that of its method. None: the search is made once."""
    if config is None:
        return own
    if config.method == "none":
        return None
    if config.method == "learned":
        return _Learned(config.refiner, own, config.k)
    return _Vector(config)


def vector_refiner(config: PrfConfig) -> QueryRefiner:
    """The refiner without parameters that `config.method` names."""
    num_feedback = {} if config.k is None else {"num_feedback": config.k}
    if config.method == "average":
        return Average(**num_feedback)
    return Rocchio(**num_feedback, alpha=config.alpha, beta=config.beta)


def build_learned(component: Component, encoder: Encoder) -> QueryRefiner | None:
    """The refiner of the method that `component` names; None where it has none."""
    method: Any = component.build()  # a `raydr.methods.base.Method`; methods know the stages, not the other way
    build = getattr(method, "build_refiner", None)
    return build(encoder) if build is not None else None


def check_k(k: int | None, num_feedback: int) -> None:
    """Raises `ConfigError` where `k` is another number of hits than a refiner has learned to read."""
    if k is not None and k != num_feedback:
        raise ConfigError(
            f"prf.k: this refiner has learned to read the first {num_feedback} hits and no other number, got {k}; "
            f"leave k out, or train one with num_feedback={k}"
        )


@dataclass(frozen=True)
class _Vector:
    config: PrfConfig

    def __call__(self, encoder: Encoder) -> QueryRefiner:
        del encoder
        return vector_refiner(self.config)


@dataclass(frozen=True)
class _Learned:
    component: Component | None
    own: BuildRefiner | None
    k: int | None

    def __call__(self, encoder: Encoder) -> QueryRefiner:
        if self.component is not None:
            refiner = build_learned(self.component, encoder)
        else:
            refiner = self.own(encoder) if self.own is not None else None
        if refiner is None:
            raise ConfigError(
                "prf.method: nothing here has learned to refine queries; name a method that has in prf.refiner (such "
                "as raydr.methods.ance_prf:AncePrf), or take average or rocchio"
            )
        check_k(self.k, refiner.num_feedback)
        return refiner
