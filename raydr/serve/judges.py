"""The rerankers of an application as a search asks them: by name, and with what they can read.

Notable: pictures travel to a reranker only where it reads them (its attribute `modalities`), which is asked of its
deployment when a picture first comes up. One that reads words alone is given the words of what has both, and refuses a
query that has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raydr.serve.errors import ApiError
from raydr.serve.fanout import ask, call
from raydr.types import Modality, Passage, Query


class Judges:
    """The Reranker deployments, by name; the first is used where a request names none."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)
        self._reads: dict[str, frozenset[Modality]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._handles)

    def name(self, asked: str | None, *, param: str = "model") -> str:
        """The reranker that a request means: the one it names (in the field `param`), or the first. Raises `ApiError`
        501 without any, 404 for a name that is not there.
        """
        if not self._handles:
            message = "no reranker is configured on this server; set `rerankers` in the application's args"
            raise ApiError(501, "reranker_not_configured", message)
        name = asked if asked is not None else self.names[0]
        if name not in self._handles:
            message = f"no reranker {name!r} here; there is: {', '.join(self._handles)}"
            raise ApiError(404, "model_not_found", message, param=param)
        return name

    async def reads(self, name: str) -> frozenset[Modality]:
        """What a reranker reads. Raises `ApiError` where its deployment does not answer."""
        if name not in self._reads:
            self._reads[name] = await ask(self._handles[name].modalities)
        return self._reads[name]

    async def rank(
        self, name: str, query: Query, passages: Sequence[Passage], *, request_id: str
    ) -> list[tuple[int, float]]:
        """(place in `passages`, score), best first. Raises `ApiError`."""
        return await call(self._handles[name].rerank.remote(query, passages, request_id=request_id))
