"""demo-images: picture search over pictures that this machine draws itself, from no picture at all to a served page.

Notable: nothing is downloaded, and no network has seen a picture before. A dual encoder in CLIP's manner is trained on
four fifths of what was drawn; its vision tower is given to a small LLaVA-NeXT made of MiniLM, which MM-Embed's stages
train to follow instructions. Both search one pool of pictures and names with questions about the last fifth, of which
they have seen nothing, and stand side by side; the second is served. A second run reuses what is finished. Without a
terminal the server is stopped after its sample answers.

    raydr demo-images        raydr demo-images clip_steps=200 random_steps=100 hard_steps=100 --no-serve
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlencode

from pydantic import Field, PositiveInt

from raydr import runtime
from raydr.artifacts import Artifact
from raydr.config import Component
from raydr.data.config import DataConfig
from raydr.data.corpus import Corpus
from raydr.data.drawn_pictures import HELD_OUT, NAME, PICTURE, build_drawn_pictures
from raydr.data.images import ImageConfig
from raydr.encoders.text import available_cpus
from raydr.evaluation.config import EvaluateConfig
from raydr.evaluation.metrics import without_excluded
from raydr.evaluation.trec import read_run
from raydr.index.config import IndexConfig
from raydr.stages.config import EmbedConfig, MineConfig, ModalityConfig, SearchConfig
from raydr.stages.search import RUN
from raydr.train.config import TrainConfig
from raydr.train.trainer import MODEL
from raydr.types import Query
from raydr.verbs.config import RunConfig
from raydr.verbs.demo_steps import DemoSettings, DemoSteps, fast_precision, prepare_serving, presented
from raydr.verbs.embed import embed
from raydr.verbs.evaluate import evaluate
from raydr.verbs.index import index
from raydr.verbs.query import print_hits
from raydr.verbs.search import search
from raydr.verbs.serve import ask
from raydr.verbs.train import trained

CLIP = "raydr.methods.clip:Clip"
MM_EMBED = "raydr.methods.mm_embed:MMEmbed"
LENGTHS = {"max_query_tokens": 48, "max_passage_tokens": 32}
"""In words: names are short."""
EXAMPLES, SHOWN = 3, 4
"""Questions of each task that are printed, and hits of each."""


class DemoImagesConfig(DemoSettings):
    """Settings of the demo of picture search."""

    out: Path = Path("runs/demo_images")
    """Folder of the artifacts."""
    size: int | None = Field(default=None, ge=2)
    """Number of pictures, the first ones; null: all that the font or the shapes give, about 1,900 or 384."""
    clip_steps: PositiveInt = 500
    """Steps in which the dual encoder learns to see."""
    random_steps: PositiveInt = 150
    """Steps of MM-Embed's first stage."""
    hard_steps: PositiveInt = 100
    """Steps of MM-Embed's second stage, with negatives by modality, in each of its two rounds."""


def demo_images(config: DemoImagesConfig) -> None:
    """Runs the whole demo; returns when the server is interrupted, or at once after its answers without a terminal."""
    steps = DemoSteps(total=5 + config.serve)
    prepare_serving(config)
    with steps("Drawing pictures, with their names"):
        drawn = build_drawn_pictures(config.out / "pictures", size=config.size)
    dashboard = runtime.connect(dashboard=True)
    with steps("Training a dual encoder to see (CLIP, scores fused) on Ray Train"):
        baseline = trained(_clip(config))
    with steps("Giving its eyes to a language model and training that (MM-Embed) on Ray Train"):
        run = trained(_mm_embed(config, tower=baseline.out / "train" / MODEL))
    with steps("Embedding, indexing and searching with both"):
        runs = {"CLIP": _searched(baseline), "MM-Embed": _searched(run)}
    with steps("Evaluating them side by side"):
        evaluation = evaluate(run, label="MM-Embed", baselines={"CLIP": runs["CLIP"]})
    corpus = Corpus.open(run.out / "corpus")
    chance = 10 / corpus.num_passages
    print("\n" + (evaluation.path / "summary.txt").read_text())
    print(f"One pool of {corpus.num_passages:,} pictures and names: by chance R@10 would be {chance:.4f}.\n")
    _print_examples(corpus, runs["MM-Embed"])
    print(f"Plot: {evaluation.path / 'report.png'}   Report: {evaluation.path / 'report.html'}\n", flush=True)
    if not config.serve:
        return
    with presented(run.out / "index", config, steps, dashboard=dashboard) as address:
        for title, query in _samples(corpus).items():
            print_hits(ask(address, query, k=3), query=title)
        names = f"{address}/?{urlencode({'instruction': NAME})}"
        print(f"Done in {steps.seconds:.0f} s.")
        print(f"Search page:    {address}   (finds pictures, by words, a picture, or both)")
        print(f"                {names}   (finds names: drop a picture)")
        print(f"Pictures to drop: {drawn.path / HELD_OUT}   (nothing was trained on these)")


