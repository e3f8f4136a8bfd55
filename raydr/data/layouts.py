"""Finds the files of a source: which of them hold passages, queries and judgements, by format and by name.

Notable: nothing is read here but names (and the first line of a judgements file), so deciding whether a finished
corpus can be reused costs next to nothing. What each format looks like is described in `docs/data_formats.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raydr.data.config import DataConfig, DataFormat
from raydr.data.fields import passage_names
from raydr.data.files import Folder, SourceFile, read_lines
from raydr.data.mbeir import is_mbeir
from raydr.data.records import BeirQrels, CsvRows, JsonLines, ParquetRows, Records, TrecQrels, TsvRows
from raydr.errors import DataError

_SUFFIXES: Mapping[DataFormat, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
}
_PASSAGES = ("passages", "corpus", "collection")
_QRELS_SUFFIXES = (".tsv", ".txt", ".trec", ".qrels", ".jsonl", ".csv", ".parquet")


def detect_format(folder: Folder) -> DataFormat:
    """The format of what lies in a folder, or of a file. Raises `DataError` when nothing is recognised."""
    if folder.find("corpus.jsonl"):
        return "beir"
    if is_mbeir(folder):
        return "mbeir"
    files = _passage_files(folder)
    if folder.find("collection.tsv") or (folder.is_file and files[0].suffix == ".tsv"):
        return "msmarco"
    for name, suffixes in _SUFFIXES.items():
        if any(file.suffix in suffixes for file in files):
            return name
    listed = ", ".join(file.name for file in files[:10]) or "nothing"
    raise DataError(
        f"{folder.uri}: cannot tell the format (found: {listed}); expected a BEIR folder with corpus.jsonl, an MS "
        "MARCO folder with collection.tsv, M-BEIR's with cand_pool and query, JSONL, CSV or Parquet files, or a saved "
        "Hugging Face dataset. "
        "Set data.format and, for unusual file names, data.passages, data.queries, data.qrels"
    )


def choose_split(available: Mapping[str, Any], wanted: str | None, where: str) -> str | None:
    """The split to use; None when there are no judgements and none were asked for."""
    names = ", ".join(sorted(available)) or "none, so leave data.split out"
    if wanted is not None:
        if wanted not in available:
            raise DataError(f"{where}: has no judgements for the split {wanted!r}; there are: {names}")
        return wanted
    if not available or "test" in available:
        return "test" if available else None
    if len(available) > 1:
        raise DataError(f"{where}: has judgements for several splits; choose one: data.split=NAME out of {names}")
    return next(iter(available))


class Layout:
    """The three tables of a source made of files."""

    def __init__(self, folder: Folder, format_: DataFormat, config: DataConfig) -> None:
        self.folder, self.format, self.config = folder, format_, config
        self.used: list[SourceFile] = []

    def passages(self) -> list[Records]:
        suffixes = _SUFFIXES.get(self.format, ())
        if self.config.passages:
            files = self._explicit(self.config.passages)
        elif self.format == "beir":
            files = _one(self.folder.find("corpus.jsonl"))
        elif self.format == "msmarco" and not self.folder.is_file:
            files = _one(self.folder.find("collection.tsv"))
        else:
            files = [file for file in _passage_files(self.folder) if not suffixes or file.suffix in suffixes]
        if not files:
            wanted = {"beir": "corpus.jsonl", "msmarco": "collection.tsv"}.get(self.format, f"{self.format} file")
            raise DataError(f"{self.folder.uri}: has no {wanted}; name the file with the passages: data.passages=FILE")
        return [self._table(file, ("passage_id", "text")) for file in files]

    def qrels(self) -> list[Records]:
        if self.config.qrels:
            return [self._qrels_table(file) for file in self._explicit(self.config.qrels)]
        available = {} if self.folder.is_file else self._qrels_files()
        split = choose_split(available, self.config.split, self.folder.uri)
        return [self._qrels_table(available[split])] if split is not None else []

    def queries(self) -> list[Records]:
        if self.config.queries:
            files = self._explicit(self.config.queries)
        elif self.folder.is_file:
            files = []
        elif self.format == "msmarco":
            files = self._msmarco_queries()
        else:
            names = [f"queries{suffix}" for suffixes in _SUFFIXES.values() for suffix in suffixes]
            files = _one(self.folder.find(*names))
        return [self._table(file, ("query_id", "text")) for file in files]

    def stamp(self) -> list[Any]:
        """Name, size and time of every file that belongs to the tables asked for so far."""
        return sorted(file.stamp for file in {file.path: file for file in self.used}.values())

    def _qrels_files(self) -> dict[str, SourceFile]:
        """Split -> file: `qrels/<split>.tsv`, `qrels.<split>.tsv`, or `qrels.tsv` (the split is then called qrels)."""
        inside = self.folder.child("qrels")
        files = inside.files() if inside and not inside.is_file else []
        found = {_stem(f): _renamed(f, f"qrels/{f.name}") for f in files if f.suffix in _QRELS_SUFFIXES}
        for file in self.folder.files():
            stem = _stem(file)
            if file.suffix in _QRELS_SUFFIXES and (stem == "qrels" or stem.startswith("qrels.")):
                found.setdefault(stem.removeprefix("qrels.") or stem, file)
        return found

    def _explicit(self, path: str) -> list[SourceFile]:
        """The file, or the files of the folder, that the config names; messages call them as the config does."""
        place = self.folder.resolve(path)
        return [_renamed(f, path if place.is_file else f"{path.rstrip('/')}/{f.name}") for f in place.files()]

    def _msmarco_queries(self) -> list[SourceFile]:
        """`queries.<split>.tsv`, or that of a wider split (`queries.dev.tsv` for dev.small), or `queries.tsv`."""
        split = choose_split(self._qrels_files(), self.config.split, self.folder.uri) if not self.config.qrels else None
        split = split or self.config.split
        parts = split.split(".") if split else []
        names = [".".join(["queries", *parts[:n], "tsv"]) for n in range(len(parts), -1, -1)]
        return _one(self.folder.find(*names))

    def _table(self, file: SourceFile, tsv_names: tuple[str, ...]) -> Records:
        self.used.append(file)
        if file.suffix in _SUFFIXES["jsonl"]:
            return JsonLines(file)
        if file.suffix in _SUFFIXES["parquet"]:
            columns = self._wanted_columns() if tsv_names[0] == "passage_id" else None
            return ParquetRows(file, columns, has_images=self.config.images is not None)
        if file.suffix == ".csv" or (file.suffix == ".tsv" and self.format == "csv"):
            return CsvRows(file, "," if file.suffix == ".csv" else "\t")
        if file.suffix in (".tsv", ".txt"):
            return TsvRows(file, tsv_names)
        raise DataError(f"{file.name}: unknown suffix {file.suffix!r}; known are .jsonl, .csv, .tsv and .parquet")

    def _qrels_table(self, file: SourceFile) -> Records:
        if file.suffix in (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".pq"):
            return self._table(file, ("query_id", "passage_id"))
        self.used.append(file)
        return TrecQrels(file) if self.format == "msmarco" else text_qrels(file)

    def _wanted_columns(self) -> tuple[str, ...] | None:
        """The columns worth reading from a Parquet file: a column that is not carried may be large (an embedding)."""
        if self.config.metadata == "all":
            return None
        roles = passage_names(self.config.columns, images=self.config.images is not None)
        own = [name for names in roles.values() for name in names]
        return (*own, *(self.config.metadata if isinstance(self.config.metadata, list) else ()))


def text_qrels(file: SourceFile) -> Records:
    """A judgements file in TREC's form (four columns) or BEIR's (three columns and a header), by its first line."""
    first = next(iter(read_lines(file)), (1, b""))[1]
    return TrecQrels(file) if len(first.split()) == 4 else BeirQrels(file)


def _passage_files(folder: Folder) -> list[SourceFile]:
    """The file itself; or what is called passages, corpus or collection; or all but queries and judgements."""
    if folder.is_file:
        return folder.files()
    for name in _PASSAGES:
        if (inside := folder.child(name)) and not inside.is_file:
            return [_renamed(file, f"{name}/{file.name}") for file in inside.files()]
    files = folder.files()
    named = [file for file in files if _stem(file) in _PASSAGES]
    return named or [file for file in files if not _stem(file).startswith(("queries", "qrels"))]


def _one(file: SourceFile | None) -> list[SourceFile]:
    return [file] if file else []


def _stem(file: SourceFile) -> str:
    """`dev.small` of `qrels/dev.small.tsv.gz`."""
    base = file.name.rsplit("/", 1)[-1]
    return base[: base.rindex(file.suffix)] if file.suffix else base


def _renamed(file: SourceFile, name: str) -> SourceFile:
    return SourceFile(file.filesystem, file.path, name, file.num_bytes, file.mtime_ns)
