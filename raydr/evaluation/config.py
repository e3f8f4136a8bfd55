"""Settings of the evaluate verb.

Notable: everything that has silently changed somebody's numbers is a field here, and all of it is written to
`summary.json` beside the numbers.

    evaluate: {measures: [nDCG@10, RR@10, R@1000, AP@1000], relevance_level: 2}
"""

from __future__ import annotations

from pydantic import Field, field_validator

from raydr.config import Config


class EvaluateConfig(Config):
    """What is measured, and how certain it is."""

    measures: list[str] = Field(default=["nDCG@10", "RR@10", "R@100"], min_length=1)
    """Names in ir_measures syntax: nDCG@10, RR@10 (or MRR@10), R@1000, AP, AP(rel=2)@1000, P@5, Judged@10, ...; and
    Hit@5, which is what M-BEIR calls recall: whether anything relevant is among the first five."""
    task_measures: dict[str, str] = Field(default_factory=dict)
    """Where queries have tasks: the measure that a task is judged by, such as `{fashioniq: Hit@10}`; the first of
    `measures` where none is named. `TaskMean` is the mean of these over the tasks."""
    relevance_level: int = Field(default=1, ge=1)
    """Grade from which a passage counts as relevant in binary measures (all but nDCG) that name no `rel` themselves;
    TREC Deep Learning passages use 2. It shows in the name of the measure: RR@10 becomes RR(rel=2)@10."""
    remove_identical_ids: bool = False
    """Drop hits whose passage id equals the query id before measuring. BEIR's own scorer always does this; it matters
    where queries are passages themselves (ArguAna, Quora). How many were dropped is reported."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Level of the bootstrap confidence intervals."""
    num_resamples: int = Field(default=10_000, ge=100)
    """Bootstrap resamples of the queries behind each interval."""
    num_permutations: int = Field(default=100_000, ge=100)
    """Random sign flips of the paired randomisation test; few enough queries are enumerated exactly instead."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples and the sign flips: the same seed gives the same intervals and p-values."""
    roc_num_negatives: int = Field(default=500, ge=1)
    """Best-scoring non-relevant hits that each query gives to the ROC curve."""

    @field_validator("measures")
    @classmethod
    def _can_be_computed(cls, names: list[str]) -> list[str]:
        from raydr.evaluation.metrics import parse_measure

        parsed = [str(parse_measure(name)) for name in names]
        if duplicates := {name for name in parsed if parsed.count(name) > 1}:
            raise ValueError(f"the same measure is named twice: {', '.join(sorted(duplicates))}")
        return names

    @field_validator("task_measures")
    @classmethod
    def _can_be_computed_too(cls, measures: dict[str, str]) -> dict[str, str]:
        from raydr.evaluation.metrics import parse_measure

        for name in measures.values():
            parse_measure(name)
        return measures
