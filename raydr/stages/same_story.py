"""Pairs of articles that tell the same story, and negatives that look like it: from a column of the corpus.

Notable: a hard negative is near under the untuned encoder, tells another story and shares no topic, so that it is no
unlabelled positive (News Deja Vu; its stories and topics are those of AllSides). Nothing is drawn at random. Articles
without a story train nothing and are no negatives, for nobody knows what they tell.

    examples = same_story_examples(corpus, Path("runs/a/base/embed"), StoryConfig(), Path("runs/a/examples"))
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from raydr.artifacts import fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Config
from raydr.data.corpus import Corpus
from raydr.data.examples import KIND, Example, ExampleSet, write_examples
from raydr.errors import DataError
from raydr.index.embedded import EmbeddedCorpus
from raydr.index.shard import dense
from raydr.storage import named
from raydr.types import PASSAGE_ID, TEXT, TITLE, Passage, Query

_ROWS_AT_ONCE = 512


class StoryConfig(Config):
    """Where a corpus says which articles tell the same story, and which pairs are hard."""

    story: str = "story"
    """Column that names an article's story; articles with the same value tell the same one."""
    topics: str | None = None
    """Column with an article's topics, a text or a list of texts; null: none are known."""
    max_distance: float = Field(default=0.6, gt=0, le=2)
    """A negative is nearer than this cosine distance under the encoder that training starts from."""
    num_negatives: int = Field(default=8, ge=1)
    """Negatives kept for each article, the nearest first."""


def same_story_examples(corpus: Corpus, embeddings: Path, config: StoryConfig, out: Path) -> ExampleSet:
    """An example for each article that shares its story with another: the article is the query, the others of the story
    are its positives, and its negatives are hard.

    `embeddings` is the artifact of the corpus's embeddings. Raises `DataError` where a column is missing or no two
    articles tell the same story.
    """
    embedded = open_artifact(embeddings, kind="embeddings", later=True)
    settings = {"same_story": config.model_dump(mode="json")}
    inputs = {"corpus": corpus.artifact, "embeddings": embedded}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"same-story pairs: {named(out)} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    rows = list(_rows(corpus, config))
    stories = [row[config.story] for row in rows]
    topics = [_topics(row, config) for row in rows]
    tellers: dict[Any, list[int]] = defaultdict(list)
    for row, story in enumerate(stories):
        if story is not None:
            tellers[story].append(row)
    if not any(len(told) > 1 for told in tellers.values()):
        raise DataError(f"{corpus.path}: no two articles have the same {config.story!r}; there is nothing to train on")
    matrix, _ = EmbeddedCorpus.of(corpus.passage_files, corpus.num_passages, embedded).embeddings(0, len(rows))
    negatives = hard_negatives(
        dense(matrix), stories, topics, max_distance=config.max_distance, num_negatives=config.num_negatives
    )
    passages = {row[PASSAGE_ID]: Passage(row[PASSAGE_ID], row[TEXT] or "", row.get(TITLE) or "") for row in rows}
    ids = list(passages)
    examples = []
    for row, passage_id in enumerate(ids):
        others = [other for other in tellers.get(stories[row], ()) if other != row]
        if not others:
            continue
        examples.append(
            Example(
                Query(passage_id, passages[passage_id].joined(" ")),
                positives=[ids[other] for other in others],
                negatives=[ids[other] for other, _ in negatives[row]],
                negative_scores=[1 - distance for _, distance in negatives[row]],
                negative_sources=["topic-aware"] * len(negatives[row]),
            )
        )
    without = sum(not example.negatives for example in examples)
    if without:
        print(f"same-story pairs: {without} of {len(examples)} articles have no hard negative", file=sys.stderr)
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs) as writer:
        writer.counts |= write_examples(out, examples, passages)
    return ExampleSet.open(out)


def hard_negatives(
    embeddings: Float32[np.ndarray, "row dim"],
    stories: Sequence[object],
    topics: Sequence[frozenset[str]],
    *,
    max_distance: float,
    num_negatives: int,
) -> list[list[tuple[int, float]]]:
    """For each article the nearest that tell another story and share no topic, with their cosine distances below
    `max_distance`, the nearest first. None for, and none of, articles without a story.
    """
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    known = np.array([story is not None for story in stories], dtype=bool)
    _, story_of = np.unique([str(story) for story in stories], return_inverse=True)
    having: dict[str, list[int]] = defaultdict(list)
    for row, own in enumerate(topics):
        for topic in own:
            having[topic].append(row)
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        distances = 1 - unit[start : start + _ROWS_AT_ONCE] @ unit.T
        for row, own in enumerate(distances, start=start):
            fits = known & (story_of != story_of[row]) & (own < max_distance)
            fits[list(chain.from_iterable(having[topic] for topic in topics[row]))] = False
            candidates = np.flatnonzero(fits) if known[row] else np.empty(0, np.int64)
            order = candidates[np.argsort(own[candidates], kind="stable")][:num_negatives]
            found.append([(int(other), float(own[other])) for other in order])
    return found


def _rows(corpus: Corpus, config: StoryConfig) -> Iterator[dict[str, Any]]:
    wanted = [name for name in (config.story, config.topics) if name is not None]
    if missing := [name for name in wanted if name not in corpus.metadata_columns]:
        raise DataError(
            f"{corpus.path}: the corpus has no column {missing[0]!r}; it has "
            f"{', '.join(corpus.metadata_columns) or 'none beside its texts'}; name one in method.args.stories"
        )
    for table in corpus.passages([PASSAGE_ID, TITLE, TEXT, *wanted]):
        yield from table.to_pylist()


def _topics(row: dict[str, Any], config: StoryConfig) -> frozenset[str]:
    value = row[config.topics] if config.topics is not None else None
    if value is None or value == "":
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset([str(value)])
