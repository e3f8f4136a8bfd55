"""The pictures that the records of a source name: found, read, and prepared once, several at a time, in order.

Notable: a record holds a picture as bytes, as base64, or as the path of a file below the source's folder; a path that
leads out of that folder (`..`, an absolute one, a symbolic link) is refused, and nothing is ever fetched from a URL.
Pillow works without Python's lock, so threads prepare; only so many pictures wait that memory stays bounded.

    reader = ImageReader.of(ImageConfig(), Folder.open("data/shop"))
    image = reader.find("image", record["image"])               # bytes, a path, or None
    for prepared in prepare_here(pending, reader, scratch): ...
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import pyarrow.fs as pafs

from raydr.data.files import Folder
from raydr.data.images import BASE64_STARTS, ImageConfig, ImageError, decode_base64, prepare_image
from raydr.data.problems import BadFieldError

_LONGEST_PATH = 4096
_SHORTEST_BASE64 = 32
"""Characters; no file of a picture is as small."""
_WAITING_PER_THREAD = 4


class Origin(NamedTuple):
    """Where a record stands, to name it when its picture turns out to be bad."""

    file: str
    line: int
    field: str
    raw: Any
    """The record."""


class Pending(NamedTuple):
    """A record whose picture is not prepared yet."""

    row: list[Any]
    """What the caller wants back with the picture; values that JSON has."""
    image: bytes | str | None
    """A file's bytes, or its path below the source's folder; None without a picture."""
    origin: Origin


class Prepared(NamedTuple):
    """A record with its picture as it is stored, or with what is wrong with it."""

    row: list[Any]
    image: bytes | None
    origin: Origin
    error: ImageError | None = None


Prepare: TypeAlias = Callable[[Iterator[Pending], "ImageReader", Path], Iterator[Prepared]]
"""Prepares the pictures of records and gives these back in order; the path is a folder for what must be put down
meanwhile, which the one who calls removes.
"""


@dataclass(frozen=True)
class ImageReader:
    """Finds the pictures of one source, and prepares them; can be sent to other processes."""

    config: ImageConfig
    filesystem: pafs.FileSystem | None
    """None where the source is no folder and its pictures cannot be files."""
    root: str
    """The folder that paths begin at and may not leave."""

    @classmethod
    def of(cls, config: ImageConfig, folder: Folder | None) -> ImageReader:
        """For a source at `folder` (or a file in it); None where the source is neither."""
        if folder is None:
            return cls(config, None, "")
        root = PurePosixPath(folder.path).parent.as_posix() if folder.is_file else folder.path
        return cls(config, folder.filesystem, os.path.realpath(root) if _is_local(folder.filesystem) else root)

    def can_read(self) -> bool:
        """Whether files can be looked for from this machine: another may not see the folder."""
        return self.filesystem is None or not _is_local(self.filesystem) or Path(self.root).is_dir()

    def find(self, field: str, value: Any) -> bytes | str | None:
        """The picture that a field's value is or names; None where it holds none. Files are not looked at yet.

        Raises `BadFieldError` for a value that can be neither.
        """
        if isinstance(value, dict) and value and set(value) <= {"bytes", "path"}:  # Hugging Face's
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None or value in ("", b""):
            return None
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise BadFieldError(field, "must be a path, bytes or base64", f"got {type(value).__name__}")
        if "://" in value[:_LONGEST_PATH] and not value.startswith("data:"):
            raise BadFieldError(field, "is a URL, and pictures are not fetched", value[:100])
        if value.startswith(("data:", *BASE64_STARTS)) and len(value) >= _SHORTEST_BASE64:
            try:
                return decode_base64(value, self.config)
            except ImageError as error:
                if value.startswith("data:") or len(value) > _LONGEST_PATH:  # otherwise a path that begins like one
                    raise BadFieldError(field, error.reason, error.detail) from error
        if len(value) > _LONGEST_PATH:
            raise BadFieldError(field, "is neither a path nor the base64 of a picture")
        return value

    def prepare(self, image: bytes | str) -> bytes:
        """What is stored of a picture that was found. Raises `ImageError`."""
        if isinstance(image, bytes):
            return prepare_image(image, self.config)
        try:
            return prepare_image(self._read(image), self.config)
        except ImageError as error:
            raise ImageError(error.reason, f"{image}: {error.detail}" if error.detail else image) from error

    def _read(self, path: str) -> bytes:
        """A file below the root; no more of it than may be read."""
        if self.filesystem is None:
            raise ImageError("names a file, but this source has no folder")
        if "\0" in path or path.startswith(("/", "~")) or ".." in PurePosixPath(path).parts:
            raise ImageError("leads out of the source's folder", "give a path below data.path")
        where = f"{self.root.rstrip('/')}/{path}"
        if _is_local(self.filesystem):
            where = os.path.realpath(where)
            if not Path(where).is_relative_to(self.root):
                raise ImageError("leads out of the source's folder", f"by a symbolic link, to {where}")
        try:
            info = self.filesystem.get_file_info(where)
            if info.type != pafs.FileType.File:
                raise ImageError("names no file", f"there is none in {self.root}")
            if (info.size or 0) > self.config.max_bytes:
                raise ImageError("has too many bytes", f"{info.size:,}, and {self.config.max_bytes:,} are allowed")
            with self.filesystem.open_input_file(where) as stream:
                return stream.read(self.config.max_bytes + 1)
        except OSError as error:
            raise ImageError("cannot be read", str(error)) from error


def prepare_here(pending: Iterator[Pending], reader: ImageReader, scratch: Path) -> Iterator[Prepared]:
    """Prepares pictures in threads of this process, in order; nothing is put down."""
    del scratch
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="picture")
    waiting: deque[tuple[Pending, Future[Prepared] | None]] = deque()
    try:
        for one in pending:
            waiting.append((one, pool.submit(prepare_one, one, reader) if one.image is not None else None))
            while waiting and (len(waiting) > _WAITING_PER_THREAD * num_threads or _is_done(waiting[0][1])):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def prepare_one(pending: Pending, reader: ImageReader) -> Prepared:
    """The record with its picture prepared, or with the reason why it cannot be."""
    try:
        image = None if pending.image is None else reader.prepare(pending.image)
    except ImageError as error:
        return Prepared(pending.row, None, pending.origin, error)
    return Prepared(pending.row, image, pending.origin)


def _is_done(future: Future[Prepared] | None) -> bool:
    return future is None or future.done()


def _result(one: Pending, future: Future[Prepared] | None) -> Prepared:
    return Prepared(one.row, None, one.origin) if future is None else future.result()


def _is_local(filesystem: pafs.FileSystem) -> bool:
    """Whether paths are those of this machine, whose symbolic links lead anywhere."""
    return "local" in filesystem.type_name  # pyarrow's "local", and fsspec's "py::fsspec+('file', 'local')"
