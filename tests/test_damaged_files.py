"""Files that a reader once stumbled over, found by `benchmarks/fuzz.py`: a `RaydrError` now that names the file."""

import gzip
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydr.config import read_yaml
from raydr.data.config import DataConfig
from raydr.data.files import LONGEST_LINE
from raydr.data.ingest import ingest
from raydr.data.training_readers import BadFieldError, _number
from raydr.encoders.checkpoint import locate, open_checkpoint
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.evaluation.trec import read_qrels, read_run
from raydr.index.bm25 import BM25
from raydr.index.build import build_index
from raydr.index.config import BM25Config, IndexConfig
from raydr.index.embedded import EmbeddedCorpus
from raydr.index.layout import ShardRecord, read_deleted
from tests.corpora import embedded_corpus


@pytest.mark.parametrize(
    "content",
    [b"a: \xc0\xaf", b"a: " + b"1" * 5000, b"{{a: b}: c}", b"a: 2026-13-45", b"!!python/object:os.system x"],
    ids=["not UTF-8", "digits", "a key that is a mapping", "no date", "a Python object"],
)
def test_yaml(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: not valid YAML"):
        read_yaml(tmp_path / "config.yaml")


def test_runs(tmp_path):
    packed = bytearray(gzip.compress(b"q1 Q0 d1 1 2.5 tag\n" * 200))
    packed[10:] = b"\xff" * 40
    (tmp_path / "a.run").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.run, after line 0: a damaged gzip file: Error -3"):
        read_run(tmp_path / "a.run")


def test_what_a_few_bytes_unpack_to_does_not_fill_the_memory(tmp_path):
    """One line of a gigabyte, in a file of a megabyte."""
    bomb = gzip.compress(b"x" * (16 << 20)) * 64
    for name, read in {"bomb.run": read_run, "bomb.qrels": read_qrels}.items():
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(DataError, match=f"{name}, line 1: more than"):
            read(tmp_path / name)
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "a", "text": "x"}\n') + bomb)
    with pytest.raises(DataError, match=rf"corpus.jsonl.gz, line 2: longer than {LONGEST_LINE >> 20} MiB"):
        ingest(DataConfig(path=str(tmp_path), on_error="skip"), tmp_path / "out")


def test_deleted_rows(tmp_path):
    shard = ShardRecord(name="00000", num_rows=3, files={}, deleted="deleted.npy", num_deleted=1)
    good = np.array([1], dtype=np.int64)
    for rows in (
        good + 5,
        good - 7,
        good.astype(np.int32),
        np.array([[1]]),
        np.array([{"an": "object"}], dtype=object),
    ):
        np.save(tmp_path / "deleted.npy", rows)
        with pytest.raises(ArtifactError, match=r"deleted\.npy"):
            read_deleted(tmp_path, shard)
    (tmp_path / "deleted.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((")
    with pytest.raises(ArtifactError, match=r"deleted\.npy: not readable"):
        read_deleted(tmp_path, shard)


