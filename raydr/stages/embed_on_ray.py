"""Embedding on Ray: a `Stage` over Ray Data with an autoscaling pool of encoder actors, resumed by checkpoints.

Notable: one block of passages is one call of an encoder, one Parquet file and one unit of Ray Data's own checkpoints,
so a killed job loses the blocks in flight and nothing else. Ray Data commits in two phases: it notes which rows a file
will hold, writes the file, then commits the note; on resume a file whose note was not committed is deleted and
its rows embedded again.

    dataset = ray.data.read_parquet("corpus/passages")
    embed_stage(EncoderFactory(method), EmbedConfig())(dataset).write_parquet("embeddings")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raydr.data.corpus import Corpus
from raydr.encoders.factory import BuildEncoder
from raydr.stages.columns import require_columns
from raydr.stages.config import EmbedConfig
from raydr.stages.embedder import NEEDED, Embedder, Work
from raydr.types import PASSAGE_ID, POSITION, TEXT, TITLE

if TYPE_CHECKING:
    import ray.data

    from raydr.protocols import Stage

CHECKPOINTS = ".ray_checkpoints"


class _EmbedActor:
    """An `Embedder` in a Ray actor, which reports its work as Ray metrics and to the driver's tally."""

    def __init__(self, build_encoder: BuildEncoder, tally: Any) -> None:
        from ray.util.metrics import Counter, Gauge

        self._embedder = Embedder(build_encoder)
        self._tally = tally
        self._passages = Counter("raydr_embed_passages", "Passages embedded.")
        self._tokens = Counter("raydr_embed_tokens", "Tokens embedded, without padding.")
        self._seconds = Counter("raydr_embed_seconds", "Seconds spent encoding, summed over actors.")
        self._padding = Gauge("raydr_embed_padding_share", "Share of the computed tokens that were padding.")

    def __call__(self, table: pa.Table) -> pa.Table:
        before, seconds = self._embedder.work, self._embedder.seconds
        result = self._embedder(table)
        after = self._embedder.work
        done = Work(
            after.passages - before.passages, after.tokens - before.tokens, after.padded_tokens - before.padded_tokens
        )
        self._passages.inc(done.passages)
        self._tokens.inc(done.tokens)
        self._seconds.inc(self._embedder.seconds - seconds)
        self._padding.set(after.padding_share)
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
        from ray.data import ActorPoolStrategy

        schema = dataset.schema()
        require_columns(schema.names if schema is not None else (), NEEDED, stage="embed")
        low, high = config.num_workers or (1, _workers_that_fit(config))
        return dataset.repartition(target_num_rows_per_block=config.passages_per_block).map_batches(
            _EmbedActor,
            fn_constructor_args=(build_encoder, tally),
            batch_format="pyarrow",
            batch_size=config.passages_per_block,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=low, max_size=high),
            num_cpus=config.worker_cpus,
            num_gpus=config.worker_gpus,
        )

    return stage


def embed_files(corpus: Corpus, build_encoder: BuildEncoder, config: EmbedConfig, out: Path, folder: Path) -> Work:
    """Embeds a corpus into Parquet files in `folder`, going on from the checkpoints in `out`; what it did this time."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    tally: Any = ray.remote(num_cpus=0)(_Tally).remote()
    columns = [PASSAGE_ID, POSITION, TITLE, TEXT]
    context = ray.data.DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column=POSITION,
        checkpoint_path=str((out / CHECKPOINTS).resolve()),
        # Kept until the manifest is written: a crash just before that must not embed everything again.
        delete_checkpoint_on_success=False,
    )
    with ray.data.DataContext.current(context):
        files = [str(file.resolve()) for file in corpus.passage_files]
        dataset = ray.data.read_parquet(files, columns=columns)
        embed_stage(build_encoder, config, tally=tally)(dataset).write_parquet(str(folder.resolve()))
    return ray.get(tally.work.remote())


def _workers_that_fit(config: EmbedConfig) -> int:
    """As many workers as the cluster's GPUs hold, or its CPUs where workers use no GPU."""
    import ray

    resources = ray.cluster_resources()
    if config.worker_gpus:
        return max(1, int(resources.get("GPU", 0) // config.worker_gpus))
    return max(1, int(resources.get("CPU", 1) // config.worker_cpus))
