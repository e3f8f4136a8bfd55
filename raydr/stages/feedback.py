"""feedback: rerankers judge what a first search found, and the queries' embeddings move towards their opinion.

Needs queries, their embeddings, and the passages (with the index's own embeddings of them) of a first search; gives
better embeddings of the queries. Notable: batch search and `/v1/search` share `moved`, so both move alike; an
approximate index gives the embeddings as it keeps them. The formulas stand in `raydr/feedback.py`.

    search.feedback: {scores: {import_path: "raydr.methods.cross_encoder:CrossEncoderRanker", args: {...}}, depth: 100}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from raydr.encoders.factory import build_reranker
from raydr.stages.config import FeedbackConfig, FeedbackSteps
from raydr.types import Hit, Passage, Query


class Teachers:
    """The rerankers of a `FeedbackConfig`, in this process."""

    def __init__(self, config: FeedbackConfig) -> None:
        self._config = config
        self._scores, self._order = (
            build_reranker(component, where=f"search.feedback.{field}") if component is not None else None
            for field, component in (("scores", config.scores), ("order", config.order))
        )

    @property
    def depth(self) -> int:
        """Hits of the first search that are judged."""
        return self._config.depth

    def moved(
        self,
        queries: Sequence[Query],
        embeddings: Float32[np.ndarray, "query dim"],
        found: Sequence[Sequence[tuple[Hit, Passage]]],
        vectors: Sequence[Float32[np.ndarray, "hit dim"]],
    ) -> Float32[np.ndarray, "query dim"]:
        """Better embeddings of `queries`; `vectors` are those of the hits `found`, in their order."""
        lists = [(query, [hit for hit, _ in own]) for query, own in zip(queries, found, strict=True)]
        passages = {passage.passage_id: passage for own in found for _, passage in own}
        judged = {
            side: [by_place(hits, ranked) for (_, hits), ranked in zip(lists, ranked_lists, strict=True)]
            for side, reranker in (("scores", self._scores), ("order", self._order))
            if reranker is not None
            for ranked_lists in [rerank_lists(reranker, lists, passages)]
        }
        first = [[hit.score for hit in hits] for _, hits in lists]
        return moved(embeddings, vectors, first, self._config, **judged)

    def close(self) -> None:
        """Ends the engines that were started for it."""
        for reranker in (self._scores, self._order):
            if hasattr(reranker, "close"):
                reranker.close()


def moved(
    embeddings: Float32[np.ndarray, "query dim"],
    vectors: Sequence[Float32[np.ndarray, "hit dim"]],
    first_scores: Sequence[Sequence[float]],
    steps: FeedbackSteps,
    *,
    scores: Sequence[Sequence[tuple[int, float]]] | None = None,
    order: Sequence[Sequence[tuple[int, float]]] | None = None,
) -> Float32[np.ndarray, "query dim"]:
    """The embeddings after stage A (where `scores` is given) and stage B (where `order` is).

    Both are what a reranker says of each query's hits: (place in `vectors`, score), best first. Of `order` only the
    order counts: the scale of stage B comes from `first_scores`, handed out in that order as the released code does.
    """
    import torch

    from raydr.feedback import towards_order, towards_scores

    width = max((len(own) for own in vectors), default=0)
    if not width:
        return embeddings
    num_queries, dim = embeddings.shape
    passages = np.zeros((num_queries, width, dim), dtype=np.float32)
    mask = np.zeros((num_queries, width), dtype=bool)
    targets, handed_out = np.zeros_like(mask, dtype=np.float32), np.zeros_like(mask, dtype=np.float32)
    ranks = np.zeros_like(mask, dtype=np.int64)
    for line, own in enumerate(vectors):
        passages[line, : len(own)], mask[line, : len(own)] = own, True
        for place, score in scores[line] if scores is not None else ():
            targets[line, place] = score
        descending = sorted(first_scores[line], reverse=True)
        for rank, (place, _) in enumerate(order[line] if order is not None else ()):
            ranks[line, place], handed_out[line, place] = rank + 1, descending[rank]
    queries, groups, real = map(torch.from_numpy, (np.array(embeddings, dtype=np.float32), passages, mask))
    if scores is not None:
        queries = towards_scores(
            queries, groups, torch.from_numpy(targets), real, learning_rate=steps.learning_rate, steps=steps.steps
        )
    if order is not None:
        queries = towards_order(
            queries,
            groups,
            torch.from_numpy(handed_out),
            torch.from_numpy(ranks),
            real,
            learning_rate=steps.order_learning_rate,
            steps=steps.order_steps,
        )
    return queries.numpy()


def rerank_lists(
    reranker: Any, lists: Sequence[tuple[Query, Sequence[Hit]]], passages: Mapping[str, Passage]
) -> list[list[Hit]]:
    """Each list as the reranker orders and scores it; at once where it can."""
    if hasattr(reranker, "rerank_many"):
        return reranker.rerank_many(lists, passages)
    return [reranker.rerank(query, hits, passages) for query, hits in lists]


def by_place(hits: Sequence[Hit], ranked: Sequence[Hit]) -> list[tuple[int, float]]:
    """(place in `hits`, score), in the order of `ranked`."""
    places = {hit.passage_id: place for place, hit in enumerate(hits)}
    return [(places[hit.passage_id], hit.score) for hit in ranked]