def _run(config: DemoImagesConfig, folder: str, method: Component, steps: int, learning_rate: float) -> RunConfig:
    return RunConfig(
        out=config.out / folder,
        data=DataConfig(path=str(config.out / "pictures"), split="test", images=ImageConfig(size=64)),
        method=method,
        embed=EmbedConfig(passages_per_block=512),  # small blocks, so that the progress bar moves
        index=IndexConfig(factory="Flat"),
        search=SearchConfig(k=100),
        evaluate=EvaluateConfig(measures=["R@10", "R@5", "R@1"]),
        mine=MineConfig(
            split="train",
            sources=["model"],
            modality_aware=ModalityConfig(depth=30, low_rank=0, above_positive=False),
        ),
        train=TrainConfig(
            batch_size=64,
            max_steps=steps,
            learning_rate=learning_rate,
            warmup_share=0.05,
            dropout=0.0,
            worker_cpus=available_cpus(),
            precision=fast_precision(),
        ),
    )


def _clip(config: DemoImagesConfig) -> RunConfig:
    """jobs/configs/clip_small.yaml, in fewer steps."""
    args = {"model": "minilm", "start": "encoder", **LENGTHS}
    return _run(config, "clip", Component(import_path=CLIP, args=args), config.clip_steps, learning_rate=3e-4)


def _mm_embed(config: DemoImagesConfig, *, tower: Path) -> RunConfig:
    """jobs/configs/mm_embed_small.yaml, in fewer steps."""
    args = {
        "model": "minilm",
        "start": "encoder",
        "tower": str(tower),
        "pooling": "mean",
        "bidirectional": True,
        "train_vision": True,
        "hard_from": "random",
        "wrong_modality_share": 1,
        "random_steps": config.random_steps,
        "hard_steps": config.hard_steps,
        "hard_rounds": 2,
        "instruction": PICTURE,  # of queries that say nothing of it, as most on the page do
        **LENGTHS,
    }
    method = Component(import_path=MM_EMBED, args=args)
    return _run(config, "mm_embed", method, config.random_steps, learning_rate=1e-4)


def _searched(run: RunConfig) -> Artifact:
    embed(run)
    index(run)
    return search(run)


def _print_examples(corpus: Corpus, run: Artifact) -> None:
    """Some questions of each task in words, taken evenly, with what was found first."""
    tasks, qrels, excluded = corpus.tasks(), corpus.qrels(), corpus.excluded()
    hits = without_excluded(read_run(run.path / RUN), excluded)
    print('What MM-Embed finds first ([a picture of it], "its name"; the right one has a star):')
    for task in dict.fromkeys(tasks.values()):
        print(f"  {task}")
        own = [query_id for query_id, name in tasks.items() if name == task]
        for query in _queries(corpus, own[:: max(1, len(own) // EXAMPLES)][:EXAMPLES]):
            found = [hit.passage_id for hit in hits[query.query_id][:SHOWN]]
            answers = [("*" if id_ in qrels[query.query_id] else "") + _in_words(id_) for id_ in found]
            print(f"    {_asked(query, excluded)}  ->  {', '.join(answers)}")
    print()


def _samples(corpus: Corpus) -> dict[str, Query]:
    """One question of each form to ask the server, by how a person would say it."""
    tasks, excluded = corpus.tasks(), corpus.excluded()
    first = {task: query_id for query_id, task in reversed(tasks.items())}
    return {_asked(query, excluded): query for query in _queries(corpus, first.values())}


def _queries(corpus: Corpus, query_ids: Collection[str]) -> list[Query]:
    wanted = set(query_ids)
    return [query for query in corpus.stream() if query.query_id in wanted]


def _asked(query: Query, excluded: Mapping[str, Sequence[str]]) -> str:
    """A query in words; the picture it asks with is the one that is excluded from its answers."""
    parts = [_in_words(passage_id) for passage_id in excluded.get(query.query_id, ())] if query.image else []
    return " + ".join([*parts, *([f'"{query.text}"'] if query.text else [])])


def _in_words(passage_id: str) -> str:
    kind, _, name = passage_id.partition(":")
    name = name.replace("-", " ")
    return f"[{name}]" if kind == "picture" else f'"{name}"'
