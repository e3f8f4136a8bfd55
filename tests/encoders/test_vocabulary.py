"""The sparse encoder: views and their supports, what its stamp depends on, and its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from raydr.encoders import vocabulary
from raydr.encoders.checkpoint import locate
from raydr.encoders.vocabulary import VocabularyEncoder, VocabularyReranker
from raydr.encoders.vocabulary_weights import convert_vsearch, load_towers, save_towers
from raydr.errors import ConfigError
from raydr.models.towers import Towers, towers_of
from raydr.types import Hit, Passage, Query
from tests.contracts import check_encoder
from tests.train.tiny import moved_towers, tiny_checkpoint

PASSAGES = [
    Passage("a", "A small furry animal that purrs and purrs.", "Cat"),
    Passage("b", "The star at the centre of the planets."),
    Passage("c", ""),
]
QUERIES = [Query("q", "which pet purrs"), Query("r", "planets")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A trained-looking checkpoint: two towers that differ, norms that are not new."""
    return moved_towers(tmp_path_factory.mktemp("vdr"))


def encoder(model: str, **settings: Any) -> VocabularyEncoder:
    small = {"query_topk": 16, "passage_topk": 16, "device": "cpu", "num_threads": 1, "precision": "float32"}
    return VocabularyEncoder(VocabularyEncoder.Config(model=model, **{**small, **settings}))


class Dense:
    """A sparse encoder's embeddings as the checks of all encoders read them."""

    def __init__(self, inner: VocabularyEncoder) -> None:
        self._inner, self.dim, self.version = inner, inner.dim, inner.version

    def encode_queries(self, queries: Any) -> np.ndarray:
        return self._inner.encode_queries(queries).toarray()

    def encode_passages(self, passages: Any) -> np.ndarray:
        return self._inner.encode_passages(passages).toarray()


def test_it_is_an_encoder(model):
    check_encoder(Dense(encoder(model)))


def test_the_views_of_a_text(model):
    bags = encoder(model, passage_view="bag").encode_passages(PASSAGES)
    assert isinstance(bags, csr_array)
    assert bags.dtype == np.float32
    assert set(bags.data.tolist()) == {1.0}
    words = encoder(model)
    assert sorted(words.tokens_of(bags[[0]].indices)) == sorted(
        ["cat", "a", "small", "furry", "animal", "that", "pu", "##rr", "##s", "and", "."]
    )
    assert bags[[2]].nnz == 0
    own = encoder(model, passage_topk=0).encode_passages(PASSAGES)
    assert np.array_equal(own.indices, bags.indices)
    assert np.array_equal(own.indptr, bags.indptr)
    every = encoder(model, passage_topk=None).encode_passages(PASSAGES)
    assert every.nnz == 3 * every.shape[1]
    exactly = encoder(model, own_tokens=False).encode_passages(PASSAGES)
    assert np.diff(exactly.indptr).tolist() == [16, 16, 16]
    both = encoder(model).encode_passages(PASSAGES)
    assert (np.diff(both.indptr) <= 16 + np.diff(bags.indptr)).all()
    assert set(bags[[0]].indices) <= set(both[[0]].indices)
    dense = every.toarray()
    for part in (own, exactly, both):
        rows = np.repeat(np.arange(3), np.diff(part.indptr))
        np.testing.assert_allclose(part.data, dense[rows, part.indices], rtol=1e-5)


def test_bags_load_no_weights(model, monkeypatch):
    monkeypatch.setattr(vocabulary, "load_towers", lambda *_, **__: pytest.fail("weights were loaded"))
    both = encoder(model, query_view="bag", passage_view="bag")
    assert both.encode_passages(PASSAGES).shape == (3, both.dim)
    assert both.encode_queries(QUERIES).nnz == 6
    assert both.weight_type == "ones"


def test_what_the_stamp_depends_on(model, tmp_path):
    start = str(tiny_checkpoint(tmp_path / "start"))
    vectors = encoder(model).version
    assert encoder(model, query_view="bag", query_topk=None, batch_tokens=64).version == vectors
    changed = ({"passage_topk": 4}, {"own_tokens": False}, {"max_passage_tokens": 32}, {"weights": "float16"})
    assert len({vectors, encoder(start).version, *(encoder(model, **change).version for change in changed)}) == 6
    bags = encoder(model, passage_view="bag").version
    assert bags != vectors
    assert encoder(start, passage_view="bag").version == bags, "an index of bags is of a tokenizer, not of weights"
    assert encoder(start, passage_view="bag", max_passage_tokens=32).version != bags
    assert encoder(start, passage_view="bag", max_query_tokens=8).version == bags


