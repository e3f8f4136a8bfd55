"""embed: a corpus in, one embedding per passage out, in this process or on Ray; resumes after a kill.

Notable: both ways write the same table (passage_id, position, embedding) and read what an interrupted run of their own
kind left behind, so no finished block is embedded twice. What decides the artifact is the method, the encoder's
version stamp and the corpus, not how many workers embedded it in which batches.

    embed_corpus(corpus, EncoderFactory(method), EmbedConfig(), Path("runs/a/embed"), use_ray=False, method=method)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from raydr import storage
from raydr.artifacts import Artifact, fingerprint, is_finished, open_artifact, write_artifact, write_durably
from raydr.config import Component
from raydr.data.corpus import Corpus
from raydr.encoders.factory import BuildEncoder
from raydr.encoders.text import SPEED_SETTINGS
from raydr.errors import ArtifactError
from raydr.progress import Progress
from raydr.stages import embed_on_ray
from raydr.stages.columns import require_columns
from raydr.stages.config import EmbedConfig
from raydr.stages.embedder import NEEDED, Embedder, Work, weight_type_of
from raydr.types import DIMS, POSITION

KIND = "embeddings"
EMBEDDINGS = "embeddings"


def embed_corpus(
    corpus: Corpus, build_encoder: BuildEncoder, config: EmbedConfig, out: Path, *, use_ray: bool, method: Component
) -> Artifact:
    """The embeddings of a corpus in `out` (kind "embeddings"); a finished artifact of the same is returned as it is.

    Writes `embeddings/*.parquet` with passage_id, position and embedding (fixed-size list of float32) or, where they
    are sparse, dimensions and weights (lists of int32 and of float32 or float16), rows in any order across files. With
    `use_ray`, every node must see the same paths, or they are a bucket's. Raises `DataError` when the corpus lacks a
    column, `ArtifactError` when `out` holds something else or is being written.
    """
    for file in corpus.passage_files:
        require_columns(pq.read_schema(file).names, NEEDED, stage=f"{file}: embed")
    encoder = build_encoder()  # only asked for its stamp here, which loads no weights
    settings = {"method": _deciding(method), "encoder_version": encoder.version}
    if is_finished(out, fingerprint(KIND, settings, {"corpus": corpus.artifact.fingerprint})):
        print(f"embed: {storage.named(out)} has these embeddings already", file=sys.stderr)
        return open_artifact(out, kind=KIND, later=True)
    with write_artifact(out, kind=KIND, config=settings, inputs={"corpus": corpus.artifact}, resume=True) as writer:
        folder, weight_type = out / EMBEDDINGS, weight_type_of(encoder)
        _keep_only_own_leftovers(out, folder, use_ray=use_ray)
        folder.mkdir(exist_ok=True)
        start = time.perf_counter()
        if use_ray:
            work = embed_on_ray.embed_files(
                corpus,
                build_encoder,
                config,
                out,
                folder,
                num_done=len(_positions(folder)),
                is_sparse=weight_type is not None,
            )
        else:
            work = _embed_here(corpus, Embedder(lambda: encoder), config, folder)
        seconds = time.perf_counter() - start
        check_complete(folder, corpus.num_passages)
        writer.counts.update(passages=corpus.num_passages, files=len(_files(folder)))
        writer.details.update(
            dim=encoder.dim,
            encoder_version=encoder.version,
            **({} if weight_type is None else {"weight_type": weight_type}),
            method=method.model_dump(),
            **_rates(work, seconds),
        )
    storage.remove_folder(out / embed_on_ray.CHECKPOINTS)
    print(_summary(corpus.num_passages, work, seconds), file=sys.stderr)
    return open_artifact(out, kind=KIND, later=True)


def check_complete(folder: Path, num_passages: int) -> None:
    """Raises `ArtifactError` unless the files in `folder` hold every position from 0 to `num_passages` exactly once."""
    counts = np.bincount(_positions(folder), minlength=num_passages)
    if len(counts) > num_passages:
        problem = f"position {len(counts) - 1} lies beyond the corpus"
    elif (counts != 1).any():
        wrong = int(np.flatnonzero(counts != 1)[0])
        problem = f"position {wrong} is embedded {counts[wrong]} times"
    else:
        return
    raise ArtifactError(f"{folder}: {problem}; delete {folder.parent} and embed again")


def _embed_here(corpus: Corpus, embedder: Embedder, config: EmbedConfig, folder: Path) -> Work:
    """Embeds block after block in this process; a file is renamed into place when it is whole."""
    done = pa.array(_positions(folder))
    bucket = storage.bucket_of(folder)
    with Progress("embed", total=corpus.num_passages, initial=len(done), unit="passage") as progress:
        for table in corpus.passages(corpus.encoded_columns):
            todo = table.filter(pc.invert(pc.is_in(table[POSITION], value_set=done)))
            for start in range(0, len(todo), config.passages_per_block):
                block = embedder(todo.slice(start, config.passages_per_block))
                sink = pa.BufferOutputStream()
                pq.write_table(block, sink, **embed_on_ray.file_options(is_sparse=DIMS in block.column_names))
                name = f"part-{block[POSITION][0].as_py():010d}.parquet"
                content = sink.getvalue().to_pybytes()
                bucket.write(name, content) if bucket is not None else write_durably(folder / name, content)
                progress.update(len(block))
    return embedder.work


def _keep_only_own_leftovers(out: Path, folder: Path, *, use_ray: bool) -> None:
    """An interrupted run on Ray is resumed on Ray and a local one locally; the other's leftovers are removed, because
    only its own kind can tell which of them are whole.
    """
    was_ray = storage.exists(out / embed_on_ray.CHECKPOINTS)
    if storage.exists(folder) and was_ray != use_ray:
        print(f"embed: {out} was interrupted in the other runtime (Ray or local); starting over", file=sys.stderr)
        storage.remove_folder(out / embed_on_ray.CHECKPOINTS)
        storage.remove_folder(folder)


def _positions(folder: Path) -> np.ndarray:
    files = _files(folder)
    if not files:
        return np.empty(0, dtype=np.int64)
    filesystem, paths = storage.reach(files)
    dataset = ds.dataset(paths, format="parquet", filesystem=filesystem)
    return dataset.to_table(columns=[POSITION])[POSITION].to_numpy()


def _files(folder: Path) -> list[Path]:
    return [file for file in storage.files_in(folder) if file.suffix == ".parquet"]


def _deciding(method: Component) -> dict[str, Any]:
    """The method without the settings that only make it fast."""
    args = {name: value for name, value in method.args.items() if name not in SPEED_SETTINGS}
    return {"import_path": method.import_path, "args": args}


def _rates(work: Work, seconds: float) -> dict[str, Any]:
    """Of what was embedded since the last interruption."""
    return {
        "passages_embedded": work.passages,
        "num_tokens": work.tokens,
        "padding_share": round(work.padding_share, 4),
        "seconds": round(seconds, 3),
        "passages_per_s": round(work.passages / seconds, 1),
        "tokens_per_s": round(work.tokens / seconds, 1),
    }


def _summary(num_passages: int, work: Work, seconds: float) -> str:
    resumed = f" ({num_passages - work.passages} were there already)" if work.passages < num_passages else ""
    return (
        f"embed: {work.passages} passages{resumed} in {seconds:.1f} s: {work.passages / seconds:.0f} passages/s, "
        f"{work.tokens / seconds:.0f} tokens/s, {work.padding_share:.1%} padding"
    )
