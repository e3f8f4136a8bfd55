"""Files of training examples as example sets: every trainer's shape, lines merged by query, mistakes by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydr.data.example_files import examples_from_file
from raydr.data.examples import ExampleSet
from raydr.errors import DataError
from raydr.types import Passage, Query

CAT, DOG, SUN = "The cat purrs.", "The dog barks.", "The sun shines."


def write(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(examples: ExampleSet, rows) -> list[str]:
    return [passage.text for passage in examples.passages(rows)]


def orders_of(examples: ExampleSet) -> list[list[str]]:
    """Each query with its passages, the positives first."""
    return [
        [
            examples.query(row).text,
            *texts(examples, [*examples.positives(row).tolist(), *examples.negatives(row).tolist()]),
        ]
        for row in range(len(examples))
    ]


def tevatron(query_id: str, query: str, positives: list, negatives: list, **more) -> dict:
    return {
        "query_id": query_id,
        "query": query,
        "positive_passages": positives,
        "negative_passages": negatives,
        **more,
    }


SHAPES = {
    "tevatron": tevatron("q", "pet", [{"docid": "c", "title": "", "text": CAT}], [{"docid": "s", "text": SUN}]),
    "flagembedding": {"query": "pet", "pos": [CAT], "neg": [SUN]},
    "sentence_transformers": {"anchor": "pet", "positive": CAT, "negative": SUN},
    "ms_swift": {
        "messages": [{"role": "user", "content": "pet"}],
        "positive_messages": [[{"role": "user", "content": CAT}]],
        "negative_messages": [[{"role": "user", "content": SUN}]],
    },
    "tevatron_ids": {
        "query_id": "q",
        "query_text": "pet",
        "query_image": None,
        "positive_document_ids": ["c"],
        "negative_document_ids": ["s"],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tmp_path, shape):
    corpus = write(tmp_path / "corpus.jsonl", {"docid": "c", "text": CAT}, {"docid": "s", "text": SUN})
    path = write(tmp_path / "train.jsonl", SHAPES[shape])
    examples = examples_from_file(path, tmp_path / "out", corpus=corpus if shape == "tevatron_ids" else None)
    assert (len(examples), examples.num_passages) == (1, 2)
    assert examples.query(0).text == "pet"
    assert texts(examples, examples.positives(0)) == [CAT]
    assert texts(examples, examples.negatives(0)) == [SUN]
    assert examples.negative_sources(0) == ["file"]
    assert examples.artifact.manifest.config["source_format"] == shape


def test_ids_titles_scores_and_several_positives_are_kept(tmp_path):
    passages = [{"docid": f"d{n}", "title": f"t{n}", "text": f"text {n}", "score": n / 2} for n in range(4)]
    path = write(tmp_path / "train.jsonl", tevatron("q1", "pet", passages[:2], passages[2:]))
    examples = examples_from_file(path, tmp_path / "out")
    assert examples.query(0) == Query("q1", "pet")
    assert examples.passages(range(4)) == [Passage(f"d{n}", f"text {n}", f"t{n}") for n in range(4)]
    assert examples.positive_scores(0).tolist() == [0.0, 0.5]
    assert examples.negative_scores(0).tolist() == [1.0, 1.5]


def test_lines_of_one_query_are_one_example(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        {"anchor": "pet", "positive": CAT, "negative": SUN},
        {"anchor": "light", "positive": SUN, "negative": CAT},
        {"anchor": "pet", "positive": DOG, "negative": CAT},
    )
    examples = examples_from_file(path, tmp_path / "out")
    assert [query.text for query in map(examples.query, range(2))] == ["pet", "light"]
    assert texts(examples, examples.positives(0)) == [CAT, DOG]
    assert texts(examples, examples.negatives(0)) == [SUN], "what is a positive on another line is no negative"
    assert examples.num_passages == 3


def test_labelled_pairs(tmp_path, capsys):
    path = write(
        tmp_path / "train.jsonl",
        {"sentence1": "pet", "sentence2": CAT, "label": 1},
        {"sentence1": "pet", "sentence2": SUN, "label": 0},
        {"sentence1": "light", "sentence2": DOG, "label": 0},
    )
    examples = examples_from_file(path, tmp_path / "out")
    assert len(examples) == 1
    assert texts(examples, examples.negatives(0)) == [SUN]
    assert examples.artifact.manifest.counts["without_positives"] == 1
    assert "queries left out, without a positive: 1" in capsys.readouterr().err


def test_scores_with_gaps_are_none_and_losses_are_said(tmp_path, capsys):
    negatives = [{"docid": "s", "text": SUN, "score": 1.0}, {"docid": "d", "text": DOG}]
    first = tevatron("q", "pet", [{"docid": "c", "text": CAT}], negatives, answers=["cat"])
    examples = examples_from_file(write(tmp_path / "train.jsonl", first), tmp_path / "out")
    assert len(examples.negative_scores(0)) == 0
    assert examples.artifact.manifest.details["lost"] == {"answers": 1}
    assert "note: answers of 1 examples are not used in training" in capsys.readouterr().err


def test_orders_of_a_teacher_stay_apart_and_keep_their_order(tmp_path):
    """Two orders of one query, which names its text and its passages by id."""
    corpus = write(tmp_path / "corpus.jsonl", *({"_id": i, "text": t} for i, t in [("c", CAT), ("s", SUN), ("d", DOG)]))
    queries = write(tmp_path / "queries.jsonl", {"_id": "q", "text": "pet"}, {"_id": "r", "text": "light"})
    orders = [{"query_id": "q", "docs": docs, "teacher": "t"} for docs in (["d", "c", "s"], ["c", "d"])]
    path = write(tmp_path / "orders.jsonl", *orders, {"query_id": "r", "docs": ["s", "c"]})
    examples = examples_from_file(path, tmp_path / "out", corpus=corpus, queries=queries, trust_order=True)
    assert orders_of(examples) == [["pet", DOG, CAT, SUN], ["pet", CAT, DOG], ["light", SUN, CAT]]
    assert examples.artifact.manifest.counts["passages"] == 3


def test_the_records_of_rank_zephyr_are_orders(tmp_path):
    shown = f"3 passages.\n[A] {CAT}\n[B] {SUN}\n[C] {DOG}\nSearch Query: pet.\nRank them."
    turns = [{"from": "human", "value": shown}, {"from": "gpt", "value": "[C] > [A] > [B]"}]
    path = write(tmp_path / "train.jsonl", {"conversations": turns})
    assert orders_of(examples_from_file(path, tmp_path / "out", trust_order=True)) == [["pet", DOG, CAT, SUN]]


def test_a_finished_set_of_the_same_file_stays(tmp_path):
    path = write(tmp_path / "train.jsonl", SHAPES["flagembedding"])
    first = examples_from_file(path, tmp_path / "out")
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    examples_from_file(path, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    write(tmp_path / "train.jsonl", {"query": "light", "pos": [SUN], "neg": []})
    assert examples_from_file(path, tmp_path / "out").artifact.fingerprint != first.artifact.fingerprint


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"query": "pet", "pos": [CAT]}, {"query": "pet", "pos": []}], r"line 2, field 'pos': is empty"),
        (
            [
                tevatron("q", "pet", [{"docid": "c", "text": CAT}], []),
                tevatron("q", "a pet", [{"docid": "c", "text": CAT}], []),
            ],
            r"line 2, field 'query_id': two queries with different texts share an id: 'q'",
        ),
        (
            [
                tevatron("q", "pet", [{"docid": "c", "text": CAT}], []),
                tevatron("r", "star", [{"docid": "c", "text": SUN}], []),
            ],
            r"line 2, field 'docid': two passages with different texts share an id: 'c'",
        ),
        ([{"sentence1": "pet", "sentence2": SUN, "label": 0}], r"train\.jsonl: holds no example with a positive"),
        ([SHAPES["tevatron_ids"]], r"names its passages by id: give the corpus file they are in, mine\.source_corpus="),
        (
            [{"query": {"text": "pet", "qid": "q"}, "candidates": [{"docid": "c", "doc": {"text": CAT}}]}],
            "its candidates are not judged, .* raydr data convert FILE JUDGED --to tevatron .* mine.trust_order=true",
        ),
        ([{"what": "is this"}], r"cannot tell the training format from the fields \['what'\]"),
    ],
)
def test_mistakes_name_line_and_field(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        examples_from_file(write(tmp_path / "train.jsonl", *records), tmp_path / "out")
