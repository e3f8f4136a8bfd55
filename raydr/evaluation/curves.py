"""ROC curves and the area under them: do scores separate relevant from other passages, also across queries?

Notable: nDCG asks only how one query's hits are sorted; the pooled curve asks whether one score threshold works for
all queries, which is what "no good answer" gates and filters rely on. The pool follows the protocol of the MW-loss
paper (arXiv 2510.00137, section 5.1): each query gives the scores of its relevant passages and of its best-scoring
500 others. A relevant passage the run did not retrieve has no score there; it counts as lower than every hit, so a
shallow run is never flattered (its own query's area is exact, the pooled one a lower bound). Tied scores count half.

    pools = score_pools(run, qrels)
    pooled_curve(pools).area
    area_per_query(pools)["q1"]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from raydr.types import Qrels, Run


class ScorePool(NamedTuple):
    """The scores one query gives to a curve; a relevant passage that was not retrieved has -inf."""

    positives: Float64[np.ndarray, " positive"]
    negatives: Float64[np.ndarray, " negative"]


@dataclass(frozen=True)
class RocCurve:
    """One point per distinct score, from (0, 0) to (1, 1): what passes when scores >= threshold are accepted."""

    thresholds: Float64[np.ndarray, " point"]
    """Descending; the first is +inf (nothing passes), the last -inf where relevant passages were not retrieved."""
    false_positive_rate: Float64[np.ndarray, " point"]
    true_positive_rate: Float64[np.ndarray, " point"]
    num_positives: int
    num_negatives: int
    num_missed: int
    """Positives that were not retrieved."""

    @property
    def area(self) -> float:
        """The chance that a positive scores above a negative, a tie counting half (the Mann-Whitney statistic)."""
        return float(np.trapezoid(self.true_positive_rate, self.false_positive_rate))

    def thinned(self, num_points: int) -> RocCurve:
        """The curve with at most about `num_points` points, ends included, for drawing and for files."""
        last = len(self.thresholds) - 1
        # Half the points evenly along either axis: a curve is often steep where the other axis stands still.
        grid = np.linspace(0, 1, num_points // 2)
        along = [np.searchsorted(rate, grid) for rate in (self.false_positive_rate, self.true_positive_rate)]
        keep = np.unique(np.clip(np.concatenate([[0, last], *along]), 0, last))
        return RocCurve(
            self.thresholds[keep],
            self.false_positive_rate[keep],
            self.true_positive_rate[keep],
            self.num_positives,
            self.num_negatives,
            self.num_missed,
        )


def roc_curve(
    positives: Float64[np.ndarray, " positive"], negatives: Float64[np.ndarray, " negative"]
) -> RocCurve | None:
    """The curve of two sets of scores; None where one of them is empty, since there is nothing to separate."""
    if not len(positives) or not len(negatives):
        return None
    scores = np.concatenate([positives, negatives])
    thresholds = np.unique(scores)[::-1]
    return RocCurve(
        thresholds=np.concatenate([[np.inf], thresholds]),
        false_positive_rate=_share_passing(negatives, thresholds),
        true_positive_rate=_share_passing(positives, thresholds),
        num_positives=len(positives),
        num_negatives=len(negatives),
        num_missed=int(np.isneginf(positives).sum()),
    )


def score_pools(run: Run, qrels: Qrels, *, num_negatives: int = 500, relevance_level: int = 1) -> dict[str, ScorePool]:
    """The scores that each judged query gives to the curves; unjudged hits are negatives."""
    pools = {}
    for query_id, grades in qrels.items():
        relevant = {passage_id for passage_id, grade in grades.items() if grade >= relevance_level}
        hits = run.get(query_id, [])
        found = [hit.score for hit in hits if hit.passage_id in relevant]
        others = [hit.score for hit in hits if hit.passage_id not in relevant]
        missed = [-np.inf] * (len(relevant) - len(found))
        pools[query_id] = ScorePool(np.array(found + missed, float), np.array(others[:num_negatives], float))
    return pools


def pooled_curve(pools: Mapping[str, ScorePool]) -> RocCurve | None:
    """The curve over the scores of all queries together; None without a positive or without a negative."""
    return roc_curve(_joined(p.positives for p in pools.values()), _joined(p.negatives for p in pools.values()))


def area_per_query(pools: Mapping[str, ScorePool]) -> dict[str, float]:
    """The area under each query's own curve; NaN where it has no positive or no negative."""
    curves = {query_id: roc_curve(pool.positives, pool.negatives) for query_id, pool in pools.items()}
    return {query_id: curve.area if curve else float("nan") for query_id, curve in curves.items()}


def _joined(arrays: Iterable[np.ndarray]) -> Float64[np.ndarray, " score"]:
    return np.concatenate([np.empty(0), *arrays])


def _share_passing(
    scores: Float64[np.ndarray, " score"], thresholds: Float64[np.ndarray, " point"]
) -> Float64[np.ndarray, " point_"]:
    below = np.searchsorted(np.sort(scores), thresholds, side="left")
    return np.concatenate([[0.0], 1.0 - below / len(scores)])
