"""Training examples on disk: queries with their positives and candidates for negatives, and the texts of both.

Notable: everything a trainer needs lies in one artifact (kind "examples"), so a worker on any node opens it and looks
texts up by row in memory-mapped Arrow; the corpus itself is not needed again. Passages are numbered by row here, and
`passage_id` says which passage of the corpus a row is. Examples are written block by block; of what was written, only
ids stay in memory.

| file | columns |
| --- | --- |
| queries.arrow | query_id, text; positives, negatives (rows; negatives hardest first), their scores, negative_sources |
| | image, instructions, task, copies and annotation where the queries have them |
| passages.arrow | passage_id, title, text; document_id where documents were split |
| | image and image_hash where there are pictures |

    examples = ExampleSet.open("runs/a/examples")
    examples.positives(0); examples.passages([3, 5])
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float32, Int64

from raydr.artifacts import Artifact, open_artifact
from raydr.data.arrow_rows import ArrowRows
from raydr.data.passages import PICTURES, has_pictures, passage_columns, passage_table, passages_of
from raydr.errors import DataError
from raydr.types import (
    ANNOTATION,
    COPIES,
    DOCUMENT_ID,
    IMAGE,
    INSTRUCTIONS,
    PASSAGE_ID,
    QUERY_ID,
    TASK,
    TEXT,
    TITLE,
    Annotation,
    Entity,
    Passage,
    Query,
)

if TYPE_CHECKING:
    from raydr.data.corpus import QuerySet

KIND = "examples"
QUERIES = "queries.arrow"
PASSAGES = "passages.arrow"
POSITIVES = "positives"
NEGATIVES = "negatives"
POSITIVE_SCORES = "positive_scores"
NEGATIVE_SCORES = "negative_scores"
NEGATIVE_SOURCES = "negative_sources"

_ROWS, _SCORES = pa.list_(pa.int64()), pa.list_(pa.float32())
_QUERY_SCHEMA = pa.schema(
    {
        QUERY_ID: pa.string(),
        TEXT: pa.string(),
        POSITIVES: _ROWS,
        NEGATIVES: _ROWS,
        POSITIVE_SCORES: _SCORES,
        NEGATIVE_SCORES: _SCORES,
        NEGATIVE_SOURCES: pa.list_(pa.string()),
    }
)
_ANNOTATIONS = pa.struct(
    {
        "entities": pa.list_(pa.struct({"start": pa.int64(), "end": pa.int64(), "label": pa.string()})),
        "labels": pa.list_(pa.string()),
    }
)
_IMAGE_HASH = "image_hash"
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Example:
    """One training query as it is written; ids are the corpus's."""

    query: Query
    positives: Sequence[str] = ()
    """The passages to train towards; none only where the query is a text with an annotation, for a tagger."""
    negatives: Sequence[str] = ()
    """Candidates for negatives, hardest first."""
    negative_scores: Sequence[float] = ()
    """The miner's (or a teacher's) score of each negative; empty where there is none."""
    negative_sources: Sequence[str] = ()
    """Where each negative is from (random, bm25, model, file); empty where nobody said."""
    positive_scores: Sequence[float] = ()
    """The score of each positive, like that of the negatives."""


