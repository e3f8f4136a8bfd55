"""From groups of examples to tensors: texts are looked up and tokenised by Ray Data tasks, ahead of the training.

Notable: each worker streams its own share, which the sampler and its rank decide, so no worker waits for another's rows
and none is fed twice; a batch travels as ragged token ids and is padded where it is used. A run that is resumed starts
its stream at its step, nothing before it is tokenised again. While as much is tokenised as has room, Ray Data's loop,
which runs in the training worker's own process, looks for room at most twenty times a second (`Paced`).

    tokenizer = BatchTokenizer(encoder_config)
    batches = stream(sampler, tokenizer, examples, first=0, last=100, worker_rank=0, num_workers=2)      # TrainBatch
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa

from raydr.data.examples import ExampleSet
from raydr.encoders.multimodal import MultimodalCheckpoint, MultimodalEncoderConfig, MultimodalReader
from raydr.encoders.text import TextEncoder, TextEncoderConfig
from raydr.encoders.texts import Texts, Vectors
from raydr.train.sampling import BatchSampler, Group, share
from raydr.types import Passage, Query

if TYPE_CHECKING:
    import torch

    from raydr.train.objective import TrainBatch

_BATCHES_PER_BLOCK = 16
_BLOCKS_AHEAD = 256
"""Blocks in one execution of Ray Data: a plan is a few numbers for each group, starting an execution costs seconds."""
_PACE_S = 0.05
"""Seconds between two looks of Ray Data's loop."""


Tokenized: TypeAlias = dict[str, Texts | Vectors]


@runtime_checkable
class GroupTokenizer(Protocol):
    """Tokenises the texts of a batch; travels to Ray Data's tasks, so it holds configuration only."""

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        """What is read, by what it is: `queries` and `passages` (query-major), or `pairs`. A side that is not trained
        may be given as its embeddings, which no network then reads.
        """
        ...

    @property
    def pad_id(self) -> int: ...


@dataclass(frozen=True)
class BatchTokenizer:
    """Queries and passages apart, as a dual encoder reads them."""

    config: TextEncoderConfig
    names_sides: bool = False
    """Whether the network is told which texts are queries and which are passages (raydr/models/towers.py)."""

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        encoder = self.encoder
        read = Texts(encoder.tokenize_queries(queries))
        passages = Texts(encoder.tokenize_passages(list(chain.from_iterable(groups))))
        if self.names_sides:
            read, passages = replace(read, side="query"), replace(passages, side="passage")
        return {"queries": read, "passages": passages}

    @property
    def encoder(self) -> TextEncoder:
        """What tokenises; of the same config the same one. Networks that read texts otherwise have another."""
        return _encoder(self.config)

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id


@dataclass(frozen=True)
class MultimodalTokenizer:
    """Queries and passages apart, pictures and all, as a multimodal encoder reads them."""

    config: MultimodalEncoderConfig

    def tokenize(self, queries: Sequence[Query], groups: Sequence[Sequence[Passage]]) -> Tokenized:
        reader = _reader(self.config)
        passages = list(chain.from_iterable(groups))
        return {"queries": reader.texts(reader.queries(queries)), "passages": reader.texts(reader.passages(passages))}

    @property
    def pad_id(self) -> int:
        return _reader(self.config).pad_id


@functools.lru_cache(maxsize=4)
def _reader(config: MultimodalEncoderConfig) -> MultimodalReader:
    return MultimodalReader(MultimodalCheckpoint(config))


@functools.lru_cache(maxsize=4)
def _encoder(config: TextEncoderConfig) -> TextEncoder:
    return TextEncoder(config)


@functools.lru_cache(maxsize=4)
def _examples(path: Path) -> ExampleSet:
    return ExampleSet.open(path)


def stream(
    sampler: BatchSampler,
    tokenizer: GroupTokenizer,
    examples: ExampleSet,
    *,
    first: int,
    last: int,
    worker_rank: int,
    num_workers: int,
    on_ray: bool = True,
    multiple_of: int = 1,
) -> Iterator[TrainBatch]:
    """One worker's share of the batches `first` to `last` (exclusive), tokenised by a Ray Data actor of its own.

    Texts are padded to a multiple of `multiple_of` tokens.
    """
    batches = islice(iter(sampler), first, last)
    path = examples.artifact.path.resolve()
    while True:
        planned = list(islice(batches, _BATCHES_PER_BLOCK * _BLOCKS_AHEAD if on_ray else 1))
        own = [share(batch, worker_rank, num_workers) for batch in planned]
        if not own:
            return
        if on_ray:
            rows = _on_ray(own, tokenizer, path, name=f"batches of training worker {worker_rank}")
        else:
            rows = (tokenized(groups, tokenizer, path) for groups in own)
        for row in rows:
            yield to_batch(row, tokenizer.pad_id, multiple_of=multiple_of)


def _on_ray(
    batches: list[list[Group]], tokenizer: GroupTokenizer, path: Path, *, name: str
) -> Iterator[dict[str, Any]]:
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    paced: Any = Paced  # Ray asks for a class with its methods, its type for one of its own
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, paced]
    blocks = [
        _plan(batches[start : start + _BATCHES_PER_BLOCK]) for start in range(0, len(batches), _BATCHES_PER_BLOCK)
    ]

    with ray.data.DataContext.current(context):
        # Not `from_arrow`, which sends a task of one CPU to look at the tables.
        source = ray.data.from_blocks(blocks)
        source.set_name(name)
        dataset = source.map_batches(
            _Tokenize,
            fn_constructor_args=(tokenizer, path),
            batch_format="pyarrow",
            batch_size=None,
            zero_copy_batch=True,
            # One process beside each training worker, which Ray would otherwise multiply; and none of Ray's CPUs:
            # the workers may hold them all, and tokenising must not wait for those who wait for it.
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=0,
        )
        tables: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        for table in tables:
            yield from table.to_pylist()


