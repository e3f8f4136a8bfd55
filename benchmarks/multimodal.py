"""MM-Embed's directions on small pictures, and how fast pictures are embedded.

    python benchmarks/emoji_collection.py --data DATA --out runs/emoji
    python benchmarks/multimodal.py learn --collection runs/emoji --seeds 0 1 2 --out results/multimodal
    python benchmarks/multimodal.py throughput --collection runs/emoji --model OUT/mm_embed-0/train_hard/model

learn: for each seed a dual encoder (`clip_small.yaml`) is trained on the training part, its vision tower is given to a
    small LLaVA-NeXT, and that is trained by MM-Embed's stages (`mm_embed_small.yaml`); with `--vdr` a dual encoder of
    sparse embeddings (`vdr_pictures_small.yaml`) from the same start as the first. Every one of them searches the
    whole test part, which is one pool of pictures, names and paragraphs of a text collection, with every kind of query;
    the picture that a query asks with is left out of its hits.
    The training part shows nothing of what the test part shows. Finished steps are used as they are, so an
    interrupted run goes on.
throughput: pictures and texts embedded by raydr's encoder and by a plain loop over the same network, processor and
    precision, batches in the order of the corpus; rounds interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from emoji_collection import TEXT_TASK
from interleaved import markdown, rounds, spread, write

from raydr.config import Component, load
from raydr.data.corpus import Corpus
from raydr.evaluation.trec import read_run
from raydr.types import TASK
from raydr.verbs.config import RunConfig
from raydr.verbs.embed import embed
from raydr.verbs.index import index
from raydr.verbs.ingest import ingest
from raydr.verbs.search import search
from raydr.verbs.train import train

CONFIGS = Path(__file__).parent.parent / "jobs/configs"
CUTS = (1, 5, 10)


# ---- learn ------------------------------------------------------------------------------------------------------


def learn(options: argparse.Namespace) -> None:
    rows = []
    for seed in options.seeds:
        for name, method in contenders(options, seed).items():
            rows.append({"method": name, "seed": seed, "tasks": measured(options, f"{name}-{seed}", method)})
            print(table(rows), flush=True)
    write(options.out, "Multimodal retrieval: what is learned", table(rows), {"rows": rows})


def contenders(options: argparse.Namespace, seed: int) -> dict[str, Component]:
    """Name -> the method as it was trained, in the order in which each makes the next possible."""
    train_on = [f"data.path={options.collection / 'train'}", "data.split=train", f"train.seed={seed}"]
    out = options.work / f"clip-{seed}"
    config = load(RunConfig, CONFIGS / "clip_small.yaml", [*train_on, f"out={out}", *options.clip])
    found = {"CLIP-style, scores fused": trained(config)}
    out = options.work / f"mm_embed-{seed}"
    tower = options.work / f"clip-{seed}/train/model"
    config = load(
        RunConfig,
        CONFIGS / "mm_embed_small.yaml",
        [
            *train_on,
            f"out={out}",
            f"method.args.tower={tower}",
            f'method.args.text_tasks=["{TEXT_TASK}"]',
            *options.mm_embed,
        ],
    )
    last = trained(config)
    stages = {
        "random": "LLaVA, random negatives",
        "hard": "+ modality-aware negatives",
        "hard_2": "+ a second round of them",
        "text": "+ continual text",
    }
    for stage, name in stages.items():
        model = (out / f"train_{stage}/model").resolve()
        if model.is_dir():
            found[name] = last.model_copy(update={"args": {**last.args, "model": str(model)}})
    if options.vdr is not None:
        out = options.work / f"vdr-{seed}"
        config = load(RunConfig, CONFIGS / "vdr_pictures_small.yaml", [*train_on, f"out={out}", *options.vdr])
        found["VDR, sparse"] = trained(config)
    return found


def trained(config: RunConfig) -> Component:
    return Component.model_validate(train(config).manifest.details["method"])


def measured(options: argparse.Namespace, name: str, method: Component) -> dict[str, dict[str, float]]:
    """Per task: Hit@k, and the share of the first k hits that are of another modality than what is looked for."""
    folder = options.work / "test" / "".join(c if c.isalnum() else "_" for c in name)
    config = RunConfig(
        out=folder,
        runtime="local",
        data={"path": str(options.collection / "test"), "split": "test", "images": {"size": 64}},
        method=method,
        search={"k": 100},
    )
    ingest(config)
    embed(config)
    index(config)
    run = read_run(search(config).path / "run.trec")
    corpus = Corpus.open(folder / "corpus")
    qrels = corpus.qrels()
    pictures = {
        row["passage_id"]
        for row in pq.read_table(
            options.collection / "test/passages.parquet", filters=[("text", "=", "")], columns=["passage_id"]
        ).to_pylist()
    }
    asked = pq.read_table(options.collection / "test/queries.parquet", columns=["query_id", TASK, "asked_with"])
    queries = {row["query_id"]: row for row in asked.to_pylist()}
    found: dict[str, dict[str, list[float]]] = {}
    for query_id, grades in qrels.items():
        relevant = {passage for passage, grade in grades.items() if grade >= 1}
        wants_picture = bool(relevant & pictures)
        query = queries[query_id]
        hits = [hit.passage_id for hit in run.get(query_id, []) if hit.passage_id != query["asked_with"]]
        own = found.setdefault(query[TASK], {})
        for cut in CUTS:
            own.setdefault(f"Hit@{cut}", []).append(float(bool(relevant & set(hits[:cut]))))
            wrong = [(hit in pictures) != wants_picture for hit in hits[:cut]]
            own.setdefault(f"wrong@{cut}", []).append(sum(wrong) / max(1, len(wrong)))
    return {task: {name: statistics.fmean(values) for name, values in own.items()} for task, own in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, lowest and highest behind them."""
    lines = []
    tasks = sorted({task for row in rows for task in row["tasks"]})
    for task in tasks:
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row["tasks"][task] for row in rows if row["method"] == name]
            cells = [
                spread([figures[measure] for figures in own])
                for measure in (*(f"Hit@{cut}" for cut in CUTS), "wrong@1", "wrong@5")
            ]
            lines.append([task, name, *cells])
    heads = ["task", "method", *(f"Hit@{cut}" for cut in CUTS), "wrong modality, first", "wrong modality, first 5"]
    return markdown(heads, lines)


