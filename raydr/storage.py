"""Folders in a bucket, each with a place on every machine: where a URL is allowed, and how files get there and back.

Notable: `s3://bucket/runs/a` has its place under `RAYDR_CACHE` (default ~/.cache/raydr), and all of raydr works with
that place as with any path; the bucket has the truth, and a place holds as much of it as this machine has needed
(raydr/artifacts.py keeps the two in step). Any scheme that pyarrow or fsspec knows is one, but for http and file.
A bucket's own settings come from where its tools look for them: `AWS_ENDPOINT_URL`, `AWS_PROFILE`, instance roles.

    place("s3://bucket/runs/a")                  ~/.cache/raydr/s3/bucket/runs/a
    bucket = bucket_of(place("s3://bucket/runs/a"))
    bucket.write("notes.txt", b"..."), bucket.read("notes.txt"), bucket.sizes()
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import PlainSerializer, PlainValidator

from raydr import series
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.secrets import holds_secret

CACHE_VARIABLE = "RAYDR_CACHE"
_NO_FOLDERS = {"http", "https", "file", "local", "data"}
_CHUNK_BYTES = 4 << 20
_THREADS = 8
LEASE = ".lease"
BEAT_S = 5.0
PATIENCE_S = 20.0
"""A lease that has not been renewed for so long belongs to nobody; four times the time between two renewals."""


class Place(type(Path())):
    """The path of a folder or file in a bucket; another process finds it again in its own machine's cache."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        url = url_of(self)
        return super().__reduce__() if url is None else (place, (url,))


def refuse_secrets(url: str) -> str:
    """`url`. Raises `ConfigError`, which does not repeat it, where manifests and logs must not have it either."""
    if holds_secret(url):
        raise ConfigError(
            "a URL with a password or key in it, which manifests and logs would keep: give the credentials in the "
            "environment (AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ...) or to the machine's role"
        )
    return url


def connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it. Raises `DataError` for a scheme that nothing here knows,
    `ConfigError` for a URI with a password in it.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), Path(uri).expanduser().absolute().as_posix()
    refuse_secrets(uri)
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        import fsspec

        if uri.partition("://")[0] not in fsspec.available_protocols():
            raise DataError(f"{uri}: neither pyarrow nor fsspec can open this URI: {error}") from error
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"{uri}: fsspec cannot open this URI: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def is_url(location: str | Path) -> bool:
    """Whether it names something in a bucket."""
    scheme, found, _ = str(location).partition("://")
    return bool(found) and scheme.isalnum() and scheme not in _NO_FOLDERS


def place(location: str | Path) -> Path:
    """The path of a location: its place on this machine where it is a URL. Raises `ConfigError` for what has none."""
    refuse_secrets(str(location))
    if not is_url(location):
        return Path(location) if url_of(location) is None else Place(location)
    scheme, _, rest = str(location).partition("://")
    parts = PurePosixPath(rest).parts
    if "?" in rest or ".." in parts or not parts or parts[0] == "/":
        raise ConfigError(
            f"{location}: not a folder of a bucket (scheme://bucket/folder); settings of the bucket go into the "
            "environment, AWS_ENDPOINT_URL for one"
        )
    return Place(_root() / scheme / PurePosixPath(*parts))


def url_of(path: str | Path) -> str | None:
    """The URL of a place; None for any other path."""
    root, path = _root(), Path(path)
    if not path.is_relative_to(root):
        return None
    scheme, *parts = path.relative_to(root).parts or ("",)
    return f"{scheme}://{'/'.join(parts)}" if parts else None


def named(path: str | Path) -> str:
    """What a path is called on every machine: its URL where it is a place."""
    return url_of(path) or str(path)


def _root() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/raydr").expanduser().resolve()


