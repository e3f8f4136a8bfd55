"""Relevance feedback in batch search: the hits are those of the moved queries, here, on Ray, and query by query."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from raydr.config import Component, ConfigError, validate
from raydr.encoders.factory import EncoderFactory
from raydr.feedback import towards_order, towards_scores
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.stages.config import FeedbackConfig, SearchConfig
from raydr.stages.search import search_corpus
from raydr.types import Hit, Query
from tests.corpora import METHOD, WordCounts, brute_force, embedded_corpus

RNG = np.random.default_rng(0)
TEXTS = {f"p{n:02d}": " ".join(RNG.choice(WordCounts.VOCABULARY, size=RNG.integers(1, 9))) for n in range(60)}
VECTORS = WordCounts().count(list(TEXTS.values()))
QUERIES = [Query(f"q{n}", " ".join(RNG.choice(WordCounts.VOCABULARY, size=3))) for n in range(7)]
DEPTH = 9


class LikesZeta:
    """A reranker: a passage is worth its share of the word zeta; ties keep their order."""

    def rerank(self, query, hits, passages):
        def worth(hit: Hit) -> float:
            words = passages[hit.passage_id].text.split()
            return words.count("zeta") / len(words)

        return [Hit(hit.passage_id, worth(hit)) for hit in sorted(hits, key=worth, reverse=True)]


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("feedback")
    build_index(*embedded_corpus(folder / "c", TEXTS, VECTORS), IndexConfig(num_shards=3), folder / "i", use_ray=False)
    return folder / "i"


def config(**settings) -> SearchConfig:
    judge = Component(import_path="tests.stages.test_feedback:LikesZeta")
    feedback = {"depth": DEPTH, **{name: judge if value is True else value for name, value in settings.items()}}
    return SearchConfig(k=10, feedback=FeedbackConfig(**feedback))


def found(index, out, config, use_ray=False) -> dict[str, list[tuple[str, float]]]:
    encoder = EncoderFactory(Component.model_validate(METHOD))
    artifact = search_corpus(index, QUERIES, encoder, config, out, use_ray=use_ray)
    hits: dict[str, list[tuple[str, float]]] = {}
    for row in pq.read_table(artifact.path / "hits.parquet").to_pylist():
        hits.setdefault(row["query_id"], []).append((row["passage_id"], row["score"]))
    return hits


def by_hand(query: Query, *, scores: bool, order: bool) -> list[tuple[str, float]]:
    """The definition, for one query: first search, opinions, the two stages, second search."""
    embedding = WordCounts().encode_queries([query])
    (first,) = brute_force(list(TEXTS), VECTORS, embedding, DEPTH)
    ranked = LikesZeta().rerank(query, [Hit(*hit) for hit in first], {id_: _Text(text) for id_, text in TEXTS.items()})
    ids = [id_ for id_, _ in first]
    passages = torch.from_numpy(VECTORS[[list(TEXTS).index(id_) for id_ in ids]])[None]
    mask = torch.ones(1, DEPTH, dtype=torch.bool)
    moved = torch.from_numpy(embedding)
    if scores:
        opinion = {hit.passage_id: hit.score for hit in ranked}
        moved = towards_scores(moved, passages, torch.tensor([[opinion[id_] for id_ in ids]]), mask)
    if order:
        place = {hit.passage_id: rank for rank, hit in enumerate(ranked)}
        handed_out = torch.tensor([[first[place[id_]][1] for id_ in ids]])
        ranks = torch.tensor([[place[id_] + 1 for id_ in ids]])
        moved = towards_order(moved, passages, handed_out, ranks, mask)
    (hits,) = brute_force(list(TEXTS), VECTORS, moved.numpy(), 10)
    return hits


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text


@pytest.mark.parametrize(("scores", "order"), [(True, False), (False, True), (True, True)])
def test_the_hits_are_those_of_the_moved_queries(index, tmp_path, scores, order):
    judges = {name: True for name, named in {"scores": scores, "order": order}.items() if named}
    hits = found(index, tmp_path / "out", config(**judges))
    for query in QUERIES:
        expected = by_hand(query, scores=scores, order=order)
        np.testing.assert_allclose([s for _, s in hits[query.query_id]], [s for _, s in expected], atol=1e-4)
        assert [id_ for id_, _ in hits[query.query_id]] == [id_ for id_, _ in expected]


@pytest.mark.ray
def test_on_ray_the_hits_are_the_same(index, tmp_path, ray_cluster):
    settings = config(scores=True, order=True)
    local, remote = found(index, tmp_path / "a", settings), found(index, tmp_path / "b", settings, use_ray=True)
    assert local == remote


def test_what_the_judges_like_is_found_more_often(index, tmp_path):
    """The passages full of zeta that the first search missed come in: the direction of the paper."""
    plain, moved = found(index, tmp_path / "a", SearchConfig(k=10)), found(index, tmp_path / "b", config(scores=True))

    def worth(hits: dict) -> float:
        return float(np.mean([TEXTS[id_].split().count("zeta") for line in hits.values() for id_, _ in line]))

    assert worth(moved) > worth(plain)


def test_no_steps_change_nothing_and_other_judges_are_another_run(index, tmp_path, capsys):
    still = config(scores=True, order=True, steps=0, order_steps=0)
    assert found(index, tmp_path / "a", still) == found(index, tmp_path / "b", SearchConfig(k=10))
    found(index, tmp_path / "a", still)
    assert "has this run already" in capsys.readouterr().err
    found(index, tmp_path / "a", config(scores=True, steps=1))
    assert "has this run already" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedback": {}}, "name a reranker: scores"),
        ({"feedback": {"scores": METHOD, "depth": 1}}, "depth"),
        ({"mode": "bm25", "feedback": {"scores": METHOD}}, "mode bm25 has none; use dense or hybrid"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(SearchConfig, settings, where="search")


def test_a_judge_that_cannot_rerank_is_named(index, tmp_path):
    with pytest.raises(ConfigError, match=r"search\.feedback\.order: tests\.corpora:WordCounts has no reranker"):
        found(index, tmp_path / "out", config(order=Component.model_validate(METHOD)))
