"""Runs reproductions: a row's commands in a folder of their own, their scores against the expected ones.

Notable: commands run without a shell, with this interpreter's programs first on the path and in a process group of
their own, so that whatever they started ends with them. Only a row that was reproduced is recorded; one that differs,
fails or lacks its data or GPU is reported and leaves the YAML alone.

    for outcome in run_rows(["scifact-minilm"]):
        print(outcome.status, outcome.message)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from raydr.evaluation.reproductions import (
    PAGE_FILE,
    ROWS_FILE,
    Reproduction,
    Verified,
    filled,
    read_rows,
    select_rows,
    write_page,
    write_rows,
)

Status: TypeAlias = Literal["reproduced", "differs", "failed", "skipped"]

DEFAULT_DATA = Path("../shared/data")
"""Where the collections are looked for when RAYDR_DATA does not say."""

_PACKAGES = ("raydr", "torch", "transformers", "ray", "faiss-cpu", "faiss-gpu", "bm25s", "ir-measures", "numpy")
_LOG_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """What one attempt gave."""

    row: Reproduction
    status: Status
    message: str
    """One line for the terminal: scores beside expectations, or the reason."""
    measured: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0


def run_rows(
    ids: Sequence[str] = (),
    *,
    rows_file: Path = ROWS_FILE,
    page_file: Path = PAGE_FILE,
    data: Path | None = None,
    out: Path | None = None,
) -> Iterator[Outcome]:
    """Runs rows one by one, yields each outcome, and records every reproduced row in the YAML and on the page.

    `data` defaults to the environment's RAYDR_DATA; `out` keeps the runs, `out/<id>` each, otherwise they are deleted.
    """
    data = data or Path(os.environ.get("RAYDR_DATA", DEFAULT_DATA))
    for row in select_rows(read_rows(rows_file), ids):
        outcome = run_row(row, data=data, out=out)
        if outcome.status == "reproduced":
            verified = _verified(outcome, written=[rows_file, page_file])
            rows = [r.model_copy(update={"verified": verified}) if r.id == row.id else r for r in read_rows(rows_file)]
            write_rows(rows, rows_file)
            write_page(rows, page_file)
        yield outcome


def run_row(row: Reproduction, *, data: Path, out: Path | None = None) -> Outcome:
    """Runs a row's commands in a folder of their own and compares what they measured with what is expected."""
    if not (data / row.dataset).exists():
        return Outcome(row, "skipped", f"no collection {row.dataset!r} at {data} (set RAYDR_DATA)")
    if row.needs_gpu and not _gpu_names():
        return Outcome(row, "skipped", "needs a CUDA device")
    with tempfile.TemporaryDirectory(prefix="raydr-") as scratch:
        folder = (out or Path(scratch)).absolute() / row.id
        if folder.exists():  # what lies there may be of other code
            return Outcome(row, "failed", f"{folder} exists already; a reproduction starts from nothing")
        folder.parent.mkdir(parents=True, exist_ok=True)
        places = {"data": str(data.absolute()), "out": str(folder)}
        started = time.perf_counter()
        for command in row.commands:
            words = [filled(word, places) for word in shlex.split(command)]
            if failure := _run_command(words, log=folder.with_name(f"{row.id}.log"), timeout_s=row.timeout_s):
                return Outcome(row, "failed", f"{shlex.join(words)}: {failure}")
        wall_s = time.perf_counter() - started
        metrics = Path(filled(row.metrics, places))
        if not metrics.is_file():
            return Outcome(row, "failed", f"the commands left no {metrics.name} at {metrics.parent}")
        measured = json.loads(metrics.read_text(encoding="utf-8"))
    return compare(row, measured, wall_s=wall_s)


def compare(row: Reproduction, measured: Mapping[str, float], *, wall_s: float = 0.0) -> Outcome:
    """Measured against expected scores; a measure that is absent differs."""
    parts, fits = [], True
    for measure, expected in row.expected.items():
        value = measured.get(measure)
        # Tolerances are decimal fractions: the boundary itself belongs to them.
        good = value is not None and abs(value - expected) <= row.tolerance + 1e-9
        fits = fits and good
        text = "missing" if value is None else f"{value:.4f}"
        parts.append(f"{measure} {text}, expected {expected:g} ± {row.tolerance:g}")
    return Outcome(row, "reproduced" if fits else "differs", "; ".join(parts), dict(measured), wall_s)


def _run_command(words: Sequence[str], *, log: Path, timeout_s: int) -> str | None:
    """Runs one command, output to `log`; returns why it failed, or None. Its children end with it."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with log.open("a", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            return str(error)
        try:
            status = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        except BaseException:  # Ctrl-C: the command is in a process group of its own and would not see it
            _end(process)
            raise
    if status == 0:
        return None
    _end(process)
    reason = f"still running after {timeout_s} s" if status is None else f"exit status {status}"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n    ".join([reason, *tail])


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _verified(outcome: Outcome, *, written: Sequence[Path]) -> Verified:
    return Verified(
        measured={measure: round(value, 5) for measure, value in outcome.measured.items()},
        date=datetime.now(UTC).isoformat(timespec="minutes"),
        commit=_commit(but=written),
        wall_s=round(outcome.wall_s, 1),
        hardware=hardware(),
        versions={"python": ".".join(map(str, sys.version_info[:3])), **_versions()},
    )


def _commit(*, but: Sequence[Path]) -> str:
    """The commit checked out, `-dirty` behind it when tracked files differ, other than those the runner writes."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    others = [".", *(f":(exclude){path}" for path in but)]
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *others)
    return f"{commit or 'unknown'}{'-dirty' if changed else ''}"


def hardware() -> str:
    """This machine in one line: processor, cores, memory, GPUs."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = [names[0] if names else "CPU", f"{len(os.sched_getaffinity(0))} cores", f"{memory_bytes / 2**30:.0f} GiB"]
    return ", ".join([*parts, *_gpu_names()])


def _gpu_names() -> list[str]:
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _output(*words: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue  # faiss comes as faiss-cpu or faiss-gpu
    return versions
