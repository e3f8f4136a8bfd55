"""The tables of a source, whatever it is: files, a Hugging Face dataset on disk, or an id of ir_datasets.

source = open_source(DataConfig(path="data/scifact", split="test"))
for number, record in source.passages[0].read(problems, advance=bar.update): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raydr.data.config import DataConfig
from raydr.data.external import hf_disk_tables, ir_dataset_tables, is_hf_disk, is_ir_dataset
from raydr.data.fields import Names, passage_names, qrels_names, query_names
from raydr.data.files import Folder
from raydr.data.layouts import Layout, detect_format
from raydr.data.mbeir import PASSAGE_NAMES, QRELS_NAMES, QUERY_NAMES, Mbeir
from raydr.data.records import Records


@dataclass(frozen=True)
class Source:
    """The tables of a source, the names to look for in them, and what the source looked like."""

    passages: Sequence[Records]
    queries: Sequence[Records]
    qrels: Sequence[Records]
    passage_names: Names
    query_names: Names
    qrels_names: Names
    stamp: Sequence[Any]
    """Names, sizes and times of the files (or the version of what else the source is): part of the fingerprint."""
    folder: Folder | None = None
    """Where paths of pictures begin; None where the source is no folder."""
    counts: Callable[[], dict[str, int]] = dict
    """What a manifest says of the queries beside how many there are; asked for when they were read."""


def open_source(config: DataConfig) -> Source:
    """The source a config names. Raises `DataError` naming what is missing and what is there instead."""
    format_, folder = config.format, None
    if format_ == "ir_datasets" or (format_ == "auto" and is_ir_dataset(config.path)):
        tables = ir_dataset_tables(config.path, config.split)
    else:
        folder = Folder.open(config.path)
        if format_ == "hf_disk" or (format_ == "auto" and is_hf_disk(folder)):
            tables = hf_disk_tables(folder, config)
        else:
            format_ = detect_format(folder) if format_ == "auto" else format_
            if format_ == "mbeir":
                own = Mbeir(folder, config)
                names = (PASSAGE_NAMES, QUERY_NAMES, QRELS_NAMES)
                return Source(own.passages, own.queries, own.qrels, *names, own.stamp, folder, own.counts)
            layout = Layout(folder, format_, config)
            tables = layout.passages(), layout.queries(), layout.qrels(), layout.stamp()
    passages, queries, qrels, stamp = tables
    settings = {"beir": format_ == "beir", "images": config.images is not None}
    return Source(
        passages,
        queries,
        qrels,
        passage_names(config.columns, **settings),
        query_names(config.columns, **settings),
        qrels_names(config.columns),
        stamp,
        folder,
    )
