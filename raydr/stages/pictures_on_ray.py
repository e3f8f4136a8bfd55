"""Pictures prepared on a Ray cluster while a corpus is read, in order, with the same result as in one process.

Notable: what was parsed is put down as Parquet parts in the artifact that is being written, which every node sees, and
streams back through Ray Data with its pictures prepared. Nodes read picture files themselves, so these must lie where
every node sees them, or in a bucket; a node that does not see the folder ends the job instead of rejecting pictures.

    ingest(config.data, out, prepare=preparation(config.runtime))
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydr import runtime
from raydr.data.images import ImageError
from raydr.data.pictures import ImageReader, Origin, Pending, Prepare, Prepared, prepare_here, prepare_one
from raydr.data.problems import excerpt
from raydr.errors import DataError
from raydr.progress import Progress
from raydr.runtime import Runtime
from raydr.storage import bucket_of, reach

_FEWEST_ROWS, _MOST_ROWS, _MOST_BYTES = 64, 2048, 32_000_000
"""Of a part, which is the work of one task: so few that few records still occupy several workers."""
_GROWTH = 16
_BATCH_ROWS = 32
_NOT_HERE = "folder is not there"

_ORIGIN = {"file": pa.string(), "line": pa.int64(), "field": pa.string(), "raw": pa.string()}
_RECORD = {"number": pa.int64(), "row": pa.string(), **_ORIGIN}
_FOUND = pa.schema({**_RECORD, "bytes": pa.binary(), "path": pa.string()})
_PREPARED = pa.schema({**_RECORD, "image": pa.binary(), "reason": pa.string(), "detail": pa.string()})


def preparation(setting: Runtime) -> Prepare:
    """What a verb prepares pictures with; how many there will be is not known before the source was read."""
    return prepare_on_ray if runtime.uses_ray(setting, num_passages=0) else prepare_here


def prepare_on_ray(pending: Iterator[Pending], reader: ImageReader, scratch: Path) -> Iterator[Prepared]:
    """Prepares pictures on the cluster of this process, joining or starting one; in order.

    Raises `DataError` where a node does not see the folder of the pictures.
    """
    files, num_records = _put_down(pending, scratch)
    if not files:
        return
    runtime.connect()
    with Progress("prepare pictures", total=num_records, unit="record") as progress:
        for number, one in enumerate(_stream(files, reader)):
            if one["number"] != number:  # what is written next would be another record's
                raise DataError(f"{scratch}: record {number} came back as {one['number']}; give the command again")
            if one["reason"] == _NOT_HERE:
                raise DataError(
                    f"{reader.root}: a node of the Ray cluster does not see this folder, whose pictures are asked for; "
                    "put it on storage that all nodes share, or into a bucket, or prepare here: runtime=local"
                )
            error = None if one["reason"] is None else ImageError(one["reason"], one["detail"])
            yield Prepared(json.loads(one["row"]), one["image"], Origin(*(one[name] for name in _ORIGIN)), error)
            progress.update(1)


def _put_down(pending: Iterator[Pending], scratch: Path) -> tuple[list[Path], int]:
    """The parts that hold what was parsed, and how many records they hold."""
    bucket = bucket_of(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    rows: list[dict[str, Any]] = []
    num_records = num_bytes = 0

    def write() -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_FOUND), sink, use_dictionary=False)
        files.append(scratch / f"part-{len(files):06d}.parquet")
        content = sink.getvalue().to_pybytes()
        if bucket is not None:
            bucket.write(files[-1].name, content)
        else:
            files[-1].write_bytes(content)

    for one in pending:
        found = {"path": one.image} if isinstance(one.image, str) else {"bytes": one.image}
        origin = one.origin._replace(raw=excerpt(one.origin.raw) if one.image is not None else "")
        row = json.dumps(one.row, ensure_ascii=False)
        rows.append({"number": num_records, "row": row, **origin._asdict(), **found})
        num_records += 1
        num_bytes += len(row) + len(one.image or "")
        if len(rows) >= min(_MOST_ROWS, max(_FEWEST_ROWS, num_records // _GROWTH)) or num_bytes >= _MOST_BYTES:
            write()
            rows, num_bytes = [], 0
    if rows:
        write()
    return files, num_records


def _stream(files: list[Path], reader: ImageReader) -> Iterator[dict[str, Any]]:
    """Rows of `_PREPARED`, in order."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # records count here, which Ray's bars do not know
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
    with ray.data.DataContext.current(context):
        filesystem, paths = reach(files)
        dataset = ray.data.read_parquet(paths, filesystem=filesystem)
        dataset.set_name("prepare pictures")
        prepare: Any = _prepare  # Ray's types know no further arguments
        prepared = dataset.map_batches(
            prepare, fn_args=(reader,), batch_format="pyarrow", batch_size=_BATCH_ROWS, zero_copy_batch=True
        )
        for batch in prepared.iter_batches(batch_size=_BATCH_ROWS, batch_format="pyarrow"):
            table: Any = batch
            yield from table.to_pylist()


def _prepare(table: pa.Table, reader: ImageReader) -> pa.Table:
    """A batch with its pictures prepared; runs on any node."""
    is_here, rows = reader.can_read(), []
    for record in table.to_pylist():
        path, content = record.pop("path"), record.pop("bytes")
        if path is not None and not is_here:
            image, error = None, ImageError(_NOT_HERE)
        else:
            found = Pending([], content if path is None else path, Origin("", 0, "", ""))
            _, image, _, error = prepare_one(found, reader)
        told = {} if error is None else {"reason": error.reason, "detail": error.detail}
        rows.append({**record, "image": image, **told})
    return pa.Table.from_pylist(rows, schema=_PREPARED)
