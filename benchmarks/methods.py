"""How well the methods rank, each trained from the same checkpoint on the same candidates, with several seeds.

    python benchmarks/methods.py --data ../shared/data --collections squad --seeds 0 1 2 --out runs/methods

Every cell is one `raydr reproduce` of jobs/configs/<method>_small.yaml in a folder of its own, so a grid that was
stopped goes on. The cross-encoder, once trained, teaches TAS-Balanced with every seed; `tas_random` is that method with
random batches and pairs, and the same two teachers; `contrastive_own` compares a query with as many passages as AR2
does, its positive and three negatives, and with nobody else's; `first_lm` trains FIRST's network with the
language-modelling loss alone. Rankers (cross_encoder, first, first_lm) reorder the untrained retriever's first hits, as
their configs say. For AR2 the warm-up ranker and the last one also reorder the retriever's first hits (`--rerank`),
which compares the two rankers. The table gives mean and standard deviation over the seeds, on the test queries and,
where there are some, on dev queries, which nothing of a run has seen. Where training and test questions have relevant
passages in common (SciFact, MedQuAD), those training questions are left out, and the table says how many stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, write

from raydr.artifacts import is_finished, open_artifact
from raydr.config import Component, load
from raydr.data.corpus import Corpus
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.metrics import measure_run
from raydr.evaluation.trec import read_qrels, read_run, write_qrels
from raydr.steps import Steps
from raydr.verbs.config import RunConfig
from raydr.verbs.search import search

REPOSITORY = Path(__file__).resolve().parent.parent
METHODS = ["zero_shot", "contrastive", "contrastive_own", "mw", "cross_encoder", "tas_balanced", "tas_random", "ar2"]
METHODS += ["first", "first_lm"]
ONCE = ["zero_shot", "cross_encoder"]
"""The start, and TAS-Balanced's teacher: of the first seed only."""
MEASURES = ["dev nDCG@10", "nDCG@10", "R@5", "R@100", "pooled AUC"]
RANKER_MEASURES = EvaluateConfig(measures=["nDCG@10", "R@5"])
LENGTHS = ["method.args.max_query_tokens=32", "method.args.max_passage_tokens=128"]


def config_of(method: str, folder: Path, data: Path, seed: int, overrides: list[str]) -> tuple[Path, list[str]]:
    names = {
        "zero_shot": "zero_shot",
        "contrastive_own": "contrastive_small",
        "tas_random": "tas_balanced_small",
        "first_lm": "first_small",
    }
    name = names.get(method, f"{method}_small")
    own = [*LENGTHS, "search.k=600", "evaluate.measures=[nDCG@10,RR@10,R@5,R@100]"]
    settings = own if method == "zero_shot" else [f"train.seed={seed}", *overrides]
    if method == "contrastive_own":
        settings += ["method.args.in_batch=false", "method.args.num_negatives=3"]
    if method == "first_lm":
        settings.append("method.args.objective=generation")
    if method.startswith("tas"):
        settings += teachers(method, folder.parent, seed)
    elif method != "zero_shot" and (start := next(folder.parent.glob("zero_shot-*/index"), None)) is not None:
        settings.append(f"mine.base_index={start}")  # the checkpoint's index, made once for the grid
    return REPOSITORY / f"jobs/configs/{name}.yaml", [f"data.path={data}", "runtime=ray", f"out={folder}", *settings]


def teachers(method: str, grid: Path, seed: int) -> list[str]:
    """The cross-encoder of the grid where there is one; for random batches the scores and ColBERT of the other run."""
    found = sorted(grid.glob("cross_encoder-*/train/model"))
    settings = ["cross_encoder_steps=0", f"cross_encoder.args.model={found[0]}"] if found else []
    if method == "tas_random":
        other = grid / f"tas_balanced-{seed}"
        settings += ["sampling=random", f"pairs={other / 'scores'}", f"colbert={other / 'colbert/model'}"]
        return [f"method.args.{setting}" for setting in settings] + [f"mine.base_index={other / 'base/index'}"]
    return [f"method.args.{setting}" for setting in settings]


def split_by_passage(data: Path, out: Path) -> tuple[Path, str]:
    """A collection whose training questions have no relevant passage that a test question has; `data` where that is so.

    The second value says what was left out.
    """
    train, test = (read_qrels(data / f"qrels/{split}.tsv") for split in ("train", "test"))
    tested = {passage for judged in test.values() for passage, grade in judged.items() if grade > 0}
    kept = {
        query: judged
        for query, judged in train.items()
        if not any(grade > 0 and passage in tested for passage, grade in judged.items())
    }
    if len(kept) == len(train):
        return data, ""
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    for file in (*data.glob("*.*"), *data.glob("qrels/*.tsv")):
        link = out / file.relative_to(data)
        if file.name != "train.tsv" and not link.exists():
            link.symlink_to(file)
    rest = out / "qrels/train.tsv"
    if not rest.exists() or read_qrels(rest) != kept:  # a file written again is another file to a run that goes on
        write_qrels(kept, rest, format="beir")
    return out, f"{len(kept)} of {len(train)} training questions share no relevant passage with a test question.\n\n"


