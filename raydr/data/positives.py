"""Training examples without negatives, straight from a corpus and its judged queries: no index, no encoder.

Notable: the corpus is read part by part, and of each part only what is judged relevant is kept. For methods whose
negatives are the other queries' passages of the batch.

    positive_examples(corpus, queries, Path("runs/a/examples_positive"))
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from raydr.artifacts import fingerprint, is_finished, write_artifact
from raydr.data.corpus import Corpus, QuerySet
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter, QueryLabels
from raydr.errors import DataError
from raydr.storage import named
from raydr.types import DOCUMENT_ID, PASSAGE_ID, TEXT, TITLE


def positive_examples(corpus: Corpus, queries: QuerySet, out: Path) -> ExampleSet:
    """The examples in `out` (kind "examples"): every query that has something of relevance 1 or more, with all of it.

    Where documents were split, the first passage of each relevant one is its positive. Finished ones of the same stay.
    Raises `DataError` when no query has a positive.
    """
    inputs = {"corpus": corpus.artifact, "queries": queries.artifact}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, {"negatives": "none"}, prints)):
        print(f"train: {named(out)} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    relevant = {
        query_id: [id_ for id_, relevance in grades.items() if relevance >= 1]
        for query_id, grades in queries.qrels().items()
    }
    wanted = {id_ for ids in relevant.values() for id_ in ids}
    if not wanted:
        raise DataError(
            f"{queries.path}: no query has a passage of relevance 1 or more, so there is nothing to train on"
        )
    settings = {"is_split": corpus.is_split, "has_pictures": corpus.has_pictures}
    with (
        write_artifact(out, kind=KIND, config={"negatives": "none"}, inputs=inputs) as writer,
        ExampleWriter(out, labels=QueryLabels.of(queries), **settings) as examples,
    ):
        passage_of = _add_passages(corpus, wanted, examples)
        given = [
            Example(query, [passage_of[id_] for id_ in relevant[query.query_id]])
            for query in queries.queries()
            if relevant[query.query_id]
        ]
        examples.add(given, corpus_schema(corpus).empty_table())
        writer.counts.update(examples.counts, without_positives=len(relevant) - len(given))
    return ExampleSet.open(out)


def _add_passages(corpus: Corpus, wanted: set[str], examples: ExampleWriter) -> dict[str, str]:
    """Writes the passages that are wanted; gives the passage of each id, a document's where they were split."""
    names = corpus_schema(corpus).names
    key = DOCUMENT_ID if corpus.is_split else PASSAGE_ID
    ids = pa.array(sorted(wanted), pa.string())
    found: dict[str, str] = {}
    for table in corpus.passages(names):
        own = table.filter(pc.is_in(table[key], value_set=ids))
        is_new = []
        for id_, passage_id in zip(own[key].to_pylist(), own[PASSAGE_ID].to_pylist(), strict=True):
            is_new.append(id_ not in found)
            found.setdefault(id_, passage_id)
        examples.add_passages(own.filter(pa.array(is_new, pa.bool_())))
    return found


def corpus_schema(corpus: Corpus) -> pa.Schema:
    """The columns of a corpus that examples keep."""
    names = [PASSAGE_ID, TITLE, TEXT, *([DOCUMENT_ID] if corpus.is_split else [])]
    fields: dict[str, pa.DataType] = {name: pa.string() for name in names}
    return pa.schema({**fields, **({"image": pa.binary()} if corpus.has_pictures else {})})
