"""W9: training steps beside sentence-transformers' trainer, scaling over workers, and the memory of a batch.

    python benchmarks/training.py throughput --rounds 5 --out results/training
    python benchmarks/training.py workers --rounds 3
    python benchmarks/training.py memory
    python benchmarks/training.py layers --rounds 15
    python benchmarks/training.py passes --rounds 5
    python benchmarks/training.py gpu --batch 128 --shape bert-large --out results/training-gpu

Contenders train the same checkpoint (dropout set to zero, so that equal batches give equal losses) on the same batches
of `squad` (`RAYDR_DATA`): 16 queries, each with a positive and three negatives, in the same order, with the same loss
(InfoNCE at temperature 0.05, all passages of the batch as negatives), AdamW and learning rate, on all cores, in float32
unless a name says otherwise. The losses of the first step must agree to 1e-3 (bfloat16: 1e-2) before a speed counts. A
step's time is the median after the first six; memory is the proportional set size of the contender's processes, Ray's
included, at its highest.

layers: one linear layer of MiniLM in float32, forward and backward, by PyTorch's own and by raydr/train/linear.py
passes: MiniLM forward and backward over 16 texts of one length, with its own dropout of 0.1 and without, attending by
    PyTorch's fused kernel and by plain matrix products
gpu: throughput in bfloat16 on one GPU, of MiniLM or of an untrained BERT of a published shape; memory is the GPU's, as
    nvidia-smi tells it. The share of the card's peak counts 6 operations per weight and token and attention's
    products, padding not counted, against the H100's 989 TFLOP/s (bfloat16, dense). Unfinished: its
    contenders have run once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from interleaved import markdown, rounds, spread, write

from raydr.artifacts import write_artifact
from raydr.data.config import DataConfig
from raydr.data.examples import KIND, Example, write_examples
from raydr.data.ingest import ingest, ingest_queries
from raydr.encoders.checkpoint import locate
from raydr.types import Passage, Query

HERE = Path(__file__).parent
DATA = Path(os.environ.get("RAYDR_DATA", HERE.parent.parent / "shared" / "data"))
GROUP = 4
BATCH = 16
STEPS = 14
WARM = 6
SHAPES = {"bert-base": (768, 12, 12, 3072), "bert-large": (1024, 24, 16, 4096)}
"""Hidden size, layers, heads and inner size."""
PEAK_FLOPS = 989e12


def prepare(folder: Path, batch: int, shape: str = "minilm") -> None:
    """The examples, as a raydr artifact and as rows of text, and the checkpoint without dropout."""
    corpus = ingest(DataConfig(path=str(DATA / "squad"), split="test"), folder / "corpus")
    queries = ingest_queries(DataConfig(path=str(DATA / "squad"), split="train"), corpus, folder / "queries")
    rows = [row for table in corpus.passages(["passage_id", "text", "title"]) for row in table.to_pylist()]
    passages = {row["passage_id"]: Passage(row["passage_id"], row["text"], row["title"] or "") for row in rows}
    qrels = queries.qrels()
    asked = {next(iter(qrels[query.query_id])): query for query in queries.queries()}  # one query for each passage
    others = [passage_id for passage_id in passages if passage_id not in asked]  # which nobody's batch has as positive
    examples = []
    for place, (positive, query) in enumerate(list(asked.items()) * STEPS):
        drawn = [others[(place * (GROUP - 1) + number) % len(others)] for number in range(GROUP - 1)]
        examples.append(Example(Query(f"{query.query_id}-{place}", query.text), [positive], drawn))
        if place + 1 == batch * STEPS:
            break
    with write_artifact(folder / "examples", kind=KIND, config={"batch": batch}) as writer:
        used = {id_ for example in examples for id_ in (*example.positives, *example.negatives)}
        write_examples(writer.path, examples, {id_: passages[id_] for id_ in used})
    texts = {id_: f"{passage.title} {passage.text}".strip() for id_, passage in passages.items()}
    rows = [
        [example.query.text, *(texts[id_] for id_ in (*example.positives, *example.negatives))] for example in examples
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    shutil.copytree(locate("minilm"), folder / "model", dirs_exist_ok=True)
    config = json.loads((folder / "model/config.json").read_text())
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "model/config.json").write_text(json.dumps({**config, **still}), encoding="utf-8")
    if shape != "minilm":
        _untrained(folder / "model", shape)


def _untrained(folder: Path, shape: str) -> None:
    """A BERT of a published shape in the place of MiniLM, with its tokenizer."""
    from transformers import AutoConfig, AutoModel

    hidden, layers, heads, inner = SHAPES[shape]
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.num_hidden_layers = hidden, layers
    config.num_attention_heads, config.intermediate_size = heads, inner
    AutoModel.from_config(config).save_pretrained(folder)


def operations(folder: Path, batch: int) -> float:
    """Floating-point operations of a step of `batch` queries, forward and backward."""
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = AutoConfig.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    rows = json.loads((folder / "rows.json").read_text())
    encoded = tokenizer([text for row in rows for text in row], truncation=True, max_length=128)["input_ids"]
    lengths = [len(ids) for ids in encoded]
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    products = sum(6 * weights * length + 12 * layers * hidden * length**2 for length in lengths)
    return products * batch / len(rows)


def run(script: str, folder: Path, settings: dict[str, Any], *, look_every_s: float = 20.0) -> dict[str, Any]:
    """One contender in processes of its own: its losses, the seconds of its steps, and its highest memory."""
    peak = [0]
    with tempfile.TemporaryDirectory(prefix="raydr-training-") as scratch:
        command = [sys.executable, str(HERE / "peers" / script), str(folder), scratch, json.dumps(settings)]
        with (Path(scratch) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            watch = _watch_gpu if settings.get("gpu") else _watch
            watcher = threading.Thread(target=watch, args=(process, peak, look_every_s), daemon=True)
            watcher.start()
            output, _ = process.communicate()
            if process.returncode:
                log.seek(0)
                raise SystemExit(f"{script} {settings} failed:\n{log.read()[-3000:]}")
    found = json.loads(output.splitlines()[-1])
    seconds = found["seconds"][WARM:]
    return {"loss": found["losses"][0], "step_s": statistics.median(seconds), "peak_mib": peak[0] / 2**20}


def _watch(process: subprocess.Popen[str], peak: list[int], every_s: float) -> None:
    """Summing up the pages of every process takes processor time from what is measured."""
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            parts = [root, *root.children(recursive=True)]
            peak[0] = max(peak[0], sum(_share(part) for part in parts))
        except psutil.Error:
            pass
        time.sleep(every_s)


def _watch_gpu(process: subprocess.Popen[str], peak: list[int], every_s: float) -> None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while process.poll() is None:
        used = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        peak[0] = max(peak[0], int(used.split()[0]) << 20)
        time.sleep(every_s)


def _share(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def compare(title: str, contenders: dict[str, tuple[str, dict[str, Any]]], options: argparse.Namespace) -> None:
    batch = options.batch
    with tempfile.TemporaryDirectory(prefix="raydr-training-") as scratch:
        folder = Path(scratch)
        prepare(folder, batch, options.shape)
        work = operations(folder, batch) if options.workload == "gpu" else None
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        names = list(contenders)
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                script, settings = contenders[name]
                found[name].append(run(script, folder, {"batch": batch, "steps": STEPS, **settings}))
                print(name, found[name][-1], flush=True, file=sys.stderr)
    first = {name: runs[0]["loss"] for name, runs in found.items()}
    reference = next(iter(first.values()))
    tolerance = {name: 1e-2 if "bfloat16" in name else 1e-3 for name in first}
    if wrong := {name: loss for name, loss in first.items() if abs(loss - reference) > tolerance[name]}:
        raise SystemExit(f"losses of the first step differ: {wrong}, expected {reference}")
    base = statistics.median(r["step_s"] for r in found[options.reference or names[-1]])
    rows = []
    for name, runs in found.items():
        rates = [batch / r["step_s"] for r in runs]
        peak = max(r["peak_mib"] for r in runs)
        ratio = base / statistics.median(r["step_s"] for r in runs)
        row = [name, spread(rates), f"{ratio:.2f}", f"{peak:.0f}", f"{first[name]:.4f}"]
        if work is not None:
            row.append(f"{100 * work / statistics.median(r['step_s'] for r in runs) / PEAK_FLOPS:.1f} %")
        rows.append(row)
    columns = ["contender", "examples/s, median (range)", "speed / reference", "peak MiB", "first loss"]
    columns += ["share of the peak"] if work is not None else []
    write(options.out, title, markdown(columns, rows), found)


def throughput(options: argparse.Namespace) -> None:
    contenders = {
        "raydr": ("raydr_training.py", {}),
        "raydr, cached in chunks of 2048 tokens": ("raydr_training.py", {"chunk_tokens": 2048}),
        "raydr, bfloat16": ("raydr_training.py", {"precision": "bfloat16"}),
        "ST, cached in chunks of 16 texts": ("st_training.py", {"mini_batch": 16}),
        "ST, bfloat16": ("st_training.py", {"bf16": True}),
        "ST": ("st_training.py", {}),
    }
    chosen = {name: contenders[name] for name in options.only or contenders}
    compare(f"W9: training, {options.batch} queries x {GROUP} passages", chosen, options)


def gpu(options: argparse.Namespace) -> None:
    half = {"gpu": True, "precision": "bfloat16"}
    contenders = {
        "raydr, bfloat16": ("raydr_training.py", half),
        "raydr, bfloat16, cached in chunks of 16384 tokens": ("raydr_training.py", {**half, "chunk_tokens": 16384}),
        "ST, bfloat16, cached in chunks of 128 texts": (
            "st_training.py",
            {"gpu": True, "bf16": True, "mini_batch": 128},
        ),
        "ST, bfloat16": ("st_training.py", {"gpu": True, "bf16": True}),
    }
    chosen = {name: contenders[name] for name in options.only or contenders}
    compare(f"W9: training on a GPU, {options.shape}, {options.batch} queries x {GROUP} passages", chosen, options)


def workers(options: argparse.Namespace) -> None:
    """The same batch by one worker of one core, two of them, and one worker of two cores."""
    contenders = {
        "2 workers x 1 core": ("raydr_training.py", {"num_workers": 2, "worker_cpus": 1}),
        "1 worker x 2 cores": ("raydr_training.py", {"num_workers": 1, "worker_cpus": 2}),
        "1 worker x 1 core": ("raydr_training.py", {"num_workers": 1, "worker_cpus": 1}),
    }
    compare("W9: workers", contenders, options)


def memory(options: argparse.Namespace) -> None:
    """Highest memory of all processes against the batch, with and without caching; and by ZeRO stage."""
    rows, found = [], []
    for batch in (16, 32, 64):
        for chunk in (None, 2048):
            with tempfile.TemporaryDirectory(prefix="raydr-training-") as scratch:
                prepare(Path(scratch), batch)
                settings = {"batch": batch, "steps": 8, "chunk_tokens": chunk}
                measured = run("raydr_training.py", Path(scratch), settings, look_every_s=0.5)
            found.append({"batch": batch, "chunk_tokens": chunk, **measured})
            rows.append([str(batch), str(chunk or "none"), f"{measured['peak_mib']:.0f}", f"{measured['step_s']:.1f}"])
            print(rows[-1], flush=True, file=sys.stderr)
    tables = markdown(["queries", "chunk_tokens", "peak MiB", "s per step"], rows) + "\n"
    rows = []
    for stage in (0, 1, 2, 3):
        with tempfile.TemporaryDirectory(prefix="raydr-training-") as scratch:
            prepare(Path(scratch), 8)
            settings = {"batch": 8, "steps": 8, "num_workers": 2, "worker_cpus": 1, "zero_stage": stage}
            found.append({"zero_stage": stage, **run("raydr_training.py", Path(scratch), settings, look_every_s=0.5)})
        rows.append([str(stage), f"{found[-1]['peak_mib']:.0f}", f"{found[-1]['step_s']:.2f}"])
        print(rows[-1], flush=True, file=sys.stderr)
    tables += markdown(["ZeRO stage, 2 workers, 8 queries", "peak MiB", "s per step"], rows)
    write(options.out, "W9: memory of training", tables, found)


def layers(options: argparse.Namespace) -> None:
    """On all cores; values and gradients must agree to 1e-5 of the largest."""
    import torch

    from raydr.train.linear import OneDnnLinear

    rows, results = [], {}
    for inner, outer in ((384, 384), (384, 1536), (1536, 384)):
        inputs, gradient = torch.randn(64 * 128, inner), torch.randn(64 * 128, outer)
        plain = torch.nn.Linear(inner, outer)
        other = OneDnnLinear(inner, outer)
        other.load_state_dict(plain.state_dict())

        def step(
            layer: torch.nn.Linear, inputs: torch.Tensor = inputs, gradient: torch.Tensor = gradient
        ) -> list[torch.Tensor]:
            layer.zero_grad(set_to_none=True)
            given = inputs.detach().requires_grad_()
            output = layer(given)
            output.backward(gradient)
            return [output, given.grad, *(weight.grad for weight in layer.parameters())]

        for mine, theirs in zip(step(other), step(plain), strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        found = rounds({"PyTorch": partial(step, plain), "oneDNN": partial(step, other)}, options.rounds)
        times = {name: statistics.median(values) for name, values in found.items()}
        products = 3 * 2 * inputs.numel() * outer / 1e9
        rows.append(
            [f"{inner} x {outer}", *(spread(values, 1000) for values in found.values())]
            + [f"{products / time:.0f}" for time in times.values()]
            + [f"{times['PyTorch'] / times['oneDNN']:.2f}"]
        )
        results[rows[-1][0]] = found
    columns = ["layer", "PyTorch, ms", "oneDNN, ms", "PyTorch, GFLOP/s", "oneDNN, GFLOP/s", "ratio"]
    table = markdown(columns, rows)
    write(
        options.out, f"Linear layers in float32, {64 * 128} tokens, {torch.get_num_threads()} threads", table, results
    )


def passes(options: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModel

    from raydr.train.dropout import set_dropout

    precisions = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rows, results = [], {}
    for precision, length in ((name, length) for name in precisions for length in (64, 192, 224, 384)):
        tokens = torch.randint(1000, 30_000, (BATCH, length))
        contenders = {}
        for attention, share in ((kind, share) for share in (0.1, 0.0) for kind in ("sdpa", "eager")):
            network = AutoModel.from_pretrained(
                locate("minilm"), attn_implementation=attention, dtype=precisions[precision]
            ).train()
            set_dropout(network, share)

            def step(network: Any = network, tokens: torch.Tensor = tokens) -> None:
                network.zero_grad(set_to_none=True)
                network(input_ids=tokens).last_hidden_state.float().mean().backward()

            contenders[f"{'fused' if attention == 'sdpa' else 'plain'}, dropout {share:g}"] = step
        found = rounds(contenders, options.rounds)
        rows.append([precision, str(length), *(spread(values, 1000) for values in found.values())])
        print(rows[-1], flush=True, file=sys.stderr)
        results[f"{precision}, {length}"] = found
    table = markdown(["precision", "tokens", *(f"{name}, ms" for name in contenders)], rows)
    write(options.out, f"MiniLM forward and backward, {BATCH} texts, {torch.get_num_threads()} threads", table, results)


WORKLOADS = {
    "throughput": throughput,
    "workers": workers,
    "memory": memory,
    "layers": layers,
    "passes": passes,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--shape", choices=["minilm", *SHAPES], default="minilm", help="of the network")
    parser.add_argument("--only", nargs="*", help="contenders of `throughput`, the first giving the expected loss")
    parser.add_argument("--reference", help="contender that the speeds are divided by (default: the last)")
    parser.add_argument("--out", type=Path, default=Path("results/training"))
    options = parser.parse_args()
    WORKLOADS[options.workload](options)


if __name__ == "__main__":
    main()
