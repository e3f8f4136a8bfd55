"""Training examples out of a corpus alone: a span of words looks for the chunk of text it was taken from.

This is the inverse cloze task (Lee et al. 2019, arXiv 1906.00300), here with the span left in its chunk: what a network
learns from it is to compare texts at all, before it learns from questions. Notable: chunks are drawn from passages with
at least `chunk_words` words, each by the seed and its number alone; every chunk is the positive of one example and a
negative of others, which were cut from other passages.

    examples = span_examples(corpus, Path("runs/a/spans"), num_examples=6400)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from raydr.artifacts import fingerprint, is_finished, write_artifact
from raydr.data.corpus import Corpus
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter, passage_table
from raydr.errors import DataError
from raydr.types import PASSAGE_ID, TEXT, Passage, Query


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
        print(f"spans: {out} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    long_enough = [
        (id_, words)
        for table in corpus.passages([PASSAGE_ID, TEXT])
        for id_, text in zip(table[PASSAGE_ID].to_pylist(), table[TEXT].to_pylist(), strict=True)
        if len(words := text.split()) >= chunk_words
    ]
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


def _piece(words: list[str], length: int, rng: np.random.Generator) -> list[str]:
    """`length` words in a row, from anywhere."""
    start = int(rng.integers(max(1, len(words) - length + 1)))
    return words[start : start + length]
