"""Reads one record of each trainer's format as a `TrainingExample`; raises `BadFieldError` naming the field.

Notable: fields are named with their path (`positive_passages[1].text`), unknown fields that hold something are noted
in the example as unread, so that a conversion can say what it leaves behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from raydr.data.problems import BadFieldError
from raydr.data.records import Record
from raydr.data.training_example import TrainingExample, TrainingPassage


class Lookup(NamedTuple):
    """What stands behind ids, for formats that name passages or queries by id."""

    passage: Callable[[str], TrainingPassage | None]
    """The passage of an id; None where the corpus does not have it."""
    query: Callable[[str], str | None]
    """The text of a query's id; None where the file of queries does not have it."""


_ROW_LABELS = ("label", "score", "labels", "scores")
_DOC_TEXTS = ("text", "contents", "content", "segment", "passage", "body")


def read_tevatron(record: Record, lookup: Lookup) -> TrainingExample:
    """Tevatron's older form: passages in full under positive_passages and negative_passages."""
    del lookup
    answers = record.get("answers") or []
    return TrainingExample(
        query=_text(record, "query"),
        query_id=identifier(record, "query_id"),
        positives=_nonempty(_tevatron_passages(record, "positive_passages"), "positive_passages"),
        negatives=_tevatron_passages(record, "negative_passages"),
        answers=tuple(_strings({"answers": [answers] if isinstance(answers, str) else answers}, "answers")),
        unread=unread(record, {"query_id", "query", "positive_passages", "negative_passages", "answers"}),
    )


def read_tevatron_ids(record: Record, lookup: Lookup) -> TrainingExample:
    """Tevatron's newer form: ids that point into a corpus file."""
    return TrainingExample(
        query=_text(record, "query_text"),
        query_id=identifier(record, "query_id"),
        positives=_nonempty(_looked_up(record, "positive_document_ids", lookup), "positive_document_ids"),
        negatives=_looked_up(record, "negative_document_ids", lookup),
        unread=unread(record, {"query_id", "query_text", "positive_document_ids", "negative_document_ids"}),
    )


def read_flagembedding(record: Record, lookup: Lookup) -> TrainingExample:
    """FlagEmbedding: query, pos, neg as texts, with scores of equal length where a teacher gave some."""
    del lookup

    def passages(field: str) -> tuple[TrainingPassage, ...]:
        texts = _strings(record, field)
        scores = _scores(record, f"{field}_scores", len(texts))
        return tuple(TrainingPassage(text, score=score) for text, score in zip(texts, scores, strict=True))

    return TrainingExample(
        query=_text(record, "query"),
        positives=_nonempty(passages("pos"), "pos"),
        negatives=passages("neg"),
        prompt=_text(record, "prompt") if record.get("prompt") else None,
        unread=unread(record, {"query", "pos", "neg", "pos_scores", "neg_scores", "prompt"}),
    )


def read_sentence_transformers(record: Record, lookup: Lookup) -> TrainingExample:
    """Columns by position: anchor, positive, negatives; a label, score or list of scores for the row.

    A pair with the whole number 0 as its label is a query with a negative, any other number of a pair is the
    positive's score; one number for a row with negatives (a margin) is the row's label.
    """
    del lookup
    columns = [name for name in record if name not in _ROW_LABELS]
    labels = [name for name in record if name in _ROW_LABELS]
    if len(columns) < 2:
        raise BadFieldError(columns[0] if columns else "anchor", "needs a second column", "anchor, positive, ...")
    if len(labels) > 1:
        raise BadFieldError(labels[1], "is a second label column", f"there is {labels[0]!r} already")
    query, *texts = [_text(record, name) for name in columns]
    label = record[labels[0]] if labels else None
    if isinstance(label, list):
        scores = _scores(record, labels[0], len(texts))
        passages = tuple(TrainingPassage(text, score=score) for text, score in zip(texts, scores, strict=True))
        return TrainingExample(query, positives=passages[:1], negatives=passages[1:])
    number = _number(label, labels[0]) if label is not None else None
    if len(texts) > 1 or number is None:
        positive, *negatives = [TrainingPassage(text) for text in texts]
        return TrainingExample(query, positives=(positive,), negatives=tuple(negatives), label=number)
    if isinstance(label, int) and label in (0, 1):
        pair = (TrainingPassage(texts[0]),)
        return TrainingExample(query, positives=pair if label else (), negatives=() if label else pair)
    return TrainingExample(query, positives=(TrainingPassage(texts[0], score=number),))


def read_ms_swift(record: Record, lookup: Lookup) -> TrainingExample:
    """ms-swift: conversations; the query is the user's last message, a system message is the prompt."""
    del lookup
    messages = _messages(record.get("messages"), "messages")
    users = [content for role, content in messages if role == "user"]
    systems = [content for role, content in messages if role == "system"]
    if not users:
        raise BadFieldError("messages", "has no user message")

    def passages(field: str) -> tuple[TrainingPassage, ...]:
        found = []
        for place, conversation in enumerate(_list(record, field)):
            name = f"{field}[{place}]"
            turns = _messages(conversation, name)
            if len(turns) != 1:
                raise BadFieldError(name, "must be one message", f"got {len(turns)}")
            found.append(TrainingPassage(turns[0][1]))
        return tuple(found)

    further = ("messages",) if len(users) + len(systems) < len(messages) or len(users) > 1 or len(systems) > 1 else ()
    return TrainingExample(
        query=users[-1],
        positives=_nonempty(passages("positive_messages"), "positive_messages"),
        negatives=passages("negative_messages"),
        prompt=systems[0] if systems else None,
        unread=further + unread(record, {"messages", "positive_messages", "negative_messages"}),
    )