@pytest.mark.parametrize(
    "name", ["params.index.json", "vocab.index.json", "indptr.csc.index.npy", "data.csc.index.npy"]
)
def test_words(tmp_path, name):
    BM25.build(["alpha beta", "beta gamma"], BM25Config()).save(tmp_path / "bm25")
    for content in (b"[]", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((", b""):
        (tmp_path / "bm25" / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="bm25: not a readable BM25 index"):
            BM25.open(tmp_path / "bm25")


@pytest.mark.parametrize("number", [10**30, -9])
def test_words_with_a_number_that_none_has(tmp_path, number):
    BM25.build(["alpha beta", "beta gamma"], BM25Config()).save(tmp_path / "bm25")
    (tmp_path / "bm25/vocab.index.json").write_text(json.dumps({"alpha": number}))
    with pytest.raises(ArtifactError, match="bm25: damaged: .*; build the index again"):
        BM25.open(tmp_path / "bm25").search(["alpha"], 1, ids_of=np.array(["a", "b"], dtype=object).__getitem__)


@pytest.mark.parametrize("content", [b"[]", b'{"hidden_size": "x"}', b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_checkpoints(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("length", ["Infinity", "-3", '"many"'])
def test_the_length_that_sentence_transformers_names(tmp_path, length):
    shutil.copytree(locate("minilm"), tmp_path / "model")
    (tmp_path / "model/sentence_bert_config.json").write_text(f'{{"max_seq_length": {length}}}')
    with pytest.raises(
        ConfigError, match=r"model: max_seq_length of sentence_bert_config\.json is no number of tokens"
    ):
        open_checkpoint(str(tmp_path / "model"))


def test_texts_that_are_not_utf_8(tmp_path):
    """Of the shard that has them it is said, not of the stop words."""
    corpus, embeddings = embedded_corpus(tmp_path, {"a": "alpha", "b": "beta"}, np.eye(2, dtype=np.float32))
    (file,) = corpus.passage_files
    table = pq.read_table(file)
    texts = pa.array([b"alpha", b"\xff\xfe"]).view(pa.string())
    pq.write_table(table.set_column(table.column_names.index("text"), "text", texts), file)
    with pytest.raises(ArtifactError, match=r"passages\.arrow: cannot be read: 'utf-8' codec"):
        build_index(corpus, embeddings, IndexConfig(), tmp_path / "index", use_ray=False)

    def texts_of_a_broken_reader():
        yield "alpha"
        raise ValueError("not of the stop words")

    with pytest.raises(ValueError, match="^not of the stop words"):
        BM25.build(texts_of_a_broken_reader(), BM25Config())


def test_a_score_of_hundreds_of_digits():
    with pytest.raises(BadFieldError, match="must be a number"):
        _number(10**400, "scores[0]")


def test_a_parquet_column_whose_name_is_not_text(tmp_path):
    table = pa.table({"_id": ["a"], "text": ["x"], "extra": ["y"]})
    pq.write_table(table, tmp_path / "corpus.parquet", store_schema=False)
    content = (tmp_path / "corpus.parquet").read_bytes()
    (tmp_path / "corpus.parquet").write_bytes(content.replace(b"extra", b"\xff\xfetra"))
    with pytest.raises(DataError, match=r"corpus\.parquet: cannot be read as Parquet"):
        ingest(DataConfig(path=str(tmp_path / "corpus.parquet")), tmp_path / "out")


def test_embeddings_that_are_null(tmp_path):
    corpus, embeddings = embedded_corpus(tmp_path, {"a": "alpha"}, np.ones((1, 4), dtype=np.float32), num_files=1)
    (name,) = embeddings.manifest.files
    table = pq.read_table(embeddings.path / name)
    nothing = pa.nulls(1, table.schema.field("embedding").type)
    pq.write_table(table.set_column(table.column_names.index("embedding"), "embedding", nothing), tmp_path / "null")
    source = EmbeddedCorpus(tuple(corpus.passage_files), (tmp_path / "null",), 1, 4)
    with pytest.raises(ArtifactError, match="passages without an embedding; embed again"):
        source.embeddings(0, 1)


@pytest.mark.parametrize("change", [{"method": None}, {"dim": "x"}, {"encoder_version": None}])
def test_what_made_the_embeddings(tmp_path, change):
    corpus, embeddings = embedded_corpus(tmp_path, {"a": "alpha"}, np.ones((1, 4), dtype=np.float32))
    details = {name: value for name, value in (embeddings.manifest.details | change).items() if value is not None}
    broken = replace(embeddings, manifest=embeddings.manifest.model_copy(update={"details": details}))
    with pytest.raises(ConfigError, match=rf"manifest\.json, details: 1 problem(.|\n)*{next(iter(change))}"):
        build_index(corpus, broken, IndexConfig(), tmp_path / "index", use_ray=False)
