"""demo: semantic search over the documentation of the Python packages installed here, from corpus to served page.

Notable: every part is the real one: Ray Data embeds with a pretrained encoder, FAISS shards and BM25 are built as Ray
tasks, three ways of searching are measured side by side on held-out questions, AR2 trains a retriever and a ranker
against each other on Ray Train for two short rounds and is measured beside them, and Ray Serve answers over HTTP with
both. A small language model learns to rerank as FIRST does, and is served on vLLM beside them. A second run reuses what
is finished. Without a terminal the server is stopped after its sample answers.

    raydr demo        raydr demo size=all        raydr demo first=false        raydr demo train=false --no-serve
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from raydr import runtime
from raydr.config import Component
from raydr.data.api_docs import build_api_docs
from raydr.data.config import DataConfig
from raydr.encoders.text import available_cpus
from raydr.index.config import IndexConfig
from raydr.stages.config import EmbedConfig, MineConfig, RerankConfig, SearchConfig
from raydr.stages.search import RUN
from raydr.train.config import TrainConfig
from raydr.verbs.config import RunConfig
from raydr.verbs.demo_steps import DemoSettings, DemoSteps, fast_precision, prepare_serving, presented
from raydr.verbs.embed import embed
from raydr.verbs.evaluate import evaluate
from raydr.verbs.index import index
from raydr.verbs.query import print_hits
from raydr.verbs.rerank import rerank
from raydr.verbs.search import search
from raydr.verbs.serve import ask
from raydr.verbs.train import train

SAMPLE_QUERIES = (
    "join two data frames on a column",
    "gradually lower the learning rate during training",
    "retry a task when its worker dies",
)
LENGTH = {"max_passage_tokens": 128}
"""What a docstring is about stands at its beginning, and half as many tokens take half the time."""
ZERO_SHOT = "raydr.methods.zero_shot:ZeroShot"
AR2 = "raydr.methods.ar2:Ar2"
RANKER = "raydr.methods.colbert:ColBertRanker"
FIRST = "raydr.methods.first:First"
LAST_ROUND = "round-02"
AR2_RANKER, FIRST_SMALL = "ar2-ranker", "first-small"
RERANKERS = {
    AR2_RANKER: "late interaction, from AR2",
    FIRST_SMALL: "a small language model on vLLM, trained here for minutes: it shows how FIRST works, not how well",
}
"""What the page's switch calls them, and what they are."""


class DemoConfig(DemoSettings):
    """Settings of the demo."""

    out: Path = Path("runs/demo")
    """Folder of the artifacts."""
    size: int | Literal["all"] = 3000
    """Number of passages, or `all` documentation found in the environment; tests, vendored copies and transformers'
    hundreds of model folders, whose documentation is one text with names changed, are left out at any size."""
    train: bool = True
    """Whether a retriever and a ranker are trained; without, the pretrained encoder is served."""
    first: bool = True
    """Whether, with `train`, a small language model is trained to rerank as well, and served on vLLM: some minutes,
    which show how FIRST works; docs/results.md has what half an hour of it gains."""


