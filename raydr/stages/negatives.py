"""Which candidates become negatives: filters against false negatives, turns of the sources, order. Arrays, no I/O.

A passage that nobody judged may answer the query all the same, and the better it scores, the likelier it does. The
filters of NV-Retriever (arXiv 2407.15831) measure that against the positive p, with one encoder's scores s:

| setting | paper | a negative has to score below |
| --- | --- | --- |
| max_score | TopK-Abs | max_score |
| margin | TopK-MarginPos | s(p) - margin |
| fraction | TopK-PercPos | fraction * s(p) |

Notable: of several positives the one with the lowest score counts, so that the inequality holds for every pair that
training can draw. `fraction * s(p)` lies above s(p) where s(p) is negative, so there the limit is s(p) minus as much as
it would be with the sign turned: (2 - fraction) * s(p).

    chosen = choose(candidates, relevant, score_limits(positive_scores, config), num_negatives=16, ids_of=ids.take)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from raydr.index.topk import IdsOf, order
from raydr.protocols import TopK
from raydr.stages.config import MineConfig, Source


class Candidates(NamedTuple):
    """What the sources found for a block of queries, each source's columns side by side, best first."""

    rows: Int64[np.ndarray, "query candidate"]
    """Rows of the index; -1 where a source found fewer."""
    sources: Sequence[Source]
    """The source of each column."""
    scores: Float32[np.ndarray, "query candidate"] | None
    """The encoder's score of each; None where nothing was scored."""


class Choice(NamedTuple):
    """The negatives of a block of queries."""

    columns: Int64[np.ndarray, "query negative"]
    """Columns of the candidates, hardest first; -1 where there are fewer."""
    counts: Counter[str]
    """Candidates, and how many of them each filter removed; one that several would remove counts for the first."""


def score_limits(
    positive_scores: Float32[np.ndarray, " query"], config: MineConfig
) -> dict[str, Float64[np.ndarray, " query"]]:
    """By filter: what a negative of each query has to score below, given the (lowest) score of its positives."""
    positive = positive_scores.astype(np.float64)
    limits = {}
    if config.max_score is not None:
        limits["max_score"] = np.full(len(positive), config.max_score, dtype=np.float64)
    if config.margin is not None:
        limits["margin"] = positive - config.margin
    if config.fraction is not None:
        limits["fraction"] = np.where(positive >= 0, config.fraction, 2 - config.fraction) * positive
    return limits


def choose(
    candidates: Candidates,
    relevant: Sequence[Int64[np.ndarray, " _"]],
    limits: Mapping[str, Float64[np.ndarray, " query"]],
    *,
    num_negatives: int,
    ids_of: IdsOf,
) -> Choice:
    """The negatives of each query: no `relevant` row, none twice, all scores below the limits.

    Sources take turns (in the order of their columns) until `num_negatives` are chosen. Hardest first means by score,
    ties by passage id; where nothing was scored, by column.
    """
    rows = candidates.rows
    left = rows >= 0
    counts = Counter(candidates=int(left.sum()))
    filters = {"relevant": is_relevant(rows, relevant), "duplicate": is_repeated(rows)}
    if candidates.scores is not None:
        filters |= {name: ~(candidates.scores < limit[:, None]) for name, limit in limits.items()}
    for name, removes in filters.items():
        counts[f"removed_{name}"] = int((left & removes).sum())
        left &= ~removes
    columns = _take_turns(left, candidates.sources, num_negatives)
    return Choice(_hardest_first(candidates, columns, ids_of), counts)


def is_relevant(
    rows: Int64[np.ndarray, "query candidate"], relevant: Sequence[Int64[np.ndarray, " _"]]
) -> Bool[np.ndarray, "query candidate"]:
    """Whether a row is one of its query's `relevant` ones."""
    return np.stack([np.isin(line, own) for line, own in zip(rows, relevant, strict=True)])


def is_repeated(rows: Int64[np.ndarray, "query candidate"]) -> Bool[np.ndarray, "query candidate"]:
    """Whether a row stands further to the left already."""
    by_row = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, by_row, axis=1)
    same = np.zeros(rows.shape, dtype=bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.empty(rows.shape, dtype=bool)
    np.put_along_axis(repeated, by_row, same, axis=1)
    return repeated


def _take_turns(
    left: Bool[np.ndarray, "query candidate"], sources: Sequence[Source], num_negatives: int
) -> Int64[np.ndarray, "query negative"]:
    """The first `num_negatives` columns that are left, one source after the other; -1 where there are fewer."""
    widths = [len(list(columns)) for _, columns in groupby(sources)]
    ends = np.cumsum(widths)
    turn = np.empty(left.shape, dtype=np.int64)
    for number, (width, end) in enumerate(zip(widths, ends, strict=True)):
        own = slice(end - width, end)
        turn[:, own] = np.cumsum(left[:, own], axis=1) * len(widths) + number
    turn[~left] = np.iinfo(np.int64).max
    first = np.argsort(turn, axis=1, kind="stable")[:, :num_negatives]
    return np.where(np.take_along_axis(left, first, axis=1), first, -1)


def _hardest_first(
    candidates: Candidates, columns: Int64[np.ndarray, "query negative"], ids_of: IdsOf
) -> Int64[np.ndarray, "query negative"]:
    num_queries, width = candidates.rows.shape
    if candidates.scores is None:
        return np.sort(columns.astype(np.uint64), axis=1).astype(np.int64)  # as uint64, -1 is the largest
    first = np.arange(num_queries)[:, None] * width
    scores = np.take_along_axis(candidates.scores, np.maximum(columns, 0), axis=1)
    # `order` breaks ties by the ids of rows; the places of the candidates stand in for them, to be found again.
    places = TopK(scores=scores, rows=np.where(columns >= 0, first + columns, -1))
    ordered = order(places, columns.shape[1], lambda found: ids_of(candidates.rows.ravel()[found]))
    return np.where(ordered.rows >= 0, ordered.rows - first, -1)