class Paced:
    """Told of every step of Ray Data's loop, and makes it wait.

    The loop waits for its tasks. What is done already and may not be read yet, for want of room in the object store,
    lets it go round without a pause: a whole core, and half of Python's lock, of the process that trains.
    """

    def before_execution_starts(self, executor: object) -> None: ...

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_PACE_S)

    def after_execution_succeeds(self, executor: object) -> None: ...

    def after_execution_fails(self, executor: object, error: Exception) -> None: ...


class _Tokenize:
    """What runs in Ray Data's actor."""

    def __init__(self, tokenizer: GroupTokenizer, path: Path) -> None:
        self._tokenizer, self._path = tokenizer, path

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = [tokenized(groups, self._tokenizer, self._path) for groups in _groups(block)]
        return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SIDES = ("queries", "passages", "pairs")
_TEXTS = pa.struct(
    {
        "ids": pa.list_(pa.list_(pa.int32())),
        "first_pooled": pa.list_(pa.int32()),
        "pixels": pa.list_(pa.large_binary()),
        "vectors": pa.list_(pa.large_binary()),
        "labels": pa.list_(pa.list_(pa.int64())),
        "side": pa.string(),
    }
)
_SCHEMA = pa.schema(
    {
        "names": pa.list_(pa.string()),
        **dict.fromkeys(_SIDES, _TEXTS),
        "passage_rows": pa.list_(pa.int64()),
        "positive_rows": pa.list_(pa.list_(pa.int64())),
        "teacher_scores": pa.list_(pa.list_(pa.float32())),
        "clusters": pa.list_(pa.int64()),
    }
)
_PLAN = pa.schema(
    {
        "query": pa.list_(pa.int64()),
        "passages": pa.list_(pa.list_(pa.int64())),
        "teacher_scores": pa.list_(pa.list_(pa.float32())),
        "cluster": pa.list_(pa.int64()),
        "wording": pa.list_(pa.int64()),
    }
)


def _plan(batches: list[list[Group]]) -> pa.Table:
    """One row per batch."""
    rows = [{name: [getattr(group, name) for group in batch] for name in _PLAN.names} for batch in batches]
    return pa.Table.from_pylist(rows, schema=_PLAN)


def _groups(block: pa.Table) -> Iterator[list[Group]]:
    for row in block.to_pylist():
        columns = (row[name] for name in _PLAN.names)
        yield [
            Group(query, tuple(rows), tuple(scores), label, wording)
            for query, rows, scores, label, wording in zip(*columns, strict=True)
        ]


def tokenized(groups: list[Group], tokenizer: GroupTokenizer, path: Path) -> dict[str, Any]:
    """The batch of these groups as lists: token ids and labels."""
    examples = _examples(path)
    rows = [row for group in groups for row in group.passages]
    passages = iter(examples.passages(rows))
    texts = [list(islice(passages, len(group.passages))) for group in groups]
    queries = [_worded(examples, group) for group in groups]
    has_teacher, has_clusters = bool(groups[0].teacher_scores), groups[0].cluster >= 0
    return {
        "names": [query.query_id for query in queries],
        **dict.fromkeys(_SIDES),
        **{side: read.parts for side, read in tokenizer.tokenize(queries, texts).items()},
        "passage_rows": rows,
        "positive_rows": [examples.relevant(group.query).tolist() for group in groups],
        "teacher_scores": [list(group.teacher_scores) for group in groups] if has_teacher else None,
        "clusters": [group.cluster for group in groups] if has_clusters else None,
    }


def _worded(examples: ExampleSet, group: Group) -> Query:
    """The group's query, with one of its instruction's wordings where it has any."""
    query, wordings = examples.query(group.query), examples.instructions(group.query)
    return query._replace(instruction=wordings[group.wording % len(wordings)]) if wordings else query


def to_batch(row: dict[str, Any], pad_id: int, *, multiple_of: int = 1) -> TrainBatch:
    """Tensors of a tokenised batch, on the CPU; `multiple_of` as in `Texts.padded`."""
    import torch

    from raydr.train.objective import Labels, TrainBatch

    def tensor(name: str, kind: torch.dtype) -> torch.Tensor | None:
        return None if row[name] is None else torch.tensor(row[name], dtype=kind)

    widest = max(len(positives) for positives in row["positive_rows"])
    padded = [[*positives, *[-1] * (widest - len(positives))] for positives in row["positive_rows"]]
    labels = Labels(
        passage_rows=torch.tensor(row["passage_rows"], dtype=torch.int64),
        positive_rows=torch.tensor(padded, dtype=torch.int64),
        teacher_scores=tensor("teacher_scores", torch.float32),
        clusters=tensor("clusters", torch.int64),
    )
    texts: dict[str, Any] = {
        side: None if row[side] is None else _side(row[side]).padded(pad_id, multiple_of=multiple_of) for side in _SIDES
    }
    queries = texts["queries"]
    if queries is not None and (own := row["queries"].get("labels")) is not None:
        width = queries.ids.shape[1]
        told = torch.tensor([[*text, *[0] * (width - len(text))] for text in own], dtype=torch.int64)
        labels = replace(labels, token_labels=told)
    return TrainBatch(labels=labels, names=row["names"], **texts)


def _side(parts: dict[str, Any]) -> Texts | Vectors:
    """What `parts` of either was made of."""
    vectors = parts.get("vectors")
    if vectors is not None:
        return Vectors.of(vectors)
    return Texts(**{name: value for name, value in parts.items() if name != "vectors"})
