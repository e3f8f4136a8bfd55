"""Changing an index that is in use: add passages, delete some, compact, clear away what nobody reads.

Notable: every change writes new files under new names and then replaces `manifest.json`, so a reader keeps the state
it opened and a crash leaves the old one; a second writer is refused while one is at work. A deleted passage is a
masked row until `compact` rewrites its shard. BM25 weighs words over the whole collection, so `add` and `compact`
build that side again.

    add("runs/a/index", new_corpus, new_embeddings, on_duplicate="replace")
    delete("runs/a/index", ["doc-17"])
    compact("runs/a/index")
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from raydr.artifacts import Artifact, ArtifactUpdate, checked, open_artifact, update_artifact
from raydr.data.corpus import Corpus
from raydr.errors import ArtifactError, DataError
from raydr.index.build import build_bm25, build_shards
from raydr.index.config import IndexConfig
from raydr.index.embedded import EmbeddedBy, EmbeddedCorpus
from raydr.index.layout import (
    KIND,
    IndexDetails,
    ShardRecord,
    read_deleted,
    read_details,
    shard_name,
    shard_path,
    write_deleted,
    write_record,
)
from raydr.index.postings import Postings
from raydr.index.shard import PASSAGES, POSTINGS, VECTORS, Shard, write_passages
from raydr.index.vectors import Vectors
from raydr.storage import bucket_of, in_parallel, place, remove_folder
from raydr.types import PASSAGE_ID

GRACE_S = 3600.0
"""Files of an old state stay this long, for readers that opened it."""

_SHOWN_IDS = 5
_REWRITTEN_ROWS = 8192
"""Passages copied at once: with pictures, a shard may be larger than the memory."""


def add(
    path: str | Path,
    corpus: Corpus,
    embeddings: Artifact,
    *,
    on_duplicate: Literal["error", "replace"] = "error",
    use_ray: bool = False,
) -> Artifact:
    """Adds an embedded corpus as new shards. `replace` deletes older passages of the same ids.

    Raises `ArtifactError` when another encoder made the embeddings, `DataError` naming ids that are there already.
    """
    path = place(path)
    with update_artifact(path, kind=KIND) as update:
        details = read_details(update.artifact)
        stamp = EmbeddedBy.of(embeddings).encoder_version
        if stamp != details.encoder_version:
            raise ArtifactError(
                f"{embeddings.path}: made by encoder {stamp}, but {path} by {details.encoder_version}; embed the new "
                "passages with the index's encoder, or build a new index from everything"
            )
        source = EmbeddedCorpus.of(corpus.passage_files, corpus.num_passages, embeddings)
        new_ids = pa.chunked_array(
            [c for table in corpus.passages([PASSAGE_ID]) for c in table.column(PASSAGE_ID).chunks], type=pa.string()
        )
        shards, replaced = _without(path, details.shards, new_ids)
        if replaced and on_duplicate == "error":
            raise DataError(
                f"{path}: holds {len(replaced)} of these passages already ({_some(replaced)}); "
                "use on_duplicate=replace, or give them other ids"
            )
        _check_columns(path, details, source)
        _drop_leftovers(path / "shards", details.next_shard)
        # Shards of one index share what training learnt, and a small addition could not be trained on anyway.
        first, empty = details.shards[0], None
        if details.weight_type is None:
            empty = Vectors.empty_copy(checked(shard_path(path, first.name) / VECTORS, first.files[VECTORS]))
        sizes = IndexConfig.model_validate(update.artifact.manifest.config).model_copy(update={"num_shards": None})
        added = build_shards(source, empty, sizes, path, first_number=details.next_shard, use_ray=use_ray)
        changes = {"shards": [*shards, *added], "next_shard": details.next_shard + len(added)}
        _publish(update, details.model_copy(update=changes), rebuild_bm25=True)
    return open_artifact(path, kind=KIND, later=True)


def delete(path: str | Path, passage_ids: Sequence[str], *, missing_ok: bool = False) -> Artifact:
    """Deletes passages: from the next opening on they are never found. Raises `DataError` naming unknown ids."""
    path = place(path)
    with update_artifact(path, kind=KIND) as update:
        details = read_details(update.artifact)
        shards, found = _without(path, details.shards, pa.chunked_array([pa.array(passage_ids, type=pa.string())]))
        unknown = sorted(set(passage_ids) - set(found))
        if unknown and not missing_ok:
            raise DataError(f"{path}: {len(unknown)} of the ids to delete are not there ({_some(unknown)})")
        _publish(update, details.model_copy(update={"shards": shards}), rebuild_bm25=False)
    return open_artifact(path, kind=KIND, later=True)


def compact(path: str | Path, *, grace_s: float = GRACE_S) -> Artifact:
    """Rewrites the shards that hold deleted rows without them, then clears away files older than `grace_s`.

    Embeddings come from the shard itself: exact for Flat and HNSW, as coded for SQ and PQ.
    """
    path = place(path)
    with update_artifact(path, kind=KIND) as update:
        details = read_details(update.artifact)
        number, shards = details.next_shard, []
        for record in tqdm(details.shards, desc="compact", unit="shard", disable=None):
            if record.num_deleted == 0:
                shards.append(record)
            elif record.num_deleted < record.num_rows:
                shards.append(_rewrite(path, record, shard_name(number)))
                number += 1
        if details.num_deleted:
            if not shards:
                raise DataError(f"{path}: every passage is deleted; build a new index instead of compacting this one")
            changes = {"shards": shards, "next_shard": number + 1}  # the BM25 side needs a new name too
            _publish(update, details.model_copy(update=changes), rebuild_bm25=True)
    clear_away(path, grace_s=grace_s)
    return open_artifact(path, kind=KIND, later=True)


def clear_away(path: str | Path, *, grace_s: float = GRACE_S) -> int:
    """Removes files that no longer belong to the index and are older than `grace_s`; returns how many."""
    path = place(path)
    num_removed = 0
    with update_artifact(path, kind=KIND) as update:  # the lock; the manifest is written again as it is
        for folder in ("shards", "deleted", "bm25"):
            for file in [f for f in (path / folder).rglob("*") if f.is_file()]:
                old = time.time() - file.stat().st_mtime >= grace_s
                if old and str(file.relative_to(path)) not in update.files:
                    file.unlink()
                    num_removed += 1
            for empty in [d for d in (path / folder).glob("*") if d.is_dir() and not any(d.iterdir())]:
                empty.rmdir()
            if (bucket := bucket_of(path / folder)) is not None:
                old_names = bucket.written_before(time.time() - grace_s)
                unused = [name for name in old_names if f"{folder}/{name}" not in update.files]
                in_parallel(bucket.remove, unused)
                num_removed += len(unused)
    return num_removed


def _drop_leftovers(shards: Path, first: int) -> None:
    """What an interrupted `add` left under the next numbers may be of another corpus."""
    bucket = bucket_of(shards)
    names = {name.partition("/")[0] for name in bucket.sizes()} if bucket is not None else set()
    for name in names | {folder.name for folder in shards.glob("*")}:
        if name.lstrip(".") >= shard_name(first):
            remove_folder(shards / name)


def _without(root: Path, shards: Sequence[ShardRecord], ids: pa.ChunkedArray) -> tuple[list[ShardRecord], list[str]]:
    """The shards with the live rows of `ids` deleted, and the ids that were found."""
    kept, found = [], []
    for record in shards:
        column = Shard(shard_path(root, record.name), files=record.files).table.column(PASSAGE_ID)
        mask = pc.is_in(column, value_set=ids).to_numpy().astype(bool)
        deleted = read_deleted(root, record)
        mask[deleted] = False
        rows = np.flatnonzero(mask)
        if len(rows):
            found += column.take(pa.array(rows)).to_pylist()
            record = write_deleted(root, record, np.union1d(deleted, rows))
        kept.append(record)
    return kept, found


def _rewrite(root: Path, record: ShardRecord, name: str) -> ShardRecord:
    """A copy of a shard, under a new name, without its deleted rows."""
    old, folder = shard_path(root, record.name), shard_path(root, name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    alive = np.ones(record.num_rows, dtype=bool)
    alive[read_deleted(root, record)] = False
    name_of = POSTINGS if POSTINGS in record.files else VECTORS
    file = checked(old / name_of, record.files[name_of])  # what is damaged must not get a new checksum
    if name_of == POSTINGS:
        postings = Postings.read(file)
        kept = postings.embeddings(np.flatnonzero(alive))
        Postings.of(kept, weight_type=postings.weight_type).write(folder / POSTINGS)
    else:
        # Read into memory: rebuilding may need a direct map, which a memory-mapped index cannot get.
        embeddings = Vectors(faiss.read_index(str(file))).reconstruct()[alive]
        vectors = Vectors.empty_copy(old / VECTORS)
        vectors.add(embeddings)
        vectors.write(folder / VECTORS)
    table = Shard(old, files=record.files).table
    rows = pa.chunked_array([pa.array(alive)])
    starts = range(0, record.num_rows, _REWRITTEN_ROWS)
    parts = (table.slice(at, _REWRITTEN_ROWS).filter(rows.slice(at, _REWRITTEN_ROWS)) for at in starts)
    write_passages(folder / PASSAGES, parts)
    return write_record(folder, name, int(alive.sum()))


def _publish(update: ArtifactUpdate, details: IndexDetails, *, rebuild_bm25: bool) -> None:
    """Writes the BM25 side of the new state and lists its files."""
    root = update.artifact.path
    if details.bm25_config is not None and rebuild_bm25:
        details = details.model_copy(update={"bm25": build_bm25(root, details, details.bm25_config)})
    files = {f"shards/{s.name}/{name}" for s in details.shards for name in [*s.files, "shard.json"]}
    files |= {shard.deleted for shard in details.shards if shard.deleted is not None}
    if details.bm25 is not None:
        old = {name for name in update.files if name.startswith(f"{details.bm25}/")}
        files |= old or {str(file.relative_to(root)) for file in (root / details.bm25).iterdir()}
    update.files = files
    update.details = details.with_version().as_details()
    update.counts |= {"passages": details.num_rows - details.num_deleted, "shards": len(details.shards)}


def _check_columns(root: Path, details: IndexDetails, source: EmbeddedCorpus) -> None:
    """Raises `DataError` unless the new passages have the columns of the old ones, which filters rely on."""
    old = Shard(shard_path(root, details.shards[0].name)).table.schema
    new = next(source.passages(0, source.num_passages)).schema
    if old.names != new.names:
        raise DataError(f"{root}: its passages have the columns {old.names}, the new ones {new.names}; they must agree")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(repr(id_) for id_ in ids[:_SHOWN_IDS]) + (", ..." if len(ids) > _SHOWN_IDS else "")
