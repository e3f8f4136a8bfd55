"""Several runs over the same judgements, side by side: values, intervals, differences to the first run, p-values.

Notable: the first run is the reference. Intervals and differences come from the same resamples of the same queries;
p-values are Holm-corrected over the runs compared with the reference, measure by measure.

    comparison = compare_runs({"BM25": bm25, "dense": dense, "hybrid": hybrid}, qrels, EvaluateConfig())
    print(comparison_table(comparison))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from raydr.errors import DataError
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.metrics import Counts, measure_run
from raydr.evaluation.significance import bootstrap_interval, holm, randomisation_test
from raydr.types import Qrels, Run

SIGNIFICANT = 0.05
"""Corrected p-values below this are marked in tables and reports."""


@dataclass(frozen=True)
class Comparison:
    """Runs by measures; row 0 is the reference, whose differences are zero and whose p-values are 1."""

    names: list[str]
    measures: list[str]
    query_ids: list[str]
    counts: list[Counts]
    """One per run."""
    config: EvaluateConfig
    per_query: Float64[np.ndarray, "run query measure"]
    values: Float64[np.ndarray, "run measure"]
    """Means over all judged queries."""
    low: Float64[np.ndarray, "run measure"]
    high: Float64[np.ndarray, "run measure"]
    differences: Float64[np.ndarray, "run measure"]
    """To the reference."""
    difference_low: Float64[np.ndarray, "run measure"]
    difference_high: Float64[np.ndarray, "run measure"]
    p_values: Float64[np.ndarray, "run measure"]
    """Two-sided paired randomisation test against the reference, uncorrected."""
    p_corrected: Float64[np.ndarray, "run measure"]

    def is_significant(self, run: int, measure: int) -> bool:
        return bool(self.p_corrected[run, measure] < SIGNIFICANT)


def compare_runs(runs: Mapping[str, Run], qrels: Qrels, config: EvaluateConfig | None = None) -> Comparison:
    """Measures every run; the first is the reference. Raises `DataError` where a run does not fit the judgements."""
    if not runs:
        raise DataError("there is no run to compare")
    config = config or EvaluateConfig()
    measured = [measure_run(run, qrels, config) for run in runs.values()]
    per_query = np.stack([one.values for one in measured])
    num_runs, num_queries, num_measures = per_query.shape
    shape = (num_runs, num_measures)

    def interval(values: Float64[np.ndarray, "run query measure"]) -> list[np.ndarray]:
        columns = values.transpose(1, 0, 2).reshape(num_queries, -1)
        bounds = bootstrap_interval(
            columns, confidence=config.confidence, num_resamples=config.num_resamples, seed=config.seed
        )
        return [bound.reshape(shape) for bound in bounds]

    to_reference = per_query - per_query[0]
    p_values = np.ones(shape)
    p_values[1:] = randomisation_test(
        to_reference[1:].transpose(1, 0, 2).reshape(num_queries, -1),
        num_permutations=config.num_permutations,
        seed=config.seed,
    ).reshape(num_runs - 1, num_measures)
    p_corrected = np.ones(shape)
    for measure in range(num_measures):
        p_corrected[1:, measure] = holm(p_values[1:, measure])
    low, high = interval(per_query)
    difference_low, difference_high = interval(to_reference)
    return Comparison(
        names=[*runs],
        measures=measured[0].measures,
        query_ids=measured[0].query_ids,
        counts=[one.counts for one in measured],
        config=config,
        per_query=per_query,
        values=per_query.mean(axis=1),
        low=low,
        high=high,
        differences=to_reference.mean(axis=1),
        difference_low=difference_low,
        difference_high=difference_high,
        p_values=p_values,
        p_corrected=p_corrected,
    )


def comparison_table(comparison: Comparison) -> str:
    """The comparison as text for a terminal: a row per measure and run, then what the numbers rest on."""
    c = comparison
    several = len(c.names) > 1
    header = ["measure", "run", "value", f"{c.config.confidence:.0%} interval"]
    header += [f"vs {c.names[0]}", "p"] if several else []
    rows = []
    for m, measure in enumerate(c.measures):
        for r, name in enumerate(c.names):
            row = [measure if r == 0 else "", name, f"{c.values[r, m]:.4f}", f"{c.low[r, m]:.3f} - {c.high[r, m]:.3f}"]
            if several and r == 0:
                row += ["", ""]
            elif several:
                mark = " *" if c.is_significant(r, m) else ""
                row += [f"{c.differences[r, m]:+.4f}", f"{format_p(c.p_corrected[r, m])}{mark}"]
            rows.append(row)
    table = text_table(header, rows, blank_every=len(c.names) if several else None)
    return "\n".join([table, "", *footnotes(c)]) + "\n"


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 2, blank_every: int | None = None
) -> str:
    """Rows as aligned text, the first `num_names` columns to the left; a blank line after every so many rows."""
    full = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in [head, *full]) for column in range(len(head))]
    lines = [_aligned(head, widths, num_names), _aligned(["-" * width for width in widths], widths, num_names)]
    for index, row in enumerate(full):
        if blank_every and index and index % blank_every == 0:
            lines.append("")
        lines.append(_aligned(row, widths, num_names))
    return "\n".join(lines)


def footnotes(comparison: Comparison) -> list[str]:
    """What the numbers rest on, one sentence per line: queries, what was left out, tests, ties."""
    c, first = comparison, comparison.counts[0]
    notes = [f"{first.queries:,} judged queries; the mean is over all of them, an unanswered query scores zero."]
    if first.without_relevant:
        notes.append(f"{first.without_relevant:,} of them have no relevant passage and score zero.")
    for name, counts in zip(c.names, c.counts, strict=True):
        if counts.unanswered:
            notes.append(f"{name}: {counts.unanswered:,} queries unanswered.")
        if counts.unjudged_queries:
            notes.append(f"{name}: {counts.unjudged_queries:,} queries without judgements left out.")
        if counts.identical_ids:
            fate = "removed" if c.config.remove_identical_ids else "kept (remove_identical_ids is off)"
            notes.append(f"{name}: {counts.identical_ids:,} hits with the query's own id {fate}.")
    notes.append(f"Intervals: paired bootstrap over queries, {c.config.num_resamples:,} resamples.")
    if len(c.names) > 1:
        corrected = ", Holm-corrected over the runs" if len(c.names) > 2 else ""
        notes.append(
            f"p: two-sided paired randomisation test against {c.names[0]}{corrected}; * marks p < {SIGNIFICANT}."
        )
    notes.append("Ties: hits count in the order of the run; a file is sorted by score, then id, both descending.")
    return notes


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _aligned(row: Sequence[str], widths: list[int], num_names: int) -> str:
    # Names to the left, numbers to the right.
    cells = [
        cell.ljust(width) if i < num_names else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
