"""What a step leaves on disk: a folder of data files with `manifest.json` written last.

Notable: the manifest's existence means the step finished, so a half-written step is never taken for a finished one;
files carry checksums. A step is skipped when a finished artifact with the same fingerprint (kind, config, input
fingerprints) is there. Folders can be moved: names inside are relative, a manifest also knows where the artifacts that
its settings name lie as seen from its own, and a fingerprint knows these by what they are, not where. A folder that
raydr did not make is never overwritten, and two processes cannot write one artifact at the same time.

    with write_artifact("runs/a/embed", kind="embeddings", config=config, inputs={"corpus": corpus}) as writer:
        (writer.path / "part-0.parquet").write_bytes(...)
        writer.counts["passages"] = 10
    artifact = open_artifact("runs/a/embed", kind="embeddings")
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from raydr.config import Config
from raydr.errors import ArtifactError
from raydr.version import __version__

MANIFEST = "manifest.json"
_IN_PROGRESS = ".in_progress"
_CHUNK_BYTES = 1 << 20


class FileRecord(Config):
    """Size and SHA-256 of one data file."""

    bytes: int
    sha256: str


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
    files: dict[str, FileRecord]
    """Relative name of each data file -> size and checksum."""
    paths: dict[str, str] = Field(default_factory=dict)
    """Each path in `config` or `details` that lies in an artifact -> the same, seen from this artifact's folder."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def verify(self) -> None:
        """Compares every file with its checksum. Raises `ArtifactError` naming the first that differs."""
        for name, record in self.manifest.files.items():
            file = self.path / name
            if not file.is_file():
                raise ArtifactError(f"{file}: listed in {MANIFEST} but missing; make the artifact again")
            if file.stat().st_size != record.bytes or file_sha256(file) != record.sha256:
                raise ArtifactError(f"{file}: differs from its checksum in {MANIFEST}; make the artifact again")


@dataclass
class ArtifactWriter:
    """An artifact being written. Files put under `path` are recorded when the `with` block ends without an error."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def fingerprint(kind: str, config: BaseModel | Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 (hex) of what decides a step's outcome."""
    settings = _as_json(config)
    known = {value: _identity(value, artifact) for _, value, artifact in _named_in("", settings)}
    content = {"kind": kind, "config": _replaced(settings, known), "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_finished(path: str | Path, expected_fingerprint: str | None = None) -> bool:
    """Whether a finished artifact lies at `path` (and, where given, is the one with this fingerprint)."""
    if not (Path(path) / MANIFEST).is_file():
        return False
    return expected_fingerprint is None or open_artifact(path).fingerprint == expected_fingerprint


def open_artifact(path: str | Path, *, kind: str | None = None) -> Artifact:
    """The finished artifact at `path`. Raises `ArtifactError` when there is none, or it is of another kind.

    Sizes are checked here, which catches truncation for nothing; `Artifact.verify` also reads the checksums.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        unfinished = (path / _IN_PROGRESS).exists()
        reason = "its step did not finish; run it again, it resumes" if unfinished else "no artifact here"
        raise ArtifactError(f"{path}: {reason} (no {MANIFEST})")
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{path / MANIFEST}: not a raydr manifest: {error}") from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path}: holds {manifest.kind!r}, but {kind!r} is needed here")
    for name, record in manifest.files.items():
        _check_relative(path, name)
        file = path / name
        if not file.is_file() or file.stat().st_size != record.bytes:
            raise ArtifactError(f"{file}: missing or truncated; make the artifact again")
    return Artifact(path, _as_seen_from(path, manifest))


def artifact_of(path: str | Path) -> Artifact | None:
    """The finished artifact that `path` is or lies in; None where it is in none, or there is no such path."""
    try:
        found = Path(path).resolve(strict=True)
    except (OSError, ValueError):  # any text may be asked about, also one that no file could be called
        return None
    for folder in (found, *found.parents):
        with suppress(OSError, ValidationError):  # no manifest, or somebody else's
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
            return Artifact(folder, _as_seen_from(folder, manifest))
    return None


def artifacts_named_in(config: BaseModel | Mapping[str, Any]) -> dict[str, Artifact]:
    """The artifacts whose folders or files a configuration names, each by the dotted name of the setting.

    They are inputs of a step with that configuration: the name of a trained model's folder stays when the model is
    trained again. A path that lies in no artifact is known by its name alone.
    """
    return {name: artifact for name, _, artifact in _named_in("", _as_json(config))}


def _named_in(name: str, value: Any) -> Iterator[tuple[str, str, Artifact]]:
    """(dotted name, path, artifact) of each string in `value` that is a path in an artifact."""
    if isinstance(value, str):
        if value and (artifact := artifact_of(value)):
            yield name, value, artifact
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _named_in(f"{name}.{key}" if name else str(key), part)


def _replaced(value: Any, known: Mapping[str, Any]) -> Any:
    """`value` with each string that is in `known` replaced, at any depth."""
    if isinstance(value, str):
        return known.get(value, value)
    if isinstance(value, dict):
        return {key: _replaced(part, known) for key, part in value.items()}
    return [_replaced(part, known) for part in value] if isinstance(value, list) else value


def _identity(path: str, artifact: Artifact) -> dict[str, str]:
    """What a path in an artifact is, wherever it lies."""
    return {"artifact": artifact.fingerprint, "inside": str(Path(path).resolve().relative_to(artifact.path))}


def _paths_from(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    return {path: os.path.relpath(Path(path).resolve(), folder.resolve()) for _, path, _ in _named_in("", settings)}


def _as_seen_from(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the paths that have moved together with `folder` as they are now."""
    now = {old: (folder / seen).resolve() for old, seen in manifest.paths.items()}
    moved = {old: str(new) for old, new in now.items() if new.exists() and Path(old).resolve() != new}
    if not moved:
        return manifest
    changes = {name: _replaced(getattr(manifest, name), moved) for name in ("config", "details")}
    paths = {moved.get(old, old): seen for old, seen in manifest.paths.items()}
    return manifest.model_copy(update={**changes, "paths": paths})


@contextmanager
def write_artifact(
    path: str | Path,
    *,
    kind: str,
    config: BaseModel | Mapping[str, Any],
    inputs: Mapping[str, Artifact] | None = None,
    resume: bool = False,
) -> Generator[ArtifactWriter]:
    """Writes an artifact: files first, `manifest.json` last and atomically.

    Leftovers of an unfinished step with the same fingerprint stay in place with `resume=True` (the step decides what
    of them is good) and are removed otherwise, as is a finished artifact of other settings. Raises `ArtifactError`
    when `path` holds files raydr did not make, or another process is writing there.
    """
    path = Path(path)
    input_prints = {name: artifact.fingerprint for name, artifact in (inputs or {}).items()}
    print_ = fingerprint(kind, config, input_prints)
    marker = path / _IN_PROGRESS
    if path.exists() and any(path.iterdir()) and not marker.exists() and not (path / MANIFEST).exists():
        raise ArtifactError(f"{path}: holds files that raydr did not make; choose another `out` or empty it yourself")
    path.mkdir(parents=True, exist_ok=True)
    with _exclusive(path):
        if not (resume and marker.exists() and marker.read_text() == print_):
            _clear(path)
        write_durably(marker, print_.encode())
        writer = ArtifactWriter(path)
        yield writer
        # Hidden files are a step's own scratch (checkpoints, locks); everything else is part of the artifact.
        names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and not _hidden(f, path))
        manifest = Manifest(
            kind=kind,
            fingerprint=print_,
            raydr_version=__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            config=_as_json(config),
            inputs=input_prints,
            counts=writer.counts,
            details=writer.details,
            files={name: _record(path / name) for name in names},
            paths=_paths_from(path, {"config": _as_json(config), "details": _as_json(writer.details)}),
        )
        for name in names:
            _fsync(path / name)
        write_durably(path / MANIFEST, manifest.model_dump_json(indent=2).encode())
        marker.unlink()


