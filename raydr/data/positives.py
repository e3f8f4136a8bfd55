"""Training examples without negatives, straight from a corpus and its judged queries: no index, no encoder.

Notable: the corpus is read part by part, and of each part only what is judged relevant is kept; queries are read a few
at a time. For methods whose negatives are the other queries' passages of the batch.

    positive_examples(corpus, queries, Path("runs/a/examples_positive"))
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydr.artifacts import fingerprint, is_finished, write_artifact
from raydr.data.corpus import Corpus, QuerySet
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter, QueryLabels
from raydr.errors import ArtifactError, DataError
from raydr.storage import named
from raydr.types import DOCUMENT_ID, IMAGE, PASSAGE_ID, TEXT, TITLE

_QUERIES_AT_ONCE = 1024


def positive_examples(
    corpus: Corpus, queries: QuerySet, out: Path, *, max_queries: int | None = None, seed: int = 0
) -> ExampleSet:
    """The examples in `out` (kind "examples"): every query that has something of relevance 1 or more, with all of it;
    a random sample of `max_queries`, where there are more.

    Where documents were split, the first passage of each relevant one is its positive. Finished ones of the same stay.
    Raises `DataError` when no query has a positive, `ArtifactError` for queries over another corpus.
    """
    if queries.artifact.manifest.inputs.get("corpus", corpus.artifact.fingerprint) != corpus.artifact.fingerprint:
        raise ArtifactError(f"{queries.path}: judges another corpus than {corpus.path}; ingest its queries again")
    settings = {"negatives": "none", **({} if max_queries is None else {"max_queries": max_queries, "seed": seed})}
    inputs = {"corpus": corpus.artifact, "queries": queries.artifact}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"train: {named(out)} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    relevant, num_without = relevant_ids(queries, max_queries=max_queries, seed=seed)
    wanted = {id_ for ids in relevant.values() for id_ in ids}
    labels = QueryLabels.of(queries)
    with (
        write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer,
        ExampleWriter(out, is_split=corpus.is_split, has_pictures=corpus.has_pictures, labels=labels) as examples,
    ):
        passage_of = _add_passages(corpus, wanted, examples)
        asked = (query for query in queries.stream() if query.query_id in relevant)
        while block := list(islice(asked, _QUERIES_AT_ONCE)):
            examples.add([Example(query, [passage_of[id_] for id_ in relevant[query.query_id]]) for query in block])
        writer.counts.update(examples.counts, without_positives=num_without)
    print(f"train: {named(out)}: {writer.counts['examples']:,} queries with their positives", file=sys.stderr)
    return ExampleSet.open(out)


def relevant_ids(
    queries: QuerySet, *, max_queries: int | None = None, seed: int = 0
) -> tuple[dict[str, list[str]], int]:
    """What is of relevance 1 or more to each query, in the order of the queries; and how many queries have nothing.

    Of more than `max_queries`, so many drawn by `seed`. Raises `DataError` when no query has anything.
    """
    relevant = {
        query_id: [id_ for id_, relevance in grades.items() if relevance >= 1]
        for query_id, grades in queries.qrels().items()
    }
    ids = [query_id for query_id in queries.query_ids() if relevant.get(query_id)]
    if not ids:
        raise DataError(
            f"{queries.path}: no query has a passage of relevance 1 or more, so there is nothing to train on"
        )
    num_without = len(relevant) - len(ids)
    if max_queries is not None and max_queries < len(ids):
        drawn = np.random.default_rng(seed).choice(len(ids), max_queries, replace=False)
        ids = [ids[place] for place in np.sort(drawn)]
    return {query_id: relevant[query_id] for query_id in ids}, num_without


def _add_passages(corpus: Corpus, wanted: set[str], examples: ExampleWriter) -> dict[str, str]:
    """Writes the passages that are wanted; gives the passage of each id, a document's where they were split."""
    key = DOCUMENT_ID if corpus.is_split else PASSAGE_ID
    columns = [PASSAGE_ID, TITLE, TEXT, *([DOCUMENT_ID] if corpus.is_split else [])]
    columns += [IMAGE] if corpus.has_pictures else []
    ids = pa.array(sorted(wanted), pa.string())
    found: dict[str, str] = {}
    for table in corpus.passages(columns):
        own = table.filter(pc.is_in(table[key], value_set=ids))
        is_new = []
        for id_, passage_id in zip(own[key].to_pylist(), own[PASSAGE_ID].to_pylist(), strict=True):
            is_new.append(id_ not in found)
            found.setdefault(id_, passage_id)
        examples.add_passages(own.filter(pa.array(is_new, pa.bool_())))
    return found
