"""What a step leaves on disk: a folder of data files with `manifest.json` written last.

Notable: the manifest's existence means the step finished, so a half-written step is never taken for a finished one;
files carry checksums. A step is skipped when a finished artifact with the same fingerprint (kind, config, input
fingerprints) is there. Folders can be moved: names inside are relative, a manifest also knows where the artifacts that
its settings name lie as seen from its own, and a fingerprint knows these by what they are, not where. A folder that
raydr did not make is never overwritten, and two processes cannot write one artifact at the same time.

An artifact may lie in a bucket (raydr/storage.py). Opening it brings its manifest to this machine, and its files unless
they are left for later (`bring`), each once and checked; writing it takes files there as steps put them under `path`,
the manifest last. A file of an older state is removed here when a newer manifest comes.

    with write_artifact("runs/a/embed", kind="embeddings", config=config, inputs={"corpus": corpus}) as writer:
        (writer.path / "part-0.parquet").write_bytes(...)
        writer.counts["passages"] = 10
    artifact = open_artifact("runs/a/embed", kind="embeddings")
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from raydr.bucket import BRINGING, bring, bring_files, bring_manifest, clear, is_hidden, manifest_above, take_there
from raydr.errors import LESS_MEMORY, ArtifactError, ConfigError, RaydrError, is_out_of_memory
from raydr.manifest import (
    MANIFEST,
    FileName,
    FileRecord,
    Manifest,
    file_sha256,
    fsync,
    inside,
    make_folder,
    sync_files,
    write_durably,
)
from raydr.storage import Bucket, Lease, bucket_of, in_parallel, leased, locked, named, place, url_of
from raydr.version import __version__

__all__ = [  # those of other modules, as the rest of raydr knows them
    "MANIFEST",
    "FileName",
    "FileRecord",
    "Manifest",
    "bring",
    "checked",
    "file_sha256",
    "write_durably",
]

_IN_PROGRESS = ".in_progress"
_CLEARING = b"clearing"
_NEXT_TO_NOTHING = 1 << 20
"""Bytes; a disk with less is full."""
_LOCK = ".lock"
_OF_THE_DISK = {
    errno.ENOSPC: "the disk is full: free some space, or give another place (out=...)",
    errno.EDQUOT: "the quota of the disk is used up: free some space, or give another place (out=...)",
    errno.EFBIG: "the file would be larger than this disk or `ulimit -f` allows: give another place (out=...)",
    errno.EROFS: "the disk is read-only: mount it for writing, or give another place (out=...)",
}


_AGAIN = "it was damaged after it was written: delete the artifact's folder, and give the command that made it again"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def verify(self, below: str = "", *, again: bool = True) -> None:
        """Compares every file (`below` a folder) with its checksum. Raises `ArtifactError` naming the first that
        differs. Without `again` a file that this process has compared before, and that looks the same, is not read.
        """
        names = [n for n in self.manifest.files if n == below or n.startswith(f"{below}/" if below else "")]
        in_parallel(lambda name: checked(self.path / name, self.manifest.files[name], again=again), names)


def checked(file: Path, record: FileRecord, *, again: bool = True) -> Path:
    """A file of an artifact, on this machine, all of it compared with its checksum. Raises `ArtifactError` naming it.

    What a disk has damaged must not be answered from. It costs one reading, which whoever searches does anyway.
    """
    bucket = bucket_of(file)
    if bucket is not None and file.is_file() and not record.is_of(file, again=again):
        file.unlink()  # a copy, of which the bucket has the original
    if not record.is_of(bring(file), again=again):
        problem = f"differs from its checksum in {MANIFEST}" if file.is_file() else f"listed in {MANIFEST} but missing"
        raise ArtifactError(f"{file}: {problem}; {_AGAIN}")
    return file


@dataclass
class ArtifactWriter:
    """An artifact being written. Files put under `path` are recorded when the `with` block ends without an error."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    records: dict[str, FileRecord] = field(default_factory=dict)
    """Of files that others have put into the artifact's bucket and taken checksums of; what is missing here is read."""


