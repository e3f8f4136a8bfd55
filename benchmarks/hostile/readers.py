"""Everything that raydr reads from disk: a valid example of each kind, and the call that reads it.

Notable: an artifact is also read with sizes and checksums in its manifest that fit what was changed, because whoever
can change a file can change the manifest beside it. Files that Arrow and FAISS map into memory are the exception: their
libraries do not check them and crash, so these are compared with their checksums first, unless `native` is asked for.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile.mutations import gzip_bomb, mutate

from raydr.artifacts import MANIFEST, open_artifact
from raydr.config import load, validate
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.example_files import examples_from_file
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest
from raydr.data.training_formats import FORMATS
from raydr.encoders.checkpoint import open_checkpoint
from raydr.encoders.tokenization import load_tokenizer
from raydr.errors import RaydrError
from raydr.evaluation.reproductions import read_rows
from raydr.evaluation.trec import read_qrels, read_run, write_run
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.index.store import delete
from raydr.serve.config import AppArgs
from raydr.stages.supervision import read_clusters, read_pairs
from raydr.types import Hit
from raydr.verbs.config import RunConfig
from tests.corpora import embedded_corpus, integers

BOMB_BYTES = 3 << 30
"""What a bomb unpacks to: more than a reader may take."""
BOMB_LINES = 2 << 20
"""Lines of one that takes time only: reading is a stream, and takes as long as what it unpacks to."""


class Target(NamedTuple):
    """`make` writes valid files into a folder; `read` reads them, and may write into another."""

    make: Callable[[Path], Any]
    read: Callable[[Path, Path], Any]
    files: str = "*"
    """Which of the files are changed."""


PASSAGES = {
    "d1": ("Cat", "A small furry animal that purrs.", "pet", 2001),
    "d2": ("", "Käse, naïve façade, Ελληνικά, 日本語, עברית, 👩‍🔬", "farm", 1999),
    "d3": ("Owl", 'A bird with large eyes, "quoted", and a comma.', "wild", 2010),
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record, ensure_ascii=bool(n % 2)) + "\n" for n, record in enumerate(records)))


def _beir(folder: Path, suffix: str = "") -> None:
    rows = [
        {"_id": id_, "title": title, "text": text, "kind": kind, "year": year, "tags": [kind, "x"]}
        for id_, (title, text, kind, year) in PASSAGES.items()
    ]
    _jsonl(folder / f"corpus.jsonl{suffix}", rows)
    _jsonl(folder / f"queries.jsonl{suffix}", [{"_id": "q1", "text": "which animal"}, {"_id": "q2", "text": "cheese"}])
    _write(folder / f"qrels/test.tsv{suffix}", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td3\t2\nq2\td2\t-1\n")


def _msmarco(folder: Path) -> None:
    _write(folder / "collection.tsv", "".join(f"{n}\t{p[1]}\n" for n, p in enumerate(PASSAGES.values())))
    _write(folder / "queries.dev.tsv", "7\twhich animal\n8\tcheese\n")
    _write(folder / "qrels.dev.tsv", "7\t0\t0\t1\n8\t0\t1\t1\n")


def _csv(folder: Path) -> None:
    with (folder / "corpus.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "title", "text", "kind", "year"])
        writer.writerows([id_, *passage] for id_, passage in PASSAGES.items())


def _parquet(folder: Path) -> None:
    titles, texts, kinds, years = (list(column) for column in zip(*PASSAGES.values(), strict=True))
    columns = {"id": list(PASSAGES), "title": titles, "text": texts, "kind": kinds, "year": years}
    columns["tags"] = [[kind] for kind in kinds]
    pq.write_table(pa.table(columns), folder / "corpus.parquet", compression="snappy")


def _ingest(folder: Path, out: Path) -> None:
    """What is refused as it is may still be read where bad records are left out: both ways are taken."""
    refused: RaydrError | None = None
    for on_error in ("raise", "skip"):
        try:
            corpus = ingest(DataConfig(path=str(folder), on_error=on_error), out / on_error)
            pa.concat_tables(corpus.passages()).to_pylist()
            if corpus.has_qrels:
                corpus.qrels()
        except RaydrError as error:
            refused = error
    if refused is not None:
        raise refused


def _training(name: str) -> Target:
    positive, negative = {"docid": "p1", "title": "T", "text": "good"}, {"docid": "p2", "title": "", "text": "bad"}
    turns = [
        {"from": "system", "value": "You rank."},
        {"from": "human", "value": "2 passages:\n\n[A] good\n[B] bad\nSearch Query: what is good.\nRank them."},
        {"from": "gpt", "value": "[B] > [A]"},
    ]
    records: dict[str, dict[str, Any]] = {
        "tevatron": {
            "query_id": "q1",
            "query": "what",
            "positive_passages": [positive],
            "negative_passages": [negative],
        },
        "tevatron_ids": {
            "query_id": "q1",
            "query_text": "what",
            "positive_document_ids": ["p1"],
            "negative_document_ids": ["p2"],
        },
        "flagembedding": {"query": "q", "pos": ["good"], "neg": ["bad"], "pos_scores": [0.9], "neg_scores": [0.1]},
        "sentence_transformers": {"anchor": "q", "positive": "good", "negative_1": "bad", "score": 0.5},
        "ms_swift": {
            "messages": [{"role": "user", "content": "q"}],
            "positive_messages": [[{"role": "user", "content": "good"}]],
            "negative_messages": [[{"role": "user", "content": "bad"}]],
        },
        "rankllm": {
            "query": {"text": "q", "qid": "q1"},
            "candidates": [{"docid": f"p{n}", "score": 1.0 / (n + 1), "doc": {"contents": f"c {n}"}} for n in range(3)],
        },
        "orders": {"query": "q", "query_id": "q1", "docs": ["p1", "p2"]},
        "rank_zephyr": {"id": "0", "conversations": turns},
    }
    assert set(records) == set(FORMATS), set(FORMATS) ^ set(records)

    def make(folder: Path) -> None:
        _jsonl(folder / "train.jsonl", [records[name]] * 3)
        if FORMATS[name].names_passages:
            _jsonl(folder / "corpus.jsonl", [positive, negative])

    def read(folder: Path, out: Path) -> None:
        corpus = str(folder / "corpus.jsonl") if FORMATS[name].names_passages else None
        path = str(folder / "train.jsonl")
        examples_from_file(path, out / "e", source_format=name, corpus=corpus, trust_order=True)

    return Target(make, read)


def _runs(folder: Path) -> None:
    run = {"q1": [Hit("d1", 2.5), Hit("d2", 1.25)], "q2": [Hit("d3", -1e-7)]}
    write_run(run, folder / "trec.run")
    write_run(run, folder / "packed.run.gz")
    _write(folder / "tevatron.run", "q1\td1\t2.5\nq1\td2\t1.5\n")
    _write(folder / "msmarco.run", "q1\td1\t1\nq1\td2\t2\n")
    _write(folder / "trec.qrels", "q1 0 d1 1\nq1 0 d2 -1\n")
    _write(folder / "beir.qrels.gz", "query-id\tcorpus-id\tscore\nq1\td1\t1\n")


def _read_runs(folder: Path, out: Path) -> None:
    del out
    for file in sorted(folder.iterdir()):
        read_qrels(file) if ".qrels" in file.name else read_run(file)


KEYS = {
    "api_keys": [
        {"name": "alice", "sha256": "0" * 64, "requests_per_minute": 60.0, "burst": 3, "routes": ["search"]},
        {"name": "bob", "sha256": ["1" * 64, "2" * 64], "filters": {"tenant": ["b", "c"], "year": {"gte": 2000}}},
    ]
}
CONFIG = """data: {path: somewhere, split: test}
out: /tmp/run
index: {num_shards: 2, factory: Flat}
search: {k: 10, filters: {year: {gte: 2000}}}
"""


def _configs(folder: Path) -> None:
    import yaml

    _write(folder / "keys.yaml", yaml.safe_dump(KEYS))
    _write(folder / "run.yaml", CONFIG)
    rows = Path(__file__).parents[2] / "docs" / "reproductions.yaml"
    _write(folder / "reproductions.yaml", rows.read_text())
    _write(folder / "template.yaml", "system_message: s\nprefix: p\nbody: '[{rank}] {candidate}'\nsuffix: x\n")


def _read_configs(folder: Path, out: Path) -> None:
    import os

    from raydr.llm.prompt import PromptConfig

    del out
    os.environ["RAYDR_FUZZ_KEYS"] = str(folder / "keys.yaml")
    validate(AppArgs, {"index": "x", "api_keys_env": "RAYDR_FUZZ_KEYS"}, where="args").read_api_keys()
    load(RunConfig, folder / "run.yaml")
    PromptConfig(template=str(folder / "template.yaml")).wording()
    read_rows(folder / "reproductions.yaml")


def _corpus_and_index(folder: Path, config: IndexConfig) -> None:
    passages = {f"p{n}": {"title": f"T {n}", "text": f"word{n} alpha beta", "year": 1990 + n} for n in range(24)}
    corpus, embeddings = embedded_corpus(folder, passages, integers(24, 8))
    build_index(corpus, embeddings, config, folder / "index", use_ray=False)
    delete(folder / "index", ["p3"])


def _index(factory: str) -> Target:
    def make(folder: Path) -> None:
        _corpus_and_index(folder, IndexConfig(num_shards=2, factory=factory))
        for name in ("corpus", "embed", "corpus.jsonl"):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return Target(make, _read_index, "index/**/*")


def _read_index(folder: Path, out: Path) -> None:
    del out
    reader = IndexReader.open(folder / "index")
    reader.artifact.verify()
    queries = integers(2, reader.dim if 0 < reader.dim < 4096 else 8, seed=1)
    top = reader.search(queries, 5, allowed=reader.select({"year": {"gte": 1992}}, exclude_ids=["p2"]))
    rows = top.rows[top.rows >= 0]
    reader.passages(rows)
    reader.embeddings(rows)
    reader.search_bm25(["word3 alpha", "beta"], 5)
    reader.rows_of(["p1", "nobody"])


def _embedded(folder: Path) -> None:
    _corpus_and_index(folder, IndexConfig(num_shards=2))
    shutil.rmtree(folder / "index")


def _read_embedded(folder: Path, out: Path) -> None:
    corpus = Corpus.open(folder / "corpus")
    build_index(corpus, open_artifact(folder / "embed", kind="embeddings"), IndexConfig(), out / "i", use_ray=False)


def _examples(folder: Path) -> None:
    records = [
        {"query_id": f"q{n}", "query": f"query {n}", "positive_passages": [{"docid": f"p{n}", "text": f"good {n}"}],
         "negative_passages": [{"docid": f"n{n}", "text": f"bad {n}"}]}
        for n in range(4)
    ]  # fmt: skip
    _jsonl(folder / "train.jsonl", records)
    examples_from_file(str(folder / "train.jsonl"), folder / "examples")
    (folder / "train.jsonl").unlink()
    ids = {"query_id": [f"q{n}" for n in range(4)]}
    pq.write_table(pa.table({**ids, "cluster": [0, 1, 0, 1]}), folder / "clusters.parquet")
    pairs = {"positive_id": [f"p{n}" for n in range(4)], "negative_id": [f"n{n}" for n in range(4)]}
    scores = {"positive_score": [1.0] * 4, "negative_score": [0.5] * 4}
    pq.write_table(pa.table({**ids, **pairs, **scores}), folder / "pairs.parquet")


def _read_examples(folder: Path, out: Path) -> None:
    del out
    examples = ExampleSet.open(folder / "examples")
    examples.artifact.verify()
    for row in range(len(examples)):
        examples.positives(row), examples.negatives(row)
    np.asarray(read_clusters(folder / "clusters.parquet", examples))
    read_pairs(folder / "pairs.parquet", examples)


def _checkpoint(folder: Path) -> None:
    from raydr.encoders.checkpoint import locate

    for file in locate("minilm").rglob("*.json"):
        target = folder / "model" / file.relative_to(locate("minilm"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    (folder / "model" / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")


def _read_checkpoint(folder: Path, out: Path) -> None:
    del out
    checkpoint = open_checkpoint(str(folder / "model"))
    load_tokenizer(checkpoint.path, lowercase=checkpoint.lowercase)


TARGETS: dict[str, Target] = {
    "beir": Target(_beir, _ingest, "**/*"),
    "beir_gz": Target(lambda folder: _beir(folder, ".gz"), _ingest, "**/*"),
    "msmarco": Target(_msmarco, _ingest),
    "csv": Target(_csv, _ingest),
    "parquet": Target(_parquet, _ingest),
    **{f"training_{name}": _training(name) for name in FORMATS},
    "runs": Target(_runs, _read_runs),
    "configs": Target(_configs, _read_configs),
    "index_flat": _index("Flat"),
    "index_ivf": _index("IVF2,Flat"),
    "index_hnsw": _index("HNSW8,SQ8"),
    "index_pq": _index("IVF2,PQ4x4"),
    "embeddings": Target(_embedded, _read_embedded, "[ce]*/**/*"),
    "examples": Target(_examples, _read_examples, "**/*"),
    "checkpoint": Target(_checkpoint, _read_checkpoint, "model/**/*.json"),
}
NATIVE = {".arrow", ".faiss"}
_CHECKSUM = re.compile(rb'("checksum":\s*")[0-9a-f]{64}(?=")')
_TEXT = {".jsonl", ".tsv", ".csv", ".run", ".qrels", ".yaml", ".json"}


def change(folder: Path, target: Target, rng: Random, *, native: bool = False) -> str:
    """Changes one file of a valid example; its name."""
    files = sorted(file for file in folder.glob(target.files) if file.is_file() and not file.name.startswith("."))
    file = rng.choice(files)
    data = file.read_bytes()
    if file.suffix == ".gz":
        packed = rng.random() < 0.5
        if rng.random() < 0.02:
            unit = rng.choice((b" ", b"x", b"\n"))
            new = gzip_bomb(BOMB_LINES if unit == b"\n" else BOMB_BYTES, unit=unit)
        elif packed:
            new = mutate(data, rng, text=False)
        else:
            new = gzip.compress(mutate(gzip.decompress(data), rng, text=True), compresslevel=1, mtime=0)
    else:
        new = mutate(data, rng, text=file.suffix in _TEXT)
    file.write_bytes(new)
    if rng.random() < 0.6 and (native or file.suffix not in NATIVE):
        _mend_manifests(folder, file)
    return file.name


def _mend_manifests(folder: Path, file: Path) -> None:
    """Sizes and checksums as the changed file has them; a manifest without its own checksum is read as well."""
    if file.name == MANIFEST:
        file.write_bytes(_CHECKSUM.sub(rb"\1", file.read_bytes()))
    for manifest in folder.rglob(MANIFEST):
        if manifest == file or not file.is_relative_to(manifest.parent):
            continue
        try:
            content = json.loads(manifest.read_bytes())
            record = content["files"].get(file.relative_to(manifest.parent).as_posix())
        except (ValueError, KeyError, AttributeError):
            continue
        if record is not None:
            record.update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
            manifest.write_text(json.dumps(content | {"checksum": ""}))
