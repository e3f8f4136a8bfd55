"""Queries and judgements of another split: checked as those of a corpus, without the corpus being read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydr.artifacts import open_artifact
from raydr.data.config import DataConfig, SplitDocuments
from raydr.data.corpus import QuerySet
from raydr.data.ingest import ingest, ingest_queries
from raydr.errors import ArtifactError, DataError
from raydr.types import Query


@pytest.fixture
def source(tiny_beir: Path) -> Path:
    with (tiny_beir / "queries.jsonl").open("a") as stream:
        stream.write(json.dumps({"_id": "t1", "text": "instrument with strings"}) + "\n")
    write_train(tiny_beir, "t1\tpiano\t1", "q1\tsun\t0")
    return tiny_beir


def write_train(folder: Path, *lines: str) -> None:
    (folder / "qrels" / "train.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")


def config(source: Path, split: str, **settings) -> DataConfig:
    return DataConfig(path=str(source), split=split, **settings)


def test_another_split_over_the_same_corpus(source, tmp_path):
    corpus = ingest(config(source, "test"), tmp_path / "corpus")
    train = ingest_queries(config(source, "train"), corpus, tmp_path / "queries")
    assert train.queries() == [Query("t1", "instrument with strings"), Query("q1", "which pet catches mice")]
    assert train.qrels() == {"t1": {"piano": 1}, "q1": {"sun": 0}}
    manifest = QuerySet.open(tmp_path / "queries").artifact.manifest
    assert manifest.counts == {"queries": 2, "qrels": 2, "rejected": 0}
    assert manifest.inputs == {"corpus": corpus.artifact.fingerprint}
    assert not (tmp_path / "queries" / "passages").exists()
    with pytest.raises(ArtifactError, match="holds 'queries', but 'corpus' is needed here"):
        open_artifact(tmp_path / "queries", kind="corpus")


def test_finished_queries_are_used_again(source, tmp_path, capsys):
    corpus = ingest(config(source, "test"), tmp_path / "corpus")
    ingest_queries(config(source, "train"), corpus, tmp_path / "queries")
    ingest_queries(config(source, "train"), corpus, tmp_path / "queries")
    assert "queries: reused" in capsys.readouterr().err
    write_train(source, "t1\twheat\t1")
    assert ingest_queries(config(source, "train"), corpus, tmp_path / "queries").qrels() == {"t1": {"wheat": 1}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["t1\tnowhere\t1"], r"train\.tsv, line 2, field 'passage_id': names an unknown passage: 'nowhere'"),
        (["t9\tpiano\t1"], r"train\.tsv, line 2, field 'query_id': names an unknown query: 't9'"),
        (["t1\tpiano\t1", "t1\tpiano\t2"], r"line 3, field 'passage_id': judged twice"),
        (["t1\tpiano\tgood"], r"line 2, field 'relevance': must be a whole number"),
    ],
)
def test_judgements_are_checked(source, tmp_path, lines, message):
    corpus = ingest(config(source, "test"), tmp_path / "corpus")
    write_train(source, *lines)
    with pytest.raises(DataError, match=message):
        ingest_queries(config(source, "train"), corpus, tmp_path / "queries")


def test_bad_judgements_can_be_left_out(source, tmp_path):
    corpus = ingest(config(source, "test"), tmp_path / "corpus")
    write_train(source, "t1\tpiano\t1", "t1\tnowhere\t1")
    train = ingest_queries(config(source, "train", on_error="skip"), corpus, tmp_path / "queries")
    assert train.qrels() == {"t1": {"piano": 1}}
    assert "nowhere" in (tmp_path / "queries" / "rejects.jsonl").read_text()


def test_judgements_name_documents_where_they_were_split(source, tmp_path):
    settings = {"split_documents": SplitDocuments(max_tokens=6, overlap_tokens=0)}
    corpus = ingest(config(source, "test", **settings), tmp_path / "corpus")
    assert corpus.num_passages > 10
    train = ingest_queries(config(source, "train", **settings), corpus, tmp_path / "queries")
    assert train.qrels()["t1"] == {"piano": 1}


def test_a_source_without_the_split(source, tmp_path):
    corpus = ingest(config(source, "test"), tmp_path / "corpus")
    with pytest.raises(DataError, match="no judgements for the split 'dev'; there are: test, train"):
        ingest_queries(config(source, "dev"), corpus, tmp_path / "queries")
    alone = DataConfig(path=str(source / "corpus.jsonl"))
    with pytest.raises(DataError, match=r"corpus\.jsonl: has no judgements; name their file: data\.qrels=FILE"):
        ingest_queries(alone, corpus, tmp_path / "queries")
