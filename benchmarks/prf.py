"""Pseudo-relevance feedback: a retriever alone, with vector PRF (average, Rocchio), and with ANCE-PRF trained for it.

    python benchmarks/prf.py --data DIR --collections scifact squad medquad --out results/prf
    python benchmarks/prf.py --data DIR --collections scifact --seeds 0 --ks 3 --bases zero_shot --out results/tiny \\
        --set train.max_steps=2 mine.max_queries=20 train.batch_size=4            (does it run?)
    python benchmarks/prf.py --alias --out results/alias

For each collection and each base retriever (`zero_shot`: MiniLM as it is; `contrastive` or any other name: trained by
jobs/configs/NAME_small.yaml) the corpus is indexed once, and every row is a batch search of that one index with
`search.prf`. ANCE-PRF is trained by jobs/configs/ance_prf_small.yaml, for `--seeds` with k = 3, and for each of `--ks`
with the first seed, which OUT.png plots. `cases told apart` is the trained encoder of the first seed reading the same
texts through a tokenizer that does not lower-case them: the mistake behind the first Pyserini figures of ANCE-PRF.
p: paired randomisation test against the base, corrected (Holm).

`--alias`: held-out entities. A query has an entity's alias alone, the relevant passage its code alone, and one passage,
the glossary's, both: only an encoder that reads what the first search found can know the code. k = 0 is the control.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, write
from methods import split_by_passage

from raydr.artifacts import open_artifact
from raydr.config import Component, load, part_of
from raydr.data.corpus import Corpus
from raydr.encoders.checkpoint import locate
from raydr.encoders.factory import EncoderFactory
from raydr.encoders.feedback import SETTINGS, FeedbackEncoder, FeedbackInput, LearnedFeedback
from raydr.encoders.text import TextEncoder
from raydr.evaluation.comparison import compare_runs, format_p
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.trec import read_run
from raydr.methods.ance_prf import AncePrf
from raydr.methods.base import build_method
from raydr.stages.config import PrfConfig, SearchConfig
from raydr.stages.search import search_corpus
from raydr.types import Run
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.train import train, trained

REPOSITORY = Path(__file__).resolve().parent.parent
MEASURES = EvaluateConfig(measures=["nDCG@10", "RR@10", "R@100"])
LENGTHS = {"max_query_tokens": 32, "max_passage_tokens": 128}
FEEDBACK_TOKENS = 64  # of each passage
K = 3


class Base:
    """A retriever with its index of one collection."""

    def __init__(self, name: str, data: Path, out: Path, overrides: list[str]) -> None:
        self.name, self.data, self.out = name, data, out
        settings = [f"data.path={data}", "data.split=test", "data.on_empty=keep", f"out={out}", "runtime=local"]
        if name == "zero_shot":
            settings += [f"method.args.{key}={value}" for key, value in LENGTHS.items()]
            config = load(RunConfig, REPOSITORY / "jobs/configs/zero_shot.yaml", settings)
        else:
            settings += overrides
            config = trained(load(RunConfig, REPOSITORY / f"jobs/configs/{name}_small.yaml", settings))
        embed(config)
        index(config)
        self.method: Component = config.method
        self.queries = Corpus.open(out / "corpus").queries()
        self.qrels = Corpus.open(out / "corpus").qrels()

    def search(self, name: str, prf: PrfConfig, build_refiner: Any = None) -> Run:
        """The run of the test queries, in a folder `name`."""
        config = SearchConfig(k=100, prf=None if build_refiner is not None else prf)
        folder, encoder = self.out / "runs" / name, EncoderFactory(self.method)
        if build_refiner is not None:  # of which the run's fingerprint knows nothing
            shutil.rmtree(folder, ignore_errors=True)
        made = search_corpus(
            self.out / "index", self.queries, encoder, config, folder, use_ray=False, build_refiner=build_refiner
        )
        return read_run(made.path / "run.trec")

    def train(self, k: int, seed: int, overrides: list[str]) -> Component:
        """ANCE-PRF for this retriever, as it was trained."""
        out = self.out / f"prf-{k}-{seed}"
        settings = [
            *(f"data.path={self.data}", "data.split=test", "data.on_empty=keep", f"out={out}"),
            f"method.args.retriever={json.dumps(self.method.model_dump(mode='json'))}",
            f"method.args.max_feedback_tokens={FEEDBACK_TOKENS}",
            f"method.args.max_tokens={LENGTHS['max_query_tokens'] + FEEDBACK_TOKENS * max(K, k)}",
            *(f"method.args.num_feedback={k}", f"mine.base_index={self.out / 'index'}", f"train.seed={seed}"),
            *overrides,
        ]
        made = train(load(RunConfig, REPOSITORY / "jobs/configs/ance_prf_small.yaml", settings))
        return Component.model_validate(made.manifest.details["method"])


def cased(method: Component, out: Path) -> Any:
    """Builds the refiner of a trained `AncePrf` whose tokenizer tells cases apart."""
    folders = {"base": out / "cased_tokenizer", "model": out / "cased_model"}
    built = method.build()
    assert isinstance(built, AncePrf)
    assert built.config.model is not None
    encoder = build_method(built.config.retriever).encoder()
    text: Any = getattr(encoder, "inner", encoder)
    for name, source in (("base", text.checkpoint.path), ("model", locate(built.config.model))):
        shutil.rmtree(folders[name], ignore_errors=True)
        shutil.copytree(source, folders[name])
    file = folders["base"] / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(spec))
    file = folders["base"] / "tokenizer_config.json"  # which has a say as well
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_lower_case": False}))
    known = json.loads((folders["model"] / SETTINGS).read_text())
    (folders["model"] / SETTINGS).write_text(json.dumps({**known, "lowercase": False}))
    settings = part_of(FeedbackInput, built.config.model_copy(update={"lowercase": False}))
    # The network's settings are the retriever's own; only its tokenizer is another.
    changes = {"model": str(folders["base"]), "pooling": text.pooling, "normalize": text.normalize}
    reading = TextEncoder(text.config.model_copy(update=changes))
    feedback = FeedbackEncoder(encoder, reading, settings, str(folders["model"]))
    return lambda _: LearnedFeedback(feedback, list)


def measured(base: Base, runs: dict[str, Run]) -> dict[str, dict[str, tuple[float, float]]]:
    """Name -> measure -> value and corrected p against the first of them."""
    found = compare_runs(runs, base.qrels, MEASURES)
    return {
        name: {m: (float(v), float(p)) for m, v, p in zip(found.measures, values, ps, strict=True)}
        for name, values, ps in zip(found.names, found.values, found.p_corrected, strict=True)
    }


def cells(values: dict[str, tuple[float, float]], *, is_base: bool = False) -> list[str]:
    return [f"{value:.4f}" + ("" if is_base else f" (p {format_p(p)})") for value, p in values.values()]


def over_seeds(found: Sequence[dict[str, tuple[float, float]]]) -> list[str]:
    """Mean and standard deviation of each measure."""
    texts = []
    for measure in found[0]:
        values = [own[measure][0] for own in found]
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.4f}{spread}")
    return texts


def plot(sweeps: dict[str, dict[int, dict[str, tuple[float, float]]]], bases: dict[str, float], file: Path) -> None:
    """What reading k hits adds to the nDCG@10 of one search; a line for each collection and base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, sweep in sweeps.items():
        axes.plot(list(sweep), [own["nDCG@10"][0] - bases[name] for own in sweep.values()], marker="o", label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("k, hits of the first search that are read")
    axes.set_ylabel("nDCG@10 less that of one search")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def collections(options: argparse.Namespace) -> None:
    lines, results = [], {}
    sweeps: dict[str, dict[int, dict[str, tuple[float, float]]]] = {}
    alone: dict[str, float] = {}
    for collection in options.collections:
        folder = (options.work / collection).resolve()
        data, left_out = split_by_passage((options.data / collection).resolve(), folder / "data")
        print(left_out, file=sys.stderr)
        for name in options.bases:
            base, label = Base(name, data, folder / name, options.base_overrides), f"{collection}, {name}"
            runs = {
                "base": base.search("base", PrfConfig(method="none")),
                "average": base.search("average", PrfConfig(method="average")),
                "Rocchio": base.search("rocchio", PrfConfig(method="rocchio")),
            }
            refiners = {(K, seed): base.train(K, seed, options.overrides) for seed in options.seeds}
            for k in options.ks:
                own = (k, options.seeds[0])
                refiners[own] = refiners.get(own) or base.train(*own, options.overrides)
            for (k, seed), refiner in refiners.items():
                runs[f"k={k}, seed {seed}"] = base.search(f"prf-{k}-{seed}", PrfConfig(refiner=refiner))
            first = refiners[K, options.seeds[0]]
            runs["cases told apart"] = base.search("cased", PrfConfig(), cased(first, base.out))
            found = measured(base, runs)
            seeds = [found[f"k={K}, seed {seed}"] for seed in options.seeds]
            for row in ("base", "average", "Rocchio"):
                lines.append([collection, name, row, *cells(found[row], is_base=row == "base")])
            lines.append([collection, name, f"ANCE-PRF, k = {K}, {len(seeds)} seeds", *over_seeds(seeds)])
            for k in options.ks:
                own = found[f"k={k}, seed {options.seeds[0]}"]
                lines.append([collection, name, f"ANCE-PRF, k = {k}, seed {options.seeds[0]}", *cells(own)])
            lines.append([collection, name, "the same (k = 3), cases told apart", *cells(found["cases told apart"])])
            sweeps[label] = {k: found[f"k={k}, seed {options.seeds[0]}"] for k in options.ks}
            alone[label] = found["base"]["nDCG@10"][0]
            details = open_artifact(base.out / f"runs/prf-{K}-{options.seeds[0]}").manifest.details
            seconds = {"prf_s": details["prf_s"], "search_s": details["search_s"]}
            results[label] = {"measures": found, "left_out": left_out, "queries": len(base.queries), **seconds}
            print(markdown(["collection", "base", "queries", *MEASURES.measures], lines), flush=True)
    if options.ks:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        plot(sweeps, alone, options.out.with_suffix(".png"))
    table = markdown(["collection", "base", "queries", *MEASURES.measures], lines)
    write(options.out, "Pseudo-relevance feedback", table, results)


def write_alias_collection(folder: Path, *, entities: int, seed: int) -> Path:
    """A BEIR folder: two thirds of the entities in the split train, the others in test."""
    rng = random.Random(seed)
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "l")]
    words: set[str] = set()
    while len(words) < 2 * entities:
        words.add("".join(rng.choices(syllables, k=3)))
    names = sorted(words)
    rng.shuffle(names)
    pairs = list(zip(names[:entities], names[entities:], strict=True))
    corpus = [{"_id": f"g{n}", "text": f"{alias} stands for {code}"} for n, (alias, code) in enumerate(pairs)]
    corpus += [{"_id": f"r{n}", "text": f"this is the record of {code}"} for n, (_, code) in enumerate(pairs)]
    queries = [{"_id": f"q{n}", "text": f"the record of {alias}"} for n, (alias, _) in enumerate(pairs)]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut = entities * 2 // 3
    for split, part in (("train", range(cut)), ("test", range(cut, entities))):
        judged = "".join(f"q{n}\tr{n}\t1\n" for n in part)
        (folder / f"qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


def alias(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for seed in options.seeds:
        folder = (options.work / f"alias-{seed}").resolve()
        data = folder / "data"
        if not data.exists():
            write_alias_collection(data, entities=options.entities, seed=seed)
        base = Base("zero_shot", data, folder / "zero_shot", [])
        runs = {"base": base.search("base", PrfConfig(method="none"))}
        runs["average"] = base.search("average", PrfConfig(method="average"))
        runs["Rocchio"] = base.search("rocchio", PrfConfig(method="rocchio"))
        for k in options.ks:
            refiner = base.train(k, seed, [f"mine.last_rank={options.entities}", *options.overrides])
            runs[f"ANCE-PRF, k = {k}"] = base.search(f"prf-{k}", PrfConfig(refiner=refiner))
        for name, values in measured(base, runs).items():
            found.setdefault(name, []).append(values)
    lines = [[name, *over_seeds(values)] for name, values in found.items()]
    table = markdown(["held-out entities", *MEASURES.measures], lines)
    write(options.out, f"Aliases, {options.entities} entities, {len(options.seeds)} seeds", table, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the collections")
    parser.add_argument("--collections", nargs="+", default=["scifact", "squad", "medquad"])
    parser.add_argument("--bases", nargs="+", default=["zero_shot", "contrastive"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ks", nargs="*", type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--alias", action="store_true", help="the experiment with aliases in the place of collections")
    parser.add_argument("--entities", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/prf"), help="folder of the indexes, models and runs")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.md, OUT.json and OUT.png")
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="settings of ANCE-PRF's training")
    parser.add_argument("--base-set", nargs="*", default=[], dest="base_overrides", help="of a trained base")
    options = parser.parse_args()
    if not options.alias and options.data is None:
        parser.error("--data: name the folder of the collections")
    alias(options) if options.alias else collections(options)


if __name__ == "__main__":
    main()