@dataclass(frozen=True)
class ExampleSet:
    """A finished set of training examples."""

    artifact: Artifact

    @classmethod
    def open(cls, path: str | Path) -> ExampleSet:
        """Raises `ArtifactError` when there is no finished set at `path`."""
        return cls(open_artifact(path, kind=KIND))

    def __len__(self) -> int:
        return self._queries.num_rows

    @property
    def num_passages(self) -> int:
        return self._passages.table.num_rows

    @cached_property
    def query_ids(self) -> list[str]:
        return self._queries[QUERY_ID].to_pylist()

    @cached_property
    def passage_ids(self) -> list[str]:
        return self._passages.table[PASSAGE_ID].to_pylist()

    def query(self, row: int) -> Query:
        image = self._queries[IMAGE][row].as_py() if IMAGE in self._queries.column_names else None
        instruction = next(iter(self.instructions(row)), "")
        query = Query(self._queries[QUERY_ID][row].as_py(), self._queries[TEXT][row].as_py(), image, instruction)
        if ANNOTATION not in self._queries.column_names:
            return query
        marked = self._queries[ANNOTATION][row].as_py()
        entities = tuple(Entity(**entity) for entity in marked["entities"])
        return query._replace(annotation=Annotation(entities, tuple(marked["labels"])))

    def instructions(self, row: int) -> list[str]:
        """All wordings of the query's instruction; empty where it has none."""
        has = INSTRUCTIONS in self._queries.column_names
        return (self._queries[INSTRUCTIONS][row].as_py() if has else None) or []

    @property
    def has_instructions(self) -> bool:
        return INSTRUCTIONS in self._queries.column_names

    def task(self, row: int) -> str | None:
        """The query's task; None where it has none."""
        return self._tasks[row] if self._tasks else None

    @cached_property
    def _tasks(self) -> list[str | None]:
        return self._queries[TASK].to_pylist() if TASK in self._queries.column_names else []

    def copies(self, row: int) -> int:
        """How often an epoch shows the query."""
        return self._copies[row] if self._copies else 1

    @cached_property
    def _copies(self) -> list[int]:
        has = COPIES in self._queries.column_names
        return [1 if copies is None else copies for copies in self._queries[COPIES].to_pylist()] if has else []

    def positives(self, row: int) -> Int64[np.ndarray, " passage"]:
        """Rows of the passages to train query `row` towards."""
        return self._lists[POSITIVES][row]

    def relevant(self, row: int) -> Int64[np.ndarray, " passage"]:
        """Rows that must never be negatives of query `row`: its positives, their copies (equal title, text, picture)
        and, where documents were split, every passage here of the same documents, whose judgement says nothing of a
        single passage.
        """
        own = self.positives(row)
        others = [rows[group] for groups, rows in self._groupings for group in np.unique(groups[own])]
        return np.unique(np.concatenate([own, *others])) if others else own

    def negatives(self, row: int) -> Int64[np.ndarray, " passage"]:
        """Rows of the candidates for negatives, hardest first."""
        return self._lists[NEGATIVES][row]

    def positive_scores(self, row: int) -> Float32[np.ndarray, " passage"]:
        """The miner's (or a teacher's) scores of `positives(row)`; empty where there are none."""
        return self._lists[POSITIVE_SCORES][row]

    def negative_scores(self, row: int) -> Float32[np.ndarray, " passage"]:
        """Likewise of `negatives(row)`."""
        return self._lists[NEGATIVE_SCORES][row]

    def negative_sources(self, row: int) -> list[str]:
        """Where each of `negatives(row)` is from; empty where nobody said."""
        return self._queries[NEGATIVE_SOURCES][row].as_py()

    def negatives_from(self, row: int, source: str) -> Int64[np.ndarray, " passage"]:
        """Those of `negatives(row)` that are from `source`."""
        sources, codes = self._sources
        own = codes[row]
        if source not in sources or not len(own):
            return np.zeros(0, dtype=np.int64)
        return self.negatives(row)[own == sources.index(source)]

    def passages(self, rows: Iterable[int] | Int64[np.ndarray, " passage"]) -> list[Passage]:
        """The passages in the given rows, in that order."""
        columns = passage_columns(self._passages.table.schema)
        return passages_of(self._passages.take(np.fromiter(rows, np.int64), columns))

    @cached_property
    def _queries(self) -> pa.Table:
        return ArrowRows.open(self.artifact.path / QUERIES).table

    @cached_property
    def _passages(self) -> ArrowRows:
        return ArrowRows.open(self.artifact.path / PASSAGES)

    @cached_property
    def _lists(self) -> dict[str, _Lists]:
        return {name: _Lists.of(self._queries[name]) for name in _QUERY_SCHEMA.names[2:6]}

    @cached_property
    def _sources(self) -> tuple[list[str], _Lists]:
        """The sources of negatives, and for each query the place in them of each negative's."""
        column = self._queries[NEGATIVE_SOURCES]
        encoded = pc.list_flatten(column).combine_chunks().dictionary_encode()
        lengths = pc.list_value_length(column).to_numpy()
        return encoded.dictionary.to_pylist(), _Lists(encoded.indices.to_numpy(), lengths)

    @cached_property
    def _groupings(self) -> list[tuple[Int64[np.ndarray, " passage"], _Lists]]:
        """Of each way in which passages belong together: the group of each passage, and the passages of each group."""
        table = self._passages.table
        keys = []
        if DOCUMENT_ID in table.column_names:
            keys.append(table[DOCUMENT_ID].to_numpy())
        pictures = [_IMAGE_HASH] if _IMAGE_HASH in table.column_names else []
        batches = table.select([TITLE, TEXT, *pictures]).to_batches()
        texts = chain.from_iterable(zip(*(column.to_pylist() for column in batch.columns)) for batch in batches)
        # By their hashes: a set may hold more text than a worker has memory for.
        hashes = np.fromiter(map(hash, texts), np.int64, table.num_rows)
        if len(np.unique(hashes)) < len(hashes):
            keys.append(hashes)
        groups = [np.unique(key, return_inverse=True)[1].astype(np.int64) for key in keys]
        return [(own, _Lists(np.argsort(own, kind="stable"), np.bincount(own))) for own in groups]


