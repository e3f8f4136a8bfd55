"""Writes a `TrainingExample` as records of each trainer's format, and says what a format could not take.

Notable: every writer returns its records and the names of what it left behind for a reason of its own; what a format
never keeps is known from `training_formats.FORMATS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from raydr.data.records import Record
from raydr.data.training_example import TrainingExample, TrainingPassage

Written: TypeAlias = tuple[list[Record], set[str]]


def write_tevatron(example: TrainingExample) -> Written:
    def passages(them: Sequence[TrainingPassage]) -> list[Record]:
        return [
            {"docid": passage.some_id, "title": passage.title, "text": passage.text}
            | ({} if passage.score is None else {"score": passage.score})
            for passage in them
        ]

    record: Record = {
        "query_id": example.some_query_id,
        "query": example.query,
        "positive_passages": passages(example.positives),
        "negative_passages": passages(example.negatives),
    }
    if example.answers:
        record["answers"] = list(example.answers)
    return [record], set()


def write_tevatron_ids(example: TrainingExample) -> Written:
    """The texts go into the corpus file, see `corpus_record`."""
    record = {
        "query_id": example.some_query_id,
        "query_text": example.query,
        "query_image": None,
        "positive_document_ids": [passage.some_id for passage in example.positives],
        "negative_document_ids": [passage.some_id for passage in example.negatives],
    }
    return [record], set()


def corpus_record(passage: TrainingPassage) -> Record:
    """A line of the corpus file. Tevatron's trainer reads `text` alone there, so the title is joined into it."""
    return {"docid": passage.some_id, "text": passage.full_text}


def write_flagembedding(example: TrainingExample) -> Written:
    record: Record = {"query": example.query}
    lost: set[str] = set()
    for field, passages in (("pos", example.positives), ("neg", example.negatives)):
        record[field] = [passage.full_text for passage in passages]
        scores = _all_scores(passages)
        if scores is not None:
            record[f"{field}_scores"] = scores
        elif any(passage.score is not None for passage in passages):
            lost.add("scores")
    if example.prompt is not None:
        record["prompt"] = example.prompt
    return [record], lost


def write_sentence_transformers(example: TrainingExample) -> Written:
    """One row per positive, each with all negatives; a row per negative, labelled 0, where there is no positive."""
    if not example.positives:
        lost = {"scores"} if any(passage.score is not None for passage in example.negatives) else set()
        rows = [{"anchor": example.query, "positive": passage.full_text, "label": 0} for passage in example.negatives]
        return rows, lost
    lost = set()
    rows = []
    for positive in example.positives:
        passages = (positive, *example.negatives)
        row: Record = {"anchor": example.query, "positive": positive.full_text}
        if len(example.negatives) == 1:
            row["negative"] = example.negatives[0].full_text
        else:
            row |= {f"negative_{n}": passage.full_text for n, passage in enumerate(example.negatives, start=1)}
        scores = _all_scores(passages)
        if scores is not None:
            row |= {"score": scores[0]} if len(scores) == 1 else {"label": scores}
        elif example.label is not None:
            row["label"] = example.label
        elif any(passage.score is not None for passage in passages):
            lost.add("scores")
        rows.append(row)
    return rows, lost


def write_ms_swift(example: TrainingExample) -> Written:
    def conversation(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text}]

    system = [{"role": "system", "content": example.prompt}] if example.prompt is not None else []
    record = {
        "messages": system + conversation(example.query),
        "positive_messages": [conversation(passage.full_text) for passage in example.positives],
        "negative_messages": [conversation(passage.full_text) for passage in example.negatives],
    }
    return [record], set()


def write_rankllm(example: TrainingExample) -> Written:
    """Candidates in their order, positives first where they are known; 1/rank stands in for a missing score."""
    passages = example.candidates or example.labelled
    candidates = [
        {
            "docid": passage.some_id,
            "score": passage.score if passage.score is not None else 1 / rank,
            "doc": {"title": passage.title, "text": passage.text} if passage.title else {"text": passage.text},
        }
        for rank, passage in enumerate(passages, start=1)
    ]
    return [{"query": {"text": example.query, "qid": example.some_query_id}, "candidates": candidates}], set()


def write_orders(example: TrainingExample) -> Written:
    """Ids in their order, positives first where they are known."""
    docs = [passage.some_id for passage in example.candidates or example.labelled]
    return [{"query_id": example.some_query_id, "query": example.query, "docs": docs}], set()


def _all_scores(passages: Sequence[TrainingPassage]) -> list[float] | None:
    """The scores where there are passages and every one has a score."""
    scores = [passage.score for passage in passages if passage.score is not None]
    return scores if scores and len(scores) == len(passages) else None
