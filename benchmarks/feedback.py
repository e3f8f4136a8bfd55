"""Relevance feedback: recall before and after queries have moved towards a reranker's opinion of their first hits.

    python benchmarks/feedback.py --data DIR --collections scifact cranfield --colbert minilm --scores CROSS_ENCODER \\
        --order FIRST --out results/feedback

CROSS_ENCODER and FIRST are folders of models that raydr trained (`OUT/train/model`); `--colbert` is such a folder or a
sentence encoder, whose token embeddings then judge as a ColBERT's do; each may be left out. Every row is one batch
search with the zero-shot encoder and `search.feedback`; `raydr search` gives the same. p: paired
randomisation test against the first row, corrected (Holm) over the rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, write

from raydr.config import Component, load
from raydr.data.corpus import Corpus
from raydr.evaluation.comparison import compare_runs, format_p
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.trec import read_run
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.search import search

REPOSITORY = Path(__file__).resolve().parent.parent
MEASURES = EvaluateConfig(measures=["R@100", "nDCG@10"])
LENGTHS = {"max_query_tokens": 32, "max_passage_tokens": 128}


def teachers(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The settings of `search.feedback` by row."""
    found: dict[str, dict[str, Any]] = {}
    if options.scores:
        path = "raydr.methods.cross_encoder:CrossEncoderRanker"
        args = {"model": options.scores, "max_pair_tokens": 144, "precision": "auto"}
        found["cross-encoder"] = {"scores": Component(import_path=path, args=args)}
    if options.colbert:
        args = {"model": options.colbert, "normalize": True, **LENGTHS}
        found["ColBERT"] = {"scores": Component(import_path="raydr.methods.colbert:ColBertRanker", args=args)}
    if options.order:
        first = load(RunConfig, REPOSITORY / "jobs/configs/first_small.yaml", ["data.path=unused"]).method
        args = {**first.args, "engine": {"model": options.order, "dtype": "auto"}, "start": "causal"}
        order = {"order": first.model_copy(update={"args": args})}
        found |= {f"{name}, then FIRST": {**own, **order} for name, own in found.items()} | {"FIRST": order}
    return {f"towards {name}": own for name, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections")
    parser.add_argument("--collections", nargs="+", default=["scifact", "cranfield"])
    parser.add_argument("--scores", help="a trained cross-encoder")
    parser.add_argument("--colbert", help="a ColBERT or a sentence encoder")
    parser.add_argument("--order", help="a trained FIRST")
    parser.add_argument("--depth", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/feedback"), help="folder of the indexes and runs")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.md and OUT.json")
    options = parser.parse_args()
    lines, results = [], {}
    for collection in options.collections:
        settings = {
            "data": {"path": str(options.data / collection), "split": "test", "on_empty": "keep"},
            "method": {"import_path": "raydr.methods.zero_shot:ZeroShot", "args": LENGTHS},
            "out": options.work / collection,
            "runtime": "local",
            "search": {"k": 1000},
        }
        run = RunConfig.model_validate(settings)
        embed(run)
        index(run)
        qrels = Corpus.open(run.out / "corpus").qrels()
        rows: dict[str, dict[str, Any]] = {"before": {}, **teachers(options)}
        runs, seconds = {}, {}
        for name, feedback in rows.items():
            changes = {"feedback": {**feedback, "depth": options.depth}} if feedback else {}
            own = RunConfig.model_validate({**settings, "search": {**settings["search"], **changes}})
            started = time.perf_counter()
            runs[name] = read_run(search(own, name=f"search_{name.replace(' ', '_')}").path / "run.trec")
            seconds[name] = time.perf_counter() - started
        compared = compare_runs(runs, qrels, MEASURES)
        for number, name in enumerate(rows):
            values = [
                f"{value:.4f}" + (f" (p {format_p(p)})" if number else "")
                for value, p in zip(compared.values[number], compared.p_corrected[number], strict=True)
            ]
            lines.append([collection, name, *values, f"{seconds[name]:.0f}"])
        results[collection] = {
            "names": compared.names,
            "values": compared.values.tolist(),
            "p_corrected": compared.p_corrected.tolist(),
            "seconds": seconds,
        }
    columns = ["collection", "query", *compared.measures, "search, s"]
    write(options.out, f"Relevance feedback from the first {options.depth} hits", markdown(columns, lines), results)


if __name__ == "__main__":
    main()
