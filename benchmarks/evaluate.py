"""W7: ten measures of a run of 1,000 queries x 1,000 hits, and a paired test of two runs.

Contenders, interleaved, each from its own in-memory form and from the same TREC files: raydr, ir_measures, pytrec_eval
and, where they are installed (they are no dependency of raydr), BEIR's evaluator and ranx:

    pip install --no-deps --target PEERS beir ranx orjson lz4 cbor2 seaborn fastparquet tabulate rich
    PYTHONPATH=PEERS python benchmarks/evaluate.py --rounds 7

Every contender's means must equal trec_eval's code (pytrec_eval) to 1e-6 (BEIR: to the five digits it rounds to) before
a time counts. Cold start (a process of
its own: imports, compilation, reading the files, measuring) and its peak memory are reported apart. BEIR computes its
own fixed set of measures, four kinds at each cut-off, so its time is for 12 of them plus MRR@10.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.metrics import measure_run
from raydr.evaluation.significance import randomisation_test
from raydr.evaluation.trec import read_qrels, read_run, write_qrels, write_run
from raydr.types import Hit, Qrels, Run

MEASURES = ["nDCG@10", "nDCG@100", "RR@10", "AP", "AP@100", "R@10", "R@100", "R@1000", "P@10", "P@100"]
TREC = {"nDCG": "ndcg_cut", "AP": "map_cut", "R": "recall", "P": "P"}
RANX = {"nDCG": "ndcg", "AP": "map", "R": "recall", "P": "precision", "RR": "mrr"}
CONFIG = EvaluateConfig(measures=MEASURES)


def make_data(num_queries: int, depth: int, seed: int) -> tuple[Run, Qrels]:
    """Distinct float32 scores, so that tie-breaking, which differs between contenders, decides nothing."""
    rng = np.random.default_rng(seed)
    run, qrels = {}, {}
    for q in range(num_queries):
        passages = rng.permutation(1_000_000)[:depth]
        scores = np.sort(rng.choice(2**20, depth, replace=False))[::-1] / 2**10
        run[f"q{q}"] = [Hit(f"d{p}", float(s)) for p, s in zip(passages, scores, strict=True)]
        judged = rng.choice(depth, 50, replace=False)
        qrels[f"q{q}"] = {f"d{passages[i]}": int(rng.integers(0, 4)) for i in judged} | {f"unfound{q}": 2}
    return run, qrels


def trec_names() -> dict[str, str]:
    """Our name -> pytrec_eval's, for the measures it has (its reciprocal rank has no cut-off)."""
    cut = [name.split("@") for name in MEASURES if "@" in name and not name.startswith("RR")]
    return {f"{kind}@{k}": f"{TREC[kind]}_{k}" for kind, k in cut} | {"AP": "map"}


def means_by_trec_eval(qrels: Qrels, run: dict[str, dict[str, float]]) -> dict[str, float]:
    import pytrec_eval

    names = trec_names()
    per_query = pytrec_eval.RelevanceEvaluator(qrels, set(names.values())).evaluate(run)
    return {ours: sum(v[theirs] for v in per_query.values()) / len(qrels) for ours, theirs in names.items()}


def means_by_ir_measures(qrels: Any, run: Any) -> dict[str, float]:
    import ir_measures

    found = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in MEASURES], qrels, run)
    return {str(measure): value for measure, value in found.items()}


def means_by_beir(qrels: Qrels, run: dict[str, dict[str, float]]) -> dict[str, float]:
    from beir.retrieval.evaluation import EvaluateRetrieval

    kinds = EvaluateRetrieval.evaluate(qrels, run, [10, 100, 1000], ignore_identical_ids=False)
    mrr = EvaluateRetrieval.evaluate_custom(qrels, run, [10], metric="mrr")
    flat = {name: value for kind in kinds for name, value in kind.items()}
    names = {"nDCG": "NDCG", "AP": "MAP", "R": "Recall", "P": "P"}
    wanted = [name.split("@") for name in MEASURES if "@" in name and not name.startswith("RR")]
    return {f"{kind}@{k}": flat[f"{names[kind]}@{k}"] for kind, k in wanted} | {"RR@10": mrr["MRR@10"]}


def means_by_ranx(qrels: Any, run: Any) -> dict[str, float]:
    from ranx import evaluate

    names = {name: "@".join([RANX[name.split("@")[0]], *name.split("@")[1:]]) for name in MEASURES}
    found = evaluate(qrels, run, list(names.values()))
    return {ours: float(found[theirs]) for ours, theirs in names.items()}


def as_dicts(run: Run) -> dict[str, dict[str, float]]:
    return {query_id: {hit.passage_id: hit.score for hit in hits} for query_id, hits in run.items()}


def raydr_from_files(run: Path, qrels: Path) -> dict[str, float]:
    return measure_run(read_run(run), read_qrels(qrels), CONFIG).means()


def ir_measures_from_files(run: Path, qrels: Path) -> dict[str, float]:
    import ir_measures

    return means_by_ir_measures(ir_measures.read_trec_qrels(str(qrels)), ir_measures.read_trec_run(str(run)))


def pytrec_eval_from_files(run: Path, qrels: Path) -> dict[str, float]:
    import pytrec_eval

    with run.open() as run_lines, qrels.open() as qrels_lines:
        return means_by_trec_eval(pytrec_eval.parse_qrel(qrels_lines), pytrec_eval.parse_run(run_lines))


