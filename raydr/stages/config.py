"""Settings of the stages: what `embed:`, `search:`, `rerank:`, `mine:` and `score:` in a run's YAML may say."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from raydr.config import Component, Config
from raydr.index.config import Device, SearchParameters
from raydr.index.fusion import FusionConfig
from raydr.runtime import Placement

Source: TypeAlias = Literal["model", "bm25", "random"]


class PoolConfig(Placement):
    """The Ray actors of a stage that works block by block."""

    num_workers: tuple[int, int] | None = None
    """On Ray: fewest and most actors; null: from one to as many as the cluster's CPUs (or GPUs) hold, starting with all
    of them."""
    worker_cpus: float | None = Field(default=None, gt=0)
    """On Ray: CPUs of each actor, which are also its threads; null: those of the smallest node, at most 4."""
    worker_gpus: float = Field(default=0.0, ge=0)
    """On Ray: GPUs of each actor."""

    @field_validator("num_workers")
    @classmethod
    def _fewest_first(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("write [fewest, most] with 1 <= fewest <= most")
        return value


class EmbedConfig(PoolConfig):
    """Embedding a corpus. Nothing here changes the embeddings."""

    passages_per_block: int = Field(default=2048, ge=1)
    """Passages per call of the encoder and per file: what an interruption costs at most, per worker."""


class PreprocessConfig(PoolConfig):
    """What a method does to a corpus's texts before they are embedded, such as tagging names and masking them. Nothing
    here changes the texts.
    """

    passages_per_block: int = Field(default=512, ge=1)
    """Passages that an actor is given at once."""


class ScoreConfig(PoolConfig):
    """Scoring training examples with a ranker, for methods that learn from one. Nothing here changes the scores."""

    queries_per_block: int = Field(default=32, ge=1)
    """Queries, each with all its positives and negatives, per call of the ranker."""


class RerankConfig(PoolConfig):
    """Reordering a run with a reranker."""

    run: str | None = None
    """A TREC run file; null: that of `search` in `out`."""
    reranker: Component | None = None
    """A reranker, or a method that builds one; null: the run's own method."""
    depth: int = Field(default=100, ge=1)
    """Hits of each query that are reordered; the others follow in their order."""
    queries_per_block: int = Field(default=16, ge=1)
    """Lists given to a reranker at once; one that works on many at a time fills its batches from them."""


class FeedbackSteps(Config):
    """How queries move towards rerankers' opinions of what a first search found; the values of FIRST's paper."""

    depth: int = Field(default=100, ge=2)
    """Hits of the first search that are judged."""
    learning_rate: float = Field(default=0.005, gt=0)
    """Of Adam, towards scores."""
    steps: int = Field(default=100, ge=0)
    """Steps towards scores."""
    order_learning_rate: float = Field(default=0.001, gt=0)
    """Of Adam, towards an order."""
    order_steps: int = Field(default=20, ge=0)
    """Steps towards an order."""


class FeedbackConfig(FeedbackSteps):
    """Who judges; where both are named, the scores come first."""

    scores: Component | None = None
    """A reranker whose scores can be compared over a whole list, such as a cross-encoder; or a method that has one."""
    order: Component | None = None
    """A reranker of which the order counts, such as FIRST; or a method that has one."""

    @model_validator(mode="after")
    def _somebody_judges(self) -> FeedbackConfig:
        if self.scores is None and self.order is None:
            raise ValueError("name a reranker: scores (a cross-encoder), order (a listwise one), or both")
        return self


PrfMethod: TypeAlias = Literal["learned", "average", "rocchio", "none"]


class PrfConfig(Config):
    """Pseudo-relevance feedback: the first hits are taken for relevant, the queries' embeddings are made anew from
    them, and the search is made again, in the same shards. Nobody judges the hits; `feedback` has rerankers do that.
    """

    method: PrfMethod = "learned"
    """`learned`: by a trained refiner (ANCE-PRF); `average`: the mean of the query's embedding and those of its first k
    hits; `rocchio`: alpha times the query's plus beta times the mean of the hits'; `none`: searches once, also where
    the method has a refiner."""
    k: int | None = Field(default=None, ge=1)
    """Hits of the first search that are read; null: as many as a learned refiner was trained with (it reads no other
    number), 3 for `average`, 5 for `rocchio`."""
    alpha: float = Field(default=0.4, ge=0)
    """rocchio: weight of the query's embedding."""
    beta: float = Field(default=0.6, ge=0)
    """rocchio: weight of the mean of its hits' embeddings."""
    refiner: Component | None = None
    """learned: a method that refines queries, over an index by the retriever it was trained for; null: the run's own
    method, or the index's."""


