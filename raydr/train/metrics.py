"""metrics.jsonl: what a training run logs, a line of JSON for each record; worker 0 writes it, the driver reads it.

Notable: a run is killed anywhere, also within a line. A line that was cut off is no record, and is gone with the first
step of the run that goes on.

    append(folder / METRICS, 10, {"loss": 0.7})
    read_metrics(folder / METRICS)[-1]["loss"]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from raydr.artifacts import write_durably

METRICS = "metrics.jsonl"


def append(file: Path, step: int, figures: Mapping[str, float]) -> None:
    """Adds the record of a step, with eight digits, which is more than a measurement has."""
    record = {"step": float(step), **figures}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(_line({name: float(f"{value:.8g}") for name, value in record.items()}))


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The records so far; none where there is no file, and without a line that is being written or was cut off."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def drop_after(file: Path, step: int) -> None:
    """Removes the records of later steps, which are about to be made again, and a line that was cut off."""
    if file.is_file():
        kept = [record for record in read_metrics(file) if record["step"] <= step]
        write_durably(file, "".join(_line(record) for record in kept).encode())


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record) + "\n"
