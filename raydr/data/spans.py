"""What can be learned from a corpus alone: a span of words looks for the text that it was taken from.

This is the inverse cloze task (Lee et al. 2019, arXiv 1906.00300), here with the span left in its text. `span_examples`
are short and easy: what a network learns from them is to compare texts at all. Notable: chunks are drawn from passages
with at least `chunk_words` words, each by the seed and its number alone; every chunk is the positive of one example and
a negative of others, which were cut from other passages. `span_queries` are queries like any others, each with the
passage it came from as what is relevant, for hits to be mined and a teacher to order them.

    examples = span_examples(corpus, Path("runs/a/spans"), num_examples=6400)
    queries = span_queries(corpus, Path("runs/a/span-queries"), num_queries=2000)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import fingerprint, is_finished, write_artifact
from raydr.data.corpus import QRELS, QUERIES, QUERIES_KIND, Corpus, QuerySet
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter
from raydr.data.passages import passage_table
from raydr.errors import DataError
from raydr.storage import named
from raydr.types import DOCUMENT_ID, PASSAGE_ID, QUERY_ID, RELEVANCE, TEXT, Passage, Query


def span_examples(
    corpus: Corpus,
    out: Path,
    *,
    num_examples: int,
    chunk_words: int = 14,
    span_words: int = 6,
    num_negatives: int = 7,
    seed: int = 0,
) -> ExampleSet:
    """So many examples in the artifact `out` (kind "examples"); a finished one of the same corpus and settings stays.

    Raises `DataError` where too few passages are long enough.
    """
    settings = {
        "num_examples": num_examples,
        "chunk_words": chunk_words,
        "span_words": span_words,
        "num_negatives": num_negatives,
        "seed": seed,
    }
    if is_finished(out, fingerprint(KIND, settings, {"corpus": corpus.artifact.fingerprint})):
        print(f"spans: {named(out)} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    long_enough = _long_enough(corpus, PASSAGE_ID, chunk_words)
    if len(long_enough) <= num_negatives:
        raise DataError(
            f"{corpus.path}: {len(long_enough)} passages have {chunk_words} words or more, and an example needs chunks "
            f"of {num_negatives + 1}"
        )
    rng = np.random.default_rng(seed)
    sources = rng.integers(len(long_enough), size=num_examples)
    chunks, spans = [], []
    for number, source in enumerate(sources.tolist()):
        id_, words = long_enough[source]
        chunk = _piece(words, chunk_words, rng)
        chunks.append(Passage(f"{id_}/{number}", " ".join(chunk)))
        spans.append(" ".join(_piece(chunk, span_words, rng)))
    examples = []
    num_drawn = min(num_examples, 4 * num_negatives)
    for number, span in enumerate(spans):
        others = rng.choice(num_examples, num_drawn, replace=False)
        negatives = [chunks[other].passage_id for other in others if sources[other] != sources[number]][:num_negatives]
        examples.append(
            Example(
                Query(f"span/{number}", span),
                positives=[chunks[number].passage_id],
                negatives=negatives,
                negative_sources=["random"] * len(negatives),
            )
        )
    with (
        write_artifact(out, kind=KIND, config=settings, inputs={"corpus": corpus.artifact}) as artifact,
        ExampleWriter(out) as writer,
    ):
        writer.add(examples, passage_table(chunks))
        artifact.counts |= writer.counts
    return ExampleSet.open(out)


def span_queries(
    corpus: Corpus, out: Path, *, num_queries: int, span_words: tuple[int, int] = (6, 16), seed: int = 0
) -> QuerySet:
    """So many spans, of a length between those of `span_words`, as queries in the artifact `out` (kind "queries"); a
    finished one of the same corpus and settings stays.

    Raises `DataError` where no passage is long enough.
    """
    settings = {"num_queries": num_queries, "span_words": list(span_words), "seed": seed}
    if is_finished(out, fingerprint(QUERIES_KIND, settings, {"corpus": corpus.artifact.fingerprint})):
        print(f"spans: {named(out)} has these queries already", file=sys.stderr)
        return QuerySet.open(out)
    judged = DOCUMENT_ID if corpus.is_split else PASSAGE_ID
    passages = _long_enough(corpus, judged, span_words[1])
    if not passages:
        raise DataError(f"{corpus.path}: no passage has {span_words[1]} words, the length of a span")
    rng = np.random.default_rng(seed)
    rows = {QUERY_ID: [], TEXT: [], PASSAGE_ID: []}
    for number, source in enumerate(rng.integers(len(passages), size=num_queries).tolist()):
        id_, words = passages[source]
        rows[QUERY_ID].append(f"span/{number}")
        rows[TEXT].append(" ".join(_piece(words, int(rng.integers(span_words[0], span_words[1] + 1)), rng)))
        rows[PASSAGE_ID].append(id_)
    with write_artifact(out, kind=QUERIES_KIND, config=settings, inputs={"corpus": corpus.artifact}) as artifact:
        pq.write_table(pa.table({name: rows[name] for name in (QUERY_ID, TEXT)}), out / QUERIES)
        relevance = pa.array([1] * num_queries, pa.int64())
        qrels = {QUERY_ID: rows[QUERY_ID], PASSAGE_ID: rows[PASSAGE_ID], RELEVANCE: relevance}
        pq.write_table(pa.table(qrels), out / QRELS)
        artifact.counts["queries"] = num_queries
    return QuerySet.open(out)


def _long_enough(corpus: Corpus, id_column: str, num_words: int) -> list[tuple[str, list[str]]]:
    """Id and words of the passages with at least `num_words`."""
    return [
        (id_, words)
        for table in corpus.passages([id_column, TEXT])
        for id_, text in zip(table[id_column].to_pylist(), table[TEXT].to_pylist(), strict=True)
        if len(words := text.split()) >= num_words
    ]


def _piece(words: list[str], length: int, rng: np.random.Generator) -> list[str]:
    """`length` words in a row, from anywhere."""
    start = int(rng.integers(max(1, len(words) - length + 1)))
    return words[start : start + length]