class SearchConfig(Placement):
    """Searching an index with a set of queries."""

    mode: Literal["dense", "bm25", "hybrid"] = "dense"
    """`dense`: by embedding; `bm25`: by words; `hybrid`: both, fused."""
    k: int = Field(default=100, ge=1)
    """Number of hits per query (of documents, where the corpus was split)."""
    candidates: int | None = Field(default=None, ge=1)
    """hybrid: number of hits taken from each side before they are fused; null takes `max(k, 100)`."""
    fusion: FusionConfig = Field(default_factory=FusionConfig)
    """hybrid: how the two sides become one ranking."""
    filters: dict[str, Any] = Field(default_factory=dict)
    """Conditions on the corpus's metadata: `{year: {gte: 1990}, topic: [a, b]}` (see docs/serving_api.md)."""
    allow_ids: tuple[str, ...] | None = None
    """Only these passages may be found; null allows all."""
    exclude_ids: tuple[str, ...] = ()
    """These passages are never found."""
    rerank: int = Field(default=0, ge=0)
    """Hits of each query that the method's reranker reorders; the others follow in their order, with scores that only
    say so. 0: the retriever's own ranking."""
    feedback: FeedbackConfig | None = None
    """Relevance feedback: rerankers judge a first search by embedding, the queries' embeddings move towards what they
    say (raydr/feedback.py), and the search is made with these; null: without."""
    prf: PrfConfig | None = None
    """Pseudo-relevance feedback: how queries are refined by what a first search found; null: by the method's own
    refiner, where it has one."""
    aggregate: bool = True
    """Where documents were split into passages: rank documents, each by its best passage."""
    parameters: SearchParameters = Field(default_factory=SearchParameters)
    """How hard an approximate index searches; what is null keeps the index's own setting."""
    run_tag: str = Field(default="raydr", pattern=r"^\S+$")
    """Last column of the TREC run."""
    query_batch: int = Field(default=1024, ge=1)
    """Number of queries searched at once: large blocks are fast, small ones bound the memory for hits."""
    device: Device = "auto"
    """Where the shards are searched: `auto` uses a GPU where FAISS has one."""
    num_threads: int | None = Field(default=None, ge=1)
    """FAISS threads per process; null uses all cores in this process, and `shard_cpus` in a Ray actor."""
    shard_cpus: float = Field(default=1.0, gt=0)
    """On Ray: CPUs of each shard's actor."""
    shard_gpus: float = Field(default=0.0, ge=0)
    """On Ray: GPUs of each shard's actor."""
    encoder_cpus: float = Field(default=1.0, gt=0)
    """On Ray: CPUs of the actor that encodes the queries."""
    encoder_gpus: float = Field(default=0.0, ge=0)
    """On Ray: GPUs of the actor that encodes the queries."""

    @model_validator(mode="after")
    def _feedback_has_embeddings_to_move(self) -> SearchConfig:
        if self.feedback is not None and self.mode == "bm25":
            raise ValueError("feedback moves the queries' embeddings, and mode bm25 has none; use dense or hybrid")
        if self.prf is not None and self.prf.method != "none" and self.mode == "bm25":
            raise ValueError("prf refines the queries' embeddings, and mode bm25 has none; use dense or hybrid")
        return self


class ModalityConfig(Config):
    """Modality-aware negatives (MM-Embed, arXiv 2411.02571): in the search by embedding of an index of all modalities,
    what is of another modality than the positives and ranks above them, and what is of theirs but ranks low.
    """

    depth: int = Field(default=50, ge=1)
    """Hits of each query that are looked at. Where no positive is among them, all of another modality count."""
    above_positive: bool = True
    """Whether a hit of another modality is a negative only where it ranks above the positive, as in the paper; false:
    wherever it ranks. A model puts the positives of its training queries first, and those of others it does not."""
    low_rank: int = Field(default=45, ge=0)
    """Hits of the positives' modality are negatives beyond this rank, down to `depth`; what is above may answer."""
    num_wrong_modality: int | None = Field(default=None, ge=0)
    """Negatives of another modality kept for each query, the hardest; null: all."""
    num_low_rank: int | None = Field(default=None, ge=0)
    """Negatives of low rank kept for each query, the hardest; null: all."""

    @model_validator(mode="after")
    def _looks_beyond_the_low_rank(self) -> ModalityConfig:
        if self.low_rank >= self.depth:
            raise ValueError(
                f"low_rank ({self.low_rank}) leaves no rank down to depth ({self.depth}): make depth greater"
            )
        return self


