"""The query side of a search: encodes and refines queries, in this process or in a Ray actor, behind one face.

Notable: the encoder is built where it runs, so a driver on a machine without weights or a GPU can search; Ray restarts
an actor that dies.

    with QueryEncoder(build_encoder, build_refiner, use_ray=True) as encoder:
        encoder.encode(queries)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeAlias

from raydr.encoders.factory import BuildEncoder
from raydr.prf import refined
from raydr.protocols import Encoder, QueryRefiner
from raydr.types import Embeddings, Found, Query

BuildRefiner: TypeAlias = Callable[[Encoder], QueryRefiner | None]

_RESTARTS = 3


class RefinerInfo(NamedTuple):
    """What a searcher has to know of a refiner that lives elsewhere."""

    num_feedback: int
    """Hits of the first search that it wants to see."""
    reads: Literal["passages", "embeddings"]
    """What it reads of them."""
    version: str | None
    """Stamp of everything that it was learned with and from; None where it has learned nothing."""

    @classmethod
    def of(cls, refiner: QueryRefiner | None) -> RefinerInfo | None:
        if refiner is None:
            return None
        return cls(refiner.num_feedback, refiner.reads, getattr(refiner, "version", None))


class _Worker:
    """What runs beside the weights."""

    def __init__(self, build_encoder: BuildEncoder, build_refiner: BuildRefiner | None) -> None:
        self._encoder = build_encoder()
        self._refiner = build_refiner(self._encoder) if build_refiner is not None else None

    def __repr__(self) -> str:
        """What Ray's dashboard calls it."""
        return f"query encoder {self._encoder.version}"

    def describe(self) -> tuple[str, RefinerInfo | None]:
        """The encoder's stamp, and the refiner where there is one."""
        return self._encoder.version, RefinerInfo.of(self._refiner)

    def encode(self, queries: Sequence[Query]) -> Embeddings:
        return self._encoder.encode_queries(queries)

    def refine(self, queries: Sequence[Query], embeddings: Any, found: Sequence[Found]) -> Embeddings:
        return refined(self._refiner, queries, embeddings, found) if self._refiner is not None else embeddings


class QueryEncoder:
    """Encodes queries, and refines their embeddings where the method has a refiner."""

    def __init__(
        self,
        build_encoder: BuildEncoder,
        build_refiner: BuildRefiner | None,
        *,
        use_ray: bool,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        placement: Mapping[str, Any] | None = None,
    ) -> None:
        self._actor: Any = None
        self._worker: _Worker | None = None
        if use_ray:
            import ray

            actor: Any = ray.remote(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                max_restarts=_RESTARTS,
                max_task_retries=-1,  # until it has died too often: each try while Ray finds a node dead counts
                **(placement or {}),
            )(_Worker)
            self._actor = actor.remote(build_encoder, build_refiner)
        else:
            self._worker = _Worker(build_encoder, build_refiner)
        self.version, self.refiner = self._call("describe")

    def encode(self, queries: Sequence[Query]) -> Embeddings:
        """One row per query."""
        return self._call("encode", queries)

    def refine(self, queries: Sequence[Query], embeddings: Any, found: Sequence[Found]) -> Embeddings:
        """Better embeddings from what a first search found; only where there is a `refiner`."""
        return self._call("refine", queries, embeddings, found)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            return getattr(self._worker, method)(*arguments)
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments))

    def __enter__(self) -> QueryEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._actor is not None:
            import ray

            ray.kill(self._actor)