def read_rankllm(record: Record, lookup: Lookup) -> TrainingExample:
    """RankLLM's requests: a query and its candidates, best first, not judged."""
    del lookup
    query = record.get("query")
    if not isinstance(query, dict):
        raise BadFieldError("query", "must be an object with text and qid", f"got {query!r}")
    candidates = []
    for place, candidate in enumerate(_list(record, "candidates", required=True)):
        name = f"candidates[{place}]"
        doc = candidate.get("doc") if isinstance(candidate, dict) else None
        if not isinstance(doc, dict):
            raise BadFieldError(f"{name}.doc", "must be an object", f"got {doc!r}")
        field = next((field for field in _DOC_TEXTS if field in doc), "text")
        score = candidate.get("score")
        candidates.append(
            TrainingPassage(
                _text(doc, field, f"{name}.doc."),
                doc.get("title") or "",
                identifier(candidate, "docid", f"{name}."),
                _number(score, f"{name}.score") if score is not None else None,
            )
        )
    return TrainingExample(
        query=_text(query, "text", "query."),
        query_id=identifier(query, "qid", "query."),
        candidates=_nonempty(tuple(candidates), "candidates"),
        unread=unread(record, {"query", "candidates"}),
    )


def read_orders(record: Record, lookup: Lookup) -> TrainingExample:
    """A teacher's order of passages, best first, by id; the query in full or by id."""
    query_id = identifier(record, "query_id")
    query = _text(record, "query") if record.get("query") is not None else lookup.query(query_id)
    if query is None:
        raise BadFieldError("query_id", "names an unknown query", repr(query_id))
    docs = _nonempty(_looked_up(record, "docs", lookup), "docs")
    ids = [passage.passage_id for passage in docs]
    if len(set(ids)) < len(ids):
        place = next(place for place, id_ in enumerate(ids) if id_ in ids[:place])
        raise BadFieldError(f"docs[{place}]", "stands in the order already", repr(ids[place]))
    return TrainingExample(
        query=query, query_id=query_id, candidates=docs, unread=unread(record, {"query_id", "query", "docs"})
    )


def _looked_up(record: Record, field: str, lookup: Lookup) -> tuple[TrainingPassage, ...]:
    """The passages whose ids are listed in a field."""
    found = []
    for place, passage_id in enumerate(_list(record, field)):
        name = f"{field}[{place}]"
        if isinstance(passage_id, int) and not isinstance(passage_id, bool):
            passage_id = str(passage_id)
        if not isinstance(passage_id, str):
            raise BadFieldError(name, "must be a string", f"got {passage_id!r}")
        passage = lookup.passage(passage_id)
        if passage is None:
            raise BadFieldError(name, "names an unknown passage", repr(passage_id))
        found.append(passage)
    return tuple(found)


def _tevatron_passages(record: Record, field: str) -> tuple[TrainingPassage, ...]:
    found = []
    for place, passage in enumerate(_list(record, field)):
        name = f"{field}[{place}]"
        if not isinstance(passage, dict):
            raise BadFieldError(name, "must be an object with docid, title and text", f"got {passage!r}")
        score = passage.get("score")
        found.append(
            TrainingPassage(
                _text(passage, "text", f"{name}."),
                passage.get("title") or "",
                identifier(passage, "docid", f"{name}."),
                _number(score, f"{name}.score") if score is not None else None,
            )
        )
    return tuple(found)


def _text(record: Mapping[str, Any], field: str, path: str = "") -> str:
    value = record.get(field)
    if value is None:
        raise BadFieldError(path + field, "is missing")
    if not isinstance(value, str):
        raise BadFieldError(path + field, "must be a string", f"got {value!r}")
    if not value.strip():
        raise BadFieldError(path + field, "is empty")
    return value


def identifier(record: Mapping[str, Any], field: str, path: str = "") -> str:
    """A string, or a whole number as one."""
    value = record.get(field)
    return str(value) if type(value) is int else _text(record, field, path)


def _list(record: Record, field: str, *, required: bool = False) -> list[Any]:
    value = record.get(field)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        raise BadFieldError(field, "must be a list" if field in record else "is missing", f"got {value!r}")
    return value


def _strings(record: Record, field: str) -> list[str]:
    values = _list(record, field)
    return [_text({str(place): value}, str(place), f"{field}.") for place, value in enumerate(values)]


def _scores(record: Record, field: str, num: int) -> Sequence[float | None]:
    values = _list(record, field)
    if not values:
        return [None] * num
    if len(values) != num:
        raise BadFieldError(field, "has another length than the passages", f"{len(values)} instead of {num}")
    return [_number(value, f"{field}[{place}]") for place, value in enumerate(values)]


def _number(value: object, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise BadFieldError(field, "must be a number", f"got {str(value)[:80]}")
    return number


def _messages(value: object, field: str) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadFieldError(field, "must be a list of messages", f"got {value!r}")
    found = []
    for place, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadFieldError(f"{field}[{place}]", "must be an object with role and content", f"got {message!r}")
        path = f"{field}[{place}]."
        found.append((_text(message, "role", path), _text(message, "content", path)))
    return found


def _nonempty(passages: tuple[TrainingPassage, ...], field: str) -> tuple[TrainingPassage, ...]:
    if not passages:
        raise BadFieldError(field, "is empty", "an example needs at least one")
    return passages


def unread(record: Record, known: Collection[str]) -> tuple[str, ...]:
    """Fields beside `known` that hold something."""
    return tuple(name for name, value in record.items() if name not in known and value not in (None, "", [], {}))
