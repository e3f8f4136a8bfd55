"""M-BEIR's layout (UniIR, arXiv 2311.17136): queries and candidates in JSON lines, pictures and instructions beside.

| in the folder | what |
| --- | --- |
| `cand_pool/global/`, `cand_pool/local/` | candidates: did, txt, img_path, modality |
| `query/SPLIT/` | queries: qid, query_txt, query_img_path, query_modality, pos_cand_list |
| `instructions/query_instructions.tsv` | query modality, candidate modality, dataset, its number, then the wordings |

Notable: a query's instruction is that of its dataset, its modality and the modality of its first positive, so queries
and candidates are looked through once before they are read. A query that occurs several times (the training union
repeats those of small datasets) is read once, with the number of its copies. In measuring, positives of another dataset
than the query's own do not count (OVEN and InfoSeek have such); in training they do.

    open_source(DataConfig(path="M-BEIR", split="test", images={}))
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from tqdm import tqdm

from raydr.data.config import DataConfig
from raydr.data.fields import Names
from raydr.data.files import Advance, Folder, SourceFile, read_lines
from raydr.data.problems import BadFieldError, Problems
from raydr.data.records import JsonLines, Record
from raydr.errors import DataError
from raydr.types import COPIES, INSTRUCTIONS, TASK

PASSAGE_NAMES: Names = {"passage_id": ("did",), "title": ("title",), "text": ("txt",), "image": ("img_path",)}
QUERY_NAMES: Names = {
    "query_id": ("qid",),
    "query_text": ("query_txt",),
    "query_image": ("query_img_path",),
    **{name: (name,) for name in (INSTRUCTIONS, TASK, COPIES)},
}
_POSITIVES = "pos_cand_list"
QRELS_NAMES: Names = {"query_id": ("qid",), "passage_id": (_POSITIVES,), "relevance": ("relevance",)}

_DATASETS = (
    *("visualnews", "fashion200k", "webqa", "edis", "nights"),
    *("oven", "infoseek", "fashioniq", "cirr", "mscoco"),
)
"""By their numbers, which ids begin with."""
_POOLS = {"train": "train", "union_train": "train", "val": "val", "union_val": "val", "test": "test"}
"""Split -> what the global pool of its candidates is called after."""
_TRAINING = ("train", "union_train")
_DATASET = "dataset"
_INSTRUCTIONS = "instructions/query_instructions.tsv"
_FEWEST_COLUMNS = 5

Wordings: TypeAlias = Mapping[tuple[str, str, str], tuple[str, ...]]
"""(dataset's number, query modality, candidate modality) -> the wordings of the instruction."""


def is_mbeir(folder: Folder) -> bool:
    """Whether a folder has M-BEIR's two parts."""
    return not folder.is_file and folder.child("cand_pool") is not None and folder.child("query") is not None


class Mbeir:
    """The tables of a folder: the candidates of a pool, and the queries of a split with what they say is relevant.

    `passages` and `queries` of the config name other files or folders of them. Raises `DataError` where something is
    missing, and for settings that this layout has no use for.
    """

    def __init__(self, folder: Folder, config: DataConfig) -> None:
        if config.images is None:
            raise DataError(f"{folder.uri}: M-BEIR has pictures; say how they are stored: data.images={{}}")
        if config.qrels is not None:
            raise DataError(f"{folder.uri}: M-BEIR's judgements are in its queries ({_POSITIVES}): leave qrels out")
        split = _split(config)
        asked = _files(folder, config.queries or _folder_of(folder, split))
        pools = _files(folder, config.passages or _global_pool(folder, split))
        instructions = folder.find(_INSTRUCTIONS)
        self._questions = Questions(asked, pools, instructions, only_own=split not in _TRAINING)
        # Where several pools are read together, what is in two of them is one passage.
        known = Occurrences(pools, "did") if len(pools) > 1 else None
        self.passages = [CandidateRows(file, known) for file in pools]
        self.queries = [QueryRows(file, self._questions) for file in asked]
        self.qrels = [PositiveRows(file, self._questions) for file in asked]
        self.stamp = sorted(file.stamp for file in (*pools, *asked, *([instructions] if instructions else [])))

    def counts(self) -> dict[str, int]:
        """What a manifest says of the queries that were read."""
        return {f"queries_{what}": len(ids) for what, ids in self._questions.noted.items()}


class First(NamedTuple):
    """The line in which something stands first."""

    file: str
    line: int
    content: bytes
    """Hash of the record."""


class Occurrences:
    """Where each id stands first in some files, and how often it stands there."""

    def __init__(self, files: Sequence[SourceFile], id_field: str) -> None:
        self._files, self._field = files, id_field
        self._first: dict[str, First] = {}

    def count(self, id_: str) -> int:
        """How often an id occurs."""
        return self._repeated.get(id_, 1)

    @property
    def has_copies(self) -> bool:
        return bool(self._repeated)

    def is_first(self, file: str, line: int, record: Record) -> bool:
        """Whether a record is to be read. Raises `BadFieldError` for one that shares its id with another one."""
        id_ = record.get(self._field)
        if not isinstance(id_, str) or self.count(id_) == 1:
            return True  # an id that is none is told by whoever reads it
        first = self._first[id_]
        if (file, line) == first[:2]:
            return True
        if first.content != _hash(record):
            where = f"{id_!r}, in {first.file}, line {first.line}"
            raise BadFieldError(self._field, "another record has this id", where)
        return False

    @cached_property
    def _repeated(self) -> dict[str, int]:
        """Of each id that occurs more than once, how often."""
        repeated: dict[str, int] = {}
        for file, line, record in look_through(self._files):
            if not isinstance(id_ := record.get(self._field), str):
                continue
            if id_ in self._first:
                repeated[id_] = repeated.get(id_, 1) + 1
            else:
                self._first[id_] = First(file, line, _hash(record))
        self._first = {id_: self._first[id_] for id_ in repeated}
        return repeated


class Questions:
    """What has to be known of all queries before one of them can be read: copies, instructions, modalities."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        pools: Sequence[SourceFile],
        instructions: SourceFile | None,
        *,
        only_own: bool,
    ) -> None:
        self._files, self._pools, self._instructions, self._only_own = files, pools, instructions, only_own
        self.occurrences = Occurrences(files, "qid")
        self.noted: dict[str, set[str]] = {
            "with_positives_of_several_modalities": set(),
            "with_positives_of_other_datasets_left_out": set(),
            "without_instruction": set(),
        }
        """Ids of queries that a manifest counts."""

    def positives(self, record: Record) -> list[str]:
        """The ids of what is relevant to a query, each once. Raises `BadFieldError`."""
        return own_positives(record) if self._only_own else all_positives(record)

    def labelled(self, record: Record) -> Record:
        """A query with its instructions, its task and its copies. Raises `BadFieldError`."""
        query_id, positives = str(record.get("qid")), self.positives(record)
        dataset = query_id.partition(":")[0]
        asked = modality_word(record.get("query_modality"), record.get("query_txt"), record.get("query_img_path"))
        found = [self._modalities[id_] for id_ in positives if id_ in self._modalities]
        labels: Record = {}
        if found:
            labels[INSTRUCTIONS] = list(self._wordings.get((dataset, asked, found[0]), ()))
            labels[TASK] = f"{dataset_name(dataset)}: {asked} to {found[0]}"
        if self.occurrences.has_copies:
            labels[COPIES] = self.occurrences.count(query_id)
        counted = (len(set(found)) > 1, len(positives) < len(all_positives(record)), not labels.get(INSTRUCTIONS))
        for ids, counts in zip(self.noted.values(), counted, strict=True):
            if counts:
                ids.add(query_id)
        return {**record, **labels}

    @cached_property
    def _modalities(self) -> dict[str, str]:
        """The modality of each candidate that is a positive of some query."""
        wanted: set[str] = set()
        for _, _, record in look_through(self._files):
            try:
                wanted.update(self.positives(record))
            except BadFieldError:  # told when it is read
                continue
        return {
            record["did"]: modality_word(record.get("modality"), record.get("txt"), record.get("img_path"))
            for _, _, record in look_through(self._pools)
            if isinstance(record.get("did"), str) and record["did"] in wanted
        }

    @cached_property
    def _wordings(self) -> Wordings:
        return {} if self._instructions is None else read_instructions(self._instructions)


@dataclass(frozen=True)
class CandidateRows(JsonLines):
    """The candidates of a file, each with the name of its dataset as metadata."""

    known: Occurrences | None
    """Of all files that are read together; None where it is one file."""

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        for line, record in super().read(problems, advance):
            try:
                if self.known is not None and not self.known.is_first(self.name, line, record):
                    continue
            except BadFieldError as error:
                problems.add(self.name, line, error.field, error.reason, record, error.detail)
            else:
                yield line, {**record, _DATASET: dataset_name(str(record.get("did")).partition(":")[0])}


@dataclass(frozen=True)
class QueryRows(JsonLines):
    """The queries of a file, each once and with its labels."""

    questions: Questions

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        for line, record in super().read(problems, advance):
            try:
                if not self.questions.occurrences.is_first(self.name, line, record):
                    continue
                labelled = self.questions.labelled(record)
            except BadFieldError as error:
                problems.add(self.name, line, error.field, error.reason, record, error.detail)
            else:
                yield line, labelled


@dataclass(frozen=True)
class PositiveRows(JsonLines):
    """What the queries of a file say is relevant to them, as judgements of grade 1.

    What is wrong with a line was told when its query was read.
    """

    questions: Questions

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        with Problems(self.name, Path(os.devnull)) as told:
            for line, record in super().read(told, advance):
                try:
                    is_first = self.questions.occurrences.is_first(self.name, line, record)
                    positives = self.questions.positives(record) if is_first else []
                except BadFieldError:
                    continue
                for passage_id in positives:
                    yield line, {"qid": record.get("qid"), _POSITIVES: passage_id, "relevance": 1}


def all_positives(record: Record) -> list[str]:
    """The ids of a query's positives, each once. Raises `BadFieldError`."""
    listed = record.get(_POSITIVES) or []
    if not isinstance(listed, list):
        raise BadFieldError(_POSITIVES, "must be a list", f"got {type(listed).__name__}")
    ids: dict[str, None] = {}
    for one in listed:
        id_ = one.get("did") if isinstance(one, dict) else one
        if not isinstance(id_, str):
            raise BadFieldError(_POSITIVES, "must be a list of ids", f"it has {str(one)[:40]!r}")
        ids[id_] = None
    return list(ids)


def own_positives(record: Record) -> list[str]:
    """Those of the query's own dataset."""
    dataset = str(record.get("qid")).partition(":")[0]
    return [id_ for id_ in all_positives(record) if id_.partition(":")[0] == dataset]


def modality_word(declared: Any, text: Any, image: Any) -> str:
    """text, image, or image,text: as it is declared, in whichever order, or by what there is."""
    parts = {part.strip() for part in declared.split(",")} if isinstance(declared, str) else set()
    if not parts or parts - {"text", "image"}:
        parts = {name for name, value in (("text", text), ("image", image)) if value}
    return ",".join(sorted(parts)) or "text"


def dataset_name(number: str) -> str:
    """The name of the dataset whose ids begin with this number."""
    is_known = number.isascii() and number.isdigit() and int(number) < len(_DATASETS)
    return _DATASETS[int(number)] if is_known else f"dataset {number}"


def read_instructions(file: SourceFile) -> Wordings:
    """The instructions of the table. Raises `DataError` naming a line that is none."""
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for number, line in read_lines(file):
        cells = [cell.strip() for cell in line.decode("utf-8", errors="replace").split("\t")]
        if number == 1 or not any(cells):  # the first line is the header
            continue
        if len(cells) < _FEWEST_COLUMNS:
            raise DataError(
                f"{file.name}, line {number}: {len(cells)} columns; needed are query modality, candidate modality, "
                "dataset, its number, and the wordings, with a tab between"
            )
        asked, candidate = (modality_word(cell, None, None) for cell in cells[:2])
        found[cells[3], asked, candidate] = tuple(wording for wording in cells[4:] if wording)
    return found


def look_through(files: Sequence[SourceFile]) -> Iterator[tuple[str, int, Record]]:
    """File, line and record of the lines that can be read; the others are told when they are read for good."""
    for file in files:
        with tqdm(total=file.num_bytes, desc=f"look at {file.name}", unit="B", unit_scale=True, delay=0.5) as bar:
            for number, line in read_lines(file, bar.update):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield file.name, number, record


def _hash(record: Record) -> bytes:
    content = json.dumps(record, sort_keys=True).encode("utf-8", errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=8).digest()


def _split(config: DataConfig) -> str:
    """The split: as it is set, or that of the folder in which the queries named lie, or test.

    Raises `DataError` where these are at odds: judgements are in the queries, so those named would be taken whatever
    the split.
    """
    folders = PurePosixPath(config.queries or "").parts
    named = next((name for above, name in pairwise(folders) if above == "query" and name in _POOLS), None)
    if named is not None and config.split is not None and _POOLS[named] != _POOLS.get(config.split):
        raise DataError(
            f"{config.path}: the queries named ({config.queries}) are those of the split {named!r}, not of "
            f"{config.split!r}; queries to train on are named by mine.queries"
        )
    return config.split or named or "test"


def _files(folder: Folder, name: str) -> list[SourceFile]:
    """The JSON-lines file, or those of the folder, with this name; messages call them by it."""
    place = folder.resolve(name)
    if place.is_file:
        return [SourceFile(f.filesystem, f.path, name, f.num_bytes, f.mtime_ns) for f in place.files()]
    files = [file for file in place.files() if file.suffix == ".jsonl"]
    if not files:
        raise DataError(f"{folder.uri}: {name} has no .jsonl file")
    return [SourceFile(f.filesystem, f.path, f"{name.rstrip('/')}/{f.name}", f.num_bytes, f.mtime_ns) for f in files]


def _folder_of(folder: Folder, split: str) -> str:
    """The folder with the queries of a split. Raises `DataError` naming those that there are."""
    if folder.child(f"query/{split}") is not None:
        return f"query/{split}"
    known = [name for name in _POOLS if folder.child(f"query/{name}") is not None]
    raise DataError(f"{folder.uri}: has no queries of the split {split!r}; there are: {', '.join(known) or 'none'}")


def _global_pool(folder: Folder, split: str) -> str:
    """The global pool of a split's candidates."""
    name = f"cand_pool/global/mbeir_union_{_POOLS.get(split, 'test')}_cand_pool.jsonl"
    found = folder.find(name)
    if found is None:
        raise DataError(
            f"{folder.uri}: has no {name}; name the candidates: data.passages=cand_pool/local/FILE.jsonl, or all of "
            "the global pools: data.passages=cand_pool/global"
        )
    return found.name
