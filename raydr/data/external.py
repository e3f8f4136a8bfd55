"""Sources that another package reads: Hugging Face datasets saved to disk, and ir_datasets ids.

Notable: both packages are optional and imported only when such a source is asked for. `datasets` memory-maps what it
reads; ir_datasets downloads a collection the first time and works without a network afterwards (`IR_DATASETS_HOME`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from raydr.data.config import DataConfig
from raydr.data.files import Advance, Folder
from raydr.data.layouts import choose_split
from raydr.data.problems import Problems
from raydr.data.records import ROWS, ROWS_WITH_IMAGES, Record, Records, batch_records
from raydr.errors import DataError, MissingDependencyError

_PREFIX = "irds:"
_HF_FOLDERS = ("corpus", "passages", "queries", "qrels", "default")

Tables: TypeAlias = tuple[list[Records], list[Records], list[Records], list[Any]]
"""Passages, queries, judgements, and the stamp of the source."""


@dataclass(frozen=True)
class HfRows:
    """A `datasets.Dataset`; `line` is the row's number."""

    dataset: Any
    name: str
    unit: str = " rows"
    fixed_columns: bool = True
    has_images: bool = False

    @property
    def size(self) -> int:
        return len(self.dataset)

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        number, rows = 0, ROWS_WITH_IMAGES if self.has_images else ROWS
        for table in self.dataset.with_format("arrow").iter(batch_size=rows):
            yield from batch_records(self.name, table, number, problems)
            number += table.num_rows
            advance(table.num_rows)


def is_hf_disk(folder: Folder) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder, or folders named corpus, queries, ... in it."""
    places = [folder, *(child for name in _HF_FOLDERS if (child := folder.child(name)))]
    return any(place.find("dataset_dict.json", "state.json") for place in places)


def hf_disk_tables(folder: Folder, config: DataConfig) -> Tables:
    """The tables of a saved dataset.

    Either one `Dataset` (the passages), or a `DatasetDict` or a folder of saved datasets with the names `corpus` (or
    passages), `queries` and `qrels`; the judgements may have splits of their own (a `DatasetDict` called qrels).
    """
    named = _hf_datasets(folder)
    passages = config.passages or next((name for name in ("corpus", "passages") if name in named), None)
    if passages is None and len(named) == 1:
        passages = next(iter(named))
    queries = config.queries or ("queries" if "queries" in named else None)
    judged = {name.rpartition("/")[2]: name for name in named if name.startswith(("qrels", "default"))}
    split = choose_split(judged, config.split, folder.uri) if not config.qrels else None
    qrels = config.qrels or (judged[split] if split is not None else None)

    def table(name: str | None) -> list[Records]:
        if name is None:
            return []
        if name not in named:
            raise DataError(f"{folder.uri}: has no dataset {name!r}; there are: {', '.join(named)}")
        return [HfRows(named[name], name, has_images=config.images is not None)]

    if passages is None:
        raise DataError(
            f"{folder.uri}: which of the datasets {', '.join(named)} holds the passages? Set data.passages=NAME"
        )
    stamp = [file.stamp for file in folder.files(recursive=True)]
    return table(passages), table(queries), table(qrels), stamp


def _hf_datasets(folder: Folder) -> dict[str, Any]:
    """Name -> dataset; the split of a `DatasetDict` is part of the name where it has several."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "a Hugging Face dataset on disk needs the package `datasets`: pip install datasets"
        ) from error

    def load(place: Folder) -> Any:
        try:
            return datasets.load_from_disk(place.uri)
        except (OSError, ValueError) as error:
            raise DataError(f"{place.uri}: not a Hugging Face dataset saved with save_to_disk: {error}") from error

    if folder.find("dataset_dict.json", "state.json"):
        loaded = load(folder)
        if isinstance(loaded, datasets.DatasetDict):
            return {str(name): dataset for name, dataset in loaded.items()}
        return {"corpus": loaded}
    found: dict[str, Any] = {}
    for name in _HF_FOLDERS:
        child = folder.child(name)
        if child is None or not child.find("dataset_dict.json", "state.json"):
            continue
        loaded = load(child)
        if not isinstance(loaded, datasets.DatasetDict):
            found[name] = loaded
        elif len(loaded) == 1 and name not in ("qrels", "default"):
            found[name] = next(iter(loaded.values()))
        else:
            found.update({f"{name}/{split}": dataset for split, dataset in loaded.items()})
    return found


