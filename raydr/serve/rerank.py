"""The Reranker deployment: any `raydr.protocols.Reranker`, named in the application's args, behind the rerank routes.

args: {reranker: {import_path: "mypackage.rerankers:Lexical", args: {}}}
args: {reranker: {import_path: "raydr.methods.cross_encoder:CrossEncoderRanker", args: {model: OUT/train/model}}}
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from raydr.config import Component
from raydr.encoders.factory import build_ranker
from raydr.errors import ConfigError
from raydr.protocols import Reranker as RerankerProtocol
from raydr.types import Hit, Passage, Query


class Reranker:
    """One replica. The reranker runs in a thread, one request at a time."""

    def __init__(self, component: Component) -> None:
        reranker = build_ranker(component)
        if not isinstance(reranker, RerankerProtocol):
            raise ConfigError(f"reranker {component.import_path}: {type(reranker).__name__} has no method rerank")
        self._reranker: RerankerProtocol = reranker
        self._turn = asyncio.Lock()

    async def rerank(self, query: str, documents: Sequence[str], *, request_id: str) -> list[tuple[int, float]]:
        """(place in `documents`, score), best first; equal scores keep the order of the request."""
        # The documents come in no order, so all enter with the same score.
        passages = {str(place): Passage(str(place), text) for place, text in enumerate(documents)}
        hits = [Hit(passage_id, 0.0) for passage_id in passages]
        async with self._turn:
            ranked = await asyncio.to_thread(self._reranker.rerank, Query(request_id, query), hits, passages)
        places = [(int(hit.passage_id), float(hit.score)) for hit in ranked]
        return sorted(places, key=lambda place_and_score: (-place_and_score[1], place_and_score[0]))
