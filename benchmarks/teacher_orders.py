"""FIRST learns the orders that large language models gave to lists of TREC 2020, and is tested on lists of TREC 2021.

    python benchmarks/teacher_orders.py --data ../shared/data --seeds 0 1 2 --out runs/teacher_orders

`dl20/teacher_orders.jsonl.gz` has the orders of gpt-3.5-turbo and RankVicuna. The network is first_small.yaml's, a
small language model made out of MiniLM, trained on spans of dl20's passages and then on these orders, but for those of
every fourth query: `dev` is how the model reorders BM25's first hits for them, for choosing settings. The test is
BM25's lists of dl21, other queries over another collection of passages, which nothing of a run has seen. `first_lm`
trains the same with the language-modelling loss alone. `untrained ColBERT` reorders the same hits by MiniLM's token
embeddings, as a mark to reach. Judgements are those of the passages that the data holds, grades as they stand.

A run that was stopped goes on, each finished method and seed staying. p: paired randomisation test against BM25's
order, Holm-corrected over the rows of a table.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, write

from raydr.artifacts import open_artifact
from raydr.config import Component, load
from raydr.data.corpus import Corpus
from raydr.evaluation.comparison import compare_runs, format_p
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.trec import read_qrels, read_run, write_run
from raydr.types import Hit, Run
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.rerank import rerank

REPOSITORY = Path(__file__).resolve().parent.parent
METHODS = {"first": "combined", "first_lm": "generation"}
MEASURES = EvaluateConfig(measures=["nDCG@10", "RR@10"])
HELD_OUT = 4
"""Every so many queries of dl20 are not learned from."""


def lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def bm25_run(folder: Path, queries: set[str]) -> Run:
    """BM25's lists of these queries; equal scores stand as they came."""
    return {
        row["query_id"]: [Hit(passage, 1.0 / rank) for rank, (passage, _) in enumerate(row["docs"], 1)]
        for row in lines(folder / "candidates.jsonl.gz")
        if row["retriever"] == "BM25" and row["query_id"] in queries
    }


def prepare(data: Path, out: Path) -> None:
    """The orders to learn from, and for both collections an index, which has the passages, and the run to reorder."""
    orders = lines(data / "dl20/teacher_orders.jsonl.gz")
    queries = sorted({row["query_id"] for row in orders})
    dev = set(queries[::HELD_OUT])
    out.mkdir(parents=True, exist_ok=True)
    learned = "".join(json.dumps(row) + "\n" for row in orders if row["query_id"] not in dev)
    file = out / "orders.jsonl"
    if not file.exists() or file.read_text() != learned:  # a file written again is another file to a run that goes on
        file.write_text(learned)
    for name, chosen in (("dl20", dev), ("dl21", set(read_qrels(data / "dl21/qrels/test.tsv")))):
        embed(config := run_of(data, name, out))
        index(config)
        write_run(bm25_run(data / name, chosen), out / f"{name}.trec")


def run_of(data: Path, name: str, out: Path) -> RunConfig:
    """A run over a collection; its embeddings are not asked for anything here, so they may be quick ones."""
    own = [*settings(data, name, out / name), "method.args.precision=bfloat16"]
    return load(RunConfig, REPOSITORY / "jobs/configs/zero_shot.yaml", own)


def settings(data: Path, name: str, out: Path) -> list[str]:
    return [f"data.path={data / name}", "data.split=test", f"out={out}", "runtime=local"]


def train(method: str, data: Path, out: Path, seed: int, overrides: list[str]) -> Component:
    """The method as trained; in a process of its own, with a Ray of its own."""
    folder = out / f"{method}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"file": out / "orders.jsonl"}
    files |= {"corpus": data / "dl20/corpus.jsonl.gz", "queries": data / "dl20/queries.jsonl"}
    own = [*settings(data, "dl20", folder), "mine.trust_order=true", f"train.seed={seed}", *overrides]
    own += [f"mine.source_{kind}={file}" for kind, file in files.items()]
    own.append(f"method.args.objective={METHODS[method]}")
    with (out / f"{folder.name}.log").open("w") as log:
        command = [sys.executable, "jobs/train.py", "jobs/configs/first_small.yaml", *own]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed}: failed; see {log.name}")
    return Component.model_validate(open_artifact(folder / "method").manifest.details["method"])


def reordered(reranker: Component, label: str, data: Path, out: Path, depth: int) -> dict[str, Run]:
    """The lists of both collections as the reranker orders them."""
    found = {}
    for name in ("dl20", "dl21"):
        config = run_of(data, name, out)
        changes = {"reranker": reranker, "run": out / f"{name}.trec", "depth": depth}
        config = config.model_copy(update={"rerank": config.rerank.model_copy(update=changes)})
        found[name] = read_run(rerank(config, name=f"rerank-{label}").path / "run.trec")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="none: what all seeds share is made")
    parser.add_argument("--depth", type=int, default=20, help="hits that are reordered")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher_orders"))
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="settings of the training")
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    prepare(data, out)
    runs = {"BM25": {name: read_run(out / f"{name}.trec") for name in ("dl20", "dl21")}}
    lengths = {"max_query_tokens": 32, "max_passage_tokens": 128}
    args = {"model": "minilm", "normalize": True, **lengths}
    colbert = Component(import_path="raydr.methods.colbert:ColBertRanker", args=args)
    runs["untrained ColBERT"] = reordered(colbert, "colbert", data, out, options.depth)
    report(runs, out, options)
    for seed in options.seeds:
        for method in options.methods:
            learned = train(method, data, out, seed, options.overrides)
            runs[f"{method}, seed {seed}"] = reordered(learned, f"{method}-{seed}", data, out, options.depth)
            report(runs, out, options)


def report(runs: dict[str, dict[str, Run]], out: Path, options: argparse.Namespace) -> None:
    tables, results = "", {}
    for name, title in (("dl20", "dev: queries of dl20 that were not learned from"), ("dl21", "test: dl21")):
        own = {label: found[name] for label, found in runs.items()}
        qrels = Corpus.open(out / name / "corpus").qrels()
        asked = own["BM25"]
        compared = compare_runs(own, {query: qrels[query] for query in asked if query in qrels}, MEASURES)
        rows = []
        for number, label in enumerate(own):
            values = [f"{value:.4f}" for value in compared.values[number]]
            p = format_p(compared.p_corrected[number][0]) if number else ""
            rows.append([label, *values, p])
        for method in options.methods:
            chosen = [compared.values[n] for n, label in enumerate(own) if label.startswith(f"{method}, ")]
            spread = zip(*chosen, strict=True)
            if len(chosen) > 1:
                values = [f"{statistics.mean(v):.4f} +- {statistics.stdev(v):.4f}" for v in spread]
                rows.append([f"{method}, {len(chosen)} seeds", *values, ""])
        tables += f"### {title}, {len(asked)} queries\n\n{markdown(['order', *compared.measures, 'p'], rows)}\n"
        results[name] = {"names": compared.names, "values": compared.values.tolist()}
    print(tables, flush=True)
    write(out / "teacher_orders", f"FIRST from a teacher's orders, first {options.depth} hits of BM25", tables, results)


if __name__ == "__main__":
    main()
