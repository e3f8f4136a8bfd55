"""rerank: reorders a run with a reranker, as one batch job; the batch side of what `/v1/search` with `rerank` serves.

Notable: lists go to the reranker by the block, and one that ranks many at a time (FIRST, on vLLM) puts the windows of
all lists of a block into its batches. On Ray every actor has a reranker, so an engine, of its own.

| in the artifact (kind "run") | what |
| --- | --- |
| run.trec | the run, readable by trec_eval |
| hits.parquet | query_id, passage_id, score |

    rerank_run(run, queries, index_path, Component(...), RerankConfig(depth=100), out, use_ray=True)
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydr import series
from raydr.artifacts import Artifact, artifacts_named_in, fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Component
from raydr.data.passages import PICTURES, passage_columns, passages_of
from raydr.encoders.factory import build_reranker
from raydr.errors import ConfigError, DataError
from raydr.index.reader import IndexReader
from raydr.progress import Progress
from raydr.stages.config import RerankConfig
from raydr.stages.feedback import rerank_lists
from raydr.stages.pool import over_pool
from raydr.stages.search import KIND, HitsTable, read_of
from raydr.storage import named
from raydr.types import IMAGE, PASSAGE_ID, QUERY_ID, SCORE, TEXT, Hit, Passage, Query, Run, with_rest

_INSTRUCTION = "instruction"
_LISTS = pa.schema(
    {
        QUERY_ID: pa.string(),
        TEXT: pa.string(),
        IMAGE: PICTURES,
        _INSTRUCTION: pa.string(),
        "passage_ids": pa.list_(pa.string()),
        "scores": pa.list_(pa.float64()),
    }
)


def rerank_run(
    run: Run,
    queries: Sequence[Query],
    index_path: Path,
    reranker: Component,
    config: RerankConfig,
    out: Path,
    *,
    use_ray: bool,
) -> Artifact:
    """The run in `out` with each query's first `depth` hits reordered and the others behind them.

    `index_path` has the passages. A finished artifact of the same run, queries and reranker stays. Raises `DataError`
    for a run that names unknown queries or passages, `ConfigError` where documents were split.
    """
    reader = IndexReader.open(index_path)
    if reader.details.is_split:
        raise ConfigError(
            f"{reader.path}: its documents were split, so a run of it names documents, not the passages to read; "
            "rerank while searching: search.rerank=N"
        )
    asked = {query.query_id: query for query in queries}
    if unknown := [query_id for query_id in run if query_id not in asked]:
        raise DataError(f"the run has hits for query {unknown[0]!r}, which is not among the {len(asked)} queries")
    settings = {
        "reranker": reranker.model_dump(mode="json"),
        "depth": config.depth,
        "run": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest(),
        "queries": hashlib.sha256(json.dumps(sorted(map(read_of, asked.values()))).encode()).hexdigest(),
    }
    inputs = {"index": reader.artifact, **artifacts_named_in({"reranker": settings["reranker"]})}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"rerank: {named(out)} has this run already", file=sys.stderr)
        return open_artifact(out, kind=KIND)
    heads = [_head(asked[query_id], hits[: config.depth]) for query_id, hits in run.items()]
    blocks = [
        pa.Table.from_pylist(heads[start : start + config.queries_per_block], schema=_LISTS)
        for start in range(0, len(heads), config.queries_per_block)
    ]
    build = functools.partial(_Reranker, reranker, reader.path.resolve())
    with (
        write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer,
        Progress("rerank", total=len(heads), unit="query") as progress,
    ):
        tables = over_pool(blocks, build, config, name=f"rerank {out.parent.name}") if use_ray else map(build(), blocks)
        found: dict[str, list[Hit]] = {}
        for table in tables:
            for row in table.to_pylist():
                found[row[QUERY_ID]] = [Hit(*hit) for hit in zip(row["passage_ids"], row["scores"], strict=True)]
            progress.update(table.num_rows)
        rows = [
            (query_id, *hit)
            for query_id, hits in run.items()
            for hit in with_rest(found[query_id], hits[config.depth :])
        ]
        columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
        types = {QUERY_ID: pa.string(), PASSAGE_ID: pa.string(), SCORE: pa.float32()}
        hits = {name: pa.array(own, type) for (name, type), own in zip(types.items(), columns, strict=True)}
        with closing(HitsTable(out, ranks_documents=False, tag="raydr")) as table:
            table.write(pa.table(hits))
        writer.counts.update(queries=len(heads), hits=len(rows))
        writer.details["index_version"] = reader.version
    return open_artifact(out, kind=KIND)


def _head(query: Query, hits: Sequence[Hit]) -> dict[str, Any]:
    ids, scores = [hit.passage_id for hit in hits], [hit.score for hit in hits]
    row = (query.query_id, query.text, query.image, query.instruction, ids, scores)
    return dict(zip(_LISTS.names, row, strict=True))


class _Reranker:
    """Reorders blocks of lists; built where it runs."""

    def __init__(self, component: Component, index_path: Path) -> None:
        self._reranker = build_reranker(component, where="rerank.reranker")
        self._reader = IndexReader.open(index_path)

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = block.to_pylist()
        asked = [Query(row[QUERY_ID], row[TEXT], row[IMAGE], row[_INSTRUCTION]) for row in rows]
        lists = [
            (query, list(map(Hit, row["passage_ids"], row["scores"]))) for query, row in zip(asked, rows, strict=True)
        ]
        passages = self._passages({hit.passage_id for _, hits in lists for hit in hits})
        with series.timed("raydr_rerank_seconds_total"):
            ranked = rerank_lists(self._reranker, lists, passages)
        series.count("raydr_rerank_lists_total", len(lists))
        heads = [_head(query, hits) for query, hits in zip(asked, ranked, strict=True)]
        return pa.Table.from_pylist(heads, schema=_LISTS)

    def _passages(self, ids: set[str]) -> dict[str, Passage]:
        rows = self._reader.passage_ids.where(ids)
        taken = passages_of(self._reader.take(rows, passage_columns(self._reader.schema)))
        found = {passage.passage_id: passage for passage in taken}
        if missing := ids - set(found):
            raise DataError(f"the run names passage {min(missing)!r}, which is not in {self._reader.path}")
        return found
