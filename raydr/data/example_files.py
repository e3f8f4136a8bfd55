"""Training examples from a trainer's own JSONL file, in any of the shapes that `training_shapes` reads.

Notable: lines with the same query (by id, or by text where there is none) become one example, so that another line's
positive is never taken for a negative; a passage is written when it is first seen, and only ids stay in memory. What an
example set has no place for (prompts, answers, the label of a row) is counted in the manifest and said on stderr.

    examples = examples_from_file("train.jsonl", "runs/a/examples")
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raydr.artifacts import fingerprint, is_finished, write_artifact
from raydr.data.examples import KIND, Example, ExampleSet, ExampleWriter
from raydr.data.files import Folder
from raydr.data.passages import passage_table
from raydr.data.problems import BadFieldError, Problems
from raydr.data.training_example import TrainingExample, TrainingPassage, content_id
from raydr.data.training_shapes import detect_format, format_named, read_examples
from raydr.errors import DataError
from raydr.storage import place
from raydr.types import Passage, Query

_KEPT = frozenset(
    {
        "query ids",
        "passage ids",
        "titles (joined into the text)",
        "scores",
        "several positives in one record",
        "which passages are positive",
    }
)
_HINT = "mend these lines, or leave them out: raydr data convert FILE MENDED --to FORMAT --rejects BAD"
_BLOCK = 8192
FILE_SOURCE = "file"
"""What `negative_sources` says of negatives that a file named."""


def examples_from_file(
    path: str,
    out: str | Path,
    *,
    source_format: str = "auto",
    corpus: str | None = None,
    queries: str | None = None,
    trust_order: bool = False,
) -> ExampleSet:
    """The examples of a JSONL file at `out`; finished ones of the same file (name, size, time) stay.

    Queries without any positive are left out and counted. `corpus` and `queries` are the JSONL files that passages and
    queries named by id are in. With `trust_order` a list that nobody judged is a teacher's order: its first passage is
    the positive, the others are negatives, and every line stays an example of its own. Raises `DataError` naming file,
    line and field of bad lines.
    """
    out = place(out)
    name = detect_format(path) if source_format == "auto" else source_format
    kind = format_named(name)
    if not kind.is_judged and not trust_order:
        raise DataError(
            f"{path}: its candidates are not judged, and training needs positives: "
            "raydr data convert FILE JUDGED --to tevatron --qrels QRELS; or, where their order is a teacher's to learn "
            "from, mine.trust_order=true"
        )
    if kind.names_passages and corpus is None:
        raise DataError(f"{path}: names its passages by id: give the corpus file they are in, mine.source_corpus=FILE")
    stamps = [Folder.open(file).files()[0].stamp for file in (path, corpus, queries) if file is not None]
    settings = {"source_format": name, "files": stamps}
    if is_finished(out, fingerprint(KIND, settings, {})):
        print(f"raydr: {out}: reused, {path} is unchanged", file=sys.stderr)
        return ExampleSet.open(out)
    with write_artifact(out, kind=KIND, config=settings) as artifact, ExampleWriter(out) as writer:
        gathered = _Gathered(writer)
        with Problems(path, hint=_HINT) as problems:
            for line, example in read_examples(path, problems, name, corpus=corpus, queries=queries):
                try:
                    gathered.add(example)
                except BadFieldError as error:
                    problems.add(path, line, error.field, error.reason, example.query, error.detail)
            problems.check()
        num_without = gathered.write()
        if not writer.counts["examples"]:
            raise DataError(f"{path}: holds no example with a positive")
        artifact.counts |= writer.counts | {"without_positives": num_without}
        artifact.details["lost"] = dict(gathered.lost)
    _summarise(out, artifact.counts, gathered.lost)
    return ExampleSet.open(out)


@dataclass
class _Merged:
    """All that the lines of one query say: ids of passages, with a score where a line gave one."""

    query: Query
    positives: dict[str, float | None] = field(default_factory=dict)
    negatives: dict[str, float | None] = field(default_factory=dict)

    def example(self) -> Example:
        negatives = {id_: score for id_, score in self.negatives.items() if id_ not in self.positives}
        return Example(
            self.query,
            positives=list(self.positives),
            negatives=list(negatives),
            positive_scores=_all_or_none(self.positives.values()),
            negative_scores=_all_or_none(negatives.values()),
            negative_sources=[FILE_SOURCE] * len(negatives),
        )


class _Gathered:
    """The examples of a file by query; texts of passages go to the writer at once."""

    def __init__(self, writer: ExampleWriter) -> None:
        self._writer = writer
        self._merged: dict[str, _Merged] = {}
        self._contents: dict[str, str] = {}
        self._texts: list[Passage] = []
        self.lost: Counter[str] = Counter()

    def add(self, example: TrainingExample) -> None:
        """Raises `BadFieldError` where an id stands for another text already."""
        query = Query(example.some_query_id, example.query)
        # Two orders of one query may disagree, so each stays a list of its own.
        key = f"{len(self._merged)} {query.query_id}" if example.candidates else query.query_id
        merged = self._merged.setdefault(key, _Merged(query))
        if merged.query.text != query.text:
            raise BadFieldError("query_id", "two queries with different texts share an id", repr(query.query_id))
        ordered = [p._replace(score=-float(place)) for place, p in enumerate(example.candidates)]
        positives = example.positives or ordered[:1]
        negatives = example.negatives or ordered[1:]
        for passage in (*positives, *negatives):
            self._add_text(passage)
        merged.positives |= {passage.some_id: passage.score for passage in positives}
        merged.negatives |= {passage.some_id: passage.score for passage in negatives}
        self.lost.update(example.features() - _KEPT)

    def write(self) -> int:
        """Writes what was gathered; returns the number of queries without a positive, which are left out."""
        self._writer.add_passages(passage_table(self._texts))
        complete = [merged.example() for merged in self._merged.values() if merged.positives]
        for first in range(0, len(complete), _BLOCK):
            self._writer.add(complete[first : first + _BLOCK], passage_table([]))
        return len(self._merged) - len(complete)

    def _add_text(self, passage: TrainingPassage) -> None:
        passage_id, content = passage.some_id, content_id(passage.full_text)
        if passage_id in self._contents:
            if self._contents[passage_id] != content:
                raise BadFieldError("docid", "two passages with different texts share an id", repr(passage_id))
            return
        self._contents[passage_id] = content
        self._texts.append(Passage(passage_id, passage.text, passage.title))
        if len(self._texts) >= _BLOCK:
            self._writer.add_passages(passage_table(self._texts))
            self._texts.clear()


def _all_or_none(scores: Iterable[float | None]) -> Sequence[float]:
    """The scores where each passage has one, otherwise none: a list with gaps could not be compared."""
    found = list(scores)
    known = [score for score in found if score is not None]
    return known if len(known) == len(found) else []


def _summarise(out: Path, counts: Mapping[str, int], lost: Mapping[str, int]) -> None:
    print(f"raydr: {out}: {counts['examples']:,} queries, {counts['passages']:,} passages", file=sys.stderr)
    if counts["without_positives"]:
        print(f"raydr: queries left out, without a positive: {counts['without_positives']:,}", file=sys.stderr)
    for name, count in lost.items():
        print(f"note: {name} of {count:,} examples are not used in training", file=sys.stderr)
