"""Each local verb on a disk that fills up, then has room again, then is read-only. Run by `test_full_disk.py`.

The disk is a tmpfs that is mounted in a mount namespace of this process, so nobody else sees it.

    unshare --mount --map-root-user python tests/storage/full_disk.py FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from raydr.artifacts import Artifact, open_artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest, ingest_queries
from raydr.encoders.factory import EncoderFactory
from raydr.errors import RaydrError
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.evaluate import evaluate_run
from raydr.evaluation.trec import read_run
from raydr.index import store
from raydr.index.build import build_index
from raydr.index.config import IndexConfig
from raydr.index.reader import IndexReader
from raydr.stages.config import EmbedConfig, MineConfig, RerankConfig, ScoreConfig, SearchConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.mine import mine_negatives
from raydr.stages.rerank import rerank_run
from raydr.stages.score import score_examples
from raydr.stages.search import search_corpus
from raydr.types import Hit, Passage, Query
from tests.corpora import METHOD, WordCounts

DISK_BYTES = 64 << 20
LEFT_BYTES = 40 << 10
"""What is left to a verb that is to fail; each of them writes more."""
NUM_PASSAGES, NUM_QUERIES = 3000, 400

METHOD_ = Component.model_validate(METHOD)
ENCODER = EncoderFactory(METHOD_)


class Drawn:
    """A reranker whose scores look drawn, so that files of them are as large as they get."""

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> np.ndarray:
        drawn = [zlib.crc32(f"{query.query_id} {passage.passage_id}".encode()) for query, passage in pairs]
        return np.array(drawn, dtype=np.float32)

    def rerank(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        scores = self.score([(query, passages[hit.passage_id]) for hit in hits])
        found = [Hit(hit.passage_id, float(score)) for hit, score in zip(hits, scores, strict=True)]
        return sorted(found, key=lambda hit: -hit.score)


RANKER = Component(import_path="tests.storage.full_disk:Drawn")


def write_source(folder: Path) -> DataConfig:
    rng = np.random.default_rng(0)
    (folder / "qrels").mkdir(parents=True)
    words = [" ".join(rng.choice(WordCounts.VOCABULARY, size=30)) + f" number {n}" for n in range(NUM_PASSAGES)]
    passages = [json.dumps({"_id": f"p{n}", "text": text}) for n, text in enumerate(words)]
    queries = [json.dumps({"_id": f"q{n}", "text": words[n][:40]}) for n in range(NUM_QUERIES)]
    (folder / "corpus.jsonl").write_text("\n".join(passages))
    (folder / "queries.jsonl").write_text("\n".join(queries))
    rows = ["query-id\tcorpus-id\tscore", *(f"q{n}\tp{n}\t1" for n in range(NUM_QUERIES))]
    (folder / "qrels/test.tsv").write_text("\n".join(rows))
    return DataConfig(path=str(folder), split="test")


def steps(data: DataConfig, out: Path) -> dict[str, Callable[[], object]]:
    def corpus() -> Corpus:
        return Corpus.open(out / "corpus")

    def embeddings() -> Artifact:
        return open_artifact(out / "embed", later=True)

    embed = EmbedConfig(passages_per_block=500)
    mine = MineConfig(split="test", num_negatives=32)
    return {
        "corpus": lambda: ingest(data, out / "corpus"),
        "embed": lambda: embed_corpus(corpus(), ENCODER, embed, out / "embed", use_ray=False, method=METHOD_),
        "index": lambda: build_index(corpus(), embeddings(), IndexConfig(num_shards=2), out / "index", use_ray=False),
        "search": lambda: search_corpus(
            out / "index", corpus().queries(), ENCODER, SearchConfig(), out / "search", use_ray=False
        ),
        "examples": lambda: mine_negatives(
            out / "index",
            ingest_queries(data, corpus(), out.parent / "queries"),
            ENCODER,
            mine,
            out / "examples",
            use_ray=False,
        ),
        "rerank": lambda: rerank_run(
            read_run(out / "search/run.trec"),
            corpus().queries(),
            out / "index",
            RANKER,
            RerankConfig(),
            out / "rerank",
            use_ray=False,
        ),
        "evaluate": lambda: evaluate_run(
            read_run(out / "search/run.trec"), corpus().qrels(), EvaluateConfig(), out / "evaluate"
        ),
        "score": lambda: score_examples(
            ExampleSet.open(out / "examples"), RANKER, ScoreConfig(), out / "score", use_ray=False
        ),
    }


def refused(act: Callable[[], object]) -> str:
    try:
        act()
    except RaydrError as error:
        return str(error)
    return ""


def halve(index: Path) -> None:
    store.delete(index, [f"p{n}" for n in range(0, NUM_PASSAGES, 2)])
    store.compact(index)


def fill(disk: Path) -> Path:
    """Leaves `LEFT_BYTES`."""
    status = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(status.f_bavail * status.f_frsize - LEFT_BYTES))
    return filler


def main(folder: Path) -> None:
    disk, out = folder / "disk", folder / "disk/out"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=True)
    data = write_source(folder / "source")
    there = steps(data, folder / "whole")
    found: dict[str, dict[str, object]] = {}
    for name, act in steps(data, out).items():
        there[name]()
        filler = fill(disk)
        found[name] = {"full": refused(act), "then": refused(lambda name=name: open_artifact(out / name))}
        filler.unlink()
        act()
        files = [open_artifact(at / name).manifest.files for at in (out, folder / "whole")]
        found[name]["same"] = sum(files[0].get(file) == record for file, record in files[1].items()) / len(files[1])
    filler = fill(disk)
    before = open_artifact(out / "index", later=True).manifest
    found["update"] = {"full": refused(lambda: halve(out / "index"))}
    filler.unlink()
    found["update"] |= {
        "passages": IndexReader.open(out / "index").num_passages,
        "was": before.counts["passages"],
    }
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    def search(target: Path, k: int) -> Artifact:
        queries = Corpus.open(out / "corpus").queries()
        return search_corpus(out / "index", queries, ENCODER, SearchConfig(k=k), target, use_ray=False)

    found["read-only"] = {
        "read": search(folder / "found", 10).manifest.counts["queries"],
        "written": refused(lambda: search(out / "s", 5)),
        "changed": refused(lambda: store.delete(out / "index", ["p1"])),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
