"""update: changes an index that is in use; readers keep what they opened, `serve deploy` swaps the new state in.

raydr update show OUT/index
raydr update add OUT/index NEW            NEW is the folder of another run: `raydr embed CONFIG out=NEW`
raydr update delete OUT/index doc-17 doc-18
raydr update compact OUT/index
"""

from __future__ import annotations

from pathlib import Path

from raydr import runtime
from raydr.artifacts import Artifact, open_artifact
from raydr.data.corpus import Corpus
from raydr.index import store
from raydr.index.reader import IndexReader


def add(index: Path, run: Path, *, replace: bool = False) -> Artifact:
    """Adds the embedded corpus of another run; with `replace`, older passages of the same ids are deleted."""
    corpus = Corpus.open(run / "corpus")
    embeddings = open_artifact(run / "embed", kind="embeddings", later=True)
    on_duplicate = "replace" if replace else "error"
    return store.add(index, corpus, embeddings, on_duplicate=on_duplicate, use_ray=runtime.in_cluster())


def describe(index: Path) -> str:
    """What an index holds, for a person."""
    reader = IndexReader.open(index)
    details = reader.details
    deleted = f" ({details.num_deleted} deleted, still on disk)" if details.num_deleted else ""
    lines = {
        "version": reader.version,
        "passages": f"{reader.num_passages}{deleted}",
        "shards": f"{reader.num_shards} x {details.factory}, dimension {reader.dim}",
        "words": "BM25" if details.bm25 else "none",
        "method": f"{reader.method.import_path} {reader.method.args or ''}",
        "encoder": reader.encoder_version,
    }
    if details.recall:
        lines["recall"] = ", ".join(f"{name} {value:.4f}" for name, value in details.recall.items())
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())
