"""Damage after a file was written: a flipped bit and a lost byte in every file of every kind of artifact is told."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from raydr import cli
from raydr import manifest as manifest_module
from raydr.artifacts import MANIFEST, open_artifact, write_artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest, ingest_queries
from raydr.encoders.checkpoint import locate
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ArtifactError
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.embedded import EmbeddedCorpus
from raydr.index.reader import IndexReader
from raydr.stages.config import EmbedConfig, MineConfig, SearchConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.mine import mine_negatives
from raydr.stages.search import search_corpus
from tests.conftest import write_beir
from tests.corpora import METHOD
from tests.train.tiny import tiny_checkpoint

METHOD_ = Component.model_validate(METHOD)
ENCODER = EncoderFactory(METHOD_)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run, with an index that has a word side and deleted passages, and a model."""
    out = tmp_path_factory.mktemp("made")
    corpus = ingest(DataConfig(path=str(write_beir(out / "source")), split="test"), out / "corpus")
    queries = ingest_queries(DataConfig(path=str(out / "source"), split="test"), corpus, out / "queries")
    embedded = embed_corpus(
        corpus, ENCODER, EmbedConfig(passages_per_block=4), out / "embed", use_ray=False, method=METHOD_
    )
    build_index(corpus, embedded, IndexConfig(num_shards=2), out / "index", use_ray=False)
    store.delete(out / "index", ["wheat"])
    search_corpus(out / "index", corpus.queries(), ENCODER, SearchConfig(), out / "search", use_ray=False)
    mine_negatives(
        out / "index", queries, ENCODER, MineConfig(num_negatives=2, split="test"), out / "examples", use_ray=False
    )
    with write_artifact(out / "train", kind="model", config={}) as writer:
        tiny_checkpoint(writer.path / "model")
    return out


def searched(out: Path) -> None:
    reader = IndexReader.open(out / "index")
    reader.search(np.ones((1, reader.dim), dtype=np.float32), 3)
    reader.search_bm25(["animal"], 3)


READERS: dict[str, Callable[[Path], object]] = {
    "corpus": lambda out: Corpus.open(out / "corpus"),
    "embed": lambda out: embeddings_of(out),
    "index": searched,
    "search": lambda out: open_artifact(out / "search"),
    "examples": lambda out: ExampleSet.open(out / "examples"),
    "train": lambda out: locate(str(out / "train/model")),
}


def embeddings_of(out: Path) -> np.ndarray:
    corpus = Corpus.open(out / "corpus")
    artifact = open_artifact(out / "embed", later=True)  # as `raydr index` opens it
    source = EmbeddedCorpus.of(corpus.passage_files, corpus.num_passages, artifact)
    return source.embeddings(0, corpus.num_passages)[0]


@contextmanager
def damaged(file: Path, content: bytes) -> Iterator[None]:
    """Replaced, not written to: what an earlier reader has mapped stays as it was."""
    kept = file.with_name(f".{file.name}.kept")
    file.rename(kept)
    file.write_bytes(content)
    try:
        yield
    finally:
        kept.replace(file)


@pytest.mark.parametrize("name", READERS)
def test_no_damaged_file_is_used(made, name):
    read = READERS[name]
    read(made)
    files = open_artifact(made / name).manifest.files
    assert len(files) >= {"index": 8, "train": 3}.get(name, 1)
    for file in [made / name / inside for inside in files]:
        if file.name == "shard.json":  # only an interrupted build reads it, and compares
            continue
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 16
        for wrong in (bytes(flipped), content[:-1]):
            with damaged(file, wrong), pytest.raises(ArtifactError) as told:
                read(made)
            assert str(file) in str(told.value) or str(file.parent) in str(told.value)
            assert "again" in str(told.value)
    read(made)


def test_a_model_is_compared_once_in_a_process_and_none_of_its_files_may_be_missing(made, tmp_path, monkeypatch):
    model = Path(shutil.copytree(made / "train", tmp_path / "train")) / "model"
    read, sha256 = [], manifest_module.file_sha256
    monkeypatch.setattr(manifest_module, "file_sha256", lambda file: read.append(file) or sha256(file))
    for _ in range(3):
        locate(str(model))
    assert sorted(read) == sorted(file for file in model.rglob("*") if file.is_file())
    (model / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: listed in manifest\.json but missing"):
        locate(str(model))


def same_json(left: bytes, right: bytes) -> bool:
    """Whether both say the same, as `1e-05` and `1E-05` do, and the last digits of some numbers."""
    try:
        return json.loads(left) == json.loads(right)
    except ValueError:
        return False


def test_no_bit_of_a_manifest_changes_unseen(made, tmp_path):
    shutil.copytree(made / "search", tmp_path / "search")
    manifest = tmp_path / "search" / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        wrong = bytearray(content)
        wrong[place] ^= 1 << place % 8
        if same_json(wrong, content):
            continue
        manifest.write_bytes(wrong)
        with pytest.raises(ArtifactError, match=r"manifest\.json: not a raydr manifest"):
            open_artifact(tmp_path / "search")


@pytest.mark.parametrize("name", ["shards/00000/vectors.faiss", "shards/00001/passages.arrow"])
def test_a_replica_does_not_become_ready_with_a_damaged_shard(made, name):
    from raydr.serve.shard import Shard, read_index_info

    ref = read_index_info(str(made / "index")).ref
    assert asyncio.run(Shard(0, 1, 2).prepare(ref)) == 2
    file = made / "index" / name
    content = file.read_bytes()
    with (
        damaged(file, content[:-1] + bytes([content[-1] ^ 1])),
        pytest.raises(ArtifactError, match=rf"{name}: differs"),
    ):
        asyncio.run(Shard(0, 1, 2).prepare(ref))


def test_doctor_verifies_what_lies_in_a_folder(made, tmp_path, capsys):
    shutil.copytree(made / "search", tmp_path / "run/search")
    shutil.copytree(made / "embed", tmp_path / "run/embed")
    assert cli.main(["doctor", "--verify", str(tmp_path / "run")]) == 0
    assert "2 artifacts" in capsys.readouterr().out
    file = next((tmp_path / "run/embed/embeddings").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[::-1])
    assert cli.main(["doctor", "--verify", str(tmp_path / "run")]) == 1
    found = capsys.readouterr().out
    assert f"{file}: differs from its checksum" in found
    assert "1 failed" in found


def test_compacting_does_not_give_damage_a_new_checksum(made, tmp_path):
    shutil.copytree(made / "index", tmp_path / "index")
    record = open_artifact(tmp_path / "index", later=True).manifest.details["shards"]
    (name,) = [shard["name"] for shard in record if shard["num_deleted"]]
    file = tmp_path / f"index/shards/{name}/vectors.faiss"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"vectors\.faiss: differs from its checksum"):
        store.compact(tmp_path / "index")
