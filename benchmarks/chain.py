"""W10 and W11: from a BEIR folder to metrics, one process per contender, cold start included.

Contenders, interleaved: raydr in-process, raydr on a Ray cluster of its own, and the script a user writes today with
sentence-transformers, FAISS and ir_measures (`peers/plain_chain.py`) at that library's default and at its best CPU
settings. All must give the same nDCG@10 to 0.005 before a time counts.

    python benchmarks/chain.py --data DIR --split test --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RAYDR = ["jobs/reproduce.py", "jobs/configs/zero_shot.yaml"]


def contenders(data: str, split: str, model: str, out: str) -> dict[str, list[str]]:
    raydr = [*RAYDR, f"data.path={data}", f"data.split={split}", "data.on_empty=keep", f"out={out}"]
    plain = ["benchmarks/peers/plain_chain.py", data, split, model]
    return {
        "raydr, in-process": [*raydr, "runtime=local", "method.args.precision=auto"],
        "raydr, in-process, fp32": [*raydr, "runtime=local"],
        "raydr, on Ray": [*raydr, "runtime=ray", "method.args.precision=auto"],
        "plain script, ST default": plain,
        "plain script, ST bf16, batch 8": [*plain, "8", "bfloat16"],
    }


def run_once(command: list[str], metrics: Path | None) -> tuple[float, float]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-2000:]}")
    content = metrics.read_text() if metrics else done.stdout.splitlines()[-1]
    return seconds, json.loads(content)["nDCG@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a BEIR folder")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of contenders (default: all)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    from raydr.encoders.checkpoint import locate

    model = str(locate("minilm"))
    times: dict[str, list[float]] = {}
    values: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name in contenders("", "", "", ""):
            if arguments.only and name not in arguments.only:
                continue
            with tempfile.TemporaryDirectory() as out:
                command = contenders(str(Path(arguments.data).resolve()), arguments.split, model, out)[name]
                metrics = Path(out) / "evaluate/metrics.json" if name.startswith("raydr") else None
                seconds, values[name] = run_once(command, metrics)
            times.setdefault(name, []).append(seconds)
            print(f"{name}: {seconds:.1f} s, nDCG@10 {values[name]:.4f}", file=sys.stderr)
    if max(values.values()) - min(values.values()) > 0.005:
        raise SystemExit(f"the contenders do not agree: {values}")
    reference = statistics.median(times[next(reversed(times))])
    print("| contender | seconds, median (min-max) | nDCG@10 | time relative to the last row |")
    print("| --- | --- | --- | --- |")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
        print(f"| {name} | {median:.1f} ({spread}) | {values[name]:.4f} | {median / reference:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": times, "nDCG@10": values}, indent=2))


if __name__ == "__main__":
    main()
