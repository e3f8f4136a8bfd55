"""The JSONL shapes trainers use: which there are, how to tell them apart, and how to read one line by line.

Notable: every shape is read into `TrainingExample` and written from it, so a new one costs a reader, a writer and a
line in `FORMATS`.

    with Problems("train.jsonl") as problems:
        for line, example in read_examples("train.jsonl", problems): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from raydr.data import training_readers as readers
from raydr.data import training_writers as writers
from raydr.data.config import Columns
from raydr.data.fields import Fields, Names, passage_names, query_names
from raydr.data.files import Folder
from raydr.data.order_conversations import read_rank_zephyr, write_rank_zephyr
from raydr.data.problems import BadFieldError, Problems
from raydr.data.records import JsonLines, Record
from raydr.data.training_example import TrainingExample, TrainingPassage
from raydr.errors import DataError

T = TypeVar("T")

_ANCHORS = {"anchor", "query", "question", "sentence", "sentence1", "premise", "text1"}


@dataclass(frozen=True)
class Format:
    """One trainer's shape."""

    read: Callable[[Record, readers.Lookup], TrainingExample]
    write: Callable[[TrainingExample], writers.Written]
    keeps: frozenset[str]
    """The features of an example (see `TrainingExample.features`) that survive in this format."""
    is_judged: bool = True
    """Whether passages are positives and negatives; RankLLM's candidates, and a teacher's order, are neither."""
    needs_positive: bool = True
    """Whether an example without a positive cannot be written."""
    names_passages: bool = False
    """Whether passages are ids, and their texts in a corpus file."""


_POSITIVES = frozenset({"several positives in one record", "which passages are positive"})
_TITLES = "titles (joined into the text)"
FORMATS: Mapping[str, Format] = {
    "tevatron": Format(
        readers.read_tevatron,
        writers.write_tevatron,
        _POSITIVES | {"query ids", "passage ids", _TITLES, "scores", "answers"},
    ),
    "tevatron_ids": Format(
        readers.read_tevatron_ids,
        writers.write_tevatron_ids,
        _POSITIVES | {"query ids", "passage ids"},
        names_passages=True,
    ),
    "flagembedding": Format(
        readers.read_flagembedding, writers.write_flagembedding, _POSITIVES | {"scores", "prompts"}
    ),
    "sentence_transformers": Format(
        readers.read_sentence_transformers,
        writers.write_sentence_transformers,
        frozenset({"which passages are positive", "scores", "labels"}),
        needs_positive=False,
    ),
    "ms_swift": Format(readers.read_ms_swift, writers.write_ms_swift, _POSITIVES | {"prompts"}),
    "rankllm": Format(
        readers.read_rankllm,
        writers.write_rankllm,
        frozenset({"query ids", "passage ids", _TITLES, "scores"}),
        is_judged=False,
        needs_positive=False,
    ),
    "orders": Format(
        readers.read_orders,
        writers.write_orders,
        frozenset({"query ids", "passage ids"}),
        is_judged=False,
        needs_positive=False,
        names_passages=True,
    ),
    "rank_zephyr": Format(
        read_rank_zephyr,
        write_rank_zephyr,
        frozenset({"query ids"}),
        is_judged=False,
        needs_positive=False,
    ),
}


def detect_format(path: str) -> str:
    """The format of a JSONL file, by the fields of its first record. Raises `DataError` when none fits."""
    table = _json_lines(path)
    with Problems(path, limit=None) as ignored:  # bad lines are for the reader to report
        _, record = next(table.read(ignored, lambda _: None), (0, {}))
    if "positive_passages" in record:
        return "tevatron"
    if "positive_document_ids" in record:
        return "tevatron_ids"
    if "candidates" in record:
        return "rankllm"
    if "docs" in record:
        return "orders"
    if "conversations" in record:
        return "rank_zephyr"
    if "messages" in record:
        return "ms_swift"
    if "pos" in record:
        return "flagembedding"
    if next(iter(record), None) in _ANCHORS:
        return "sentence_transformers"
    raise DataError(
        f"{path}: cannot tell the training format from the fields {list(record)}; name one of {', '.join(FORMATS)}"
    )


def read_examples(
    path: str, problems: Problems, format_: str = "auto", *, corpus: str | None = None, queries: str | None = None
) -> Iterator[tuple[int, TrainingExample]]:
    """Every example of a file with its line number; what cannot be read goes to `problems`.

    `corpus` is the JSONL file that passages named by id are in, `queries` that of queries named by id; both are held in
    memory. Without them, such passages have an id and no text, and such queries are problems.
    """
    format_ = detect_format(path) if format_ == "auto" else format_
    kind = format_named(format_)
    lookup = readers.Lookup(
        _corpus_lookup(corpus, problems) if corpus and kind.names_passages else _ids_alone,
        _query_lookup(queries, problems) if queries else _no_queries,
    )
    table = _json_lines(path)
    for line, record in table.read(problems, lambda _: None):
        try:
            example = kind.read(record, lookup)
        except BadFieldError as error:
            problems.add(table.name, line, error.field, error.reason, record, error.detail)
        else:
            yield line, example


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise DataError(f"unknown training format {name!r}; known are: {', '.join(FORMATS)}")
    return FORMATS[name]


def _json_lines(path: str) -> JsonLines:
    folder = Folder.open(path)
    if not folder.is_file:
        raise DataError(f"{path}: is a folder; training formats are JSONL files")
    return JsonLines(folder.files()[0])


def _ids_alone(passage_id: str) -> TrainingPassage:
    return TrainingPassage("", passage_id=passage_id)


def _no_queries(query_id: str) -> str | None:
    raise BadFieldError("query", "is missing", f"or give the file with the text of query {query_id!r}")


def _corpus_lookup(corpus: str, problems: Problems) -> Callable[[str], TrainingPassage | None]:
    """Passages by id from a JSONL corpus: docid (or _id), title, text (or document_text)."""

    def read(fields: Fields, record: Record) -> tuple[str, TrainingPassage]:
        id_ = fields.identifier(record, "passage_id")
        return id_, TrainingPassage(fields.string(record, "text"), fields.string(record, "title"), id_)

    return _by_id(corpus, passage_names(Columns()), read, problems).get


def _query_lookup(path: str, problems: Problems) -> Callable[[str], str | None]:
    """Texts of queries by id from a JSONL file: _id (or query_id), text."""

    def read(fields: Fields, record: Record) -> tuple[str, str]:
        return fields.identifier(record, "query_id"), fields.string(record, "query_text")

    return _by_id(path, query_names(Columns()), read, problems).get


def _by_id(
    path: str, names: Names, read: Callable[[Fields, Record], tuple[str, T]], problems: Problems
) -> dict[str, T]:
    """What `read` makes of each line of a JSONL file, by its id; what cannot be read goes to `problems`."""
    table = _json_lines(path)
    fields = Fields(table, names)
    found: dict[str, T] = {}
    for line, record in table.read(problems, lambda _: None):
        fields.locate(record)
        try:
            id_, value = read(fields, record)
            found[id_] = value
        except BadFieldError as error:
            problems.add(table.name, line, error.field, error.reason, record, error.detail)
    return found
