"""What a finished step says about itself, and how a file is put on disk so that no crash leaves half of it. No Ray.

Notable: a manifest has the checksum of every file, and its own. A name is on disk when its folder is synced, so files
and all folders down to them are synced before the manifest takes its name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from raydr.config import Config

MANIFEST = "manifest.json"
_LONGEST_NAME = 255
_CHUNK_BYTES = 1 << 20


def inside(name: str) -> str:
    """`name`, where it is that of a file in a folder. Raises `ValueError` for one that leads out of it, or nowhere."""
    parts = name.split("/")
    if "\0" in name or any(part in ("", ".", "..") or len(part.encode()) > _LONGEST_NAME for part in parts):
        raise ValueError(f"the file name {name[:300]!r} leaves the artifact's folder, or is none")
    return name


FileName = Annotated[str, AfterValidator(inside)]
"""Relative, in a folder that it does not leave."""


class FileRecord(Config):
    """Size and SHA-256 of one data file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileRecord:
        return cls(bytes=file.stat().st_size, sha256=file_sha256(file))

    def is_of(self, file: Path, *, again: bool = True) -> bool:
        """Whether that file is there, with this content, all of which is read; see `known_sha256` without `again`."""
        read = file_sha256 if again else known_sha256
        return file.is_file() and file.stat().st_size == self.bytes and read(file) == self.sha256


class Manifest(Config):
    """What a finished step says about itself."""

    kind: str
    """What the artifact is: corpus, embeddings, index, run, evaluation."""
    fingerprint: str
    """SHA-256 over kind, config and the inputs' fingerprints: equal fingerprints mean the same step."""
    raydr_version: str
    created_at: str
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The resolved configuration of the step."""
    inputs: dict[str, str]
    """Name of each input artifact -> its fingerprint."""
    counts: dict[str, int]
    """How many passages, queries, shards ... the step handled."""
    details: dict[str, Any]
    """What the step wants its readers to know: encoder stamp, dimension, rates."""
    files: dict[FileName, FileRecord]
    """Relative name of each data file -> size and checksum."""
    paths: dict[str, str] = Field(default_factory=dict)
    """Each path in `config` or `details` that lies in an artifact -> the same, seen from this artifact's folder."""
    checksum: str = ""
    """SHA-256 of all of the above; empty in those that an older raydr wrote."""

    @model_validator(mode="after")
    def _undamaged(self) -> Manifest:
        if self.checksum and self.checksum != self._sha256():
            raise ValueError("differs from its own checksum; delete the artifact's folder and make it again")
        return self

    def as_json(self) -> bytes:
        """What stands in the file, checksum included."""
        return self.model_copy(update={"checksum": self._sha256()}).model_dump_json(indent=2).encode()

    def _sha256(self) -> str:
        content = json.loads(self.model_dump_json(exclude={"checksum"}))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """`file_sha256` of a file that is opened many times, such as a model's: read anew only when size or time differ."""
    stat = path.stat()
    return _sha256_of(str(path), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256_of(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 (size and time are the cache's key)
    return file_sha256(Path(path))


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` with `content` so that a crash or power cut leaves either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it would take what is left
        raise
    fsync(path.parent)


def make_folder(path: Path) -> None:
    """A folder and those above it that are missing, so that a power cut takes none of them back."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def sync_files(folder: Path, names: Iterable[str]) -> None:
    """Files below a folder, and the folders they lie in up to this one: contents and names are then on disk."""
    folders = {folder}
    for name in names:
        fsync(folder / name)
        folders |= {folder / parent for parent in Path(name).parents}
    for each in sorted(folders, reverse=True):  # the deepest first
        fsync(each)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
