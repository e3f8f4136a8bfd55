"""VDR and SiDR against the dense retriever from the same start on the same data, BM25, and hybrids; sparsity; engines.

    python benchmarks/vdr.py learn --data ../shared/data --collection squad --transfer scifact --seeds 0 1 2 \
        --work runs/vdr --out results/vdr
    python benchmarks/vdr.py sparsity --data ../shared/data --collection squad --model runs/vdr/sidr-0/train/model \
        --work runs/vdr --out results/vdr_sparsity
    python benchmarks/vdr.py engines --passages 20000 --out results/vdr_engines
    python benchmarks/vdr.py pooling --out results/vdr_pooling

learn: `contrastive_small.yaml`, and `vdr_small.yaml` without and with SiDR's terms, train on the collection's training
    questions with the same number of steps. Each is searched in every way it knows, on the test questions and, without
    further training, on the collection `--transfer`: dense; parametric, alpha, beta, late parametric (the first 20 and
    100 hits of beta); BM25; and hybrids with BM25. Bytes are those of the index's embeddings per passage; queries/s
    are those of batch search, encoding included. `own words` is the share of a passage's 16 highest dimensions that
    are its own tokens.
sparsity: nDCG@10, R@100 and bytes by how many dimensions of a passage are kept, drawn in OUT.png.
engines: scoring random sparse embeddings with SciPy in three ways and, where it is installed, with Seismic, which is
    approximate (`pip install pyseismic-lsr`); rounds interleaved.
pooling: forward and backward pass of each word's highest logit over positions, 64 texts in bfloat16, against the
    formula as it stands, with all logits in memory; rounds interleaved.

Finished steps are used as they are, so an interrupted run goes on. A tiny run: `--set train.max_steps=2 \
mine.max_queries=40 --max-passages 300`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, rounds, spread, write

from raydr.artifacts import open_artifact
from raydr.config import Component, load
from raydr.data.corpus import Corpus
from raydr.data.passages import passages_of
from raydr.encoders.vocabulary import VocabularyEncoder
from raydr.evaluation.trec import read_qrels
from raydr.index.shard import POSTINGS, VECTORS
from raydr.methods.base import build_method
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.evaluate import evaluate
from raydr.verbs.index import index
from raydr.verbs.search import search
from raydr.verbs.train import train

CONFIGS = Path(__file__).parent.parent / "jobs/configs"
MEASURES = ("nDCG@10", "R@100")
TRAINED = {
    "dense": ("contrastive_small", []),
    "vdr": ("vdr_small", ["method.args.semi=false"]),
    "sidr": ("vdr_small", ["method.args.semi=true"]),
}


# ---- learn ------------------------------------------------------------------------------------------------------


def learn(options: argparse.Namespace) -> None:
    collections = {name: collection(options, name) for name in (options.collection, options.transfer) if name}
    rows = []
    for seed in options.seeds:
        for name, (config, settings) in TRAINED.items():
            out = options.work / f"{name}-{seed}"
            given = [f"data.path={collections[options.collection]}", f"out={out}", f"train.seed={seed}"]
            run = load(RunConfig, CONFIGS / f"{config}.yaml", [*given, *settings, *options.set])
            method = Component.model_validate(train(run).manifest.details["method"])
            for place, path in collections.items():
                rows += [
                    {"seed": seed, "collection": place, **row} for row in searched(out / place, path, name, method)
                ]
                print(table(rows), flush=True)
    write(options.out, "VDR: what is learned", table(rows), {"rows": rows})


def searched(out: Path, data: Path, name: str, method: Component) -> list[dict[str, Any]]:
    """The figures of one trained method on one collection, by how it is searched."""
    if name == "dense":
        return figures(out, data, method, {"dense": {}, "dense + BM25": {"mode": "hybrid"}, "BM25": {"mode": "bm25"}})
    alpha, bags = changed(method, query_view="bag"), changed(method, passage_view="bag")
    rows = figures(out / "vectors", data, method, {f"{name}, parametric": {}, f"{name} + BM25": {"mode": "hybrid"}})
    rows += figures(out / "vectors", data, alpha, {f"{name}, alpha": {}}, has_index=True)
    late = {f"{name}, late parametric, {depth}": {"rerank": depth} for depth in (20, 100)}
    rows += figures(out / "bags", data, bags, {f"{name}, beta": {}, **late})
    words = changed(bags, query_view="bag")
    rows += figures(out / "bags", data, words, {f"{name}, bags on both sides": {}}, has_index=True)
    share = own_words(out / "vectors", method)
    return [{**row, "own words": share} if row["search"] == f"{name}, parametric" else row for row in rows]


def changed(method: Component, **settings: Any) -> Component:
    return method.model_copy(update={"args": {**method.args, **settings}})


def figures(
    out: Path, data: Path, method: Component, searches: dict[str, dict[str, Any]], *, has_index: bool = False
) -> list[dict[str, Any]]:
    rows = []
    for name, settings in searches.items():
        folder = "search_" + "".join(c if c.isalnum() else "_" for c in name)
        run = RunConfig(
            out=out,
            runtime="local",
            data={"path": str(data), "split": "test"},
            method=method,
            search={"k": 100, **settings},
            evaluate={"measures": list(MEASURES)},
        )
        if not has_index:
            embed(run)
            index(run)
        found = search(run, name=folder).manifest.details
        metrics = evaluate(run, name=folder, to=f"evaluate_{folder}").path / "metrics.json"
        means = json.loads(metrics.read_text(encoding="utf-8"))
        rows.append(
            {
                "search": name,
                **{measure: float(means[measure]) for measure in MEASURES},
                "bytes": None if settings.get("mode") == "bm25" else bytes_per_passage(out / "index"),
                "queries/s": found["queries_per_s"],
            }
        )
    return rows


def bytes_per_passage(path: Path) -> float:
    """Of the embeddings alone, in the files of the shards."""
    manifest = open_artifact(path, kind="index").manifest
    size = sum(file.bytes for name, file in manifest.files.items() if name.endswith((VECTORS, POSTINGS)))
    return size / manifest.counts["passages"]


def own_words(out: Path, method: Component, *, highest: int = 16, num_passages: int = 200) -> float:
    """The share of passages' highest dimensions that are their own tokens."""
    encoder: Any = build_method(method).encoder()
    inner: VocabularyEncoder = encoder.inner
    passages = passages_of(next(iter(Corpus.open(out / "corpus").passages())).slice(0, num_passages))
    vectors, bags = inner.encode_passages(passages), inner.bags(inner.texts.tokenize_passages(passages))
    shares = []
    for row in range(len(passages)):
        start, end = vectors.indptr[row], vectors.indptr[row + 1]
        top = vectors.indices[start:end][np.argsort(-vectors.data[start:end])[:highest]]
        shares.append(np.isin(top, bags.indices[bags.indptr[row] : bags.indptr[row + 1]]).mean())
    return float(np.mean(shares))


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over seeds, lowest and highest behind them."""
    lines, columns = [], [*MEASURES, "bytes", "queries/s", "own words"]
    for key in dict.fromkeys((row["collection"], row["search"]) for row in rows):
        own = [row for row in rows if (row["collection"], row["search"]) == key]
        values = {column: [row[column] for row in own if row.get(column) is not None] for column in columns}
        lines.append([*key, *(spread(values[column]) if values[column] else "" for column in columns)])
    heads = ["collection", "search", *MEASURES, "index bytes per passage", "queries/s", "own words"]
    return markdown(heads, lines)


def collection(options: argparse.Namespace, name: str) -> Path:
    """The collection, or a part of it with at most `--max-passages`: all that is judged, then the first others."""
    source = options.data / name
    if options.max_passages is None:
        return source
    out = options.work / f"{name}-{options.max_passages}"
    if (out / "qrels/test.tsv").is_file():
        return out
    kept_queries: set[str] = set()
    kept: set[str] = set()
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    judged = {split: read_qrels(source / f"qrels/{split}.tsv") for split in ("train", "test")
              if (source / f"qrels/{split}.tsv").is_file()}  # fmt: skip
    for split, qrels in judged.items():
        for query_id, grades in list(qrels.items())[: options.max_passages // 4]:
            kept_queries.add(query_id)
            kept |= {passage_id for passage_id, grade in grades.items() if grade > 0}
        lines = [f"{q}\t{p}\t{g}\n" for q, grades in qrels.items() if q in kept_queries for p, g in grades.items()]
        (out / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")
    for file, wanted, most in (("queries.jsonl", kept_queries, 0), ("corpus.jsonl", kept, options.max_passages)):
        others, chosen = max(0, most - len(wanted)), []
        for line in lines_of(source / file):
            is_wanted = json.loads(line)["_id"] in wanted
            others -= not is_wanted
            if is_wanted or others >= 0:
                chosen.append(line)
        (out / file).write_text("".join(chosen), encoding="utf-8")
    return out


def lines_of(file: Path) -> Iterator[str]:
    packed = file.with_name(f"{file.name}.gz")
    with gzip.open(packed, "rt", encoding="utf-8") if packed.is_file() else file.open(encoding="utf-8") as lines:
        yield from lines


# ---- sparsity ---------------------------------------------------------------------------------------------------


def sparsity(options: argparse.Namespace) -> None:
    data = collection(options, options.collection)
    method = Component(
        import_path="raydr.methods.vdr:Vdr",
        args={"model": str(options.model.resolve()), "max_query_tokens": 32, "max_passage_tokens": 128},
    )
    rows = []
    for topk in options.topk:
        sparse = changed(method, passage_topk=topk, query_topk=topk)
        found = figures(options.work / f"topk-{topk}", data, sparse, {str(topk): {}})
        rows += [{"topk": topk, **row} for row in found]
    lines = [
        [str(r["topk"]), *(f"{r[m]:.4f}" for m in MEASURES), f"{r['bytes']:.0f}", f"{r['queries/s']:.1f}"] for r in rows
    ]
    tables = markdown(["dimensions kept", *MEASURES, "bytes per passage", "queries/s"], lines)
    write(options.out, "VDR: sparsity", tables, {"rows": rows})
    draw(rows, options.out.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    quality, size = figure.subplots(1, 2)
    places = [row["topk"] for row in rows]
    for measure in MEASURES:
        quality.plot(places, [row[measure] for row in rows], marker="o", label=measure)
    size.plot(places, [row["bytes"] for row in rows], marker="o", color="black")
    for axes, name in ((quality, "quality"), (size, "bytes per passage")):
        axes.set_xscale("symlog", base=2, linthresh=16)  # 0: the own words alone
        axes.set_xlabel("dimensions kept")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    quality.legend(fontsize=8)
    figure.savefig(file, dpi=110)


# ---- engines ----------------------------------------------------------------------------------------------------


def engines(options: argparse.Namespace) -> None:
    from scipy.sparse import csc_array, csr_array

    rng = np.random.default_rng(0)
    passages = drawn(rng, options.passages, options.entries)
    lines = []
    for name, entries in (("vector", options.entries), ("bag of 12", 12)):
        queries = drawn(rng, options.queries, entries)
        columns, by_dim = csc_array(passages), csr_array(passages.T)
        bounds = list(zip(queries.indptr, queries.indptr[1:], strict=False))
        contenders = {
            "columns of the query, times its weights": lambda q=queries, b=bounds, c=columns: [
                c[:, q.indices[start:end]] @ q.data[start:end] for start, end in b
            ],
            "sparse product of queries and postings": lambda q=queries, d=by_dim: q @ d,
            "passages times dense queries": lambda q=queries: passages @ q.toarray().T,
        }
        if find_spec("seismic") is not None:
            contenders["Seismic (approximate)"] = seismic(passages, queries)
        for contender, times in rounds(contenders, options.rounds).items():
            lines.append([name, contender, spread([t / options.queries for t in times], 1000)])
    title = f"Scoring {options.passages:,} passages of {options.entries} weights each"
    write(options.out, title, markdown(["query", "engine", "ms per query"], lines), {"lines": lines})


def drawn(rng: np.random.Generator, rows: int, entries: int, *, dims: int = 29523) -> Any:
    """Random weights; a few dimensions are in many rows, most in few, as words are."""
    from scipy.sparse import csr_array

    shares = 1 / np.arange(1, dims + 1) ** 0.7
    bounds = np.cumsum(shares / shares.sum())
    indices = [np.unique(np.searchsorted(bounds[:-1], rng.random(entries))) for _ in range(rows)]
    counts = np.cumsum([0, *map(len, indices)])
    flat = np.concatenate(indices)
    return csr_array((1 + rng.random(len(flat), dtype=np.float32), flat, counts), shape=(rows, dims))


def seismic(passages: Any, queries: Any) -> Any:
    import seismic as library

    kind = library.get_seismic_string()
    names = np.arange(passages.shape[1]).astype(str).astype(kind)
    dataset = library.SeismicDataset()
    for row, (start, end) in enumerate(zip(passages.indptr, passages.indptr[1:], strict=False)):
        dataset.add_document(str(row), names[passages.indices[start:end]], passages.data[start:end])
    built = library.SeismicIndex.build_from_dataset(dataset, num_threads=1)
    spans = list(zip(queries.indptr, queries.indptr[1:], strict=False))

    def run() -> None:
        for line, (start, end) in enumerate(spans):
            weights, words = queries.data[start:end], names[queries.indices[start:end]]
            built.search(str(line), words, weights, k=10, query_cut=20, heap_factor=0.9)

    return run


def pooling(options: argparse.Namespace) -> None:
    import torch

    from raydr.models.vocabulary import highest_over_positions

    generator = torch.Generator().manual_seed(0)
    words = torch.randn(29523, 384, generator=generator).bfloat16().requires_grad_()
    long, short = (torch.randint(low, high, (64,), generator=generator) for low, high in ((80, 161), (3, 10)))
    mixed = torch.where(torch.arange(64) < 24, long, short)
    lines = []
    for name, lengths in (
        ("64 of 160 tokens", torch.full((64,), 160)),
        ("24 of 80 to 160, 40 of 3 to 9", mixed),
        ("64 of 3 to 9", short),
    ):
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        hidden = torch.randn(*mask.shape, 384, generator=generator).bfloat16().requires_grad_()
        contenders = {
            "raydr": lambda h=hidden, m=mask: highest_over_positions(h, words, m).float().sum().backward(),
            "all logits at once": lambda h=hidden, m=mask: (
                (h @ words.T).masked_fill(m[:, :, None] == 0, float("-inf")).amax(dim=1).float().sum().backward()
            ),
        }
        lines += [[name, contender, spread(times)] for contender, times in rounds(contenders, options.rounds).items()]
    table = markdown(["texts", "contender", "seconds, forward and backward"], lines)
    write(options.out, "The highest logit over positions", table, {"lines": lines})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("learn", "sparsity"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--collection", default="squad")
        command.add_argument("--max-passages", type=int)
        command.add_argument("--work", type=Path, required=True)
    commands.choices["learn"].add_argument("--transfer", default="scifact")
    commands.choices["learn"].add_argument("--seeds", type=int, nargs="+", default=[0])
    commands.choices["learn"].add_argument("--set", nargs="*", default=[], help="overrides of all trainings")
    commands.choices["sparsity"].add_argument("--model", type=Path, required=True)
    commands.choices["sparsity"].add_argument("--topk", type=int, nargs="+", default=[0, 16, 64, 256, 768, 2048])
    command = commands.add_parser("engines")
    command.add_argument("--passages", type=int, default=20_000)
    command.add_argument("--entries", type=int, default=512)
    command.add_argument("--queries", type=int, default=32)
    commands.add_parser("pooling")
    for name in ("engines", "pooling"):
        commands.choices[name].add_argument("--rounds", type=int, default=3)
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    {"learn": learn, "sparsity": sparsity, "engines": engines, "pooling": pooling}[options.command](options)


if __name__ == "__main__":
    main()
