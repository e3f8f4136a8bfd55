"""Marked texts: read and refused with file, line and field; tags to offsets and back; F1 as others compute it."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from raydr.data.entities import KINDS, allowed_labels, entities_of, entity_scores, joined, on_tokens
from raydr.data.ocr import clean, noisy, noisy_query, readable_shares
from raydr.data.tagged import NoiseConfig, TaggedSource, read_tagged, tagged_examples
from raydr.errors import DataError
from raydr.types import Annotation, Entity, Query

SENTENCES = [
    (["Mr.", "Pitt", "went", "to", "Bath", "."], ["O", "B-person", "O", "O", "B-location", "O"]),
    (["The", "Red", "Jacket", "(", "Bristol", ")"], ["O", "B-ship", "I-ship", "O", "B-LOC", "O"]),
]


def write_jsonl(file, rows=SENTENCES):
    file.write_text("".join(json.dumps({"tokens": tokens, "tags": tags}) + "\n" for tokens, tags in rows))
    return str(file)


def test_both_layouts_hold_the_same(tmp_path):
    conll = tmp_path / "a.conll"
    texts = ["\n".join(f"{token} x {tag}" for token, tag in zip(*row)) for row in SENTENCES]
    conll.write_text("-DOCSTART- -X- O\n\n" + "\n\n".join(texts))
    labels = {"ship": "MISC"}
    lines = read_tagged(TaggedSource(path=write_jsonl(tmp_path / "a.jsonl"), labels=labels))
    columns = read_tagged(TaggedSource(path=str(conll), labels=labels))
    assert [marked[1:] for marked in lines] == [marked[1:] for marked in columns]
    assert lines[0].text == "Mr. Pitt went to Bath."
    assert lines[0].annotation.entities == (Entity(4, 8, "PER"), Entity(17, 21, "LOC"))
    assert [lines[1].text[e.start : e.end] for e in lines[1].annotation.entities] == ["Red Jacket", "Bristol"]
    assert lines[1].text == "The Red Jacket (Bristol)"
    assert lines[0].annotation.labels == ("PER", "LOC", "MISC")
    assert (lines[1].name, columns[1].name) == ("a.jsonl:2", "a.conll:10")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"tokens": ["a"], "tags": ["B-alien"]}, ["line 1", "'tags'", "alien", "labels={NAME: PER}"]),
        ({"tokens": ["a", "b"], "tags": ["O"]}, ["line 1", "'tags'", "1 tags for 2 tokens"]),
        ({"tokens": "a b", "tags": ["O"]}, ["line 1", "'tokens'", "list of strings"]),
        ({"tokens": ["a"], "tags": ["O"]}, ["no entity is marked"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError) as error:
        read_tagged(TaggedSource(path=str(file)))
    assert all(word in str(error.value) for word in ["bad.jsonl", *words]), error.value


def test_a_token_without_a_tag_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("Bath B-LOC\nfine\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: a token without a tag"):
        read_tagged(TaggedSource(path=str(tmp_path / "a.txt")))


def test_real_collections_are_read_whole(collection):
    folder = collection("ner")
    texts = read_tagged(TaggedSource(path=str(folder / "topres19th/dev.jsonl")))
    assert len(texts) == 646
    assert {marked.annotation.labels for marked in texts} == {("LOC",)}
    assert sum(len(marked.annotation.entities) for marked in texts) == 201 + 18 + 17 + 1  # and an I- that begins one
    posts = read_tagged(TaggedSource(path=str(folder / "wnut17/dev.jsonl")))
    assert {marked.annotation.labels for marked in posts} == {KINDS}
    assert all(
        marked.text[start:end] == token
        for marked, line in zip(posts, (folder / "wnut17/dev.jsonl").read_text().splitlines())
        for (start, end), token in zip(marked.offsets, json.loads(line)["tokens"], strict=True)
    )


def test_what_was_not_looked_for_is_left_open():
    words = [(0, 4), (5, 9), (10, 14)]
    full = allowed_labels(words, Annotation((Entity(5, 14, "LOC"),), KINDS))
    assert full == [1, 1 << 5, 1 << 6]
    places_only = allowed_labels(words, Annotation((Entity(5, 9, "LOC"),), ("LOC",)))
    assert places_only == [0b110011111, 1 << 5, 0b110011111]


def test_f1_is_that_of_nervaluate():
    """On random tags, stray I- included: strict matches, kind by kind and together."""
    nervaluate = pytest.importorskip("nervaluate")
    rng = random.Random(4)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in KINDS)]
    texts = [[[rng.choice(tags) for _ in range(9)] for _ in range(2)] for _ in range(40)]
    for pair in texts:
        pair[1] = [own if rng.random() < 0.7 else other for own, other in zip(*pair)]
    # nervaluate takes a stray I- for something else; as B- it means the same to everybody
    began = [[_begun(own) for own in pair] for pair in texts]
    offsets = [(2 * place, 2 * place + 1) for place in range(9)]
    scores = entity_scores(*([entities_of(pair[side], offsets) for pair in texts] for side in (0, 1)))
    found = nervaluate.Evaluator(*([p[side] for p in began] for side in (0, 1)), tags=list(KINDS), loader="list")
    result = found.evaluate()
    assert scores["all"].f1 == pytest.approx(result["overall"]["strict"].f1)
    for kind in KINDS:
        strict = result["entities"][kind]["strict"]
        assert scores[kind][:3] == pytest.approx((strict.precision, strict.recall, strict.f1))


def _begun(tags):
    done = []
    for place, tag in enumerate(tags):
        before = tags[place - 1] if place else "O"
        stray = tag.startswith("I-") and before[2:] != tag[2:]
        done.append(f"B-{tag[2:]}" if stray else tag)
    return done


def test_ends_inside_of_a_token_are_moved_to_its_end():
    _, offsets = joined(["at", "U.S.", "ports"])
    assert on_tokens([Entity(3, 6, "LOC")], offsets) == [Entity(3, 7, "LOC")]


def test_cleaning_joins_lines_and_words_and_keeps_paragraphs():
    assert clean("a hyphen-\nated word\non two\r\nlines\n\nnew-\n\npart") == (
        "a hyphenated word on two lines\n\nnew-\n\npart"
    )
    assert clean("") == ""


def test_misreading_keeps_entities_where_they_are():
    text = "The Morning Light sailed from Liverpool to Melbourne. " * 20
    entities = tuple(
        Entity(place, place + 9, "LOC") for place in range(len(text)) if text[place : place + 9] == "Liverpool"
    )
    query = Query("q", text, annotation=Annotation(entities, ("LOC",)))
    same = noisy_query(query, rate=0.0, rng=np.random.default_rng(0))
    assert same == query
    misread = noisy_query(query, rate=0.1, rng=np.random.default_rng(0))
    assert misread.annotation is not None and len(misread.annotation.entities) == 20
    words = [misread.text[e.start : e.end] for e in misread.annotation.entities]
    assert 3 < sum(word == "Liverpool" for word in words) < 17
    assert all(abs(len(word) - 9) < 6 and sum(c in "Liverpool" for c in word) >= 4 for word in words)
    assert noisy(text, rate=0.1, rng=np.random.default_rng(0))[0] == misread.text


def test_the_better_reading_has_the_higher_share():
    texts = ["the house was burnt to the ground last night in a great fire of unknown cause"] * 4
    misread, _ = noisy(texts[0], rate=0.2, rng=np.random.default_rng(1))
    shares = readable_shares([*texts, misread])
    assert shares[0] == 1.0 and shares[4] < 0.8


def test_examples_keep_annotations_and_are_made_once(tmp_path):
    source = TaggedSource(path=write_jsonl(tmp_path / "a.jsonl"), labels={"ship": "MISC"})
    noise = NoiseConfig(copies=2, rates=(0.1, 0.3))
    examples = tagged_examples([source], tmp_path / "examples", noise=noise)
    assert len(examples) == 6
    first = examples.query(0)
    assert first.annotation == read_tagged(source)[0].annotation
    assert examples.query(2).text != first.text
    made = (tmp_path / "examples/manifest.json").stat().st_mtime_ns
    tagged_examples([source], tmp_path / "examples", noise=noise)
    assert (tmp_path / "examples/manifest.json").stat().st_mtime_ns == made