def ranx_from_files(run: Path, qrels: Path) -> dict[str, float]:
    import ranx

    return means_by_ranx(ranx.Qrels.from_file(str(qrels), kind="trec"), ranx.Run.from_file(str(run), kind="trec"))


FROM_FILES = {
    "raydr": raydr_from_files,
    "ir_measures": ir_measures_from_files,
    "pytrec_eval": pytrec_eval_from_files,
    "ranx": ranx_from_files,
}


def in_memory(run: Run, qrels: Qrels) -> dict[str, Callable[[], dict[str, float]]]:
    """Each contender on the form it documents, made before the clock starts."""
    dicts = as_dicts(run)
    contenders: dict[str, Callable[[], dict[str, float]]] = {
        "raydr": lambda: measure_run(run, qrels, CONFIG).means(),
        "ir_measures": partial(means_by_ir_measures, qrels, dicts),
        "pytrec_eval (9 measures)": partial(means_by_trec_eval, qrels, dicts),
    }
    if importlib.util.find_spec("beir"):
        contenders["BEIR (13 measures)"] = partial(means_by_beir, qrels, dicts)
    if importlib.util.find_spec("ranx"):
        import ranx

        contenders["ranx"] = partial(means_by_ranx, ranx.Qrels(qrels), ranx.Run(dicts))
    return contenders


def paired_tests(run: Run, qrels: Qrels) -> dict[str, Callable[[], Any]]:
    """All ten measures of two runs; raydr with its 100,000 sign flips, scipy and raydr with 1,000 as ranx does."""
    from scipy.stats import permutation_test

    other = {q: [*hits[1::2], *hits[::2]] for q, hits in run.items()}
    a, b = measure_run(run, qrels, CONFIG).values, measure_run(other, qrels, CONFIG).values

    def by_scipy() -> Any:
        mean = lambda x, axis: x.mean(axis=axis)  # noqa: E731
        return permutation_test((b - a,), mean, permutation_type="samples", n_resamples=1000, vectorized=True)

    tests = {
        "raydr, 100,000 permutations": lambda: randomisation_test(b - a),
        "raydr, 1,000 permutations": lambda: randomisation_test(b - a, num_permutations=1000),
        "scipy, 1,000 permutations": by_scipy,
    }
    if importlib.util.find_spec("ranx"):
        from ranx.statistical_tests import fisher_randomization_test

        columns = [(a[:, m].copy(), b[:, m].copy()) for m in range(len(MEASURES))]
        tests["ranx, 1,000 permutations"] = lambda: [fisher_randomization_test(x, y, 1000) for x, y in columns]
    return tests


def check(name: str, found: dict[str, float], truth: dict[str, float]) -> float:
    """Largest difference from trec_eval's code (RR@10: from raydr); ends the benchmark beyond 1e-6."""
    worst = max(abs(found[measure] - truth[measure]) for measure in found if measure in truth)
    if worst > (5.001e-6 if name.startswith("BEIR") else 1e-6):  # BEIR rounds its means to five digits
        raise SystemExit(f"{name} differs from trec_eval by {worst:.2e}: {found} against {truth}")
    return worst


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()  # warm-up
    for _ in range(rounds):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def cold(name: str, run: Path, qrels: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a process of its own that reads the files and measures them."""
    command = [sys.executable, __file__, "--one", name, str(run), str(qrels)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, int(done.stdout.splitlines()[-1])


def show(title: str, seconds: dict[str, list[float]], notes: dict[str, str]) -> None:
    print(f"\n| {title} | median s | min - max | |\n| --- | --- | --- | --- |")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} - {max(times):.3f} | {notes[name]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--depth", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "RUN", "QRELS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, run_file, qrels_file = arguments.one
        FROM_FILES[name](Path(run_file), Path(qrels_file))
        # Not getrusage: its maximum is inherited from the parent process.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024)
        return
    run, qrels = make_data(arguments.queries, arguments.depth, seed=0)
    reciprocal = {"RR@10": measure_run(run, qrels, CONFIG).means()["RR@10"]}
    truth = means_by_trec_eval(qrels, as_dicts(run)) | reciprocal
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        run_file, qrels_file = Path(folder) / "run.trec", Path(folder) / "qrels"
        write_run(run, run_file)
        write_qrels(qrels, qrels_file)
        files = {n: partial(f, run_file, qrels_file) for n, f in FROM_FILES.items() if importlib.util.find_spec(n)}
        for title, contenders in (("in memory", in_memory(run, qrels)), ("from files", files)):
            worst = {name: check(name, call(), truth) for name, call in contenders.items()}
            figures[title] = interleaved(contenders, arguments.rounds)
            show(title, figures[title], {name: f"within {value:.0e} of trec_eval" for name, value in worst.items()})
        starts = {name: [cold(name, run_file, qrels_file) for _ in range(arguments.rounds)] for name in files}
    figures["cold start, from files"] = {name: [second for second, _ in runs] for name, runs in starts.items()}
    memory = {name: f"peak {max(size for _, size in runs) / 2**20:.0f} MiB" for name, runs in starts.items()}
    show("cold start, from files", figures["cold start, from files"], memory)
    tests = paired_tests(run, qrels)
    figures["paired test, ten measures"] = interleaved(tests, arguments.rounds)
    show("paired test, ten measures", figures["paired test, ten measures"], dict.fromkeys(tests, ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
