"""What the search benchmarks share: interleaved rounds, a child process per cold start, tables with their origin.

Rounds go A B C A B C ..., so that a machine that slows down slows all contenders; the order turns by one each round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("raydr", "faiss-cpu", "usearch", "hnswlib", "sentence-transformers", "bm25s", "numba", "numpy", "torch")


def rounds(contenders: Mapping[str, Callable[[], Any]], num_rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each call: `num_rounds` rounds of `repeats` calls each, after one call that is not counted."""
    names = list(contenders)
    for call in contenders.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for _ in range(repeats):
                start = time.perf_counter()
                contenders[name]()
                times[name].append(time.perf_counter() - start)
    return times


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def spread(values: list[float], scale: float = 1.0) -> str:
    """Median (lowest-highest)."""
    median, low, high = (_readable(scale * value) for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low}-{high})"


def _readable(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def in_child(script: str, arguments: list[str]) -> dict[str, Any]:
    """The JSON that `script` prints last, run in a process of its own: nothing is warm, and its memory is its own."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def origin() -> dict[str, Any]:
    """Where numbers come from: command, commit, processor, versions."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "cpu": f"{len(cpu)} x {cpu[0] if cpu else platform.processor()}",
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "versions": versions,
    }


def write(out: Path, title: str, tables: str, results: Any) -> None:
    """Writes OUT.md and OUT.json, and prints the tables."""
    source = origin()
    named = ", ".join(f"{name} {number}" for name, number in source["versions"].items())
    note = f"`{source['command']}`, commit {source['commit']}, {source['cpu']}, {source['threads']} threads; {named}.\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"## {title}\n\n{note}\n{tables}", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps({"origin": source, "results": results}, indent=1), encoding="utf-8")
    print(out.with_suffix(".md").read_text(encoding="utf-8"))
