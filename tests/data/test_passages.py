"""Tables and passages: there and back, and a text called "image" is no picture."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from raydr.artifacts import fingerprint
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import KIND
from raydr.data.ingest import ingest
from raydr.data.passages import has_pictures, passage_columns, passage_table, passages_of
from raydr.data.positives import positive_examples
from raydr.encoders.factory import EncoderFactory
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.stages.config import EmbedConfig
from raydr.stages.embed import embed_corpus
from raydr.types import Passage
from tests.corpora import METHOD
from tests.pictures import PASSAGES


def test_there_and_back():
    table = passage_table(PASSAGES)
    assert table.schema.field("image").type == pa.large_binary()
    assert passages_of(table) == PASSAGES
    assert passages_of(passage_table(PASSAGES[3:5])) == PASSAGES[3:5]
    assert passage_table(PASSAGES[3:5]).column_names == ["passage_id", "title", "text"]
    assert passages_of(passage_table([])) == []


def test_what_is_missing_is_empty():
    columns = {"passage_id": ["a"], "text": pa.array([None], pa.string()), "image": pa.array([None], pa.binary())}
    assert passages_of(pa.table(columns)) == [Passage("a", "")]


@pytest.mark.parametrize(("kind", "expected"), [(pa.binary(), True), (pa.large_binary(), True), (pa.string(), False)])
def test_only_bytes_are_pictures(kind, expected):
    schema = pa.schema({"passage_id": pa.string(), "text": pa.string(), "image": kind})
    assert has_pictures(schema) == expected
    assert passage_columns(schema) == ["passage_id", "text", *(["image"] if expected else [])]


def test_a_catalogue_with_addresses_of_pictures_is_a_text_collection(tmp_path):
    """From its file to search results and training examples."""
    row = {"text": "alpha beta", "image": "https://example.com/a.png"}
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"_id": id_, **row}) + "\n" for id_ in "abc"))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "alpha"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb\t1\n")
    corpus = ingest(DataConfig(path=str(tmp_path)), tmp_path / "corpus")
    assert corpus.metadata_columns == ["image"]
    assert not corpus.has_pictures
    method = Component.model_validate(METHOD)
    embeddings = embed_corpus(
        corpus, EncoderFactory(method), EmbedConfig(), tmp_path / "embed", use_ray=False, method=method
    )
    index = build_index(corpus, embeddings, IndexConfig(), tmp_path / "index", use_ray=False)
    reader = IndexReader.open(index.path)
    assert not reader.has_pictures
    assert reader.modalities.tolist() == [0, 0, 0]
    assert set(reader.select({"image": row["image"]})) == {True}
    assert passages_of(reader.take([0])) == [Passage("a", "alpha beta")]
    examples = positive_examples(corpus, corpus, tmp_path / "examples")
    assert examples.passages([0]) == [Passage("b", "alpha beta")]


def test_the_fingerprint_of_a_text_collection_stays(tiny_beir, tmp_path, monkeypatch):
    """Settings that only pictures have are not in it: corpora that were read before there were any are current."""
    monkeypatch.chdir(tiny_beir.parent)
    manifest = ingest(DataConfig(path=tiny_beir.name), tmp_path / "out").artifact.manifest
    columns = ("passage_id", "title", "text", "query_id", "query_text", "relevance")
    data = {
        "path": tiny_beir.name,
        "format": "auto",
        "split": None,
        "passages": None,
        "queries": None,
        "qrels": None,
        "columns": dict.fromkeys(columns),
        "metadata": "all",
        "metadata_types": {},
        "on_error": "raise",
        "on_empty": "error",
        "split_documents": None,
    }
    source = manifest.config["source"]
    assert manifest.config == {"data": data, "source": source, "layout": 1}
    assert manifest.fingerprint == fingerprint(KIND, {"data": data, "source": source, "layout": 1}, {})
