"""The schema of a run: where the data is, which method, and the settings of each verb.

Notable: it only gathers the schemas that live next to the code that reads them; `docs/configuration.md` is generated
from it. The smallest config is `data: {path: DIR}`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raydr.config import Component, Config
from raydr.data.config import DataConfig
from raydr.evaluation.config import EvaluateConfig
from raydr.index.config import IndexConfig
from raydr.runtime import Runtime
from raydr.stages.config import EmbedConfig, MineConfig, PreprocessConfig, RerankConfig, ScoreConfig, SearchConfig
from raydr.storage import Location
from raydr.train.config import TrainConfig


class RunConfig(Config):
    """One run over one corpus: every artifact lies in a folder of `out` named after the verb that makes it."""

    out: Location = Path("runs/run")
    """Folder of the run's artifacts: corpus, embed, index, search, evaluate, examples; a path, or a URL of a bucket."""
    runtime: Runtime = "auto"
    """`ray`: on a Ray cluster; `local`: in this process; `auto`: on Ray inside a job or with a large corpus."""
    data: DataConfig
    """The corpus, and the queries and judgements where there are any."""
    method: Component = Component(import_path="raydr.methods.zero_shot:ZeroShot")
    """What encodes: a method by import path, with its arguments."""
    preprocess: PreprocessConfig = Field(default_factory=PreprocessConfig)
    """Changing the corpus's texts, for methods that do so."""
    embed: EmbedConfig = Field(default_factory=EmbedConfig)
    """Embedding the corpus."""
    index: IndexConfig = Field(default_factory=IndexConfig)
    """Building the index."""
    search: SearchConfig = Field(default_factory=SearchConfig)
    """Searching it with the queries of the split."""
    rerank: RerankConfig = Field(default_factory=RerankConfig)
    """Reordering what was found."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """Measuring the run against the judgements."""
    train: TrainConfig | None = None
    """Training the method; null: it is used as it is."""
    mine: MineConfig = Field(default_factory=MineConfig)
    """Finding negatives for the queries of a training split."""
    score: ScoreConfig = Field(default_factory=ScoreConfig)
    """Scoring them with a ranker, for methods that learn from one."""

    @model_validator(mode="after")
    def _dev_queries_to_evaluate_on(self) -> RunConfig:
        if self.train is not None and self.train.evaluate_every and self.mine.dev_split is None:
            raise ValueError(
                "train.evaluate_every: there are no dev examples; name their split in mine.dev_split, or leave "
                "evaluate_every and patience out"
            )
        return self
