"""What an index says about itself: the typed form of `details` in its manifest, and the names of its files.

Notable: files never change once written. A new state (more shards, more deletions) is new files and a new manifest, so
a reader keeps the state it opened; `version` is a hash of the content, equal for equal indexes.

    shards/00000/{vectors.faiss,passages.arrow,shard.json}   deleted/00000-1f2e3d4c.npy   bm25/00000/...
    shards/00000/{postings.arrow,passages.arrow,shard.json}   of sparse embeddings
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from pydantic import Field, ValidationError

from raydr.artifacts import Artifact, FileName, FileRecord, bring, write_durably
from raydr.config import Component, Config
from raydr.data.images import ImageConfig
from raydr.errors import ArtifactError
from raydr.index.config import BM25Config, SearchParameters
from raydr.storage import bucket_of
from raydr.types import WeightType

KIND = "index"
SHARD_RECORD = "shard.json"


class ShardRecord(Config):
    """One shard: its folder in `shards/`, its size, its files' checksums, and which of its rows are deleted."""

    name: FileName
    num_rows: int = Field(ge=0)
    files: dict[FileName, FileRecord]
    deleted: FileName | None = None
    """File of the deleted rows (int64, `.npy`), relative to the index; null when there are none."""
    num_deleted: int = 0


class IndexDetails(Config):
    """`details` of an index's manifest."""

    version: str
    """Hash of the content: what a hit's answer depends on."""
    encoder_version: str
    """Stamp of the encoder that made the embeddings."""
    dim: int = Field(ge=1)
    method: Component
    """The method whose encoder made the embeddings."""
    title_separator: str
    """Between title and text where they are one string (BM25, rerankers)."""
    metric: str
    factory: str
    is_exact: bool
    """Whether the shards give true nearest neighbours."""
    is_split: bool
    """Whether passages were cut from documents (`document_id`)."""
    search: SearchParameters
    shards: list[ShardRecord]
    next_shard: int
    """Number of the next shard; numbers are never used twice."""
    bm25: FileName | None
    """Folder of the BM25 side, relative to the index; null when there is none."""
    bm25_config: BM25Config | None
    """How the BM25 side was built."""
    weight_type: WeightType | None = None
    """How the weights of sparse embeddings are stored; null: the embeddings are dense."""
    images: ImageConfig | None = None
    """How the passages' pictures were prepared, as those of queries have to be; null: there are none."""
    recall: dict[str, float] | None = None
    """recall@k of an approximate index against exact search, measured when it was built."""

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_deleted(self) -> int:
        return sum(shard.num_deleted for shard in self.shards)

    def with_version(self) -> IndexDetails:
        """The same with `version` computed from all else."""
        # Nothing of these decides an answer.
        beside = {"version", "recall", "next_shard", "bm25", "images", "weight_type"}
        content = json.dumps(self.model_dump(mode="json", exclude=beside), sort_keys=True)
        return self.model_copy(update={"version": hashlib.sha256(content.encode()).hexdigest()[:16]})

    def as_details(self) -> dict[str, Any]:
        optional = {name for name in ("images", "weight_type") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=optional)


def read_details(artifact: Artifact) -> IndexDetails:
    """The details of an index artifact. Raises `ArtifactError` when another version of raydr wrote them."""
    try:
        return IndexDetails.model_validate(artifact.manifest.details)
    except ValidationError as error:
        raise ArtifactError(
            f"{artifact.path}: its details are not readable (raydr {artifact.manifest.raydr_version} wrote it); "
            f"build the index again: {error}"
        ) from error


def shard_path(root: Path, name: str) -> Path:
    return root / "shards" / name


def shard_name(number: int) -> str:
    return f"{number:05d}"


def write_record(folder: Path, name: str, num_rows: int) -> ShardRecord:
    """Closes the folder of the shard that will be called `name`: `shard.json` with its checksums, written last."""
    files = {file.name: FileRecord.of(file) for file in sorted(folder.iterdir()) if file.name != SHARD_RECORD}
    record = ShardRecord(name=name, num_rows=num_rows, files=files)
    write_durably(folder / SHARD_RECORD, record.model_dump_json(indent=2).encode())
    return record


def read_record(folder: Path) -> ShardRecord | None:
    """The record of a finished shard whose files agree with their checksums; None for anything else.

    Of files in a bucket the sizes are compared; bringing them compares the rest.
    """
    bucket = bucket_of(folder)
    if bucket is not None:
        bucket.pull(SHARD_RECORD)
    try:
        record = ShardRecord.model_validate_json((folder / SHARD_RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    if bucket is not None:
        sizes = bucket.sizes()
        return record if all(sizes.get(name) == expected.bytes for name, expected in record.files.items()) else None
    return record if all(expected.is_of(folder / name) for name, expected in record.files.items()) else None


def write_deleted(root: Path, shard: ShardRecord, rows: Int64[np.ndarray, " deleted"]) -> ShardRecord:
    """Records `rows` (all deleted ones of the shard, ascending) in a new file named after its content."""
    name = f"deleted/{shard.name}-{_digest(rows)}.npy"
    (root / "deleted").mkdir(exist_ok=True)
    with (root / name).open("wb") as stream:
        np.save(stream, rows, allow_pickle=False)
    return shard.model_copy(update={"deleted": name, "num_deleted": len(rows)})


def read_deleted(root: Path, shard: ShardRecord) -> Int64[np.ndarray, " deleted"]:
    """Raises `ArtifactError` where the file is not the one that its name says."""
    if shard.deleted is None:
        return np.zeros(0, dtype=np.int64)
    path = bring(root / shard.deleted)
    try:
        rows = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy reads a header as Python, and raises what that raises
        raise ArtifactError(f"{path}: not readable: {error}; build the index again") from error
    if rows.dtype != np.int64 or rows.ndim != 1 or ((rows < 0) | (rows >= shard.num_rows)).any():
        raise ArtifactError(f"{path}: holds no rows of shard {shard.name}; build the index again")
    if shard.deleted != f"deleted/{shard.name}-{_digest(rows)}.npy":
        raise ArtifactError(f"{path}: differs from the checksum in its name, it was damaged; build the index again")
    return rows


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()[:12]
