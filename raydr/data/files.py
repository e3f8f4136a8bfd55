"""Source files on any filesystem pyarrow or fsspec knows, read as a stream and decompressed by their suffix.

Notable: a path is a local one unless it has a scheme (`s3://bucket/corpus`); `.gz`, `.bz2`, `.zst` and `.lz4` are
opened transparently, also where several compressed members follow one another; reading tells the caller how many bytes
of the stored file it has used up, which is what a progress bar can know in advance.

    folder = Folder.open("s3://bucket/scifact")
    for number, line in read_lines(folder.find("corpus.jsonl"), advance=bar.update): ...
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from raydr.errors import DataError
from raydr.storage import connect

Advance = Callable[[int], object]
"""Told how many more units (bytes of a file, rows of a table) were read."""

COMPRESSED = ("", ".gz", ".zst", ".bz2", ".lz4")
LONGEST_LINE = 64 << 20
"""Bytes of a line (characters of a CSV field): what a few bytes of gzip unpack to must not fill the memory."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceFile:
    """One file; `name` is what messages call it, relative to the source's folder."""

    filesystem: pafs.FileSystem
    path: str
    name: str
    num_bytes: int
    mtime_ns: int

    @property
    def stamp(self) -> list[str | int]:
        """What tells a changed file from an unchanged one."""
        return [self.name, self.num_bytes, self.mtime_ns]

    @property
    def suffix(self) -> str:
        """The suffix below any compression: `.jsonl` of `corpus.jsonl.gz`."""
        path = PurePosixPath(self.name)
        return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix

    @contextmanager
    def chunks(self, advance: Advance) -> Generator[Iterator[bytes]]:
        """The decompressed content in pieces. Raises `DataError` where it cannot be read or is cut short."""
        with self.filesystem.open_input_file(self.path) as raw:
            yield self._chunks(raw, advance)

    def _chunks(self, raw: pa.NativeFile, advance: Advance) -> Iterator[bytes]:
        codec = pa.Codec.detect(self.path).name if PurePosixPath(self.path).suffix in COMPRESSED[1:] else None
        buffered = pa.BufferedInputStream(raw, 4 * _CHUNK_BYTES)
        stream = pa.CompressedInputStream(buffered, codec) if codec else buffered
        position = 0
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                advance(raw.tell() - position)
                position = raw.tell()
                yield chunk
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read to its end: {error}") from error


@dataclass(frozen=True)
class Folder:
    """A folder (or a single file) at a path or URI."""

    filesystem: pafs.FileSystem
    path: str
    uri: str
    """As the user wrote it."""

    @classmethod
    def open(cls, uri: str) -> Folder:
        """Raises `DataError` when the scheme is unknown or nothing is there."""
        filesystem, path = connect(uri)
        if _info(filesystem, path, uri).type == pafs.FileType.NotFound:
            raise DataError(f"{uri}: no such file or folder")
        return cls(filesystem, path, uri)

    @property
    def is_file(self) -> bool:
        return _info(self.filesystem, self.path, self.uri).type == pafs.FileType.File

    def files(self, *, recursive: bool = False) -> list[SourceFile]:
        """The files of the folder by name (hidden ones left out), or the file itself."""
        info = _info(self.filesystem, self.path, self.uri)
        if info.type == pafs.FileType.File:
            return [_source_file(self.filesystem, info, info.base_name)]
        try:
            infos = self.filesystem.get_file_info(pafs.FileSelector(self.path, recursive=recursive))
        except OSError as error:
            raise DataError(f"{self.uri}: cannot be listed: {error}") from error
        found = [i for i in infos if i.type == pafs.FileType.File and not i.base_name.startswith((".", "_"))]
        root = self.path.rstrip("/") + "/"
        return sorted(
            (_source_file(self.filesystem, i, i.path.removeprefix(root)) for i in found), key=lambda f: f.name
        )

    def find(self, *names: str) -> SourceFile | None:
        """The first of these files that exists, compressed or not."""
        if self.is_file:
            return None
        for name in (name + suffix for name in names for suffix in COMPRESSED):
            info = _info(self.filesystem, f"{self.path.rstrip('/')}/{name}", self.uri)
            if info.type == pafs.FileType.File:
                return _source_file(self.filesystem, info, name)
        return None

    def child(self, name: str) -> Folder | None:
        """The folder or file `name` inside this one; None when there is none."""
        path = f"{self.path.rstrip('/')}/{name}"
        if _info(self.filesystem, path, self.uri).type == pafs.FileType.NotFound:
            return None
        return Folder(self.filesystem, path, f"{self.uri.rstrip('/')}/{name}")

    def resolve(self, path: str) -> Folder:
        """A file or folder named in the config: relative to this folder, or absolute, or a URI."""
        if "://" in path or path.startswith(("/", "~")):
            return Folder.open(path)
        parent = PurePosixPath(self.path).parent.as_posix() if self.is_file else self.path
        inside = Folder(self.filesystem, f"{parent.rstrip('/')}/{path}", path)
        if _info(self.filesystem, inside.path, path).type == pafs.FileType.NotFound:
            raise DataError(f"{path}: no such file or folder in {self.uri}")
        return inside


def read_lines(file: SourceFile, advance: Advance = lambda _: None) -> Iterator[tuple[int, bytes]]:
    """Every line with its number (from 1), without its line feed or a byte-order mark.

    Raises `DataError` for a line beyond `LONGEST_LINE`.
    """
    number = 0
    pending: list[bytes] = []  # the beginning of a line that goes on in the next chunk
    num_bytes = 0
    with file.chunks(advance) as chunks:
        for chunk in chunks:
            first, *rest = chunk.split(b"\n")
            pending.append(first)
            num_bytes += len(first)
            if num_bytes > LONGEST_LINE:
                raise DataError(f"{file.name}, line {number + 1}: longer than {LONGEST_LINE >> 20} MiB; split it")
            if not rest:
                continue
            *lines, last = b"".join(pending), *rest
            pending, num_bytes = [last], len(last)
            for line in lines:
                number += 1
                yield number, _clean(line, number)
    if last := b"".join(pending):
        yield number + 1, _clean(last, number + 1)


def _clean(line: bytes, number: int) -> bytes:
    return line.removeprefix(_BOM) if number == 1 else line


def _info(filesystem: pafs.FileSystem, path: str, uri: str) -> pafs.FileInfo:
    try:
        return filesystem.get_file_info(path)
    except OSError as error:
        raise DataError(f"{uri}: cannot be reached: {error}") from error


def _source_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, name: str) -> SourceFile:
    return SourceFile(filesystem, info.path, name, info.size or 0, info.mtime_ns or 0)
