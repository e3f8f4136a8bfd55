"""W1, W2 and the embedding half of W11: texts to embeddings, beside sentence-transformers in its several modes.

    python benchmarks/encode.py --rounds 5 --peer-python ~/st-openvino/bin/python --out results/encode

Every contender is a process of its own with the same model folder, maximum length and threads; rounds interleave
(A B C, B C A, ...), outputs are compared with fp32 before a speed counts. `--peer-python` is an interpreter with
`sentence-transformers[openvino]` (and without torchvision, which that extra pulls in for another torch):

    python -m venv ~/flag && ~/flag/bin/pip install torch==2.13.0 FlagEmbedding          (for --flag-python)
    python -m venv ~/st-openvino && ~/st-openvino/bin/pip install torch==2.13.0 'sentence-transformers[openvino]'
    ~/st-openvino/bin/pip uninstall -y torchvision

Texts: passages of `dl20` (short), a mix of squad, medquad and cranfield (mixed) and transcripts of `qmsum` (long), from
`RAYDR_DATA`; where that is absent, words drawn from a fixed vocabulary with the same spread of lengths.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, rounds, spread, write

from raydr.encoders.checkpoint import locate, open_checkpoint
from raydr.encoders.text import available_cpus

HERE = Path(__file__).parent
COLLECTIONS = {"short": ["dl20"], "mixed": ["squad", "medquad", "cranfield"], "long": ["qmsum"]}
WORDS = {"short": (10, 110), "mixed": (5, 600), "long": (5_000, 50_000)}
Embed = Callable[[int, str | None], dict[str, Any]]


def texts_of(workload: str, number: int) -> tuple[list[str], str]:
    """`number` texts and where they come from."""
    data = Path(os.environ.get("RAYDR_DATA", HERE.parent.parent / "shared" / "data"))
    rng = random.Random(0)
    files = [data / name / "corpus.jsonl.gz" for name in COLLECTIONS[workload]]
    if all(file.is_file() for file in files):
        texts = []
        for file in files:
            with gzip.open(file, "rt", encoding="utf-8") as stream:
                rows = [json.loads(line) for line in stream]
            own = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
            texts += rng.sample(own, min(len(own), -(-number // len(files))))
        rng.shuffle(texts)
        return texts[:number], "+".join(COLLECTIONS[workload])
    low, high = WORDS[workload]
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    return [" ".join(rng.choices(vocabulary, k=rng.randint(low, high))) for _ in range(number)], "synthetic"


class Worker:
    """A contender in a process of its own."""

    def __init__(self, python: str, script: Path, load: dict[str, Any], threads: int) -> None:
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | settings,
        )
        self.load_s = self.ask({"do": "load", "threads": threads, **load})["load_s"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise ChildProcessError(f"{request['do']}: the process ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def contenders(arguments: argparse.Namespace, workload: str, calibration: Path) -> dict[str, tuple[Worker, int]]:
    """Name -> (its process, its batch size); a peer that is not installed is left out and named on stderr."""
    max_tokens = open_checkpoint(arguments.model).max_tokens
    folder, best, peer_python = str(locate(arguments.model)), arguments.best_batch, arguments.peer_python
    plans: list[tuple[str, str, str, dict[str, Any], int]] = [
        ("raydr (auto)", sys.executable, "raydr", {}, 0),
        ("raydr, torch bf16", sys.executable, "raydr", {"backend": "torch", "precision": "bfloat16"}, 0),
        ("raydr, torch fp32", sys.executable, "raydr", {"backend": "torch", "precision": "float32"}, 0),
        ("ST, batch 32 (default)", sys.executable, "sentence-transformers", {}, 32),
        (f"ST, batch {best}", sys.executable, "sentence-transformers", {}, best),
        (f"ST bf16, batch {best}", sys.executable, "sentence-transformers", {"dtype": "bfloat16"}, best),
    ]
    if arguments.flag_python:
        options = {"normalize_embeddings": True, "use_fp16": False, "pooling_method": "mean", "devices": "cpu"}
        plans.append(("FlagEmbedding", arguments.flag_python, "flagembedding", options, 256))
    if peer_python:
        openvino = {"backend": "openvino"}
        full = {**openvino, "model_kwargs": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}}
        int8 = {**openvino, "int8_calibrated_on": str(calibration)}
        for size in sorted({32, 16, best}):
            plans.append((f"ST OpenVINO, batch {size}", peer_python, "sentence-transformers", openvino, size))
        plans.append((f"ST OpenVINO fp32, batch {best}", peer_python, "sentence-transformers", full, best))
        plans.append((f"ST OpenVINO int8, batch {best}", peer_python, "sentence-transformers", int8, best))
    if workload in ("long", "lengths"):  # the other settings say nothing more about the cost of reading
        wanted = ("raydr (auto)", "ST, batch 32", "ST OpenVINO, batch 16", "ST OpenVINO fp32")
        plans = [plan for plan in plans if plan[0].startswith(wanted)]
    found: dict[str, tuple[Worker, int]] = {}
    for name, python, peer, options, size in plans:
        script = HERE / "peers" / ("raydr_worker.py" if peer == "raydr" else "st_worker.py")
        if peer == "raydr":
            options = {"device": arguments.device, **options}
        device = arguments.device
        load = {"peer": peer, "model": folder, "max_tokens": max_tokens, "device": device, "options": options}
        try:
            found[name] = (Worker(python, script, load, arguments.threads), size)
        except ChildProcessError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    return found


def measure(workload: str, number: int, arguments: argparse.Namespace, scratch: Path) -> tuple[str, dict[str, Any]]:
    texts, source = texts_of(workload, number)
    file = scratch / f"{workload}.json"
    file.write_text(json.dumps(texts), encoding="utf-8")
    calibration = scratch / "calibration.json"
    calibration.write_text(json.dumps(texts_of("short", number + 100)[0][-100:]), encoding="utf-8")
    running = contenders(arguments, workload, calibration)
    last: dict[str, dict[str, Any]] = {}
    outputs: dict[str, np.ndarray] = {}
    try:
        for name, (worker, size) in running.items():
            worker.ask({"do": "texts", "file": str(file)})
            out = scratch / "embeddings.npy"
            worker.ask({"do": "encode", "batch_size": size, "out": str(out)})
            outputs[name] = np.load(out)

        def call(name: str) -> Callable[[], None]:
            worker, size = running[name]
            return lambda: last.__setitem__(name, worker.ask({"do": "encode", "batch_size": size}))

        seconds = rounds({name: call(name) for name in running}, arguments.rounds)
    finally:
        for worker, _ in running.values():
            worker.close()
    reference = outputs.get("ST, batch 32 (default)", next(iter(outputs.values())))
    rows, results = [], {}
    for name, times in seconds.items():
        cosine = float(_cosines(outputs[name], reference).min())
        rate = [number / s for s in times]
        results[name] = {
            "texts_per_s": rate,
            "min_cosine": cosine,
            "rss_mib": last[name]["rss_mib"],
            "start_s": running[name][0].load_s,
        }
        if cosine < 0.999:
            print(f"{workload}: {name} gives other embeddings (least cosine {cosine:.5f})", file=sys.stderr)
        rows.append(
            [name, spread(rate), f"{cosine:.5f}", *(f"{results[name][key]:.1f}" for key in ("rss_mib", "start_s"))]
        )
    num_words = np.mean([len(text.split()) for text in texts])
    heading = f"### {workload}: {len(texts)} texts ({source}), {num_words:.0f} words on average\n\n"
    columns = ["contender", "texts/s, median (range)", "least cosine", "peak RSS, MiB", "start, s"]
    return heading + markdown(columns, rows) + "\n", results


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def lengths(arguments: argparse.Namespace, scratch: Path) -> tuple[str, dict[str, Any]]:
    """W2: seconds per text against its length; only the first 256 tokens are ever embedded."""
    texts, source = texts_of("long", 100)
    words = " ".join(texts).split()
    sizes = [200, 1_000, 5_000, 20_000, 50_000]
    count = 8
    files = []
    for size in sizes:
        own = [" ".join(words[start : start + size]) for start in range(0, count * size, size)]
        files.append(scratch / f"length-{size}.json")
        files[-1].write_text(json.dumps(own), encoding="utf-8")
    calibration = scratch / "calibration.json"
    calibration.write_text(json.dumps(texts_of("short", 100)[0]), encoding="utf-8")
    running = contenders(arguments, "lengths", calibration)
    results: dict[str, dict[int, list[float]]] = {}
    try:
        for size, file in zip(sizes, files, strict=True):
            for worker, _ in running.values():
                worker.ask({"do": "texts", "file": str(file)})

            def call(name: str) -> Callable[[], None]:
                worker, batch = running[name]
                return lambda: worker.ask({"do": "encode", "batch_size": batch})

            for name, times in rounds({name: call(name) for name in running}, arguments.rounds).items():
                results.setdefault(name, {})[size] = [1000 * s / count for s in times]
    finally:
        for worker, _ in running.values():
            worker.close()
    rows = [[name, *(spread(own[size]) for size in sizes)] for name, own in results.items()]
    heading = f"### lengths: milliseconds per text ({source}) of so many words\n\n"
    return heading + markdown(["contender", *(f"{size:,}" for size in sizes)], rows) + "\n", results


def fixed_cost(scratch: Path, num_passages: int, num_rounds: int) -> tuple[str, dict[str, Any]]:
    """W11: one small corpus embedded by the `embed` step in this process and on a fresh Ray cluster, start to exit."""
    texts, _ = texts_of("short", num_passages)
    source = scratch / "fixed_cost"
    source.mkdir()
    rows = (json.dumps({"_id": str(i), "text": text}) for i, text in enumerate(texts))
    (source / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

    def run(runtime: str) -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            command = [sys.executable, "jobs/embed.py", f"data.path={source}", f"out={out}/run", f"runtime={runtime}"]
            environment = os.environ | {"RAY_ADDRESS": "local"}
            subprocess.run(command, cwd=HERE.parent, env=environment, check=True, capture_output=True)

    seconds = rounds({name: lambda name=name: run(name) for name in ("local", "ray")}, num_rounds)
    table = markdown(["runtime", "seconds, median (range)"], [[name, spread(times)] for name, times in seconds.items()])
    return f"### Fixed cost: jobs/embed.py over {num_passages} passages, start to exit\n\n{table}\n", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["short", "mixed", "long", "lengths", "fixed_cost"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", type=int, default=2000, help="number of short texts")
    parser.add_argument("--mixed", type=int, default=1000, help="number of mixed texts")
    parser.add_argument("--long", type=int, default=100, help="number of long texts")
    parser.add_argument("--fixed-cost", type=int, default=200, help="passages of the fixed-cost corpus")
    parser.add_argument("--best-batch", type=int, default=8, help="batch size that suits sentence-transformers here")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--peer-python", help="interpreter with sentence-transformers[openvino]")
    parser.add_argument("--flag-python", help="interpreter with FlagEmbedding")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encode"))
    arguments = parser.parse_args()
    tables, results = "", {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for workload in arguments.workloads:
            if workload == "lengths":
                table, results[workload] = lengths(arguments, Path(folder))
            elif workload == "fixed_cost":
                table, results[workload] = fixed_cost(Path(folder), arguments.fixed_cost, arguments.rounds)
            else:
                table, results[workload] = measure(workload, getattr(arguments, workload), arguments, Path(folder))
            print(f"{workload} done after {time.perf_counter() - start:.0f} s", file=sys.stderr)
            tables += table
    write(arguments.out, "Encoding (W1, W2, W11)", tables, results)


if __name__ == "__main__":
    main()
