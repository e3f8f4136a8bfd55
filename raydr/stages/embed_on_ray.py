"""Embedding on Ray: a `Stage` over Ray Data with an autoscaling pool of encoder actors, resumed by checkpoints.

Notable: one block of passages is one call of an encoder, one Parquet file and one unit of Ray Data's own checkpoints,
so a killed job loses the blocks in flight and nothing else. Ray Data commits in two phases: it notes which rows a file
will hold, writes the file, then commits the note; on resume a file whose note was not committed is deleted and
its rows embedded again.

    dataset = ray.data.read_parquet("corpus/passages")
    embed_stage(EncoderFactory(method), EmbedConfig())(dataset).write_parquet("embeddings")
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raydr import series
from raydr.data.corpus import Corpus
from raydr.encoders.factory import BuildEncoder
from raydr.progress import followed
from raydr.stages.columns import require_columns
from raydr.stages.config import EmbedConfig
from raydr.stages.embedder import NEEDED, Embedder, Work
from raydr.stages.pool import mapped, worker_pool
from raydr.storage import reach
from raydr.types import DIMS, POSITION

if TYPE_CHECKING:
    import ray.data

    from raydr.protocols import Stage

CHECKPOINTS = ".ray_checkpoints"


def file_options(*, is_sparse: bool) -> dict[str, Any]:
    """How embeddings are written in Parquet: a dictionary of numbers that never repeat takes a fifth more, and
    dimensions, which ascend, are told by their differences.
    """
    encoding = {"column_encoding": {f"{DIMS}.list.element": "DELTA_BINARY_PACKED"}} if is_sparse else {}
    return {"use_dictionary": False, **encoding}


class _EmbedPassages:
    """An `Embedder` in a Ray actor, which reports its work as time series and to the driver's tally."""

    def __init__(self, build_encoder: BuildEncoder, num_threads: int, tally: Any) -> None:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # Ray would derive it from the CPUs reserved for scheduling
        self._embedder = Embedder(build_encoder)
        self._tally = tally

    def __call__(self, table: pa.Table) -> pa.Table:
        before, seconds = self._embedder.work, self._embedder.seconds
        result = self._embedder(table)
        after = self._embedder.work
        done = Work(
            after.passages - before.passages, after.tokens - before.tokens, after.padded_tokens - before.padded_tokens
        )
        series.count("raydr_embed_passages_total", done.passages)
        series.count("raydr_embed_tokens_total", done.tokens)
        series.count("raydr_embed_padding_tokens_total", done.padded_tokens - done.tokens)
        series.count("raydr_embed_seconds_total", self._embedder.seconds - seconds)
        if self._tally is not None:
            self._tally.add.remote(done)
        return result


class _Tally:
    """Sums the work of all actors."""

    def __init__(self) -> None:
        self._work = Work()

    def add(self, work: Work) -> None:
        self._work.add(work)

    def work(self) -> Work:
        return self._work


def embed_stage(build_encoder: BuildEncoder, config: EmbedConfig, *, tally: Any = None) -> Stage:
    """A `Stage` that needs passage_id, position and text (title) and gives passage_id, position and embedding."""

    def stage(dataset: ray.data.Dataset) -> ray.data.Dataset:
        schema = dataset.schema()
        require_columns(schema.names if schema is not None else (), NEEDED, stage="embed")
        pool = worker_pool(config, config.nodes())
        blocks = dataset.repartition(target_num_rows_per_block=config.passages_per_block)
        arguments = (build_encoder, pool.num_threads, tally)
        return mapped(blocks, _EmbedPassages, arguments, config, pool, batch_size=config.passages_per_block)

    return stage


def embed_files(
    corpus: Corpus,
    build_encoder: BuildEncoder,
    config: EmbedConfig,
    out: Path,
    folder: Path,
    *,
    num_done: int,
    is_sparse: bool = False,
) -> Work:
    """Embeds a corpus into Parquet files in `folder`, going on from the checkpoints in `out`; what it did this time.

    `num_done` passages are there already, for the progress shown.
    """
    import ray
    from ray.data.checkpoint import CheckpointConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On this node, with which the job would end anyway: on another one its loss would end the job.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    tally: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(_Tally).remote()
    filesystem, (checkpoints, target) = reach([out / CHECKPOINTS, folder])
    context = ray.data.DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column=POSITION,
        checkpoint_path=checkpoints,
        override_filesystem=filesystem,
        # Kept until the manifest is written: a crash just before that must not embed everything again.
        delete_checkpoint_on_success=False,
    )
    # Ray's own bars show operators and blocks, and without a terminal some thirty log lines every ten seconds; its
    # dashboard has all of that. Here it is passages that count.
    context.enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)

    def embedded() -> int:
        return num_done + ray.get(tally.work.remote()).passages

    shown = followed("embed", embedded, total=corpus.num_passages, unit="passage")
    with ray.data.DataContext.current(context), shown:
        own, files = reach(corpus.passage_files)
        dataset = ray.data.read_parquet(files, columns=corpus.encoded_columns, filesystem=own)
        dataset.set_name(f"embed {corpus.name}")  # as the dashboard calls it, and all that follows from it
        embedded_passages = embed_stage(build_encoder, config, tally=tally)(dataset)
        embedded_passages.write_parquet(target, filesystem=filesystem, **file_options(is_sparse=is_sparse))
    return ray.get(tally.work.remote())
