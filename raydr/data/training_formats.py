"""Checks a trainer's JSONL file line by line, and converts it into another trainer's format.

Notable: a conversion counts what the target has no place for, and its files appear only when all of them is written.

    convert("train.jsonl", "train.st.jsonl", "sentence_transformers").losses     # {'query ids': 809, ...}
    for problem in validate("train.jsonl").problems: print(problem)              # train.jsonl, line 3, field 'pos': ...
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from raydr.data import training_writers as writers
from raydr.data.config import Columns
from raydr.data.fields import Fields, qrels_names
from raydr.data.files import Folder
from raydr.data.layouts import text_qrels
from raydr.data.problems import BadFieldError, Problem, Problems
from raydr.data.training_example import TrainingExample, TrainingPassage, content_id
from raydr.data.training_shapes import FORMATS, detect_format, format_named, read_examples
from raydr.errors import DataError
from raydr.types import Qrels

__all__ = ["FORMATS", "Conversion", "Validation", "convert", "detect_format", "validate"]

_HINT = "mend these lines, or leave them out and list them in a file (--rejects FILE); nothing was written"


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    source_format: str
    num_examples: int
    num_records: int
    losses: Mapping[str, int]
    """What the target has no place for -> in how many examples it was lost."""
    num_rejected: int = 0


@dataclass(frozen=True)
class Validation:
    """What a check found."""

    format: str
    num_examples: int
    problems: list[Problem]
    unread: Mapping[str, int]
    """Fields raydr has no use for -> in how many examples they hold something."""


def validate(path: str, format_: str = "auto", *, corpus: str | None = None, queries: str | None = None) -> Validation:
    """Checks every line of a training file; the problems name file, line and field.

    Ids of passages are looked up only where a `corpus` is given; those of queries need `queries`.
    """
    format_ = detect_format(path) if format_ == "auto" else format_
    unread: Counter[str] = Counter()
    num = 0
    with Problems(path, limit=None) as problems:
        for _, example in read_examples(path, problems, format_, corpus=corpus, queries=queries):
            num += 1
            unread.update(example.unread)
    return Validation(format_, num, problems.found, unread)


def convert(
    source: str,
    target: str | Path,
    target_format: str,
    *,
    source_format: str = "auto",
    corpus: str | None = None,
    queries: str | None = None,
    target_corpus: str | Path | None = None,
    qrels: str | None = None,
    rejects: str | Path | None = None,
) -> Conversion:
    """Writes a training file in another format.

    Args:
        source: JSONL file or URI.
        target: file to write; it appears when all of it is written.
        target_format: a name of `FORMATS`.
        source_format: likewise, or `auto`.
        corpus: where the source names passages by id (`tevatron_ids`, `orders`): the file they are in.
        queries: where it names queries by id: the file they are in.
        target_corpus: where the passages of such a target go.
        qrels: judgements (TREC or BEIR) that turn RankLLM's candidates into positives and negatives.
        rejects: leave bad lines out and list them in this file, instead of raising.

    Raises `DataError` naming file, line and field of bad lines, or the argument that a conversion needs.
    """
    kind = format_named(target_format)
    source_format = detect_format(source) if source_format == "auto" else source_format
    if format_named(source_format).names_passages and corpus is None:
        raise DataError(f"{source}: names its passages by id: give the corpus file they are in, corpus=FILE")
    if kind.names_passages and target_corpus is None:
        raise DataError(f"{target_format} keeps the passages in a file of their own: give target_corpus=FILE")
    if kind.is_judged and not format_named(source_format).is_judged and qrels is None:
        raise DataError(f"{source}: candidates are not judged, and {target_format} needs positives: give qrels=FILE")
    judge = _judge(qrels) if qrels is not None else (lambda example: example)
    losses: Counter[str] = Counter()
    num_examples = num_records = 0
    with ExitStack() as stack:
        problems = stack.enter_context(Problems(source, Path(rejects) if rejects else None, hint=_HINT))
        out = stack.enter_context(_complete_or_absent(Path(target)))
        passages = None
        if target_corpus is not None and kind.names_passages:
            passages = _CorpusFile(stack.enter_context(_complete_or_absent(Path(target_corpus))))
        for line, example in read_examples(source, problems, source_format, corpus=corpus, queries=queries):
            judged = judge(example)
            try:
                if kind.needs_positive and not judged.positives:
                    raise BadFieldError("positives", "there is none", f"{target_format} needs at least one")
                if passages:
                    passages.add(judged)
            except BadFieldError as error:
                problems.add(source, line, error.field, error.reason, judged.query, error.detail)
                continue
            records, lost = kind.write(judged)
            losses.update(lost | (judged.features() - kind.keeps))
            num_examples, num_records = num_examples + 1, num_records + len(records)
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        problems.check()
    return Conversion(source_format, num_examples, num_records, losses, problems.counts.total())


class _CorpusFile:
    """The corpus beside a file that names passages by id: each once, in order of appearance."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._seen: dict[str, str] = {}

    def add(self, example: TrainingExample) -> None:
        """Raises `BadFieldError`, and writes nothing, where an id stands for another text already."""
        new: dict[str, TrainingPassage] = {}
        for passage in example.labelled or example.candidates:
            content = content_id(passage.full_text)
            if (
                self._seen.get(passage.some_id, content) != content
                or passage.full_text != new.setdefault(passage.some_id, passage).full_text
            ):
                raise BadFieldError("docid", "two passages with different texts share an id", repr(passage.some_id))
        for passage_id, passage in new.items():
            if passage_id not in self._seen:
                self._seen[passage_id] = content_id(passage.full_text)
                self._stream.write(json.dumps(writers.corpus_record(passage), ensure_ascii=False) + "\n")


def _judge(path: str) -> Callable[[TrainingExample], TrainingExample]:
    """Turns candidates into positives (grade 1 and above) and negatives (judged below); the unjudged are left out."""
    qrels: Qrels = {}
    with Problems(path, hint="mend these lines") as problems:
        table = text_qrels(Folder.open(path).files()[0])
        fields = Fields(table, qrels_names(Columns()))
        for line, record in table.read(problems, lambda _: None):
            fields.locate(record)
            try:
                grades = qrels.setdefault(fields.identifier(record, "query_id"), {})
                grades[fields.identifier(record, "passage_id")] = fields.grade(record)
            except BadFieldError as error:
                problems.add(table.name, line, error.field, error.reason, record, error.detail)
        problems.check()

    def judge(example: TrainingExample) -> TrainingExample:
        grades = qrels.get(example.some_query_id, {})
        judged = [(passage, grades[passage.some_id]) for passage in example.candidates if passage.some_id in grades]
        if not example.candidates:
            return example
        return replace(
            example,
            candidates=(),
            positives=tuple(passage for passage, grade in judged if grade >= 1),
            negatives=tuple(passage for passage, grade in judged if grade < 1),
            unread=example.unread
            + (("candidates without a judgement",) if len(judged) < len(example.candidates) else ()),
        )

    return judge


@contextmanager
def _complete_or_absent(path: Path) -> Generator[TextIO]:
    """A file for writing that takes its name when the block ends without an error, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
