"""Hostile files: thousands of changed copies of everything raydr reads. A case may end in a result or in a `RaydrError`
that names a file; anything else is a finding: another exception, a crash, more than SECONDS, more than MEMORY.

Notable: cases run in a process of their own with a bound on its memory, because FAISS and Arrow are not Python; when it
dies, the case it died of is known and the next process goes on behind it. A case is found again by target, seed and
number (`--first`).

    python benchmarks/fuzz.py                           every target, 200 cases each
    python benchmarks/fuzz.py index_hnsw --cases 2000 --seed 1 --native
    python benchmarks/fuzz.py runs --first 17 --cases 1 --show
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NoReturn

SECONDS = 20
MEMORY = 2 << 30
"""Beyond what the process has mapped before its first case."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--cases", type=int, default=200, help="of each target")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="what each case ended in")
    parser.add_argument("--native", action="store_true", help="mend the checksums of what Arrow and FAISS map as well")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = range(arguments.first, arguments.first + arguments.cases)
    if arguments.worker is not None:
        work(arguments.targets, arguments.seed, cases, arguments.worker, native=arguments.native)
        return 0
    started = time.monotonic()
    results = run(arguments.targets or list_targets(), arguments.seed, cases, native=arguments.native)
    findings = [result for result in results if result["outcome"] not in ("read", "refused")]
    for name in dict.fromkeys(result["target"] for result in results):
        own = [result for result in results if result["target"] == name]
        counts = Counter(result["outcome"] for result in own)
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        slowest, memory = max(result["seconds"] for result in own), max(result.get("mib", 0) for result in own)
        print(f"{name}: {len(own)} cases: {shown}; slowest {slowest:.1f} s, process {memory} MiB")
    times: Counter[str] = Counter()
    for result in results if arguments.show else findings:
        place = f"{result['outcome']} {result.get('place', '')}"
        times[place] += 1
        if arguments.show or times[place] <= 3:
            print(f"  {result['target']}, case {result['case']}, {result.get('file')}: {result['outcome']}: "
                  f"{result.get('detail', '')}")  # fmt: skip
    print(f"{len(results)} cases in {time.monotonic() - started:.0f} s, {len(findings)} findings")
    return 1 if findings else 0


def list_targets() -> list[str]:
    from hostile.readers import TARGETS

    return list(TARGETS)


def run(targets: list[str], seed: int, cases: range, *, native: bool = False) -> list[dict[str, Any]]:
    """The outcome of each case of each target; a process that dies or hangs is followed by another."""
    results: list[dict[str, Any]] = []
    first = cases.start
    while targets:
        command = [*(sys.executable, __file__, *targets), *("--seed", str(seed)), *("--first", str(cases.start))]
        command += [*("--cases", str(len(cases))), *("--worker", str(first))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        running, ended = _follow(process, results)
        if ended == "done":
            break
        if running is None:
            assert process.stderr is not None
            raise SystemExit(f"the fuzzer itself failed: {ended} {process.stderr.read()[-2000:].decode()}")
        results.append({**running, "outcome": ended, "seconds": time.monotonic() - running.pop("started")})
        targets, first = targets[targets.index(running["target"]) :], running["case"] + 1
        if first == cases.stop:
            targets, first = targets[1:], cases.start
    return results


def _follow(process: subprocess.Popen, results: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """Adds what a worker reports to `results`; the case it was at when it ended, and how that was."""
    assert process.stdout is not None
    running: dict[str, Any] | None = None
    lines, patience = b"", 120.0  # of imports and the first valid example
    while select.select([process.stdout], [], [], patience)[0]:
        chunk = os.read(process.stdout.fileno(), 1 << 16)
        if not chunk:
            code = process.wait()
            return running, "done" if code == 0 else signal.Signals(-code).name if code < 0 else f"exit {code}"
        *complete, lines = (lines + chunk).split(b"\n")
        for line in complete:
            event = json.loads(line)
            patience = 3.0 * SECONDS
            running = {**event, "started": time.monotonic()} if "outcome" not in event else None
            results += [event] if "outcome" in event else []
    process.kill()
    process.wait()
    return running, "hang"


def work(names: list[str], seed: int, cases: range, first: int, *, native: bool = False) -> None:
    """The cases of some targets, the first one's from `first` on: a line on stdout before and after each."""
    from hostile.readers import TARGETS, change

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what native code prints is none of the lines
    signal.signal(signal.SIGALRM, _too_slow)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    for name in names:
        target = TARGETS[name]
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as root:
            valid, folder, written = (Path(root) / part for part in ("valid", "case", "out"))
            valid.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):
                target.make(valid)
                target.read(shutil.copytree(valid, Path(root) / "first"), Path(root) / "first-out")
            resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, resource.RLIM_INFINITY))
            for case in range(first, cases.stop):
                shutil.copytree(valid, folder)
                file = change(folder, target, Random(f"{name}:{seed}:{case}"), native=native)
                event: dict[str, Any] = {"target": name, "case": case, "file": file}
                out.write(json.dumps(event) + "\n")
                started = time.monotonic()
                outcome = _outcome(target.read, folder, written)
                seconds, mib = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                out.write(json.dumps({**event, **outcome, "seconds": seconds, "mib": mib}) + "\n")
                for left in (folder, written):
                    shutil.rmtree(left, ignore_errors=True)
        first = cases.start


def _outcome(read: Callable[[Path, Path], Any], folder: Path, written: Path) -> dict[str, str]:
    from raydr.errors import RaydrError

    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            read(folder, written)
        return {"outcome": "read"}
    except RaydrError as error:
        names = {str(folder), *(file.name for file in folder.rglob("*"))}
        if any(name in str(error) for name in names):
            return {"outcome": "refused", "detail": str(error)[:500]}
        return {"outcome": "refused without a name", "detail": str(error)[:500], "place": _place(error)}
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is what is looked for)
        place = _place(error)
        return {"outcome": type(error).__name__, "detail": f"{str(error)[:300]} at {place}", "place": place}
    finally:
        signal.alarm(0)


def _place(error: BaseException) -> str:
    """Where in raydr it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/raydr/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in own[:-4:-1])


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _too_slow(*_: object) -> NoReturn:
    raise TimeoutError(f"more than {SECONDS} s")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' tiny corpora
    raise SystemExit(main())