class MineConfig(Config):
    """Finding negatives for training queries. How the index is searched (devices, CPUs, how hard) is `search`'s."""

    split: str = "train"
    """Judgements of the training queries, from the same source as the corpus."""
    dev_split: str | None = None
    """Judgements of the queries that a training is measured with while it runs; null: none."""
    queries: str | None = None
    """File of the training queries when it has an unusual name; null: `data.queries`, or the usual name."""
    qrels: str | None = None
    """File of their judgements, likewise; `split` is then not needed."""
    dev_qrels: str | None = None
    """File of the dev queries' judgements, likewise; `dev_split` is then only a name for them."""
    max_queries: int | None = Field(default=None, ge=1)
    """Train on a random sample of so many queries; null: on all."""
    base_index: str | None = None
    """An index of this corpus by the checkpoint that a training starts from; null: the training makes one."""
    sources: tuple[Source, ...] = ("model",)
    """Where candidates come from: `model`: dense search with the method's encoder; `bm25`: search by words; `random`:
    uniformly from the whole index. Several take turns, so each gives its share."""
    num_negatives: int = Field(default=16, ge=1)
    """Negatives kept for each query, the hardest in front. With `modality_aware` it counts random ones only."""
    keep: Literal["hardest", "random"] = "hardest"
    """Which `num_negatives` of the candidates that are left: the hardest, or any of them, drawn uniformly."""
    num_feedback: int = Field(default=0, ge=0)
    """First hits of the search by embedding that are kept with each query, whatever was judged of them, for encoders of
    queries that read them; the trainings of these set it themselves."""
    first_rank: int = Field(default=1, ge=1)
    """`model` and `bm25`: the first rank of the search that is a candidate."""
    last_rank: int = Field(default=100, ge=1)
    """`model` and `bm25`: the last rank that is a candidate."""
    max_score: float | None = None
    """A negative has to score below this."""
    margin: float | None = Field(default=None, ge=0)
    """A negative has to score below the positive's score minus this (TopK-MarginPos of arXiv 2407.15831).
    0 removes what is as good as the positive, copies of it included."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """A negative has to score below this fraction of the positive's score (TopK-PercPos, which NV-Retriever uses with
    0.95). Where the positive's score s is negative, below (2 - fraction) * s."""
    modality_aware: ModalityConfig | None = None
    """Negatives by what they are made of, for corpora with pictures: `{}` has the paper's settings. Then `sources`,
    `first_rank` and `last_rank` stay as they are, and `max_score`, `margin` and `fraction` apply to the negatives of
    low rank and to random ones: the wrong modality is wrong however well it scores. null: without regard to it."""
    fill_random: bool = True
    """Whether queries that are left with no negative get random ones (with `modality_aware`: of their positives'
    modality); without, they stay without any."""
    seed: int = 0
    """Draws random negatives; a query's draw depends on nothing else but its id."""
    source_file: str | None = None
    """A file of training examples (docs/data_formats.md, Training files) to take as they are, instead of mining."""
    source_format: str = "auto"
    """Its format; `auto` recognises it."""
    source_corpus: str | None = None
    """The corpus, where the examples of the file name passages by id."""
    source_queries: str | None = None
    """The queries, where the examples of the file name them by id."""
    trust_order: bool = False
    """A list of the file that nobody judged is a teacher's order: its first passage is the positive, the others are
    negatives, the hardest first (for FIRST, which learns the whole order)."""

    @property
    def filters_scores(self) -> bool:
        """Whether candidates are judged by the encoder's scores."""
        return any(limit is not None for limit in (self.max_score, self.margin, self.fraction))

    @model_validator(mode="after")
    def _can_find_something(self) -> MineConfig:
        if self.dev_qrels is not None and self.dev_split is None:
            raise ValueError("dev_qrels: give the dev queries a name as well, such as dev_split: dev")
        if not self.sources:
            raise ValueError("sources: name at least one of model, bm25, random")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources: each may be named once, got {list(self.sources)}")
        if self.first_rank > self.last_rank:
            raise ValueError(f"first_rank ({self.first_rank}) must not be greater than last_rank ({self.last_rank})")
        if self.modality_aware is not None:
            decided = ("sources", "first_rank", "last_rank", "keep")
            if changed := [name for name in decided if getattr(self, name) != type(self).model_fields[name].default]:
                raise ValueError(
                    f"{changed[0]}: with modality_aware, negatives are the model's hits, at the ranks that "
                    "modality_aware.depth and modality_aware.low_rank say; leave it out"
                )
        return self