def _placed(value: Any) -> Path:
    if not isinstance(value, (str, Path)):
        raise ValueError(f"must be a path or a URL, not {value!r}")  # noqa: TRY004 (pydantic tells nobody of others)
    try:
        return place(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


Location = Annotated[
    Path,
    PlainValidator(_placed, json_schema_input_type=str),
    PlainSerializer(named, when_used="json"),
]
"""A path, or the URL of a folder in a bucket, whose place it then is."""


@dataclass(frozen=True)
class Bucket:
    """The bucket's side of a place. Its errors are `ArtifactError`s that name the URL."""

    place: Path
    url: str
    filesystem: pafs.FileSystem
    path: str
    """Of the folder (or file), on the filesystem."""

    def read(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        with self._telling(name):
            try:
                with self.filesystem.open_input_stream(self._at(name)) as stream:
                    content = stream.read()
                series.count("raydr_bucket_bytes_total", len(content), direction="read")
                return content
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file at once: a reader sees the old one or the new one."""
        with self._telling(name):
            self._with_parent(name)
            with self.filesystem.open_output_stream(self._at(name)) as stream:
                stream.write(content)
        series.count("raydr_bucket_bytes_total", len(content), direction="written")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its name, at any depth."""
        return {name: int(info.size or 0) for name, info in self._files().items()}

    def written_before(self, time_s: float) -> list[str]:
        """Names of the files that are older than a Unix time."""
        return [name for name, info in self._files().items() if (info.mtime_ns or 0) < time_s * 1e9]

    def _files(self) -> dict[str, pafs.FileInfo]:
        with self._telling(""):
            infos = self.filesystem.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
        root = self.path.rstrip("/") + "/"
        found = {info.path.removeprefix(root): info for info in infos if info.type == pafs.FileType.File}
        for name in found:  # a bucket may call a file anything; on this machine it would lie somewhere else
            if ".." in name.split("/") or name.startswith("/"):
                raise ArtifactError(f"{self.url}: holds {name!r}, a name that leads out of this folder; remove it")
        return found

    def pull(self, name: str, sha256: str | None = None) -> bool:
        """Puts a file into its place, whole or not at all; False where there is none.

        Raises `ArtifactError` where its checksum is not `sha256`.
        """
        target = self.place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        digest = hashlib.sha256()
        try:
            with self._telling(name):
                try:
                    source = self.filesystem.open_input_stream(self._at(name))
                except FileNotFoundError:
                    return False
                with source, temporary.open("wb") as sink:
                    while chunk := source.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        sink.write(chunk)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise ArtifactError(f"{self.url}/{name}: differs from its checksum; make the artifact again")
            temporary.replace(target)
            series.count("raydr_bucket_bytes_total", target.stat().st_size, direction="read")
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def push(self, name: str) -> None:
        """Copies a file from its place."""
        with self._telling(name):
            self._with_parent(name)
            with (self.place / name).open("rb") as source, self.filesystem.open_output_stream(self._at(name)) as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    sink.write(chunk)
        series.count("raydr_bucket_bytes_total", (self.place / name).stat().st_size, direction="written")

    def sha256(self, name: str) -> str:
        """Of a file that is in the bucket, which is read for it and not kept."""
        digest = hashlib.sha256()
        with self._telling(name), self.filesystem.open_input_stream(self._at(name)) as source:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def remove(self, name: str) -> None:
        with self._telling(name):
            try:
                self.filesystem.delete_file(self._at(name))
            except FileNotFoundError:
                return

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def _with_parent(self, name: str) -> None:
        """Buckets have no folders to make; Hadoop and the filesystems of fsspec have."""
        if self.filesystem.type_name not in {"s3", "gcs", "abfs"}:
            self.filesystem.create_dir(self._at(name).rpartition("/")[0], recursive=True)

    @contextmanager
    def _telling(self, name: str) -> Generator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.url}/{name}: not there: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(f"{self.url}/{name}: cannot be reached: {error}") from error


def bucket_of(path: str | Path) -> Bucket | None:
    """The bucket's side of a place; None for a path that is on this machine alone."""
    url = url_of(path)
    if url is None:
        return None
    scheme, _, rest = url.partition("://")
    bucket, _, folder = rest.partition("/")
    filesystem, root = _connected(f"{scheme}://{bucket}", os.environ.get("AWS_ENDPOINT_URL"))
    return Bucket(Path(path), url, filesystem, f"{root.rstrip('/')}/{folder}" if folder else root)


@functools.cache
def _connected(url: str, endpoint: str | None) -> tuple[pafs.FileSystem, str]:  # noqa: ARG001 (a part of the key)
    return connect(url)


def reach(paths: Iterable[Path]) -> tuple[pafs.FileSystem, list[str]]:
    """Where files lie for whoever reads them anywhere in the cluster: in the bucket, or under the paths themselves."""
    paths = list(paths)
    buckets = [bucket_of(path) for path in paths]
    if paths and (first := buckets[0]) is not None:
        return first.filesystem, [bucket.path for bucket in buckets if bucket is not None]
    return pafs.LocalFileSystem(), [str(path.resolve()) for path in paths]


def files_in(folder: Path) -> list[Path]:
    """Files right in a folder, in its bucket where it has one; hidden ones are left out."""
    bucket = bucket_of(folder)
    names = bucket.sizes() if bucket is not None else [f.name for f in folder.glob("*") if f.is_file()]
    return [folder / name for name in sorted(names) if "/" not in name and not name.startswith(".")]


def latest(file: Path) -> Path:
    """A file or folder that changes under its name, as its bucket has it now; as it is where there is no bucket."""
    bucket = bucket_of(file)
    if bucket is None or bucket.pull(""):
        return file
    file.unlink(missing_ok=True) if file.is_file() else shutil.rmtree(file, ignore_errors=True)
    in_parallel(bucket.pull, bucket.sizes())
    return file


def publish(path: Path) -> None:
    """Puts a file, or all files of a folder, into the bucket, where there is one, in place of what was there."""
    bucket = bucket_of(path)
    if bucket is None:
        return
    if path.is_file():
        bucket.push("")
        return
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    in_parallel(bucket.push, names)
    in_parallel(bucket.remove, bucket.sizes().keys() - names)


def remove_folder(folder: Path) -> None:
    """Here and in its bucket; one that is not there stays so."""
    shutil.rmtree(folder, ignore_errors=True)
    if (bucket := bucket_of(folder)) is not None:
        in_parallel(bucket.remove, bucket.sizes())


def remove_file(file: Path) -> None:
    """Here and in its bucket; one that is not there stays so."""
    file.unlink(missing_ok=True)
    if (bucket := bucket_of(file)) is not None:
        bucket.remove("")


def exists(path: Path) -> bool:
    """Whether a folder is there, in its bucket where it has one."""
    bucket = bucket_of(path)
    return path.exists() if bucket is None else bool(bucket.sizes())


def in_parallel(work: Any, names: Iterable[str]) -> list[Any]:
    """`work` of each name, in threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, names))


@contextmanager
def locked(folder: Path, name: str, *, wait: bool) -> Generator[bool]:
    """Holds a lock of this machine; the kernel drops it when the process dies, so no stale lock can remain.

    Yields whether it is held, which it always is with `wait`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass(frozen=True)
class Lease:
    """A folder of a bucket that is held against the writers of other machines."""

    bucket: Bucket
    owner: str

    def is_held(self) -> bool:
        """Whether nobody has taken it over, as they may from one that was asleep for `PATIENCE_S`."""
        return _of_lease(self.bucket.read(LEASE)).get("owner") in (self.owner, None)

    def check(self) -> None:
        """Raises `ArtifactError` where it is no longer held: what was written since is not to be published."""
        if not self.is_held():
            raise ArtifactError(
                f"{self.bucket.url}: another machine writes this artifact since this one was away for more than "
                f"{PATIENCE_S:.0f} s (asleep, or cut off from the bucket); wait for it to finish"
            )


@contextmanager
def leased(bucket: Bucket) -> Generator[Lease | None]:
    """Holds a folder of a bucket against the writers of other machines; None where one of them holds it.

    The lease is a small file that its owner renews. One that stays the same for `PATIENCE_S` belongs to nobody any
    more, whatever the clocks say, and one of this machine neither: whoever asks holds the machine's lock already.
    Buckets have no lock: two writers that ask within one request's time of each other can both be let in.
    """
    host = socket.gethostname()
    beat = {"host": host, "owner": uuid.uuid4().hex, "count": 0}
    lease = Lease(bucket, str(beat["owner"]))
    ended = threading.Event()
    seen = bucket.read(LEASE)
    if seen is not None and _of_lease(seen).get("host") != host:
        ended.wait(PATIENCE_S)
        if bucket.read(LEASE) not in (seen, None):
            yield None
            return

    def renew() -> None:
        while not ended.wait(BEAT_S):
            beat["count"] += 1
            with suppress(ArtifactError):  # a bucket that is away for a while may come back in time
                if not lease.is_held():
                    return
                bucket.write(LEASE, json.dumps(beat).encode())

    bucket.write(LEASE, json.dumps(beat).encode())
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        if lease.is_held():
            bucket.remove(LEASE)


def _of_lease(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
