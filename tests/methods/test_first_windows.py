"""FIRST: which windows its training draws, and how a list is ranked by windows."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from raydr.data.example_files import examples_from_file
from raydr.data.examples import Example
from raydr.errors import ConfigError
from raydr.llm.listwise import ListwiseConfig
from raydr.methods.first import FirstReranker, WindowBatches
from raydr.types import Hit, Passage, Query
from tests.methods.test_first import written


def example(query_id, negatives):
    return Example(Query(query_id, "x"), ["p"], negatives, negative_scores=[0.0] * len(negatives))


def test_windows_of_a_batch_have_one_size_and_shuffled_passages(tmp_path):
    names = [f"n{n}" for n in range(7)]
    passages = {name: Passage(name, name) for name in ["p", *names]}
    examples = written(tmp_path / "examples", [example("q0", names), example("q1", names[:6])], passages)
    sampler = WindowBatches(examples, batch_size=2, window_size=20, short_share=0.5, shuffled_share=1.0, seed=1)
    batches = [batch for batch, _ in zip(sampler, range(30))]
    sizes = {len(group.passages) for batch in batches for group in batch}
    assert all(len({len(group.passages) for group in batch}) == 1 for batch in batches)
    assert max(sizes) == 7 and min(sizes) < 7
    assert len({group.passages for batch in batches for group in batch if len(group.passages) == 7}) > 5
    for batch in batches:
        for group in batch:
            ids = [passage.passage_id for passage in examples.passages(group.passages)]
            assert list(group.teacher_scores) == [
                float(id_ == "p") for id_ in ids
            ]  # the miner's scores are no teacher's
    assert [b for b, _ in zip(sampler, range(5))] == batches[:5]


def test_windows_hold_a_positive_and_may_stand_as_the_retriever_ranked_them(tmp_path):
    names = [f"n{n}" for n in range(9)]
    passages = {name: Passage(name, name) for name in ["p", *names]}
    scores = [float(n) for n in range(9)]
    mined = Example(
        Query("q", "x"), ["p"], names, negative_scores=scores, negative_sources=["model"] * 9, positive_scores=[4.5]
    )
    examples = written(tmp_path / "examples", [mined], passages)
    ranks = {"p": 4.5, **dict(zip(names, scores, strict=True))}
    for shuffled_share, expected in ((0.0, {True}), (1.0, {True, False})):
        settings = {"batch_size": 4, "window_size": 3, "short_share": 0.0, "seed": 1}
        sampler = WindowBatches(examples, shuffled_share=shuffled_share, **settings)
        windows = [
            [passage.passage_id for passage in examples.passages(group.passages)]
            for batch, _ in zip(sampler, range(10))
            for group in batch
        ]
        assert all("p" in window and len(set(window)) == 3 for window in windows)
        assert len({frozenset(window) for window in windows}) > 10
        assert {window == sorted(window, key=ranks.__getitem__, reverse=True) for window in windows} == expected


def test_a_teacher_that_orders_positives_alone_leaves_no_window_without_one(tmp_path):
    """Equal scores of all negatives make no pair, so a window of negatives would teach nothing."""
    names = [f"n{n}" for n in range(9)]
    passages = {name: Passage(name, name) for name in ["p", "r", *names]}
    graded = Example(
        Query("q", "x"), ["p", "r"], names, negative_scores=[0.0] * 9, negative_sources=["file"] * 9,
        positive_scores=[2.0, 1.0],
    )  # fmt: skip
    examples = written(tmp_path / "examples", [graded], passages)
    sampler = WindowBatches(examples, batch_size=4, window_size=3, short_share=0.0, shuffled_share=1.0, seed=1)
    for batch, _ in zip(sampler, range(10)):
        for group in batch:
            assert {"p", "r"} & {passage.passage_id for passage in examples.passages(group.passages)}


def test_the_orders_of_a_file_are_learned(tmp_path):
    docs = [{"_id": name, "text": f"text of {name}"} for name in "abcde"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    orders = [{"query_id": "q", "query": "x", "docs": list(order)} for order in ("dbace", "eabcd")]
    (tmp_path / "orders.jsonl").write_text("".join(json.dumps(order) + "\n" for order in orders))
    corpus = str(tmp_path / "corpus.jsonl")
    examples = examples_from_file(str(tmp_path / "orders.jsonl"), tmp_path / "out", corpus=corpus, trust_order=True)
    sampler = WindowBatches(examples, batch_size=2, window_size=5, short_share=0.0, shuffled_share=0.0, seed=1)
    for group in next(iter(sampler)):
        ids = [passage.passage_id for passage in examples.passages(group.passages)]
        ranked = [ids[place] for place in np.argsort([-score for score in group.teacher_scores])]
        assert "".join(ranked) == ("dbace", "eabcd")[group.query]
    # As a list is ranked by sliding windows, the teacher's first is in some windows and not in others.
    small = WindowBatches(examples, batch_size=2, window_size=3, short_share=0.0, shuffled_share=1.0, seed=1)
    windows = [
        {passage.passage_id for passage in examples.passages(group.passages)}
        for batch, _ in zip(small, range(100))
        for group in batch
        if group.query == 0
    ]
    assert {len(window) for window in windows} == {3}
    assert {name: sum(name in window for window in windows) for name in "abcde"} == pytest.approx(
        dict.fromkeys("abcde", 60), abs=18
    )


def test_a_query_without_a_second_candidate_is_named(tmp_path):
    examples = written(tmp_path / "examples", [example("q0", [])], {"p": Passage("p", "p")})
    with pytest.raises(ConfigError, match=r"q0.*has 1 candidate.*raydr mine"):
        WindowBatches(examples, batch_size=2, window_size=20, short_share=0.5, shuffled_share=1.0, seed=1)


class _Oracle(FirstReranker):
    """Ranks by the number in a text."""

    async def rank_window(self, query, passages):
        from raydr.llm.listwise import RankedWindow

        await asyncio.sleep(0)
        scores = [float(text) - 100 * len(passages) for text in passages]  # windows are on different scales
        return RankedWindow(sorted(range(len(scores)), key=lambda n: -scores[n]), scores)


@pytest.mark.parametrize("scores", ["window", "calibrated"])
def test_a_list_is_ranked_by_windows_and_every_hit_comes_back(scores):
    reranker = _Oracle(ListwiseConfig(engine={"model": "none"}, window_size=20, stride=10, scores=scores))
    values = np.random.default_rng(0).permutation(95)
    passages = {str(n): Passage(str(n), str(value)) for n, value in enumerate(values)}
    hits = [Hit(passage_id, 0.0) for passage_id in passages]
    ranked = reranker.rerank(Query("q", "x"), hits, passages)
    assert sorted(hit.passage_id for hit in ranked) == sorted(passages)
    assert [int(passages[hit.passage_id].text) for hit in ranked[:10]] == list(range(94, 84, -1))
    own = [hit.score for hit in ranked]
    assert own == sorted(own, reverse=True)
    if scores == "calibrated":
        head = [int(passages[hit.passage_id].text) for hit in ranked[:10]]
        np.testing.assert_allclose(np.diff(own[:10]), np.diff(head))
    assert reranker.rerank(Query("q", "x"), [], passages) == []
    many = reranker.rerank_many([(Query("a", "x"), hits), (Query("b", "x"), hits[:7])], passages)
    assert many[0] == ranked
    assert len(many[1]) == 7
