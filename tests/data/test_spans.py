"""Examples cut out of a corpus: spans lie in their chunks, chunks in their passages, negatives in others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest
from raydr.data.spans import span_examples, span_queries
from raydr.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Passages of 5 to 44 words that say where they are from."""
    rows = [{"_id": f"p{n}", "text": " ".join(f"p{n}w{w}" for w in range(5 + n))} for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ingest(DataConfig(path=str(tmp_path / "corpus.jsonl")), tmp_path / "corpus")


def all_texts(examples: ExampleSet) -> list[tuple[str, str, list[str]]]:
    return [
        (
            examples.query(row).text,
            examples.passages(examples.positives(row))[0].text,
            [passage.text for passage in examples.passages(examples.negatives(row))],
        )
        for row in range(len(examples))
    ]


def test_spans_lie_in_chunks_and_negatives_in_other_passages(corpus, tmp_path):
    examples = span_examples(corpus, tmp_path / "out", num_examples=60, chunk_words=12, span_words=4, num_negatives=5)
    assert (len(examples), examples.num_passages) == (60, 60)
    passages = {text for table in corpus.passages(["text"]) for text in table["text"].to_pylist()}
    for span, chunk, negatives in all_texts(examples):
        assert f" {span} " in f" {chunk} "
        assert (len(span.split()), len(chunk.split())) == (4, 12)
        assert any(chunk in passage for passage in passages)
        sources = [text.split("w")[0] for text in (chunk, *negatives)]
        assert len(negatives) == 5
        assert sources[0] not in sources[1:]
    starts = {chunk.split()[0].split("w")[1] for _, chunk, _ in all_texts(examples)}
    assert len(starts) > 5  # from anywhere in a passage


def test_the_seed_decides_and_a_finished_set_stays(corpus, tmp_path, capsys):
    first = span_examples(corpus, tmp_path / "a", num_examples=20, seed=1)
    assert all_texts(first) == all_texts(span_examples(corpus, tmp_path / "b", num_examples=20, seed=1))
    assert all_texts(first) != all_texts(span_examples(corpus, tmp_path / "c", num_examples=20, seed=2))
    span_examples(corpus, tmp_path / "a", num_examples=20, seed=1)
    assert "has these examples already" in capsys.readouterr().err
    assert not np.array_equal(first.negatives(0), first.negatives(1))


def test_a_corpus_of_short_passages_is_refused(corpus, tmp_path):
    with pytest.raises(DataError, match="5 passages have 40 words or more, and an example needs chunks of 8"):
        span_examples(corpus, tmp_path / "out", num_examples=10, chunk_words=40)
    assert not (tmp_path / "out").exists()


def test_span_queries_are_judged_by_the_passage_they_came_from(corpus, tmp_path, capsys):
    queries = span_queries(corpus, tmp_path / "out", num_queries=30, span_words=(3, 6), seed=1)
    texts = {row["passage_id"]: row["text"] for t in corpus.passages(["passage_id", "text"]) for row in t.to_pylist()}
    qrels, found = queries.qrels(), queries.queries()
    assert len(found) == len(qrels) == 30
    assert {len(query.text.split()) for query in found} == {3, 4, 5, 6}
    for query in found:
        (source, grade), *others = qrels[query.query_id].items()
        assert grade == 1 and not others
        assert f" {query.text} " in f" {texts[source]} "
    again = span_queries(corpus, tmp_path / "out", num_queries=30, span_words=(3, 6), seed=1)
    assert "has these queries already" in capsys.readouterr().err
    assert again.queries() == found
    assert span_queries(corpus, tmp_path / "b", num_queries=30, span_words=(3, 6), seed=2).queries() != found
    with pytest.raises(DataError, match="no passage has 90 words"):
        span_queries(corpus, tmp_path / "c", num_queries=3, span_words=(3, 90))
