"""Measures of a run against judgements: a thin call into ir_measures.

Notable:
- ir_measures hands nDCG, AP, R and P to trec_eval's own code, which breaks tied scores by descending passage id, and
  RR@k to MS MARCO's script, which breaks them by ascending id. raydr gives both the same tie-free ranking, the order
  of the hits in the run, so all measures judge one ranking. `raydr.evaluation.trec.read_run` ranks files as trec_eval
  does; a run in memory keeps its own order, and `write_run` keeps it in the file.
- Every judged query counts: one the run does not answer scores zero (`trec_eval -c`). Queries without judgements are
  left out. Both are counted.
- nDCG uses the grades as linear gains, as trec_eval does; negative grades are not relevant.
- `Hit@k` is 1 where any relevant passage is among the first k hits, 0 where none is. It is what M-BEIR, DPR and others
  print as "recall@k", and what ir_measures calls Success@k; R@k is the share of the relevant passages that are there.
- A measure with a cut-off is given the run only that deep, which changes nothing but the time it takes.

    per_query = measure_run(run, qrels, EvaluateConfig(measures=["nDCG@10", "RR@10"]))
    per_query.means()    # {"nDCG@10": 0.645, "RR@10": 0.612}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from raydr.errors import DataError
from raydr.evaluation.config import EvaluateConfig
from raydr.types import Qrels, Run

if TYPE_CHECKING:
    from ir_measures.measures import Measure

_CUT_IS_HARMLESS = {"nDCG", "AP", "R", "P", "RR", "Success"}
"""Measures whose value at cut-off k depends on the first k hits alone."""
_HIT = re.compile(r"^Hit(?=[@(]|$)")


@dataclass(frozen=True)
class Counts:
    """What was measured, and what was not."""

    queries: int
    """Judged queries: what every mean is taken over."""
    unanswered: int
    """Judged queries without a single hit in the run; they score zero."""
    without_relevant: int
    """Judged queries with no relevant passage; they score zero whatever the run does."""
    unjudged_queries: int
    """Queries of the run without judgements; they are left out."""
    hits: int
    """Hits of the judged queries."""
    identical_ids: int
    """Hits with the query's own id: dropped where `remove_identical_ids` is set, otherwise kept."""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class PerQuery:
    """The values of one run."""

    query_ids: list[str]
    """All judged queries, in the order of the qrels."""
    measures: list[str]
    values: Float64[np.ndarray, "query measure"]
    counts: Counts

    def means(self) -> dict[str, float]:
        """Measure -> mean over all judged queries."""
        return {name: float(mean) for name, mean in zip(self.measures, self.values.mean(axis=0), strict=True)}


def measure_run(run: Run, qrels: Qrels, config: EvaluateConfig | None = None) -> PerQuery:
    """Each measure of each judged query. Raises `DataError` when run and qrels cannot belong together."""
    import ir_measures

    config = config or EvaluateConfig()
    measures = [parse_measure(name, config.relevance_level) for name in config.measures]
    rankings, counts = _rankings(run, qrels, config)
    # RR@k is computed by a script in plain Python that sorts all it is given, so each such measure goes alone, with
    # little; the measures of trec_eval share one call.
    groups = [[m] for m in measures if m.NAME == "RR"] + [[m for m in measures if m.NAME != "RR"]]
    rows = {query_id: row for row, query_id in enumerate(qrels)}
    columns = {measure: column for column, measure in enumerate(measures)}
    values = np.zeros((len(qrels), len(measures)))
    descending = [float(score) for score in range(max(map(len, rankings.values()), default=0), 0, -1)]
    for group in filter(None, groups):
        depth = _depth(group)
        # Whole numbers, falling with the rank: exact in float32, and free of ties.
        scored = {q: dict(zip(ids[:depth], descending, strict=False)) for q, ids in rankings.items()}
        for value in ir_measures.iter_calc(group, qrels, scored):
            values[rows[value.query_id], columns[value.measure]] = value.value
    names = [measure_name(name, config.relevance_level) for name in config.measures]
    return PerQuery([*qrels], names, values, counts)