# ---- throughput -------------------------------------------------------------------------------------------------


def throughput(options: argparse.Namespace) -> None:
    import torch

    from raydr.encoders.multimodal import MultimodalEncoder, MultimodalEncoderConfig
    from raydr.types import Passage

    rows = pq.read_table(options.collection / "test/passages.parquet").to_pylist()
    whole = [Passage(row["passage_id"], row["text"], image=row["image"]) for row in rows]
    pictures = [passage for passage in whole if passage.image is not None]
    kinds = {"pictures": pictures, "pictures, names, paragraphs": whole[:: max(1, len(whole) // options.passages)]}
    encoder = MultimodalEncoder(MultimodalEncoderConfig(model=str(options.model), precision=options.precision))
    network = encoder.checkpoint.load(options.precision)
    reader = encoder.reader

    def plain(passages: list[Passage]) -> None:
        with torch.inference_mode():
            for start in range(0, len(passages), options.batch):
                tokens = reader.texts(reader.passages(passages[start : start + options.batch])).padded(reader.pad_id)
                network(*tokens.inputs)

    torch.set_num_threads(encoder.config.num_threads or torch.get_num_threads())
    lines, results = [], {}
    for kind, found in kinds.items():
        passages = found[: options.passages]
        before = encoder.stats.tokens if results else 0
        encoder.encode_passages(passages)  # loads the network, the first time
        tokens = encoder.stats.tokens - before
        contenders = {
            "raydr": lambda p=passages: encoder.encode_passages(p),
            "a plain loop": lambda p=passages: plain(p),
        }
        seconds = rounds(contenders, options.rounds)
        lines += [
            [
                f"{len(passages):,} {kind}",
                name,
                spread([len(passages) / s for s in own]),
                spread([tokens / s for s in own]),
                f"{statistics.median(seconds['a plain loop']) / statistics.median(own):.2f}",
            ]
            for name, own in seconds.items()
        ]
        results[kind] = {"seconds": seconds, "tokens": tokens, "passages": len(passages)}
    text = markdown(["what", "contender", "passages/s", "tokens/s", "times the plain loop"], lines)
    print(text)
    write(options.out, "Multimodal embedding", text, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["learn", "throughput"])
    parser.add_argument("--collection", type=Path, required=True, help="what emoji_collection.py wrote")
    parser.add_argument("--work", type=Path, default=Path("runs/multimodal"), help="learn: where steps are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clip", nargs="*", default=[], help="learn: overrides of clip_small.yaml, key=value")
    parser.add_argument("--mm-embed", nargs="*", default=[], help="learn: overrides of mm_embed_small.yaml")
    parser.add_argument("--vdr", nargs="*", help="learn: VDR as well, with overrides of vdr_pictures_small.yaml")
    parser.add_argument("--model", type=Path, help="throughput: a trained model's folder")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="throughput: of the plain loop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/multimodal"))
    given = parser.parse_args()
    {"learn": learn, "throughput": throughput}[given.what](given)
