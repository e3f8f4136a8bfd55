"""Embedded corpora for tests: real corpus artifacts with embeddings a test chooses, no model needed.

corpus, embeddings = embedded_corpus(tmp_path, {"a": "alpha", "b": "beta"}, np.eye(2, dtype=np.float32))
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import Artifact, open_artifact, write_artifact
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.ingest import ingest
from raydr.types import EMBEDDING, PASSAGE_ID, POSITION, Query

STAMP = "word-count-1"
METHOD = {"import_path": "tests.corpora:WordCounts", "args": {}}


def embedded_corpus(
    folder: Path,
    passages: Mapping[str, str | dict[str, Any]],
    embeddings: np.ndarray,
    *,
    encoder_version: str = STAMP,
    num_files: int = 3,
    seed: int = 0,
) -> tuple[Corpus, Artifact]:
    """A corpus of `passages` (text, or text with title and metadata) and its embeddings, written in shuffled order."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"_id": id_, **({"text": p} if isinstance(p, str) else p)} for id_, p in passages.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = ingest(DataConfig(path=str(folder / "corpus.jsonl")), folder / "corpus")
    details = {"encoder_version": encoder_version, "dim": embeddings.shape[1], "method": METHOD}
    with write_artifact(folder / "embed", kind="embeddings", config={}, inputs={"corpus": corpus.artifact}) as writer:
        writer.details.update(details)
        order = np.random.default_rng(seed).permutation(len(rows))
        for number, part in enumerate(np.array_split(order, num_files)):
            table = {
                PASSAGE_ID: pa.array([rows[row]["_id"] for row in part], type=pa.string()),
                POSITION: pa.array(part, type=pa.int64()),
                EMBEDDING: pa.FixedSizeListArray.from_arrays(
                    pa.array(embeddings[part].ravel(), type=pa.float32()), embeddings.shape[1]
                ),
            }
            pq.write_table(pa.table(table), writer.path / f"part-{number}.parquet", row_group_size=7)
    return corpus, open_artifact(folder / "embed")


def integers(num_rows: int, dim: int, *, seed: int = 0, spread: int = 3) -> np.ndarray:
    """Embeddings of small whole numbers: their inner products are exact, and full of ties."""
    return np.random.default_rng(seed).integers(-spread, spread + 1, size=(num_rows, dim)).astype(np.float32)


def brute_force(ids: Sequence[str], embeddings: np.ndarray, queries: np.ndarray, k: int, allowed=None) -> list[list]:
    """[(id, score)] of the k best passages per query, ties by id: the definition, in plain Python."""
    rows = range(len(ids)) if allowed is None else np.flatnonzero(allowed)
    ranked = [
        sorted(((ids[row], float(embeddings[row] @ query)) for row in rows), key=lambda hit: (-hit[1], hit[0]))
        for query in queries
    ]
    return [hits[:k] for hits in ranked]


def as_pairs(top, ids) -> list[list]:
    """A `TopK` as [(id, score)] per query."""
    return [
        [(ids[row], float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for rows, scores in zip(top.rows, top.scores, strict=True)
    ]


class WordCounts:
    """An encoder that counts the words of a small vocabulary, and a method that builds it."""

    VOCABULARY = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
    dim = len(VOCABULARY)
    version = STAMP

    def encode_queries(self, queries: Sequence[Query]) -> np.ndarray:
        return self.count([query.text for query in queries])

    def encode_passages(self, passages) -> np.ndarray:
        return self.count([passage.text for passage in passages])

    def count(self, texts: Sequence[str]) -> np.ndarray:
        counts = [[text.split().count(word) for word in self.VOCABULARY] for text in texts]
        return np.array(counts, dtype=np.float32).reshape(len(texts), self.dim)

    def encoder(self) -> WordCounts:
        return self
