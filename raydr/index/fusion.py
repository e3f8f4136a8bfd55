"""Fusing dense and BM25 hits into one ranking: by reciprocal rank, or by normalised scores.

Notable: works on rows of one common numbering, vectorised over queries; sums are taken in the order of `parts`, and
ties are decided by passage id, so the same hits always fuse to the same ranking.

    fuse([dense, bm25], FusionConfig(method="rrf"), k=100, ids_of=reader.passage_ids.take)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from raydr.config import Config
from raydr.errors import ConfigError
from raydr.index.topk import IdsOf, empty, order
from raydr.protocols import TopK


class FusionConfig(Config):
    """How several rankings become one."""

    method: Literal["rrf", "min_max", "z_score"] = "rrf"
    """`rrf`: sum of weight / (rank_constant + rank); `min_max`, `z_score`: weighted sum of the scores, normalised over
    the candidates of each side. A passage that one side did not find counts there as that side's worst."""
    weights: tuple[float, ...] = (1.0, 1.0)
    """One per side: dense, BM25."""
    rank_constant: float = Field(default=60.0, gt=0)
    """The constant of reciprocal rank fusion (60 in Cormack et al., 2009)."""


def fuse(parts: Sequence[TopK], config: FusionConfig, k: int, ids_of: IdsOf) -> TopK:
    """The `k` best passages of all parts together, with their fused scores."""
    if len(config.weights) != len(parts):
        raise ConfigError(f"fusion.weights: {len(config.weights)} weights for {len(parts)} rankings; give one for each")
    normalise = {"rrf": _reciprocal_ranks, "min_max": _min_max, "z_score": _z_scores}[config.method]
    rows = np.concatenate([part.rows for part in parts], axis=1)
    gains = np.concatenate(
        [weight * normalise(part, config) for weight, part in zip(config.weights, parts, strict=True)], axis=1
    )
    num_queries, width = rows.shape
    if rows.size == 0:
        return empty(num_queries, k)
    # Bring equal rows of a query side by side, then add up each run of equal rows.
    best = np.argsort(rows, axis=1, kind="stable")
    rows, gains = np.take_along_axis(rows, best, axis=1), np.take_along_axis(gains, best, axis=1)
    starts = np.ones(rows.shape, dtype=bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    group = (np.cumsum(starts, axis=1) - 1) + np.arange(num_queries)[:, None] * width
    sums = np.bincount(group.ravel(), weights=gains.ravel(), minlength=rows.size).reshape(rows.shape)
    fused = empty(num_queries, width)
    fused.rows.ravel()[group[starts]] = rows[starts]
    fused.scores[:] = sums
    return order(fused, k, ids_of)


def _reciprocal_ranks(part: TopK, config: FusionConfig) -> Float64[np.ndarray, "query column"]:
    ranks = np.arange(1, part.rows.shape[1] + 1, dtype=np.float64)
    return np.where(part.rows >= 0, 1.0 / (config.rank_constant + ranks), 0.0)


def _min_max(part: TopK, config: FusionConfig) -> Float64[np.ndarray, "query column"]:  # noqa: ARG001 (one signature)
    above_worst, found = _above_worst(part)
    return _divided(above_worst, above_worst.max(axis=1, initial=0.0, keepdims=True), found)


def _z_scores(part: TopK, config: FusionConfig) -> Float64[np.ndarray, "query column"]:  # noqa: ARG001
    """(score - worst) / standard deviation: the z-score up to a constant per query, which changes no ranking."""
    above_worst, found = _above_worst(part)
    count = np.maximum(found.sum(axis=1, keepdims=True), 1)
    mean = above_worst.sum(axis=1, keepdims=True) / count
    deviation = np.sqrt((np.where(found, above_worst - mean, 0.0) ** 2).sum(axis=1, keepdims=True) / count)
    return _divided(above_worst, deviation, found)


def _divided(above_worst: np.ndarray, spread: np.ndarray, found: np.ndarray) -> Float64[np.ndarray, "query column"]:
    """Where all hits score alike there is no spread to measure by, and each of them counts 1."""
    flat = spread <= 0
    return np.where(found, np.where(flat, 1.0, above_worst / np.where(flat, 1.0, spread)), 0.0)


def _above_worst(part: TopK) -> tuple[np.ndarray, np.ndarray]:
    found = part.rows >= 0
    scores = np.where(found, part.scores, np.inf).astype(np.float64)
    worst = scores.min(axis=1, initial=np.inf, keepdims=True)
    return np.where(found, scores - np.where(np.isfinite(worst), worst, 0.0), 0.0), found
