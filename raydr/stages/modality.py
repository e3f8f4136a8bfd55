"""Negatives by what they are made of: the modality-aware rule of MM-Embed. Arrays, no I/O.

A retriever that is asked for a picture and answers with a text has not followed the instruction, however well the text
fits. For each query, the right modalities are those of its judged positives, and the hits of a search of all modalities
give two kinds of negatives (Lin et al., ICLR 2025, arXiv 2411.02571):

| kind | in the paper | hits, judged positives left out |
| --- | --- | --- |
| wrong_modality | C1 | of no right modality, ranked above the positive; all down to `depth` where none was found |
| low_rank | C2 | of a right modality, at the ranks beyond `low_rank`, down to `depth` |

Notable: of several positives the one that ranks best counts, so that a wrong-modality negative stands above every
positive that training can pair it with. Filters against false negatives apply to the second kind only: whether a
passage answers is a guess, which modality it is of is not. (And `fraction` or `margin` would remove the whole first
kind, which scores above the positive by definition.) With `above_positive: false` the first kind is all of no right
modality: what a model has been trained on it answers with the positive first, so that rule finds nothing there of what
it gets wrong elsewhere.

    hard = by_modality(candidates, relevant, reader.modalities, score_limits(scores, config), config.modality_aware)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int8, Int64

from raydr.stages.config import ModalityConfig
from raydr.stages.negatives import Candidates, is_relevant, is_repeated
from raydr.types import MODALITIES

WRONG_MODALITY = "wrong_modality"
LOW_RANK = "low_rank"


class HardNegatives(NamedTuple):
    """Which candidates of a block of queries are negatives, and why; no candidate is both."""

    wrong_modality: Bool[np.ndarray, "query rank"]
    low_rank: Bool[np.ndarray, "query rank"]
    counts: Counter[str]
    """Hits, what was removed of them, negatives of either kind, and queries that have none of it; `unfound`: queries
    without a positive among their hits."""

    def of(self, line: int) -> tuple[Int64[np.ndarray, " negative"], list[str]]:
        """Columns of the negatives of one query, best rank first, and the kind of each."""
        columns = np.flatnonzero(self.wrong_modality[line] | self.low_rank[line])
        return columns, np.where(self.wrong_modality[line, columns], WRONG_MODALITY, LOW_RANK).tolist()


def right_modalities(
    relevant: Sequence[Int64[np.ndarray, " _"]], modalities: Int8[np.ndarray, " row"]
) -> Bool[np.ndarray, "query modality"]:
    """The modalities of what is relevant to each query; columns in the order of `MODALITIES`."""
    right = np.zeros((len(relevant), len(MODALITIES)), dtype=bool)
    for line, rows in enumerate(relevant):
        right[line, modalities[rows]] = True
    return right


def by_modality(
    candidates: Candidates,
    relevant: Sequence[Int64[np.ndarray, " _"]],
    modalities: Int8[np.ndarray, " row"],
    limits: Mapping[str, Float64[np.ndarray, " query"]],
    config: ModalityConfig,
) -> HardNegatives:
    """The two kinds of negatives among the first `depth` hits of each query.

    `candidates` are the hits of one search, column 0 at rank 1; `relevant` are the rows of each query's positives,
    `modalities` has the place in `MODALITIES` of every row of the index, and `limits` are those of `score_limits`.
    """
    rows = candidates.rows[:, : config.depth]
    found = rows >= 0
    is_positive = is_relevant(rows, relevant) & found
    is_other = found & ~is_positive & ~is_repeated(rows)
    line = np.arange(len(rows))[:, None]
    is_right = right_modalities(relevant, modalities)[line, modalities[rows]]
    ranks = np.arange(1, rows.shape[1] + 1)
    wrong = is_other & ~is_right
    if config.above_positive:
        wrong &= ~np.logical_or.accumulate(is_positive, axis=1)
    low = is_other & is_right & (ranks > config.low_rank)
    counts = Counter(candidates=int(found.sum()), removed_relevant=int(is_positive.sum()))
    for name, limit in limits.items():
        if candidates.scores is None:
            raise TypeError("limits of scores need scores")
        removes = low & ~(candidates.scores[:, : config.depth] < limit[:, None])
        counts[f"removed_{name}"] = int(removes.sum())
        low &= ~removes
    wrong, low = _first(wrong, config.num_wrong_modality), _first(low, config.num_low_rank)
    for name, kept in ((WRONG_MODALITY, wrong), (LOW_RANK, low)):
        counts[name] = int(kept.sum())
        counts[f"without_{name}"] = int((~kept.any(axis=1)).sum())
    counts["unfound"] = int((~is_positive.any(axis=1)).sum())
    return HardNegatives(wrong, low, counts)


def _first(chosen: Bool[np.ndarray, "query rank"], num: int | None) -> Bool[np.ndarray, "query rank"]:
    """The first `num` of each line; None: all."""
    return chosen if num is None else chosen & (np.cumsum(chosen, axis=1) <= num)
