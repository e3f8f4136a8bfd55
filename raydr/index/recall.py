"""How much of the truth an approximate index finds: recall@k against exact search, on embeddings of its own corpus.

Notable: the truth is computed from the embeddings themselves while streaming them, so no exact index is built; a
query's own passage is left out of both sides, because every index finds that one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from raydr.index.config import RecallProbe
from raydr.index.embedded import EmbeddedCorpus
from raydr.index.layout import IndexDetails
from raydr.index.reader import open_shard, shift
from raydr.index.topk import merge


def measure_recall(
    root: Path, details: IndexDetails, source: EmbeddedCorpus, probe: RecallProbe, *, seed: int
) -> dict[str, float]:
    """`{"recall@10": ...}`: the mean share of the k nearest passages that the index's own k best contain."""
    depths = sorted(k for k in probe.at if k < source.num_passages)
    own, queries = source.sample(probe.num_queries, np.random.default_rng(seed + 1))
    if not depths:
        return {}
    depth = depths[-1] + 1
    truth = _exact(source, queries, depth)
    shards = [
        open_shard(root, record, parameters=details.search, device="cpu", num_threads=None) for record in details.shards
    ]
    first_rows = np.cumsum([0, *(record.num_rows for record in details.shards)])
    parts = [shift(s.search(queries, depth), int(first)) for s, first in zip(shards, first_rows, strict=False)]
    # Ties may fall either way here: the truth is taken by position, which is the row of the index being built.
    found = merge(parts, depth, lambda rows: rows).rows
    recall = {k: [] for k in depths}
    for row, true_rows, found_rows in zip(own, truth, found, strict=True):
        true_rows, found_rows = true_rows[true_rows != row], found_rows[found_rows != row]
        for k in depths:
            recall[k].append(len(np.intersect1d(true_rows[:k], found_rows[:k])) / k)
    return {f"recall@{k}": float(np.mean(values)) for k, values in recall.items()}


def _exact(source: EmbeddedCorpus, queries: np.ndarray, depth: int) -> np.ndarray:
    """Positions of the `depth` nearest passages of each query, best first."""
    best_scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
    best_rows = np.full((len(queries), depth), -1, dtype=np.int64)
    for positions, vectors in tqdm(source.blocks(), desc="exact search", unit="block", disable=None):
        scores = np.concatenate([best_scores, queries @ vectors.T], axis=1)
        rows = np.concatenate([best_rows, np.broadcast_to(positions, (len(queries), len(positions)))], axis=1)
        kept = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        best_scores, best_rows = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(rows, kept, axis=1)
    ranked = np.argsort(-best_scores, axis=1, kind="stable")
    return np.take_along_axis(best_rows, ranked, axis=1)
