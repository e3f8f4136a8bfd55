"""The tagger against transformers' own pipeline, and windows: nothing lost, nothing twice."""

from __future__ import annotations

import pytest

from raydr.encoders.tagger import EntityTagger, TaggerConfig
from raydr.errors import ConfigError
from raydr.types import Entity
from tests.taggers import gazetteer_tagger
from tests.train.tiny import tiny_checkpoint

TEXT = "John Smith, of New York. Mary met Parliament in Liverpool; the unbelievable Olympics"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(gazetteer_tagger(tmp_path_factory.mktemp("tagger")))


def tagger(model: str, **settings) -> EntityTagger:
    return EntityTagger(TaggerConfig(model=model, **{"overlap_tokens": 4, "num_threads": 1, **settings}))


def test_entities_are_offsets_in_the_original(model):
    found = tagger(model).tag([TEXT, "", "nothing here"])
    assert [(TEXT[e.start : e.end], e.label) for e in found[0]] == [
        ("John Smith", "PER"),
        ("New York", "LOC"),
        ("Mary", "PER"),
        ("Parliament", "ORG"),
        ("Liverpool", "LOC"),
        ("Olympics", "MISC"),
    ]
    assert found[1:] == [[], []]


def test_it_agrees_with_transformers_pipeline(model):
    """Of a network that sees context: the same groups, with the same ends, for texts within its window."""
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    texts = ["Der Graf von Monte Christo reist nach Marseille", "unbelievable antidisestablishmentarianism in Bath"]
    network = AutoModelForTokenClassification.from_pretrained(model)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.bert.embeddings.word_embeddings.weight)
    tokens = AutoTokenizer.from_pretrained(model)
    theirs = pipeline("ner", model=network, tokenizer=tokens, aggregation_strategy="max", device="cpu")
    ours = tagger(model)
    ours._network.network.transformer = network
    for text, own in zip(texts, ours.tag(texts), strict=True):
        expected = [Entity(group["start"], group["end"], group["entity_group"]) for group in theirs(text)]
        assert len(own) > 2 and own == expected


@pytest.mark.parametrize(("max_tokens", "overlap"), [(8, 0), (9, 3), (16, 8), (64, 20), (10, 64)])
def test_long_texts_are_stitched(model, max_tokens, overlap):
    """Every place of every window: entities of two words at all distances from each other."""
    parts, expected, position = [], [], 0
    for gap in range(60):
        before = "x " * (gap % 7)
        parts.append(f"{before}Mary Smith ")
        start = position + len(before)
        expected.append(Entity(start, start + len("Mary Smith"), "PER"))
        position += len(parts[-1])
    text = "".join(parts)
    assert tagger(model, max_tokens=max_tokens, overlap_tokens=overlap).tag([text, "Mary"]) == [
        expected,
        [Entity(0, 4, "PER")],
    ]


def test_a_token_is_judged_where_most_is_seen_around_it(model):
    """With position as the only thing the network looks at, each window's own part shows."""
    ours = tagger(model, max_tokens=12, overlap_tokens=4)
    seen = []
    ours._scores = lambda ids: seen.extend(ids) or [_by_position(len(own)) for own in ids]
    words = next(iter(ours.words(["a b c d e f g h i j k l m n"])))
    assert [len(own) for own in seen] == [12, 10]
    # Ten tokens to a window, four of them shared: two go to the first window, two to the second.
    assert [word.label for word in words] == ["O"] * 8 + ["B-PER"] * 6
    assert len(words) == 14


def _by_position(length: int):
    """O in the window of twelve, B-PER in the other."""
    import numpy as np

    scores = np.zeros((length, 9), np.float32)
    scores[:, 0 if length == 12 else 1] = 1
    return scores


def test_truncated_words_end_with_the_first_window(model):
    words = next(iter(tagger(model, max_tokens=12).words(["mary " * 30], truncate=True)))
    assert len(words) == 10


def test_what_is_no_tagger_is_refused(tmp_path, model):
    with pytest.raises(ConfigError, match="no token classifier; train one"):
        EntityTagger(TaggerConfig(model="minilm"))
    with pytest.raises(ConfigError, match="no token classifier"):
        EntityTagger(TaggerConfig(model=str(tiny_checkpoint(tmp_path / "plain"))))
    with pytest.raises(ConfigError, match="more than the 64"):
        _ = tagger(model, max_tokens=65).max_tokens


def test_the_version_says_what_changes_what_is_found(model, tmp_path):
    other = gazetteer_tagger(tmp_path / "other", {"bath": "B-LOC"})
    versions = {tagger(model).version, tagger(str(other)).version, tagger(model, overlap_tokens=5).version}
    assert len(versions) == 3
    assert tagger(model, batch_tokens=7, num_threads=2).version == tagger(model).version