@dataclass(frozen=True)
class IrRows:
    """One table of an ir_datasets dataset; `line` is the row's number."""

    rows: Callable[[], Iterable[Any]]
    as_record: Callable[[Any], Record]
    name: str
    size: int
    unit: str = " rows"
    fixed_columns: bool = True

    def read(self, problems: Problems, advance: Advance) -> Iterator[tuple[int, Record]]:
        del problems  # ir_datasets has parsed the rows
        try:
            for number, row in enumerate(self.rows(), start=1):
                advance(1)
                yield number, self.as_record(row)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.name}: ir_datasets cannot read it: {error}. It downloads a collection on first use; without "
                "a network, copy its folder from a machine that has it and set IR_DATASETS_HOME"
            ) from error


def is_ir_dataset(path: str) -> bool:
    """Whether a path is an id of ir_datasets: marked `irds:`, or no local path, and known to the package."""
    if path.startswith(_PREFIX):
        return True
    if "://" in path or path.startswith(("/", ".", "~")) or Path(path).exists():
        return False
    try:
        import ir_datasets
    except ModuleNotFoundError:
        return False
    return _is_registered(ir_datasets, path)


def ir_dataset_tables(path: str, split: str | None) -> Tables:
    """The tables of an ir_datasets id; `split` is appended to the id where it does not end with it already."""
    try:
        import ir_datasets
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"{path}: ids of ir_datasets need that package: pip install ir-datasets"
        ) from error
    base = path.removeprefix(_PREFIX)
    name = base if split is None or base.endswith(f"/{split}") else f"{base}/{split}"
    if not _is_registered(ir_datasets, name):
        known = [other for other in ir_datasets.registry if other == base or other.startswith(f"{base}/")]
        hint = f"; ids of this collection: {', '.join(sorted(known)[:20])}" if known else ""
        raise DataError(f"{name}: ir_datasets {ir_datasets.__version__} knows no such id{hint}")
    dataset = ir_datasets.load(name)
    if not dataset.has_docs():
        raise DataError(f"{name}: this ir_datasets id has no passages (docs); name a collection that has them")
    passages = [IrRows(dataset.docs_iter, _passage, f"{name} docs", 0)]
    queries = [IrRows(dataset.queries_iter, _query, f"{name} queries", 0)] if dataset.has_queries() else []
    qrels = [IrRows(dataset.qrels_iter, _qrel, f"{name} qrels", 0)] if dataset.has_qrels() else []
    return list(passages), list(queries), list(qrels), [f"ir_datasets {ir_datasets.__version__}", name]


def _passage(doc: Any) -> Record:
    """The doc's own fields; where it has no field called text, that is what ir_datasets calls its default text."""
    record = {"_id" if key == "doc_id" else key: value for key, value in doc._asdict().items()}
    if "text" not in record:
        record["text"] = doc.default_text()
        record.pop("title", None)  # the default text begins with it
    return record


def _query(query: Any) -> Record:
    return {"_id": query.query_id, "text": query.text if hasattr(query, "text") else query.default_text()}


def _qrel(qrel: Any) -> Record:
    return {"query_id": qrel.query_id, "passage_id": qrel.doc_id, "relevance": qrel.relevance}


def _is_registered(ir_datasets: Any, name: str) -> bool:
    try:
        ir_datasets.load(name)
    except KeyError:
        return False
    return True