def demo(config: DemoConfig) -> None:
    """Runs the whole demo; returns when the server is interrupted, or at once after its answers without a terminal."""
    has_first = config.train and config.first and find_spec("vllm") is not None
    if config.train and config.first and not has_first:
        print("FIRST is left out: vLLM is not installed here (docs/install.md).", file=sys.stderr)
    steps = DemoSteps(total=5 + 2 * config.train + has_first + config.serve)
    prepare_serving(config)
    with steps("Collecting the documentation of the packages installed in this environment"):
        build_api_docs(config.out / "docs", size=config.size)
    run = RunConfig(
        out=config.out,
        runtime="ray",
        data=DataConfig(path=str(config.out / "docs"), split="test"),
        method=Component(import_path=ZERO_SHOT, args=LENGTH),
        embed=EmbedConfig(passages_per_block=512),  # small blocks, so that the progress bar moves
        index=IndexConfig(factory="Flat", num_shards=2),
        search=SearchConfig(k=100),
    )
    dashboard = runtime.connect(dashboard=True)
    with steps("Embedding it with all-MiniLM-L6-v2 on Ray Data"):
        embed(run)
    with steps("Building two FAISS shards and a BM25 index"):
        index(run)
    with steps("Searching with the held-out questions: BM25, dense, hybrid"):
        runs = {mode: search(_with_mode(run, mode), name=f"search_{mode}") for mode in ("bm25", "dense", "hybrid")}
    with steps("Evaluating them side by side"):
        baselines = {"BM25": runs["bm25"], "dense": runs["dense"]}
        evaluation = evaluate(run, name="search_hybrid", label="hybrid", baselines=baselines)
    print("\n" + (evaluation.path / "summary.txt").read_text(), flush=True)
    served, rerankers = config.out / "index", {}
    if config.train:
        with steps("Training retriever and ranker against each other (AR2): two short rounds on Ray Train"):
            method = _train(run)
        served, rerankers = config.out / LAST_ROUND / "index", {AR2_RANKER: method.build().ranker}
        if has_first:
            with steps("Training a small language model to rerank (FIRST) on Ray Train"):
                rerankers[FIRST_SMALL] = _train_first(run)
        with steps("Evaluating what was trained beside the others"):
            trained = run.model_copy(update={"method": method})
            after = search(trained, name="search_trained", index=served)
            reranked = run.search.model_copy(update={"rerank": 10})
            search(trained.model_copy(update={"search": reranked}), name="search_reranked", index=served)
            baselines = {"dense": runs["dense"], "BM25": runs["bm25"], "hybrid": runs["hybrid"], "AR2": after}
            if has_first:
                again = RerankConfig(
                    run=str(after.path / RUN), reranker=rerankers[FIRST_SMALL], depth=10, queries_per_block=64
                )
                baselines["AR2 + FIRST"] = rerank(
                    run.model_copy(update={"rerank": again}), name="search_first", index=served
                )
            label = "AR2 + ranker"
            evaluation = evaluate(run, name="search_reranked", label=label, to="evaluate_trained", baselines=baselines)
        print("\n" + (evaluation.path / "summary.txt").read_text())
    print(f"Plot: {evaluation.path / 'report.png'}   Report: {evaluation.path / 'report.html'}\n")
    if not config.serve:
        return
    with presented(served, config, steps, dashboard=dashboard, rerankers=rerankers) as address:
        for query in SAMPLE_QUERIES:
            print_hits(ask(address, query, k=3, rerank=bool(rerankers)), query=query)
        print(f"Done in {steps.seconds:.0f} s.")
        print(f"Search page:    {address}")
        if rerankers:
            described = ", ".join(f"{name} ({RERANKERS[name]})" for name in rerankers)
            print(f"Its Rerank switch offers {described}.")


def _train(run: RunConfig) -> Component:
    """AR2, as short as it can be and still be AR2: the trained method."""
    args = {
        **LENGTH,
        "normalize": True,  # as MiniLM was trained
        "score_scale": 20.0,
        "num_negatives": 3,
        "rounds": 2,
        "retriever_steps": 15,
        "ranker_steps": 6,
        "ranker_learning_rate": 2e-5,
        "ranker_warmup_steps": 12,
        "ranker_warmup_learning_rate": 2e-5,
        # A cross-encoder needs thousands of steps before it ranks better than the retriever; ColBERT starts above it.
        "ranker": Component(import_path=RANKER, args={**LENGTH, "loss": "listwise", "normalize": True}),
    }
    config = run.model_copy(
        update={
            "method": Component(import_path=AR2, args=args),
            "index": IndexConfig(factory="Flat", num_shards=2),
            "mine": MineConfig(
                base_index=str(run.out / "index"), max_queries=160, num_negatives=6, last_rank=50, fraction=0.95
            ),
            "train": TrainConfig(
                batch_size=8,
                learning_rate=3e-5,
                worker_cpus=available_cpus(),
                precision=fast_precision(),
                log_every=2,
            ),
        }
    )
    return Component.model_validate(train(config).manifest.details["method"])


def _train_first(run: RunConfig) -> Component:
    """A language model of eight layers made out of the encoder, trained as shortly as shows something: the method."""
    args = {
        "engine": {"model": "minilm", "dtype": "float32", "cache_gib": 0.25},
        "start": "encoder",
        "span_steps": 200,
        "span_batch_size": 16,
        "window_size": 5,
        "stride": 3,
        "neftune_alpha": 0,
        "max_prompt_tokens": 512,
        # Nothing but the passages and, behind them, the query, whose words then look for their like.
        "prompt": {"system": "", "prefix": "", "suffix": "{query}", "max_passage_words": 24, "max_query_words": 24},
        "retriever": Component(import_path=ZERO_SHOT, args=LENGTH),
    }
    config = run.model_copy(
        update={
            "out": run.out / "first",
            "method": Component(import_path=FIRST, args=args),
            "mine": MineConfig(base_index=str(run.out / "index"), num_negatives=9, last_rank=20),
            "train": TrainConfig(
                batch_size=8,
                max_steps=100,
                learning_rate=2e-4,
                warmup_share=0.1,
                worker_cpus=available_cpus(),
                precision=fast_precision(),
                log_every=10,
            ),
        }
    )
    return Component.model_validate(train(config).manifest.details["method"])


def _with_mode(run: RunConfig, mode: Literal["dense", "bm25", "hybrid"]) -> RunConfig:
    return run.model_copy(update={"search": run.search.model_copy(update={"mode": mode})})
