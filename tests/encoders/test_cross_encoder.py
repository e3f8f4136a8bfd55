"""The cross-encoder as a reranker: sentence-transformers' scores, every hit once, equal ones in the order they came."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raydr.config import Component
from raydr.encoders.cross_encoder import CrossEncoderReranker, PairConfig, load_cross_encoder, save_cross_encoder
from raydr.errors import ConfigError
from raydr.models.cross_encoder import segments
from raydr.protocols import Reranker
from raydr.types import Hit, Passage, Query
from tests.train.tiny import tiny_checkpoint

PASSAGES = {
    "a": Passage("a", "The tide rises and falls with the moon.", "Tides"),
    "b": Passage("b", "Knead the dough and let it rest in a warm place for an hour or two."),
    "c": Passage("c", "Short."),
}
QUERY = Query("q1", "why does the sea rise and fall")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved cross-encoder of random weights."""
    start = tiny_checkpoint(tmp_path_factory.mktemp("cross") / "start")
    torch.manual_seed(1)
    network = load_cross_encoder(PairConfig(model=str(start)))
    out = tmp_path_factory.mktemp("cross") / "model"
    out.mkdir()
    save_cross_encoder(network, str(start), out)
    return out


def reranker(folder: Path, **settings) -> CrossEncoderReranker:
    args = {"model": str(folder), "precision": "float32", "max_pair_tokens": 48, "num_threads": 1, **settings}
    return Component(import_path="raydr.encoders.cross_encoder:CrossEncoderReranker", args=args).build()


def test_scores_are_those_of_sentence_transformers(folder):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu", max_length=48)
    texts = [(QUERY.text, f"{p.title} {p.text}" if p.title else p.text) for p in PASSAGES.values()]
    expected = theirs.predict(texts, activation_fn=torch.nn.Identity())
    found = reranker(folder).score([(QUERY, passage) for passage in PASSAGES.values()])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_returns_every_hit_once_best_first(folder):
    model = reranker(folder)
    assert isinstance(model, Reranker)
    hits = [Hit(id_, 0.5) for id_ in ("c", "a", "b")]
    ranked = model.rerank(QUERY, hits, PASSAGES)
    assert {hit.passage_id for hit in ranked} == {"a", "b", "c"}
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)
    assert model.rerank(QUERY, [], PASSAGES) == []


def test_equal_scores_keep_their_order(folder):
    twins = {id_: Passage(id_, "The very same text.") for id_ in ("x", "y", "z")}
    ranked = reranker(folder).rerank(QUERY, [Hit(id_, 0.0) for id_ in ("z", "x", "y")], twins)
    assert [hit.passage_id for hit in ranked] == ["z", "x", "y"]


def test_batches_do_not_change_scores(folder):
    pairs = [(QUERY, passage) for passage in PASSAGES.values()] * 5
    np.testing.assert_allclose(
        reranker(folder, batch_tokens=16).score(pairs), reranker(folder, batch_tokens=4096).score(pairs), atol=1e-5
    )


def test_a_query_that_fills_the_pair_is_named(folder):
    with pytest.raises(ConfigError, match="'long' leaves no room.*raise max_pair_tokens"):
        reranker(folder, max_pair_tokens=8).score([(Query("long", "word " * 30), PASSAGES["a"])])


def test_segments():
    ids = torch.tensor([[2, 5, 3, 7, 8, 3], [2, 3, 6, 3, 0, 0]])
    assert segments(ids, 3).tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
