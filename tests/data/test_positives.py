"""Examples from judgements alone: every relevant passage, what the queries bring, and nothing else of the corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydr.data.config import DataConfig, SplitDocuments
from raydr.data.ingest import ingest, ingest_queries
from raydr.data.positives import positive_examples, relevant_ids
from raydr.errors import ArtifactError, DataError
from raydr.types import Query
from tests.conftest import TINY_QUERIES
from tests.pictures import PASSAGES, QUERIES, picture, picture_corpus


def positives(examples, row: int) -> list[str]:
    assert not len(examples.negatives(row))
    return [examples.passage_ids[passage] for passage in examples.positives(row)]


def test_pictures_instructions_tasks_and_copies_come_along(tmp_path, capsys):
    corpus = picture_corpus(tmp_path / "corpus")
    examples = positive_examples(corpus, corpus, tmp_path / "out")
    by_id = {passage.passage_id: passage for passage in PASSAGES}
    kept = [case for case in QUERIES if any(grade >= 1 for grade in case[-1].values())]
    assert examples.query_ids == ["words", "colour", "both"] == [case[0].query_id for case in kept]
    for row, (query, instructions, task, copies, grades) in enumerate(kept):
        assert examples.query(row) == query
        assert examples.instructions(row) == instructions
        assert (examples.task(row), examples.copies(row)) == (task, copies or 1)
        assert sorted(positives(examples, row)) == sorted(grades)
        own = examples.positives(row)
        assert examples.passages(own) == [by_id[id_] for id_ in positives(examples, row)]
    assert examples.num_passages == 4
    assert examples.artifact.manifest.counts == {"examples": 3, "passages": 4, "without_positives": 1}
    assert positive_examples(corpus, corpus, tmp_path / "out").artifact == examples.artifact
    assert "already" in capsys.readouterr().err
    positive_examples(corpus, corpus, tmp_path / "out", max_queries=2)
    assert "already" not in capsys.readouterr().err


def test_a_sample_is_in_the_order_of_the_queries_and_the_seed_s(tmp_path):
    corpus = picture_corpus(tmp_path / "corpus")
    everything, num_without = relevant_ids(corpus)
    assert (list(everything), num_without) == (["words", "colour", "both"], 1)
    drawn = {seed: list(relevant_ids(corpus, max_queries=2, seed=seed)[0]) for seed in range(30)}
    assert {tuple(ids) for ids in drawn.values()} == {("words", "colour"), ("words", "both"), ("colour", "both")}
    assert relevant_ids(corpus, max_queries=9) == (everything, 1)
    sample = positive_examples(corpus, corpus, tmp_path / "out", max_queries=2, seed=3)
    assert sample.query_ids == drawn[3]


def test_texts_alone_have_no_columns_of_pictures(tiny_beir, tmp_path):
    corpus = ingest(DataConfig(path=str(tiny_beir)), tmp_path / "corpus")
    examples = positive_examples(corpus, corpus, tmp_path / "out")
    assert [positives(examples, row) for row in range(3)] == [["cat", "dog"], ["moon"], ["faiss"]]
    assert examples.query(0) == Query("q1", TINY_QUERIES["q1"][0])
    assert set(examples._queries.column_names) >= {"query_id", "text"}
    assert not {"image", "instructions", "task", "copies"} & set(examples._queries.column_names)
    assert examples._passages.table.column_names == ["passage_id", "title", "text"]


def test_of_a_split_document_the_first_passage_is_the_positive(tmp_path):
    (tmp_path / "qrels").mkdir()
    words = " ".join(f"word{n}" for n in range(30))
    lines = [json.dumps({"_id": id_, "text": words}) + "\n" for id_ in ("a", "b")]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "word"}\n')
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb\t1\n")
    data = DataConfig(path=str(tmp_path), split_documents=SplitDocuments(max_tokens=20, overlap_tokens=0))
    corpus = ingest(data, tmp_path / "corpus")
    assert corpus.num_passages > 4
    examples = positive_examples(corpus, corpus, tmp_path / "out")
    assert examples.passage_ids == ["b#0"]


def test_queries_of_another_corpus_are_refused(tiny_beir, tmp_path):
    data = DataConfig(path=str(tiny_beir))
    corpus = ingest(data, tmp_path / "corpus")
    queries = ingest_queries(data, corpus, tmp_path / "queries")
    assert len(positive_examples(corpus, queries, tmp_path / "out")) == 3
    with pytest.raises(ArtifactError, match="judges another corpus"):
        positive_examples(picture_corpus(tmp_path / "other"), queries, tmp_path / "out2")


def test_nothing_relevant_is_an_error(tiny_beir: Path, tmp_path):
    (tiny_beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tcat\t0\n")
    corpus = ingest(DataConfig(path=str(tiny_beir)), tmp_path / "corpus")
    with pytest.raises(DataError, match="nothing to train on"):
        positive_examples(corpus, corpus, tmp_path / "out")


def test_a_corpus_is_streamed_as_it_is_read_at_once(tmp_path):
    corpus = picture_corpus(tmp_path / "corpus")
    assert corpus.queries() == [case[0] for case in QUERIES] == list(corpus.stream())
    assert corpus.query_ids() == [query.query_id for query in corpus.queries()]
    assert corpus.instructions() == {case[0].query_id: case[1] for case in QUERIES if case[1]}
    assert corpus.copies() == {"words": 3, "nothing": 1}
    assert corpus.tasks() == {"words": "text to image", "colour": "image to text"}
    assert corpus.has_pictures
    assert corpus.has_query_pictures
    assert next(corpus.stream()).image is None
    assert corpus.queries()[1].image == picture("blue")