@dataclass
class ArtifactUpdate:
    """A new state of an artifact: new files beside the old ones, and which of them all belong to it."""

    artifact: Artifact
    counts: dict[str, int]
    details: dict[str, Any]
    files: set[str]
    """Relative names of the files of the new state; files that are left out stay on disk for readers of the old."""


@contextmanager
def update_artifact(path: str | Path, *, kind: str) -> Generator[ArtifactUpdate]:
    """Publishes a new state of a finished artifact: files under new names first, then the manifest, atomically.

    A reader sees the old state or the new one, never a mixture; an error inside the `with` block changes nothing. The
    fingerprint stays: it says what the artifact was made from. Raises `ArtifactError` when there is no artifact, or
    another process is writing there.
    """
    path = Path(path)
    open_artifact(path, kind=kind)  # no lock file is left in a folder that is not ours
    with _exclusive(path):
        artifact = open_artifact(path, kind=kind)
        old = artifact.manifest
        update = ArtifactUpdate(artifact, dict(old.counts), dict(old.details), set(old.files))
        yield update
        records = {}
        for name in sorted(update.files):
            _check_relative(path, name)
            if name not in old.files:
                _fsync(path / name)
            records[name] = old.files.get(name) or _record(path / name)
        changes = {"counts": update.counts, "details": update.details, "files": records}
        write_durably(path / MANIFEST, old.model_copy(update=changes).model_dump_json(indent=2).encode())


def write_durably(path: Path, content: bytes) -> None:
    """Replaces `path` with `content` so that a crash or power cut leaves either the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    _fsync(path.parent)


@contextmanager
def _exclusive(path: Path) -> Generator[None]:
    """Holds the folder's lock; the kernel drops it when the process dies, so no stale lock can remain."""
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{path}: another process is writing this artifact; wait for it to finish") from None
        yield


def _clear(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first, so that a crash in here cannot leave a "finished" artifact
    for child in path.iterdir():
        if child.name == ".lock":
            continue
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def _record(file: Path) -> FileRecord:
    return FileRecord(bytes=file.stat().st_size, sha256=file_sha256(file))


def _hidden(file: Path, root: Path) -> bool:
    return file.name == MANIFEST or any(part.startswith(".") for part in file.relative_to(root).parts)


def _check_relative(root: Path, name: str) -> None:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtifactError(f"{root / MANIFEST}: the file name {name!r} leaves the artifact's folder")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(config: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, BaseModel):
        return config.model_dump(mode="json")
    return json.loads(json.dumps(dict(config), default=str))