class _Lists:
    """A column of lists as two arrays: samplers ask for lists at every step."""

    def __init__(self, values: np.ndarray, lengths: np.ndarray) -> None:
        self._values = values
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> _Lists:
        return cls(pc.list_flatten(column).to_numpy(), pc.list_value_length(column).to_numpy())

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        return self._values[self._bounds[row] : self._bounds[row + 1]]


@dataclass(frozen=True)
class QueryLabels:
    """What a set of examples keeps of its queries beside their texts."""

    has_pictures: bool = False
    """Whether some of them have a picture."""
    instructions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Query id -> wordings of its instruction."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    """Query id -> its task."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """Query id -> how often an epoch shows it."""
    has_annotations: bool = False
    """Whether all of them have an annotation."""

    @classmethod
    def of(cls, queries: QuerySet) -> QueryLabels:
        return cls(queries.has_query_pictures, queries.instructions(), queries.tasks(), queries.copies())

    @property
    def schema(self) -> dict[str, pa.DataType]:
        """The columns that these take."""
        there = {
            IMAGE: (PICTURES, self.has_pictures),
            INSTRUCTIONS: (pa.list_(pa.string()), bool(self.instructions)),
            TASK: (pa.string(), bool(self.tasks)),
            COPIES: (pa.int64(), bool(self.copies)),
            ANNOTATION: (_ANNOTATIONS, self.has_annotations),
        }
        return {name: kind for name, (kind, is_there) in there.items() if is_there}

    def row(self, query: Query) -> dict[str, Any]:
        """The query's values of all columns that there may be."""
        id_ = query.query_id
        marked = None
        if query.annotation is not None:
            entities = [entity._asdict() for entity in query.annotation.entities]
            marked = {"entities": entities, "labels": list(query.annotation.labels)}
        labels = (query.image, self.instructions.get(id_), self.tasks.get(id_), self.copies.get(id_), marked)
        return dict(zip((IMAGE, INSTRUCTIONS, TASK, COPIES, ANNOTATION), labels, strict=True))


