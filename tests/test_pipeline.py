"""The plain-Python pipeline: order, refinement, reranking, missing rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raydr.pipeline import Pipeline, to_hits
from raydr.protocols import TopK
from raydr.types import Hit, Passage, Query

TEXTS = {"a": "alpha", "b": "beta gamma", "c": "gamma"}
WORDS = ["alpha", "beta", "gamma"]
PASSAGES = {id_: Passage(id_, text) for id_, text in TEXTS.items()}


class CountingEncoder:
    """Counts the words of a tiny vocabulary."""

    dim = len(WORDS)
    version = "count"

    def encode_queries(self, queries: Sequence[Query]) -> np.ndarray:
        return self._count([query.text for query in queries])

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        return self._count([passage.text for passage in passages])

    def _count(self, texts: list[str]) -> np.ndarray:
        counts = [[text.split().count(word) for word in WORDS] for text in texts]
        return np.array(counts, dtype=np.float32).reshape(len(texts), self.dim)


class ExactIndex:
    """Every inner product, sorted."""

    def __init__(self) -> None:
        self.passage_ids: list[str] = []
        self.embeddings = np.empty((0, len(WORDS)), dtype=np.float32)

    def add(self, passage_ids: Sequence[str], embeddings: np.ndarray) -> None:
        self.passage_ids += passage_ids
        self.embeddings = np.concatenate([self.embeddings, embeddings])

    def search(self, embeddings: np.ndarray, k: int, *, allowed: np.ndarray | None = None) -> TopK:
        assert allowed is None, "the pipeline filters nothing"
        scores = embeddings @ self.embeddings.T
        rows = np.full((len(embeddings), k), -1, dtype=np.int64)
        top = np.full((len(embeddings), k), -np.inf, dtype=np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows[:, : order.shape[1]] = order
        top[:, : order.shape[1]] = np.take_along_axis(scores, order, axis=1)
        return TopK(scores=top, rows=rows)


def pipeline(**parts) -> Pipeline:
    encoder = CountingEncoder()
    index = ExactIndex()
    index.add(list(TEXTS), encoder.encode_passages(list(PASSAGES.values())))
    return Pipeline(encoder, index, PASSAGES, **parts)


def test_hits_come_best_first_with_their_scores():
    run = pipeline().search([Query("q1", "alpha alpha"), Query("q2", "beta gamma")], k=2)
    assert run == {"q1": [Hit("a", 2.0), Hit("b", 0.0)], "q2": [Hit("b", 2.0), Hit("c", 1.0)]}


def test_asking_for_more_than_there_is_gives_what_there_is():
    run = pipeline().search([Query("q", "gamma")], k=10)
    assert [hit.passage_id for hit in run["q"]] == ["b", "c", "a"]


def test_no_queries_give_an_empty_run():
    assert pipeline().search([], k=3) == {}


def test_rows_of_minus_one_fall_away():
    index = ExactIndex()
    index.add(["a", "b"], np.zeros((2, 3), dtype=np.float32))
    top = TopK(
        scores=np.array([[1.0, -np.inf]], dtype=np.float32),
        rows=np.array([[1, -1]], dtype=np.int64),
    )
    assert to_hits(index, top) == [[Hit("b", 1.0)]]


class AddFeedback:
    """Adds the embedding of the best passage to the query."""

    num_feedback = 1
    reads = "passages"

    def refine(self, queries, embeddings, found):
        return embeddings + CountingEncoder().encode_passages([own.passages[0] for own in found])


def test_a_refiner_searches_again_with_what_the_first_search_found():
    found = pipeline(refiner=AddFeedback()).search([Query("q", "beta")], k=3)["q"]
    # "beta" finds b ("beta gamma"); with b's words added, c ("gamma") now scores too.
    assert found == [Hit("b", 3.0), Hit("c", 1.0), Hit("a", 0.0)]


class Reverse:
    def rerank(self, query, hits, passages):
        assert all(hit.passage_id in passages for hit in hits)
        return [Hit(hit.passage_id, -float(rank)) for rank, hit in enumerate(reversed(hits))]


def test_a_reranker_has_the_last_word():
    found = pipeline(reranker=Reverse()).search([Query("q", "beta gamma")], k=2)["q"]
    assert found == [Hit("c", 0.0), Hit("b", -1.0)]
