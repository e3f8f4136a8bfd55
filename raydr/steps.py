"""The steps of a training, each idempotent and in a folder of its own: what a method's `fit` is written in.

Notable: a step that finished is not done again, one that was interrupted goes on, so a `fit` that was killed anywhere
is run again from the top and ends with the same result. A step depends on the artifacts it was given, those among the
arguments of its method included, so with other settings exactly what they change is made again. The corpus is read
once; the trained method is a method like any other.

    index = steps.index(method, "base")
    examples = steps.mine(method, index, "examples")
    model = steps.train(method, steps.train_config, examples, "train")
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydr import runtime
from raydr.artifacts import Artifact
from raydr.config import Component
from raydr.data.corpus import Corpus, QuerySet
from raydr.data.examples import ExampleSet
from raydr.data.ingest import ingest, ingest_queries
from raydr.data.pictures import prepare_here
from raydr.data.positives import positive_examples
from raydr.encoders.factory import EncoderFactory
from raydr.errors import ConfigError
from raydr.evaluation.evaluate import evaluate_run
from raydr.evaluation.metrics import without_excluded
from raydr.evaluation.tasks import in_question
from raydr.evaluation.trec import read_run
from raydr.index.build import build_index
from raydr.index.reader import IndexReader
from raydr.stages.config import MineConfig
from raydr.stages.embed import embed_corpus
from raydr.stages.mine import examples_of_file, mine_negatives, training_data
from raydr.stages.pictures_on_ray import preparation, prepare_on_ray
from raydr.stages.preprocess import preprocessed_corpus
from raydr.stages.query_encoder import QueryEncoder
from raydr.stages.score import score_examples
from raydr.stages.search import RUN, search_corpus
from raydr.storage import place
from raydr.types import Embeddings

if TYPE_CHECKING:
    from raydr.train.config import TrainConfig
    from raydr.verbs.config import RunConfig


@dataclass(frozen=True)
class Steps:
    """Steps over one corpus; folders are names below `config.out`."""

    config: RunConfig
    corpus: Corpus
    use_ray: bool

    @classmethod
    def of(cls, config: RunConfig) -> Steps:
        """Ingests the corpus, and connects to Ray, which training always runs on."""
        corpus = ingest(config.data, config.out / "corpus", prepare=preparation(config.runtime))
        use_ray = runtime.uses_ray(config.runtime, num_passages=corpus.num_passages)
        runtime.connect(dashboard=False)
        return cls(config, corpus, use_ray)

    @property
    def train_config(self) -> TrainConfig:
        """Raises `ConfigError` where the run has none."""
        if self.config.train is None:
            raise ConfigError("this config has no `train` section")
        return self.config.train

    def base(self, method: Component) -> Path:
        """The index by the checkpoint that training starts from: the one that the config names, or a new one."""
        named = self.config.mine.base_index
        return place(named) if named is not None else self.index(method, "base")

    def index(self, method: Component, folder: str) -> Path:
        """Embeds the corpus with `method` and indexes it; the index artifact's path."""
        out = self.config.out / folder
        texts = self.config.out / "preprocessed"
        ready, build_encoder = preprocessed_corpus(
            self.corpus, method, self.config.preprocess, texts, use_ray=self.use_ray
        )
        embeddings = embed_corpus(
            ready,
            build_encoder,
            self.config.embed,
            out / "embed",
            use_ray=self.use_ray,
            method=method,
        )
        build_index(self.corpus, embeddings, self.config.index, out / "index", use_ray=self.use_ray)
        return out / "index"

    def examples(self, method: Component) -> tuple[ExampleSet, ExampleSet | None]:
        """The training and dev examples of a training in one round: mined with `method`, or those of the config's file.

        The index to mine in is only made where something is mined.
        """
        config = self.config.mine
        if config.source_file is not None and config.dev_split is None:
            return examples_of_file(config, self.config.out / "examples"), None
        index = self.base(method)
        return self.mine(method, index, "examples"), self.dev(method, index)

    def positives(self, folder: str) -> ExampleSet:
        """The training queries with what is judged relevant and no negatives: nothing is searched for them.

        Those of the config's file, where it names one.
        """
        config, out = self.config.mine, self.config.out / folder
        if config.source_file is not None:
            return examples_of_file(config, out)
        queries = self._queries(config)
        return positive_examples(self.corpus, queries, out, max_queries=config.max_queries, seed=config.seed)

    def mine(
        self,
        method: Component,
        index: Path,
        folder: str,
        *,
        split: str | None = None,
        queries: QuerySet | None = None,
    ) -> ExampleSet:
        """Examples for the queries of the dev `split`, or for all of the `queries` given, with negatives found in
        `index`; neither: as the config says, which may name a file of examples instead.
        """
        config = self.config.mine if split is None else self._of_split(split)
        if queries is not None:
            config = config.model_copy(update={"source_file": None, "max_queries": None})
        if config.source_file is not None:
            return examples_of_file(config, self.config.out / folder)
        mined = mine_negatives(
            index,
            self._queries(config) if queries is None else queries,
            EncoderFactory(method),
            config,
            self.config.out / folder,
            use_ray=self.use_ray,
            search=self.config.search,
        )
        return ExampleSet(mined)

    def dev(self, method: Component, index: Path) -> ExampleSet | None:
        """Examples of the dev split, for choosing among checkpoints; None where the config names none."""
        split = self.config.mine.dev_split
        return self.mine(method, index, "examples_dev", split=split) if split is not None else None

    def evaluate(
        self, method: Component, index: Path, folder: str, *, baselines: Mapping[str, Artifact] | None = None
    ) -> dict[str, Artifact]:
        """Measures `method` on the dev queries, searched in `index` as the config says, beside the runs `baselines`.

        `folder/evaluate` holds the figures, and the table of all the runs, which is printed. Returns the runs by their
        folders, this one last: the `baselines` of the next call. Where the config names no dev split, nothing is done.
        """
        split = self.config.mine.dev_split
        if split is None:
            return {}
        queries, out = self._queries(self._of_split(split)), self.config.out / folder
        built: Any = method.build()  # a `raydr.methods.base.Method`; methods know the steps, not the other way
        run = search_corpus(
            index,
            queries.queries(),
            EncoderFactory(method),
            self.config.search,
            out / "search",
            use_ray=self.use_ray,
            corpus=self.corpus,
            build_refiner=built.build_refiner,
            reranker=built.build_reranker() if self.config.search.rerank else None,
        )
        artifacts = {**(baselines or {}), folder: run}
        excluded = queries.excluded()
        runs = {name: without_excluded(read_run(one.path / RUN), excluded) for name, one in artifacts.items()}
        qrels, reader = queries.qrels(), IndexReader.open(index)
        modalities = reader.modalities_of(in_question(runs, qrels)) if reader.has_pictures else None
        evaluation = evaluate_run(
            runs.pop(folder),
            qrels,
            self.config.evaluate,
            out / "evaluate",
            name=folder,
            baselines=runs,
            queries=queries.queries(),
            title=f"{Path(self.config.data.path).name}, {split}",
            inputs={"queries": queries.artifact, **{f"run {name}": artifact for name, artifact in artifacts.items()}},
            tasks=queries.tasks(),
            modalities=modalities,
        )
        print((evaluation.path / "summary.txt").read_text(encoding="utf-8"), file=sys.stderr)
        return artifacts

    def embed_queries(self, method: Component, examples: ExampleSet) -> Embeddings:
        """Embeddings of the examples' queries by `method`, in order."""
        queries = [examples.query(row) for row in range(len(examples))]
        search = self.config.search
        with QueryEncoder(
            EncoderFactory(method),
            None,
            use_ray=self.use_ray,
            num_cpus=search.encoder_cpus,
            num_gpus=search.encoder_gpus,
        ) as encoder:
            return encoder.encode(queries)

    def score(self, ranker: Component, examples: ExampleSet, folder: str) -> Artifact:
        """The ranker's score of every candidate of every example."""
        return score_examples(examples, ranker, self.config.score, self.config.out / folder, use_ray=self.use_ray)

    def train(
        self,
        method: Component,
        config: TrainConfig,
        examples: ExampleSet,
        folder: str,
        *,
        dev: ExampleSet | None = None,
        start: Path | None = None,
        keep_state: bool = False,
    ) -> Artifact:
        """The model artifact of `method` trained on `examples`."""
        from raydr.train.trainer import train_model

        out = self.config.out / folder
        return train_model(method, config, examples, out, dev=dev, start=start, keep_state=keep_state)

    def _of_split(self, split: str) -> MineConfig:
        """The settings of mining, for the queries of the dev split. Raises `ConfigError` where their judgements would
        be those of all splits.
        """
        qrels = self.config.mine.dev_qrels
        if self.config.data.qrels is not None and qrels is None:
            raise ConfigError(
                f"data.qrels names the file {self.config.data.qrels!r} whatever the split is; name the one with the "
                "judgements of the dev queries: mine.dev_qrels=FILE"
            )
        changes = {"split": split, "queries": None, "qrels": qrels, "source_file": None}
        return self.config.mine.model_copy(update=changes)

    def _queries(self, config: MineConfig) -> QuerySet:
        data = training_data(self.config.data, config)
        prepare = prepare_on_ray if self.use_ray else prepare_here
        return ingest_queries(data, self.corpus, self.config.out / f"queries_{config.split}", prepare=prepare)