def fingerprint(kind: str, config: BaseModel | Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 (hex) of what decides a step's outcome."""
    settings = _as_json(config)
    known = {value: _identity(value, artifact) for _, value, artifact in _named_in("", settings)}
    content = {"kind": kind, "config": _replaced(settings, known), "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_finished(path: str | Path, expected_fingerprint: str | None = None) -> bool:
    """Whether a finished artifact lies at `path` (and, where given, is the one with this fingerprint)."""
    path = place(path)
    if (bucket := bucket_of(path)) is not None:
        bring_manifest(bucket)
    if not (path / MANIFEST).is_file():
        return False
    return expected_fingerprint is None or open_artifact(path, later=True).fingerprint == expected_fingerprint


def open_artifact(path: str | Path, *, kind: str | None = None, later: bool = False) -> Artifact:
    """The finished artifact at `path`. Raises `ArtifactError` when there is none, or it is of another kind.

    Its files are compared with their checksums. `later`: they are not read here, only their sizes are compared, and
    those in a bucket stay there; whoever reads one asks for it with `checked` or `bring`.
    """
    path = place(path)
    bucket = bucket_of(path)
    if bucket is not None:
        bring_manifest(bucket)
    if not (path / MANIFEST).is_file():
        unfinished = (path / _IN_PROGRESS).exists() or (bucket is not None and bucket.read(_IN_PROGRESS) is not None)
        reason = "its step did not finish; run it again, it resumes" if unfinished else "no artifact here"
        raise ArtifactError(f"{named(path)}: {reason} (no {MANIFEST})")
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{named(path / MANIFEST)}: not a raydr manifest: {error}") from error
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{named(path)}: holds {manifest.kind!r}, but {kind!r} is needed here")
    if bucket is not None and not later:
        bring_files(bucket, manifest, manifest.files)
    for name, record in manifest.files.items():
        file = path / name
        if bucket is not None and later and not file.exists():
            continue
        if not file.is_file() or file.stat().st_size != record.bytes:
            raise ArtifactError(f"{file}: missing or truncated; {_AGAIN}")
    artifact = Artifact(path, _as_seen_from(path, manifest))
    if not later:
        artifact.verify()
    return artifact


def artifact_of(path: str | Path) -> Artifact | None:
    """The finished artifact that `path` is or lies in; None where it is in none, or there is no such path."""
    try:
        found = place(path)
        if bucket_of(found) is not None:
            above = manifest_above(found)
            return None if above is None else Artifact(above[0], _as_seen_from(*above))
        found = found.resolve(strict=True)
    except (OSError, ValueError, ConfigError):  # any text may be asked about, also one that no file could be called
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
    return {"artifact": artifact.fingerprint, "inside": str(place(path).resolve().relative_to(artifact.path))}


def _paths_from(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    return {path: os.path.relpath(place(path).resolve(), folder.resolve()) for _, path, _ in _named_in("", settings)}


def _as_seen_from(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the paths that have moved together with `folder` as they are now."""
    now = {old: (folder / seen).resolve() for old, seen in manifest.paths.items()}
    now = {old: new for old, new in now.items() if place(old).resolve() != new}
    moved = {old: url_of(new) or str(new) for old, new in now.items() if new.exists() or artifact_of(new) is not None}
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
    path = place(path)
    bucket = bucket_of(path)
    input_prints = {name: artifact.fingerprint for name, artifact in (inputs or {}).items()}
    print_ = fingerprint(kind, config, input_prints)
    marker = path / _IN_PROGRESS
    with ExitStack() as stack:
        stack.enter_context(_told(path))
        _check_ours(path, bucket)
        make_folder(path)
        lease = stack.enter_context(_exclusive(path, bucket))
        if not (resume and marker.exists() and marker.read_text() == print_):
            write_durably(marker, _CLEARING)  # so that what a crash leaves here is known to be ours, and of nobody
            _clear(path)
        write_durably(marker, print_.encode())
        if bucket is not None and not (resume and bucket.read(_IN_PROGRESS) == print_.encode()):
            bucket.write(_IN_PROGRESS, _CLEARING)
            clear(bucket, _IN_PROGRESS)
            bucket.write(_IN_PROGRESS, print_.encode())
        writer = ArtifactWriter(path)
        yield writer
        # Hidden files are a step's own scratch (checkpoints, locks); everything else is part of the artifact.
        names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and not _hidden(f, path))
        records = {name: FileRecord.of(path / name) for name in names}
        if bucket is not None:
            records = take_there(bucket, records, writer.records)
        manifest = Manifest(
            kind=kind,
            fingerprint=print_,
            raydr_version=__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            config=_as_json(config),
            inputs=input_prints,
            counts=writer.counts,
            details=_portable(writer.details),
            files=dict(sorted(records.items())),
            paths=_paths_from(path, {"config": _as_json(config), "details": _as_json(writer.details)}),
        )
        sync_files(path, names)
        _publish(path, lease, manifest)
        marker.unlink()
        if bucket is not None:
            bucket.remove(_IN_PROGRESS)


def _check_ours(path: Path, bucket: Bucket | None) -> None:
    if path.exists() and any(path.iterdir()) and not (path / _IN_PROGRESS).exists() and not (path / MANIFEST).exists():
        begun = (BRINGING, _LOCK, f".{_IN_PROGRESS}.")  # the last: half written, where a crash came as early as that
        if any(not file.name.startswith(begun) for file in path.iterdir()):
            raise ArtifactError(
                f"{path}: holds files that raydr did not make; choose another `out` or empty it yourself"
            )
    if bucket is not None and bucket.read(MANIFEST) is None and bucket.read(_IN_PROGRESS) is None and bucket.sizes():
        raise ArtifactError(
            f"{bucket.url}: holds files that raydr did not make; choose another `out` or empty it yourself"
        )


def _publish(path: Path, lease: Lease | None, manifest: Manifest) -> None:
    content = manifest.as_json()
    if lease is not None:
        lease.check()
        lease.bucket.write(MANIFEST, content)
    write_durably(path / MANIFEST, content)


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
    path = place(path)
    bucket = bucket_of(path)
    open_artifact(path, kind=kind, later=True)  # no lock file is left in a folder that is not ours
    with _told(path), _exclusive(path, bucket) as lease:
        artifact = open_artifact(path, kind=kind, later=True)
        old = artifact.manifest
        update = ArtifactUpdate(artifact, dict(old.counts), dict(old.details), set(old.files))
        yield update
        records = {}
        for name in sorted(update.files):
            inside(name)
            if name in old.files:
                records[name] = old.files[name]
                continue
            if bucket is not None and not (path / name).is_file():  # another machine has put it there
                bring(path / name)
            elif bucket is not None:
                bucket.push(name)
            records[name] = FileRecord.of(path / name)
        sync_files(path, [name for name in records if name not in old.files and (path / name).is_file()])
        changes = {"counts": update.counts, "details": _portable(update.details), "files": records}
        _publish(path, lease, old.model_copy(update=changes))


@contextmanager
def _exclusive(path: Path, bucket: Bucket | None) -> Generator[Lease | None]:
    """Holds the folder's lock, and its bucket's lease, which it gives."""
    with ExitStack() as stack:
        held, lease = stack.enter_context(locked(path, _LOCK, wait=False)), None
        if held and bucket is not None:  # whoever holds the machine's lock may take over this machine's lease
            lease = stack.enter_context(leased(bucket))
        if not held or (bucket is not None and lease is None):
            raise ArtifactError(f"{named(path)}: another process is writing this artifact; wait for it to finish")
        yield lease


@contextmanager
def _told(path: Path) -> Generator[None]:
    """Says which disk is full or read-only, or that memory was short, and what to do, whoever noticed it: Arrow, FAISS
    or a Ray task.
    """
    try:
        yield
    except RaydrError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise RaydrError(f"{named(path)}: {LESS_MEMORY}") from error
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number is None and shutil.disk_usage(path).free < _NEXT_TO_NOTHING:
            number = errno.ENOSPC  # numpy says only that less was written than it wanted
        for known, way_out in _OF_THE_DISK.items():
            if number == known or os.strerror(known) in str(error):
                again = "; then give the same command again, which goes on from what is whole"
                raise ArtifactError(f"{named(path)}: {way_out}{again} ({_shortly(error)})") from error
        raise


def _shortly(error: Exception) -> str:
    """The last line: errors of Ray's tasks bring their traceback along."""
    return str(error).strip().rpartition("\n")[2].strip()


def _clear(path: Path) -> None:
    if (path / MANIFEST).exists():
        (path / MANIFEST).unlink()
        fsync(path)  # before anything else goes, so that no crash in here can leave a "finished" artifact
    for child in path.iterdir():
        if child.name in (_LOCK, BRINGING, _IN_PROGRESS):
            continue
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def _hidden(file: Path, root: Path) -> bool:
    return is_hidden(file.relative_to(root).as_posix())


def _as_json(config: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Places as the URLs that they are of: another machine has its cache somewhere else."""
    settings = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    return _portable(json.loads(json.dumps(settings, default=str)))


def _portable(value: Any) -> Any:
    if isinstance(value, str):
        return (url_of(value) if value.startswith("/") else None) or value
    if isinstance(value, dict):
        return {key: _portable(part) for key, part in value.items()}
    return [_portable(part) for part in value] if isinstance(value, list) else value