class ExampleWriter:
    """Writes both files into a folder, block by block.

    with ExampleWriter(folder) as writer:
        writer.add(examples, passage_table(passages))
        writer.counts
    """

    def __init__(
        self, folder: Path, *, is_split: bool = False, has_pictures: bool = False, labels: QueryLabels | None = None
    ) -> None:
        names = [PASSAGE_ID, TITLE, TEXT, *([DOCUMENT_ID] if is_split else [])]
        fields: dict[str, pa.DataType] = {name: pa.string() for name in names}
        pictures = {IMAGE: PICTURES, _IMAGE_HASH: pa.int64()} if has_pictures else {}
        self._passage_schema = pa.schema({**fields, **pictures})
        self._labels = labels or QueryLabels()
        self._query_schema = pa.schema([*_QUERY_SCHEMA, *pa.schema(self._labels.schema)])
        self._queries = pa.ipc.new_file(str(folder / QUERIES), self._query_schema)
        self._passages = pa.ipc.new_file(str(folder / PASSAGES), self._passage_schema)
        self._rows: dict[str, int] = {}
        self._num_examples = 0

    def new(self, passage_ids: Iterable[str]) -> list[str]:
        """Those of the ids whose texts were not given yet, each once."""
        return [passage_id for passage_id in dict.fromkeys(passage_ids) if passage_id not in self._rows]

    def add(self, examples: Sequence[Example], passages: pa.Table | None = None) -> None:
        """Appends examples; `passages` has the texts of the passages that are `new` to the set, if any.

        Raises `DataError` for an example without a positive, with a negative that is also a positive, or with a passage
        whose text was never given.
        """
        if passages is not None:
            self.add_passages(passages)
        columns: dict[str, list] = {name: [] for name in self._query_schema.names}
        for example in examples:
            _check(example)
            columns[QUERY_ID].append(example.query.query_id)
            columns[TEXT].append(example.query.text)
            columns[POSITIVES].append(self._rows_of(example.query, example.positives))
            columns[NEGATIVES].append(self._rows_of(example.query, example.negatives))
            columns[POSITIVE_SCORES].append(list(example.positive_scores))
            columns[NEGATIVE_SCORES].append(list(example.negative_scores))
            columns[NEGATIVE_SOURCES].append(list(example.negative_sources))
            labels = self._labels.row(example.query)
            for name in self._labels.schema:
                columns[name].append(labels[name])
        self._num_examples += len(examples)
        self._queries.write_table(pa.table(columns, schema=self._query_schema))

    def add_passages(self, passages: pa.Table) -> None:
        """Appends the texts of passages that are `new` to the set."""
        for passage_id in passages[PASSAGE_ID].to_pylist():
            self._rows[passage_id] = len(self._rows)
        if _IMAGE_HASH in self._passage_schema.names:
            passages = _with_hashes(passages)
        table = passages.select(self._passage_schema.names).cast(self._passage_schema)
        self._passages.write_table(table, max_chunksize=_BATCH_ROWS)

    @property
    def counts(self) -> dict[str, int]:
        """What was written so far."""
        return {"examples": self._num_examples, "passages": len(self._rows)}

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queries.close()
        self._passages.close()

    def _rows_of(self, query: Query, passage_ids: Sequence[str]) -> list[int]:
        if missing := [passage_id for passage_id in passage_ids if passage_id not in self._rows]:
            raise DataError(f"query {query.query_id!r}: its passage {missing[0]!r} is not in the corpus")
        return [self._rows[passage_id] for passage_id in passage_ids]


def write_examples(
    folder: Path,
    examples: Iterable[Example],
    passages: Mapping[str, Passage],
    *,
    labels: QueryLabels | None = None,
) -> dict[str, int]:
    """Writes a set that fits into memory; `passages` has every passage that an example names. Returns the counts."""
    examples = list(examples)
    has_pictures = any(passage.image is not None for passage in passages.values())
    with ExampleWriter(folder, has_pictures=has_pictures, labels=labels) as writer:
        named = writer.new(chain.from_iterable((*example.positives, *example.negatives) for example in examples))
        writer.add(examples, passage_table([passages[passage_id] for passage_id in named if passage_id in passages]))
        return writer.counts


def _with_hashes(passages: pa.Table) -> pa.Table:
    """The table with a number for each picture, equal for equal ones: workers compare these and read no picture."""
    if not has_pictures(passages.schema):
        passages = passages.append_column(IMAGE, pa.nulls(passages.num_rows, PICTURES))
    hashes = [
        None if image is None else int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little", signed=True)
        for image in chain.from_iterable(chunk.to_pylist() for chunk in passages[IMAGE].chunks)
    ]
    return passages.append_column(_IMAGE_HASH, pa.array(hashes, pa.int64()))


def _check(example: Example) -> None:
    name = f"query {example.query.query_id!r}"
    if not example.positives and example.query.annotation is None:
        raise DataError(f"{name}: an example needs a positive")
    if both := set(example.positives) & set(example.negatives):
        raise DataError(f"{name}: its passage {min(both)!r} is a positive and a negative")
    for what, values, passages in (
        (POSITIVE_SCORES, example.positive_scores, example.positives),
        (NEGATIVE_SCORES, example.negative_scores, example.negatives),
        (NEGATIVE_SOURCES, example.negative_sources, example.negatives),
    ):
        if len(values) not in (0, len(passages)):
            raise DataError(f"{name}: {len(values)} {what} for {len(passages)} passages")