def test_passages_in_half_precision_are_what_is_stored(model):
    half, whole = (encoder(model, weights=kind).encode_passages(PASSAGES) for kind in ("float16", "float32"))
    assert np.array_equal(half.data, whole.data.astype(np.float16).astype(np.float32))
    assert not np.array_equal(half.data, whole.data)


def test_a_checkpoint_has_the_towers_it_was_saved_with(model, tmp_path):
    network = load_towers(model)
    assert isinstance(network, Towers)
    assert not torch.equal(*(tower.norm.weight for tower in towers_of(network)))
    with pytest.raises(ConfigError, match="one for queries and one for passages"):
        load_towers(model, towers="one")
    shared = load_towers(str(tiny_checkpoint(tmp_path / "start")), towers="one")
    (tmp_path / "one").mkdir()
    save_towers(shared, str(tmp_path / "start"), tmp_path / "one")
    again = load_towers(str(tmp_path / "one"))
    assert not isinstance(again, Towers)
    for name, weight in shared.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    one = encoder(str(tmp_path / "one"), passage_topk=None, query_topk=None)
    same = one.encode_queries([Query("q", "a cat")]), one.encode_passages([Passage("p", "a cat")])
    assert np.array_equal(same[0].data, same[1].data)


def test_a_released_checkpoint_is_converted(model, tmp_path):
    """Made by hand with the names of theirs: there is none here."""
    from safetensors.torch import save_file

    network = load_towers(model)
    assert isinstance(network, Towers)
    weights = {}
    for side, tower in (("encoder_q", network.queries), ("encoder_p", network.passages)):
        own: Any = tower
        weights |= {f"{side}.bert_model.{n}": w.clone() for n, w in own.transformer.state_dict().items()}
        weights |= {f"{side}.ln.{n}": w.clone() for n, w in own.norm.state_dict().items()}
    source = tmp_path / "released"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    sides = {side: {"type": "vdr", "shift_vocab_num": 1000} for side in ("encoder_q", "encoder_p")}
    (source / "config.json").write_text(json.dumps({**sides, "shared_encoder": False}))
    converted = convert_vsearch(source, base=str(tiny_checkpoint(tmp_path / "base")), out=tmp_path / "converted")
    found = load_towers(str(converted))
    for name, weight in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    read = encoder(str(converted))
    assert (read.shift, read.num_towers, read.dim) == (1000, 2, 30522 - 1000)
    assert all(tower.pools_padding for tower in towers_of(found))
    (source / "config.json").write_text(json.dumps({**sides, "encoder_p": {"type": "vdr_crossmodal_image"}}))
    with pytest.raises(ConfigError, match="vdr_crossmodal_image"):
        convert_vsearch(source, base="minilm", out=tmp_path / "refused")


def test_late_parametric_orders_by_the_vectors(model):
    every = {"query_topk": None, "passage_topk": None}
    reranker = VocabularyReranker(encoder(model, passage_view="bag", **every))
    passages = {passage.passage_id: passage for passage in PASSAGES}
    hits = [Hit("c", 3.0), Hit("a", 2.0), Hit("b", 1.0)]
    vectors = encoder(model, **every)
    scores = (vectors.encode_queries(QUERIES) @ vectors.encode_passages(PASSAGES).T).toarray()
    for ranked, row in zip(reranker.rerank_many([(q, hits) for q in QUERIES], passages), scores, strict=True):
        assert [hit.passage_id for hit in ranked] == [PASSAGES[place].passage_id for place in np.argsort(-row)]
        np.testing.assert_allclose([hit.score for hit in ranked], np.sort(row)[::-1], rtol=1e-5)


@pytest.mark.parametrize("settings", [{"pooling": "cls"}, {"dimensions": 8}, {"own_tokens": False, "query_topk": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="leave them out|own_tokens"):
        VocabularyEncoder.Config(**settings)


def test_minilm_has_berts_vocabulary():
    assert Path(locate("minilm"), "config.json").is_file()
    assert VocabularyEncoder(VocabularyEncoder.Config()).dim == 29523