def run_once(method: str, folder: Path, data: Path, seed: int, overrides: list[str]) -> None:
    config, settings = config_of(method, folder, data, seed, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    if method == "tas_random" and not (folder / "examples").exists():  # the scores are of these, negative for negative
        shutil.copytree(folder.with_name(f"tas_balanced-{seed}") / "examples", folder / "examples")
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "jobs/reproduce.py", str(config), *settings], cwd=REPOSITORY, stdout=log, stderr=log
        )
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed}: failed; see {log.name}")


def measured(folder: Path) -> dict[str, float]:
    """The measures of a finished run, and its pooled area under the ROC curve."""
    summary = json.loads((folder / "evaluate/summary.json").read_text())["runs"][0]
    values = {name: found["value"] for name, found in summary["measures"].items()}
    return {**values, "pooled AUC": summary["roc"]["pooled_area"]}


def learned(folder: Path) -> Component:
    """The method as the run trained it."""
    return Component.model_validate(open_artifact(folder / "method").manifest.details["method"])


def on_dev(folder: Path, config: RunConfig) -> dict[str, float]:
    """What a finished run reaches on the dev queries, over the index that was measured on the test queries."""
    method = learned(folder) if is_finished(folder / "method") else config.method
    steps = Steps(config, Corpus.open(folder / "corpus"), use_ray=False)
    steps.evaluate(method, folder / "index", "dev")
    return {"dev nDCG@10": json.loads((folder / "dev/evaluate/metrics.json").read_text())["nDCG@10"]}


def rankers(folder: Path, data: Path, seed: int, depth: int, overrides: list[str]) -> dict[str, dict[str, float]]:
    """AR2's warm-up ranker and its last one over the first hits of the final retriever."""
    path, settings = config_of("ar2", folder, data, seed, overrides)
    config = load(RunConfig, path, [*settings, f"search.rerank={depth}", f"search.k={max(depth, 10)}"])
    method = learned(folder)
    corpus = Corpus.open(folder / "corpus")
    found = {}
    for label, ranker in (("warm-up ranker", folder / "ranker-warmup/model"), ("last ranker", None)):
        args = dict(method.args) if ranker is None else {**method.args, "trained_ranker": str(ranker.resolve())}
        own = config.model_copy(update={"method": method.model_copy(update={"args": args})})
        run = read_run(search(own, name=f"search_{label.replace(' ', '_')}").path / "run.trec")
        found[f"{label}, first {depth}"] = measure_run(run, corpus.qrels(), RANKER_MEASURES).means()
    return found


def table(cells: dict[str, list[dict[str, float]]]) -> str:
    rows = []
    for name, seeds in cells.items():
        row = [name, str(len(seeds))]
        for measure in MEASURES:
            values = [found[measure] for found in seeds if measure in found]
            if not values:
                row.append("")
                continue
            deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.4f}{deviation}")
        rows.append(row)
    return markdown(["method", "seeds", *MEASURES], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the collections")
    parser.add_argument("--collections", nargs="+", default=["squad"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rerank", type=int, default=5, help="hits that AR2's rankers reorder; 0: leave it out")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="settings for all trained methods")
    options = parser.parse_args()
    tables, results = "", {}
    for collection in options.collections:
        cells: dict[str, list[dict[str, float]]] = {}
        grid = (options.out / collection).resolve()
        data, left_out = split_by_passage((options.data / collection).resolve(), grid / "data")
        for seed in options.seeds:
            for method in options.methods:
                if method in ONCE and seed != options.seeds[0]:
                    continue
                folder = grid / f"{method}-{seed}"
                if not is_finished(folder / "evaluate"):
                    run_once(method, folder, data, seed, options.overrides)
                found = measured(folder)
                if (data / "qrels/dev.tsv").is_file():
                    path, settings = config_of(method, folder, data, seed, options.overrides)
                    found |= on_dev(folder, load(RunConfig, path, [*settings, "mine.dev_split=dev"]))
                cells.setdefault(method, []).append(found)
                if method == "ar2" and options.rerank:
                    for label, found in rankers(folder, data, seed, options.rerank, options.overrides).items():
                        cells.setdefault(label, []).append(found)
                print(table(cells), flush=True)
        tables += f"### {collection}\n\n{left_out}{table(cells)}\n"
        results[collection] = cells
    write(options.out / "methods", "Methods", tables, results)


if __name__ == "__main__":
    main()
