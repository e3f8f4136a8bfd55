"""Is what came out after a kill what an undisturbed run leaves? Used by `kills.py`.

compared("search", Path("killed/search"), Path("undisturbed/search"))     "bit-equal"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from raydr.artifacts import open_artifact
from raydr.evaluation.trec import read_run
from raydr.train.metrics import METRICS, read_metrics


def compared(name: str, ours: Path, theirs: Path) -> str:
    """How an artifact relates to the undisturbed one. Raises `SystemExit` where anything is lost, doubled or other."""
    mine, other = open_artifact(ours), open_artifact(theirs)
    mine.verify()
    if mine.manifest.counts != other.manifest.counts and name != "embed":  # of files there may be more
        raise SystemExit(f"{ours}: counts {mine.manifest.counts} instead of {other.manifest.counts}")
    if name == "train":
        return _same_training(ours, theirs)
    if mine.manifest.files == other.manifest.files:
        return "bit-equal"
    if name == "embed":
        return _same_embeddings(ours, theirs)
    if name in ("search", "rerank"):
        return _same_run(ours / "run.trec", theirs / "run.trec")
    if name == "index":
        return _same_shards(mine.manifest.files, other.manifest.files)
    if name == "evaluate":
        a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (ours, theirs))
        return "same figures" if a == b else _refuse(ours, "other figures")
    differing = sorted(n for n in other.manifest.files if mine.manifest.files.get(n) != other.manifest.files[n])
    return _refuse(ours, f"differs in {differing[:3]}")


def _same_embeddings(ours: Path, theirs: Path) -> str:
    tables = []
    for folder in (ours, theirs):
        table = ds.dataset(folder / "embeddings", format="parquet").to_table().sort_by("position")
        if table["position"].to_pylist() != list(range(len(table))):
            _refuse(folder, "positions are lost or doubled")
        tables.append(table)
    if tables[0]["passage_id"] != tables[1]["passage_id"]:
        _refuse(ours, "passage ids differ")
    a, b = (np.stack(table["embedding"].to_numpy()) for table in tables)
    return _within(ours, float(np.abs(a - b).max()), 1e-5, f"{len(a):,} rows once each, ")


def _same_run(ours: Path, theirs: Path) -> str:
    a, b = read_run(ours), read_run(theirs)
    if {query: [hit.passage_id for hit in hits] for query, hits in a.items()} != {
        query: [hit.passage_id for hit in hits] for query, hits in b.items()
    }:
        _refuse(ours, "other hits")
    worst = max(abs(x.score - y.score) for query in a for x, y in zip(a[query], b[query], strict=True))
    return _within(ours, worst, 1e-5, "same hits, ")


def _same_shards(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    differing = sorted(name for name in theirs if ours.get(name) != theirs[name])
    if any(not name.startswith("bm25/") for name in differing):
        raise SystemExit(f"index: differs in {differing[:3]}")
    return "bit-equal but for the order in which BM25 numbers words"


def _same_training(ours: Path, theirs: Path) -> str:
    from safetensors.numpy import load_file

    steps = [[int(r["step"]) for r in read_metrics(folder / METRICS) if "loss" in r] for folder in (ours, theirs)]
    if steps[0] != steps[1]:
        _refuse(ours, "steps are lost or doubled")
    a, b = (load_file(folder / "model/model.safetensors") for folder in (ours, theirs))
    worst = max(float(np.abs(a[name].astype(np.float64) - b[name]).max()) for name in b)
    return _within(ours, worst, 1e-5, f"{len(steps[0])} steps once each, weights ")


def _within(path: Path, worst: float, limit: float, what: str) -> str:
    if worst > limit:
        _refuse(path, f"{what}off by {worst:.1e}")
    return what + ("bit-equal" if worst == 0 else f"within {worst:.0e}")


def _refuse(path: Path, why: str) -> str:
    raise SystemExit(f"{path}: {why}")
