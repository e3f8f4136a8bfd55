"""An artifact's files between its bucket and this machine: brought when needed, each once and checked; put there.

Notable: opening an artifact brings its manifest; a file of an older state is removed here when a newer manifest comes.
However many processes of a machine ask for a file, it is brought once. A file is compared with its checksum in the
manifest, so what is cut short or altered in the bucket is never opened.

    bring(place("s3://bucket/runs/a/index/shards/00003"))      the shard's files, on this machine
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from raydr import series
from raydr.errors import ArtifactError
from raydr.manifest import MANIFEST, FileRecord, Manifest, file_sha256, write_durably
from raydr.storage import LEASE, Bucket, bucket_of, in_parallel, locked, place

BRINGING = ".bringing"
"""The lock of whoever brings files into a folder."""


def bring(path: str | Path) -> Path:
    """The file or folder at `path`, on this machine: from its bucket where it has one and is not here yet.

    A file of an artifact is compared with its checksum. Nothing is brought, and nothing wrong, where the bucket has
    no such file: whoever opens it will say so.
    """
    path = place(path)
    bucket = bucket_of(path)
    if bucket is None:
        return path
    if path.is_file():
        series.count("raydr_cache_files_total", result="hit")
        return path
    inside = manifest_above(path)
    if inside is None:
        names = [name for name in bucket.sizes() if not (path / name).is_file()]
        with locked(path.parent, BRINGING, wait=True):
            if not names:
                bucket.pull("")
            in_parallel(bucket.pull, names)
        return path
    folder, manifest = inside
    prefix = path.relative_to(folder).as_posix()
    names = [name for name in manifest.files if name == prefix or prefix == "." or name.startswith(f"{prefix}/")]
    own = bucket_of(folder)
    if names and own is not None:
        bring_files(own, manifest, names)
    elif not names:
        bucket.pull("")  # a step's scratch, such as an index that shards start from
    return path


def manifest_above(path: Path) -> tuple[Path, Manifest] | None:
    """The finished artifact's folder that a place is or lies in, as known on this machine or else in the bucket."""
    for folder in (path, *path.parents):
        bucket = bucket_of(folder)
        if bucket is None or "/" not in bucket.url.partition("://")[2]:  # a bucket itself is no artifact
            return None
        if not (folder / MANIFEST).is_file():
            bring_manifest(bucket)
        with suppress(OSError, ValidationError):
            return folder, Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    return None


def bring_manifest(bucket: Bucket) -> None:
    """Makes this machine's manifest the bucket's; files here that are not of that state are removed."""
    content = bucket.read(MANIFEST)
    folder = bucket.place
    if content is None:
        (folder / MANIFEST).unlink(missing_ok=True)
        return
    if (folder / MANIFEST).is_file() and (folder / MANIFEST).read_bytes() == content:
        return
    with locked(folder, BRINGING, wait=True):
        known: dict[str, FileRecord] = {}
        with suppress(OSError, ValidationError):
            known = Manifest.model_validate_json((folder / MANIFEST).read_bytes()).files
        with suppress(ValidationError):  # which opening it will tell
            for name, record in Manifest.model_validate_json(content).files.items():
                file = folder / name
                if file.is_file() and known.get(name) != record and file_sha256(file) != record.sha256:
                    file.unlink()
        write_durably(folder / MANIFEST, content)


def bring_files(bucket: Bucket, manifest: Manifest, names: Iterable[str]) -> None:
    """Each file once on a machine, however many of its processes ask for it."""
    names = list(names)
    missing = [name for name in names if not (bucket.place / name).is_file()]
    series.count("raydr_cache_files_total", len(names) - len(missing), result="hit")
    if not missing:
        return
    with locked(bucket.place, BRINGING, wait=True):

        def one(name: str) -> None:
            if (bucket.place / name).is_file():  # another process has brought it meanwhile
                series.count("raydr_cache_files_total", result="hit")
                return
            series.count("raydr_cache_files_total", result="miss")
            if not bucket.pull(name, manifest.files[name].sha256):
                raise ArtifactError(f"{bucket.url}/{name}: listed in {MANIFEST} but missing; make the artifact again")

        in_parallel(one, missing)


def take_there(bucket: Bucket, here: dict[str, FileRecord], known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Puts the files that are here into the bucket; records of all that it then has."""
    there = {name: size for name, size in bucket.sizes().items() if not is_hidden(name)}
    in_parallel(
        bucket.push,
        [name for name, record in here.items() if there.get(name) != record.bytes or known.get(name) != record],
    )
    others = [name for name in there if name not in here and name not in known]
    prints = dict(zip(others, in_parallel(bucket.sha256, others), strict=True))
    read = {name: FileRecord(bytes=there[name], sha256=sha256) for name, sha256 in prints.items()}
    return {**read, **{name: record for name, record in known.items() if name in there}, **here}


def clear(bucket: Bucket, kept: str) -> None:
    bucket.remove(MANIFEST)
    in_parallel(bucket.remove, [name for name in bucket.sizes() if name not in (LEASE, kept)])


def is_hidden(name: str) -> bool:
    return name == MANIFEST or any(part.startswith(".") for part in name.split("/"))
