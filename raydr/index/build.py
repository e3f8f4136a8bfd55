"""Building an index from a corpus and its embeddings: shards in parallel, then BM25, then the recall report.

Notable: shard i takes a contiguous range of positions, so an index does not depend on the parallelism that embedded its
corpus; an index with a training phase is trained once, on embeddings drawn over the whole corpus, and copied to every
shard, so their scores compare. Each shard appears under its name only when it is whole, and a build that was
interrupted keeps the shards whose checksums agree.

    build_index(corpus, embeddings, IndexConfig(factory="IVF1024,SQ8"), out, use_ray=True)
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from raydr import series
from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact
from raydr.data.arrow_rows import readable
from raydr.data.corpus import Corpus
from raydr.errors import ArtifactError, ConfigError
from raydr.index.bm25 import BM25
from raydr.index.config import BM25Config, IndexConfig
from raydr.index.embedded import EmbeddedBy, EmbeddedCorpus
from raydr.index.layout import (
    KIND,
    SHARD_RECORD,
    IndexDetails,
    ShardRecord,
    read_record,
    shard_name,
    shard_path,
    write_record,
)
from raydr.index.postings import Postings
from raydr.index.recall import measure_recall
from raydr.index.shard import PASSAGES, POSTINGS, VECTORS, Shard, write_passages
from raydr.index.vectors import Vectors, create, train
from raydr.manifest import fsync
from raydr.runtime import PLACEMENT, smallest_node_cpus
from raydr.storage import bucket_of, latest, named, publish, remove_file
from raydr.types import PASSAGE_ID, TEXT, TITLE

_EMPTY = ".empty.faiss"
_EXACT = "Flat"
_ADD_ROWS = 65_536


@dataclass(frozen=True)
class ShardPlan:
    """One shard to build: which positions, from which empty index, into which folder."""

    source: EmbeddedCorpus
    first: int
    last: int
    empty_index: Path | None
    """None: the embeddings are sparse, and nothing has to be learnt of them."""
    path: Path


def build_index(corpus: Corpus, embeddings: Artifact, config: IndexConfig, out: Path, *, use_ray: bool) -> Artifact:
    """The index over an embedded corpus in `out` (kind "index"); a finished one is returned as it is.

    With `use_ray` the shards are Ray tasks, and every node must see the same paths, or they are a bucket's. Raises
    `ArtifactError` when the embeddings are not those of the corpus, `ConfigError` when the factory does not fit them.
    """
    inputs = {"corpus": corpus.artifact, "embeddings": embeddings}
    prints = {name: artifact.fingerprint for name, artifact in inputs.items()}
    settings = config.model_dump(mode="json", exclude=set(PLACEMENT))
    if is_finished(out, fingerprint(KIND, settings, prints)):
        print(f"index: {named(out)} has this index already", file=sys.stderr)
        return open_artifact(out, kind=KIND, later=True)
    source = EmbeddedCorpus.of(corpus.passage_files, corpus.num_passages, embeddings)
    with write_artifact(out, kind=KIND, config=settings, inputs=inputs, resume=True) as writer:
        # After an interruption the finished shards are copies of this one; another training might differ.
        empty = None
        if source.weight_type is None:
            is_there = latest(out / _EMPTY).is_file()
            empty = Vectors.empty_copy(out / _EMPTY) if is_there else trained(source, config)
        elif config.factory != _EXACT:
            raise ConfigError(
                f"index.factory {config.factory!r}: these embeddings are sparse, and an inverted index of them is "
                f"exact; leave the setting out, or say {_EXACT}"
            )
        records = build_shards(source, empty, config, out, first_number=0, use_ray=use_ray)
        made_by = EmbeddedBy.of(embeddings)
        details = IndexDetails(
            version="",
            encoder_version=made_by.encoder_version,
            dim=source.dim,
            method=made_by.method,
            title_separator=str(made_by.method.args.get("title_separator", " ")),
            metric=config.metric,
            factory=config.factory,
            is_exact=empty is None or empty.is_exact,
            is_split=corpus.is_split,
            weight_type=source.weight_type,
            images=corpus.images,
            search=config.search,
            shards=records,
            next_shard=len(records),
            bm25=None,
            bm25_config=config.bm25,
        )
        if config.bm25 is not None:
            details = details.model_copy(update={"bm25": build_bm25(out, details, config.bm25)})
        if config.recall is not None and not details.is_exact:
            recall = measure_recall(out, details, source, config.recall, seed=config.seed)
            details = details.model_copy(update={"recall": recall})
            print(f"recall of {config.factory} against exact search: {_as_text(recall)}", file=sys.stderr)
        writer.details.update(details.with_version().as_details())
        writer.counts.update(passages=source.num_passages, shards=len(records))
        for record in records:
            writer.records |= {f"{shard_path(Path(), record.name)}/{name}": file for name, file in record.files.items()}
    return open_artifact(out, kind=KIND, later=True)


def trained(source: EmbeddedCorpus, config: IndexConfig) -> Vectors:
    """The empty index every shard starts from, trained where its kind needs it."""
    index = create(config.factory, source.dim, ef_construction=config.ef_construction)
    if not index.is_trained:
        _, sample = source.sample(config.train_sample, np.random.default_rng(config.seed))
        train(index, sample, device=config.device)
    return Vectors(index)


def build_shards(
    source: EmbeddedCorpus, empty: Vectors | None, config: IndexConfig, out: Path, *, first_number: int, use_ray: bool
) -> list[ShardRecord]:
    """Builds the shards of a corpus under `out/shards`, each from a copy of `empty` (None: of sparse embeddings); keeps
    those that are finished.
    """
    empty_index = None if empty is None else out / _EMPTY
    if empty is not None and empty_index is not None:
        empty.write(empty_index.with_suffix(".tmp"))
        fsync(empty_index.with_suffix(".tmp"))  # whole wherever it has its name, also after a power cut
        empty_index.with_suffix(".tmp").rename(empty_index)
        publish(empty_index)
    first_empty = None if empty_index is None else empty_index.resolve()
    plans = _plan(source, config, out.resolve(), first_empty, first_number)
    builder = _on_ray(config, len(plans)) if use_ray else partial(map, build_shard)
    bar = tqdm(builder(plans), total=len(plans), desc="index", unit="shard", disable=None)
    records = sorted(bar, key=lambda record: record.name)
    if empty_index is not None:
        remove_file(empty_index)
    return records


def build_shard(plan: ShardPlan, num_threads: int | None = None) -> ShardRecord:
    """Builds one shard beside its place and moves it there when it is whole; one that is there already stays."""
    finished = read_record(plan.path)
    if finished is not None and finished.num_rows == plan.last - plan.first:
        return finished
    started = time.perf_counter()
    scratch = plan.path.with_name(f".{plan.path.name}")
    for leftover in (scratch, plan.path):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    matrix, ids = cast("tuple[Any, Any]", plan.source.embeddings(plan.first, plan.last))
    if plan.empty_index is None:
        Postings.of(matrix, weight_type=plan.source.weight_type or "float32").write(scratch / POSTINGS)
    else:
        vectors = Vectors(faiss.read_index(str(latest(plan.empty_index))), num_threads=num_threads)
        for start in range(0, len(matrix), _ADD_ROWS):
            vectors.add(matrix[start : start + _ADD_ROWS])
        vectors.write(scratch / VECTORS)
    write_passages(scratch / PASSAGES, plan.source.passages(plan.first, plan.last))
    if not Shard(scratch).table.column(PASSAGE_ID).combine_chunks().equals(_one_array(ids)):
        raise ArtifactError(
            f"{plan.source.embedding_files[0].parent}: the passage ids of the embeddings are not those of the corpus "
            f"between positions {plan.first} and {plan.last}; embed this corpus again"
        )
    record = write_record(scratch, plan.path.name, matrix.shape[0])
    scratch.rename(plan.path)
    if (bucket := bucket_of(plan.path)) is not None:
        for name in (*record.files, SHARD_RECORD):
            bucket.push(name)
    series.count("raydr_index_shards_total")
    series.count("raydr_index_passages_total", matrix.shape[0])
    series.count("raydr_index_seconds_total", time.perf_counter() - started)
    return record


def build_bm25(out: Path, details: IndexDetails, config: BM25Config) -> str:
    """Builds the BM25 side over all rows of the shards; returns its folder, relative to `out`."""
    name = f"bm25/{shard_name(details.next_shard)}"
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir(parents=True)
    BM25.build(_texts(out, details), config).save(out / name)
    return name


def _texts(out: Path, details: IndexDetails) -> Iterator[str]:
    with tqdm(total=details.num_rows, desc="bm25", unit="passage", disable=None) as bar:
        for record in details.shards:
            shard = Shard(shard_path(out, record.name), files=record.files)
            for batch in shard.table.select([TITLE, TEXT]).to_batches():
                with readable(shard.path / PASSAGES):
                    titles, texts = batch.column(TITLE).to_pylist(), batch.column(TEXT).to_pylist()
                for title, text in zip(titles, texts, strict=True):
                    yield f"{title}{details.title_separator}{text}" if title else text
                bar.update(batch.num_rows)


def _plan(
    source: EmbeddedCorpus, config: IndexConfig, out: Path, empty_index: Path | None, first_number: int
) -> list[ShardPlan]:
    wanted = config.num_shards or max(1, math.ceil(source.num_bytes / config.shard_bytes))
    num_shards = min(wanted, source.num_passages)
    bounds = [source.num_passages * i // num_shards for i in range(num_shards + 1)]
    return [
        ShardPlan(source, first, last, empty_index, shard_path(out, shard_name(first_number + i)))
        for i, (first, last) in enumerate(pairwise(bounds))
    ]


def _on_ray(config: IndexConfig, num_shards: int) -> Callable[[list[ShardPlan]], Iterator[ShardRecord]]:
    """Builds plans as Ray tasks whose threads share the cluster's CPUs evenly; yields records as they come.

    A task reserves one CPU: one that reserved all that it uses would wait until nothing else holds any of them, and
    what serves holds its own for good.
    """
    import ray

    nodes = config.nodes()
    threads = max(1, int(min(sum(node["CPU"] for node in nodes) // num_shards, smallest_node_cpus(nodes))))
    task: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD", **config.options())(build_shard)

    def run(plans: list[ShardPlan]) -> Iterator[ShardRecord]:
        pending = [task.remote(plan, threads) for plan in plans]
        while pending:
            done, pending = ray.wait(pending)
            yield from ray.get(done)

    return run


def _one_array(ids: Any) -> pa.Array:
    return pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids


def _as_text(recall: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in recall.items())
