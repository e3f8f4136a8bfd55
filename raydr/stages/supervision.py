"""Tables of supervision that a training reads: scored pairs of passages, and the cluster of each query.

Notable: ids are looked up once and become rows of the example set; a row that cannot be used is named, with its file.
The pairs may also be a ranker's scores of all candidates, as `raydr.stages.score` leaves them.

| table (Parquet) | columns |
| --- | --- |
| pairs | query_id, positive_id, negative_id, positive_score, negative_score |
| clusters | query_id, cluster |

    pairs = read_pairs("pairs.parquet", examples)
    clusters = read_clusters("clusters.parquet", examples)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from raydr.artifacts import is_finished
from raydr.data.examples import ExampleSet
from raydr.errors import DataError
from raydr.stages.score import open_scores
from raydr.types import QUERY_ID

POSITIVE_ID = "positive_id"
NEGATIVE_ID = "negative_id"
POSITIVE_SCORE = "positive_score"
NEGATIVE_SCORE = "negative_score"
CLUSTER = "cluster"


def write_clusters(path: str | Path, query_ids: Sequence[str], clusters: Int64[np.ndarray, " query"]) -> None:
    """Writes the table that `TasBalanced` reads: query_id, cluster."""
    pq.write_table(pa.table({QUERY_ID: pa.array(query_ids, pa.string()), CLUSTER: clusters}), Path(path))


def read_clusters(path: str | Path, examples: ExampleSet) -> Int64[np.ndarray, " query"]:
    """The cluster of each query of the examples; -1 where the table has none."""
    table = _table(path, {QUERY_ID: pa.string(), CLUSTER: pa.int64()})
    rows = pc.index_in(pa.array(examples.query_ids, pa.string()), value_set=table[QUERY_ID])
    return pc.fill_null(table[CLUSTER].take(rows), -1).to_numpy()


class ScoredPairs(NamedTuple):
    """One entry for each scored pair of passages; queries and passages are rows of the example set."""

    queries: Int64[np.ndarray, " pair"]
    positives: Int64[np.ndarray, " pair"]
    negatives: Int64[np.ndarray, " pair"]
    positive_scores: Float64[np.ndarray, " pair"]
    negative_scores: Float64[np.ndarray, " pair"]


def read_pairs(path: str | Path, examples: ExampleSet) -> ScoredPairs:
    """The scored pairs of a Parquet file or folder with the columns query_id, positive_id, negative_id, positive_score,
    negative_score; any order, further columns are ignored.

    Raises `DataError` naming the file and the row for a missing column, an id that the examples do not have, a positive
    that is none of its query's, and a score that is no number.
    """
    if is_finished(path):
        return pairs_of_scores(Path(path), examples)
    ids = {QUERY_ID: examples.query_ids, POSITIVE_ID: examples.passage_ids, NEGATIVE_ID: examples.passage_ids}
    scores = (POSITIVE_SCORE, NEGATIVE_SCORE)
    table = _table(path, {**dict.fromkeys(ids, pa.string()), **dict.fromkeys(scores, pa.float64())})

    def refuse(wrong: np.ndarray, column: str, what: str) -> None:
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{path}: row {row + 1}: {column} {table[column][row].as_py()!r} {what}")

    columns = []
    for column, known in ids.items():
        rows = pc.fill_null(pc.index_in(table[column], value_set=pa.array(known, pa.string())), -1).to_numpy()
        refuse(rows < 0, column, "is not in the examples; score the pairs of the same example set")
        columns.append(rows.astype(np.int64))
    for column in scores:
        columns.append(pc.fill_null(table[column], np.nan).to_numpy())
        refuse(~np.isfinite(columns[-1]), column, "is no finite number")
    pairs = ScoredPairs(*columns)
    known_pairs = [row * examples.num_passages + examples.positives(row) for row in range(len(examples))]
    of_query = np.isin(pairs.queries * examples.num_passages + pairs.positives, np.concatenate(known_pairs))
    refuse(~of_query, POSITIVE_ID, "is not a positive of its query")
    return pairs


def pairs_of_scores(path: Path, examples: ExampleSet) -> ScoredPairs:
    """Every positive of a query with every one of its negatives, by a ranker's scores (`raydr.stages.score`)."""
    columns: list[list[np.ndarray]] = [[] for _ in ScoredPairs._fields]
    for query, scores in enumerate(open_scores(path, examples)):
        positives, negatives = examples.positives(query), examples.negatives(query)
        own = scores[: len(positives)].astype(np.float64), scores[len(positives) :].astype(np.float64)
        times = len(negatives)
        parts = (
            np.full(len(positives) * times, query),
            np.repeat(positives, times),
            np.tile(negatives, len(positives)),
            np.repeat(own[0], times),
            np.tile(own[1], len(positives)),
        )
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    return ScoredPairs(*(np.concatenate(parts) for parts in columns))


def _table(path: str | Path, columns: dict[str, pa.DataType]) -> pa.Table:
    try:
        table = pq.read_table(path)
        if missing := [name for name in columns if name not in table.column_names]:
            raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(table.column_names)}")
        return table.select(list(columns)).cast(pa.schema(columns))
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
