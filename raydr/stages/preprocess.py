"""A method's preprocessing done once, ahead: for what is read again and again, or costs more than the rest.

Notable: what decides the result is the method's `preprocessing_version`, not its encoder, so a corpus that was masked
for one encoder is embedded again with another without a tagger; and what tags has actors of its own, apart from those
that embed. A part of the corpus that is written is not done again after an interruption.

    ready, build_encoder = preprocessed_corpus(corpus, method, PreprocessConfig(), out, use_ray=True)
    embed_corpus(ready, build_encoder, ...)
    masked = preprocess_examples(examples, method.build(), Path("runs/a/examples_masked"))
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact, write_durably
from raydr.config import Component
from raydr.data.arrow_rows import ArrowRows
from raydr.data.corpus import PASSAGES as PASSAGES_FOLDER
from raydr.data.corpus import Corpus
from raydr.data.examples import KIND, PASSAGES, QUERIES, ExampleSet
from raydr.data.passages import passages_of
from raydr.encoders.factory import EncoderFactory
from raydr.progress import Progress
from raydr.stages.config import PreprocessConfig
from raydr.stages.pool import over_pool
from raydr.storage import named
from raydr.types import POSITION, QUERY_ID, TEXT, TITLE, Passage, Query

PREPROCESSED_KIND = "preprocessed"
_ROWS_AT_ONCE = 512


@runtime_checkable
class Preprocessing(Protocol):
    """What is asked of a method; `raydr.methods.base.Method` says what each means."""

    @property
    def preprocessing_version(self) -> str: ...

    def preprocess_queries(self, queries: Sequence[Query]) -> list[Query]: ...

    def preprocess_passages(self, passages: Sequence[Passage]) -> list[Passage]: ...


@dataclass(frozen=True)
class PreprocessedCorpus(Corpus):
    """A corpus whose passages are those of an artifact of preprocessed texts; all else is the corpus's."""

    texts: Artifact

    @property
    def passage_files(self) -> list[Path]:
        return sorted((self.texts.path / PASSAGES_FOLDER).glob("part-*.parquet"))


def preprocessed_corpus(
    corpus: Corpus, method: Component, config: PreprocessConfig, out: Path, *, use_ray: bool
) -> tuple[Corpus, EncoderFactory]:
    """The corpus as `method` encodes it, kept in `out` (kind "preprocessed"), and what builds the encoder that embeds
    it as it lies there; the corpus itself and the method's encoder where the method changes no texts.
    """
    built: Any = method.build()
    version = getattr(built, "preprocessing_version", "")
    if not version:
        return corpus, EncoderFactory(method)
    settings, inputs = {"preprocessing": version}, {"corpus": corpus.artifact}
    if is_finished(out, fingerprint(PREPROCESSED_KIND, settings, {"corpus": corpus.artifact.fingerprint})):
        print(f"preprocess: {named(out)} has these texts already", file=sys.stderr)
    else:
        with write_artifact(out, kind=PREPROCESSED_KIND, config=settings, inputs=inputs, resume=True) as writer:
            _write_parts(corpus, method, config, out / PASSAGES_FOLDER, use_ray=use_ray)
            writer.counts["passages"] = corpus.num_passages
    texts = open_artifact(out, kind=PREPROCESSED_KIND)
    return PreprocessedCorpus(corpus.artifact, texts), EncoderFactory(method, is_preprocessed=True)


def _write_parts(corpus: Corpus, method: Component, config: PreprocessConfig, folder: Path, *, use_ray: bool) -> None:
    folder.mkdir(exist_ok=True)
    work = functools.partial(_Work, method)
    here = None if use_ray else work()
    with Progress("preprocess", total=corpus.num_passages, unit="passage") as progress:
        for file, table in zip(corpus.passage_files, corpus.passages(corpus.encoded_columns), strict=True):
            if (folder / file.name).is_file():
                progress.update(table.num_rows)
                continue
            size = config.passages_per_block
            blocks = [table.slice(start, size) for start in range(0, table.num_rows, size)]
            done = map(here, blocks) if here is not None else over_pool(blocks, work, config, name="preprocess")
            parts = []
            for part in done:
                parts.append(part)
                progress.update(part.num_rows)
            sink = pa.BufferOutputStream()
            pq.write_table(pa.concat_tables(parts).sort_by(POSITION) if parts else table, sink)
            write_durably(folder / file.name, sink.getvalue().to_pybytes())


class _Work:
    """Preprocesses one block of passages after another, here or in an actor."""

    def __init__(self, method: Component) -> None:
        self._method: Any = method.build()

    def __call__(self, block: pa.Table) -> pa.Table:
        return _passages(block, self._method)


def preprocess_examples(examples: ExampleSet, method: Preprocessing, out: Path) -> ExampleSet:
    """The same examples with their texts preprocessed; a training on them must not do it again."""
    settings = {"preprocessing": method.preprocessing_version}
    if is_finished(out, fingerprint(KIND, settings, {"examples": examples.artifact.fingerprint})):
        print(f"preprocess: {named(out)} has these examples already", file=sys.stderr)
        return ExampleSet.open(out)
    tables = [ArrowRows.open(examples.artifact.path / name).table for name in (QUERIES, PASSAGES)]
    total = sum(table.num_rows for table in tables)
    with (
        write_artifact(out, kind=KIND, config=settings, inputs={"examples": examples.artifact}) as writer,
        Progress("preprocess", total=total, unit="text") as progress,
    ):
        changes = (lambda block: _queries(block, method), lambda block: _passages(block, method))
        for name, table, change in zip((QUERIES, PASSAGES), tables, changes, strict=True):
            with pa.ipc.new_file(str(out / name), table.schema) as file:
                for block in _changed(table, change):
                    file.write_table(block)
                    progress.update(block.num_rows)
        writer.counts |= examples.artifact.manifest.counts
    return ExampleSet.open(out)


def _passages(table: pa.Table, method: Preprocessing) -> pa.Table:
    passages = method.preprocess_passages(passages_of(table))
    table = _replaced(table, TEXT, [passage.text for passage in passages])
    return _replaced(table, TITLE, [passage.title for passage in passages]) if TITLE in table.column_names else table


def _queries(table: pa.Table, method: Preprocessing) -> pa.Table:
    pairs = zip(table[QUERY_ID].to_pylist(), table[TEXT].to_pylist(), strict=True)
    queries = method.preprocess_queries([Query(query_id, text or "") for query_id, text in pairs])
    return _replaced(table, TEXT, [query.text for query in queries])


def _replaced(table: pa.Table, name: str, values: list[str]) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def _changed(table: pa.Table, change: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, _ROWS_AT_ONCE):
        yield change(table.slice(start, _ROWS_AT_ONCE))