def without_excluded(run: Run, excluded: Mapping[str, Collection[str]]) -> Run:
    """A run without the hits that are no answers: `excluded` says of a query which passages (documents, where they were
    split) these are, such as the picture that it asks with.
    """
    return {
        query_id: [hit for hit in hits if hit.passage_id not in ids] if (ids := excluded.get(query_id)) else hits
        for query_id, hits in run.items()
    }


def _depth(measures: list[Measure]) -> int | None:
    """How deep a ranking these measures look; None for all of it."""
    if all(m.NAME in _CUT_IS_HARMLESS and "cutoff" in m.params and not m.params.get("judged_only") for m in measures):
        return max(m.params["cutoff"] for m in measures)
    return None


def measure_name(name: str, relevance_level: int = 1) -> str:
    """A measure as it is named in what is written: as ir_measures does, but for `Hit@k`."""
    measure = str(parse_measure(name, relevance_level))
    return measure.replace("Success", "Hit") if _HIT.match(name) else measure


def parse_measure(name: str, relevance_level: int = 1) -> Measure:
    """The ir_measures object of a name, or of `Hit@k`. Raises `ValueError` saying what is wrong and what would do."""
    import ir_measures

    try:
        measure = ir_measures.parse_measure(_HIT.sub("Success", name))
        measure.validate_params()
    except (NameError, ValueError, AssertionError, SyntaxError) as error:
        reason = re.sub(r"invalid param (\w+)=<object.*", r"it needs a \1", str(error))
        raise ValueError(
            f"{name!r} is not a measure: {reason}; write it as in nDCG@10, RR@10, R@100, Hit@5, AP(rel=2)"
        ) from None
    if "cutoff" in measure.params and measure.params["cutoff"] < 1:
        raise ValueError(f"{name!r}: a cut-off is at least 1")
    rel = measure.SUPPORTED_PARAMS.get("rel")
    if rel is not None and rel.default == 1 and "rel" not in measure.params and relevance_level != 1:
        measure = measure(rel=relevance_level)
    if type(measure.aggregator()) is not ir_measures.measures.MeanAgg:
        raise ValueError(f"{name!r} is a count, not a mean over queries; counts are in summary.json")
    if not ir_measures.DefaultPipeline.supports(measure):
        raise ValueError(f"{name!r}: nothing that is installed here computes it")
    return measure


def _rankings(run: Run, qrels: Qrels, config: EvaluateConfig) -> tuple[dict[str, list[str]], Counts]:
    """The passage ids of each judged query, best first, with the counts of what was left out."""
    if not qrels:
        raise DataError("there are no judgements (empty qrels), so there is nothing to measure against")
    judged = {query_id: [hit.passage_id for hit in run[query_id]] for query_id in qrels if query_id in run}
    if run and not judged:
        raise DataError(
            f"no query of the run is judged: the run has {next(iter(run))!r} ..., the qrels have "
            f"{next(iter(qrels))!r} ...; is it the right split?"
        )
    identical = 0
    for query_id, ids in judged.items():
        if len(set(ids)) != len(ids):
            raise DataError(f"query {query_id!r}: the run lists a passage twice")
        if query_id in ids:
            identical += 1
            if config.remove_identical_ids:
                ids.remove(query_id)
    answered = {query_id: ids for query_id, ids in judged.items() if ids}
    return answered, Counts(
        queries=len(qrels),
        unanswered=len(qrels) - len(answered),
        without_relevant=sum(max(grades.values(), default=0) < config.relevance_level for grades in qrels.values()),
        unjudged_queries=len(run.keys() - qrels.keys()),
        hits=sum(map(len, answered.values())),
        identical_ids=identical,
    )
