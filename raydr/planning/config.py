"""What a plan is asked: how much there is, which models, how fast it has to answer, and on which machines.

Notable: `index:` is the section of a run's config of that name, with the same fields and defaults, so what was planned
can be built. Nothing here has a price until somebody gives one. An example:

    {corpus: {passages: 1e9}, index: {factory: "IVF65536,PQ48"}, search: {qps: 100, p99_ms: 300}}
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from raydr.config import Config
from raydr.index.config import IndexConfig
from raydr.planning.structure import structure
from raydr.planning.units import Given


def _count(value: object) -> object:
    """`1e9`, which YAML 1.1 reads as a string, and 1.0e+9 are whole numbers."""
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_count), Field(ge=1)]


class CorpusShape(Config):
    """The corpus. The defaults are MS MARCO's passages, the mean of the 400 of `benchmarks/encode.py --workloads
    short`.
    """

    passages: Count
    """How many there are."""
    tokens_per_passage: float = Field(default=82.0, gt=0)
    """Tokens the encoder reads of one, in the mean, special ones included."""
    text_bytes: float = Field(default=360.0, gt=0)
    """Title, text and metadata of one, in the mean."""
    id_bytes: float = Field(default=16.0, gt=0)
    """Its id."""


class Network(Config):
    """A transformer. A token's work is 2 operations for each weight, and 4 x layers x hidden x tokens of attention.

    The defaults are all-MiniLM-L6-v2's.
    """

    layers: int = Field(default=6, ge=1)
    """Transformer layers."""
    hidden: int = Field(default=384, ge=1)
    """Width of a token's state."""
    feed_forward: int | None = Field(default=None, ge=1)
    """Width inside a layer; null: four times `hidden`."""
    parameters: Count | None = None
    """Weights that every token is multiplied with, without the table of tokens; null: 4 hidden^2 + 2 hidden
    feed_forward for each layer."""
    all_parameters: Count | None = None
    """Weights altogether, which count for memory; null: `parameters` and a table of 30,522 tokens, BERT's."""

    @property
    def weights(self) -> int:
        inner = self.feed_forward or 4 * self.hidden
        return self.parameters or self.layers * (4 * self.hidden**2 + 2 * self.hidden * inner)

    @property
    def all_weights(self) -> int:
        return self.all_parameters or self.weights + 30_522 * self.hidden


class EncoderShape(Network):
    """The encoder of passages and queries."""

    dim: int = Field(default=384, ge=1)
    """Of an embedding."""


class SearchLoad(Config):
    """What is asked of the index while it is served."""

    qps: float = Field(default=10.0, gt=0)
    """Queries in a second, at the busiest hour."""
    p99_ms: float = Field(default=300.0, gt=0)
    """All but one answer in a hundred come within this."""
    k: int = Field(default=10, ge=1)
    """Hits of a query."""
    query_tokens: float = Field(default=12.0, gt=0)
    """Tokens of a query, in the mean; of a training query too."""
    replicas: int = Field(default=1, ge=1)
    """Copies of every shard at least; two go on when a node is lost."""
    busy_share: float = Field(default=0.6, gt=0, lt=1)
    """Share of the processors' time that queries take at the busiest hour; waiting grows as 1 / (1 - busy_share)."""
    hours: float = Field(default=730.0, gt=0)
    """Hours that are paid for; a month has 730."""


class RerankLoad(Config):
    """Reranking the hits of every query that is searched."""

    network: Network
    """The reranker. For a language model give layers, hidden, parameters and all_parameters."""
    kind: Literal["cross_encoder", "listwise"] = "cross_encoder"
    """`cross_encoder`: a pass for each passage; `listwise`: a pass for each window of passages (FIRST), which reads its
    order off one token."""
    depth: int = Field(default=100, ge=1)
    """Hits reranked."""
    window_size: int = Field(default=20, ge=2)
    """listwise: passages in a window."""
    stride: int = Field(default=10, ge=1)
    """listwise: passages that the next window lies further up."""
    prompt_tokens: float = Field(default=12.0, ge=0)
    """Tokens of a pass beside its passages: query and wording."""
    qps: float | None = Field(default=None, gt=0)
    """Lists in a second; null: all of `search.qps`."""


class TrainingLoad(Config):
    """One training."""

    queries: Count
    """Training queries."""
    epochs: float = Field(default=1.0, gt=0)
    """Times that each is seen."""
    batch_size: int = Field(default=64, ge=1)
    """Queries in a step, of all workers together."""
    passages_per_query: int = Field(default=8, ge=1)
    """Passages encoded for each query: its positive and its negatives."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed splits among the workers: as in `train.zero_stage`."""
    network: Network | None = None
    """What is trained; null: the encoder."""


class NodeShape(Config):
    """A machine. The defaults are a shape to start from, not an offer of anybody's."""

    cores: int = Field(default=16, ge=1)
    """Processor cores."""
    memory_gib: float = Field(default=64.0, gt=0)
    """Memory, in GiB."""
    disk_gib: float = Field(default=1000.0, gt=0)
    """Disk, in GiB."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """In whatever currency; null: hours are planned, and no cost."""


class GpuNodeShape(NodeShape):
    """A machine with GPUs. The defaults are an H100 SXM's, of NVIDIA's data sheet, as in benchmarks/training.py."""

    gpus: int = Field(default=1, ge=1)
    """How many it has."""
    peak_flops: float = Field(default=989e12, gt=0)
    """Of one GPU in the precision that is used; bfloat16, dense."""
    gpu_memory_gib: float = Field(default=80.0, gt=0)
    """Of one GPU, in GiB."""


class PlanConfig(Config):
    """A plan."""

    corpus: CorpusShape
    """What is embedded and searched."""
    encoder: EncoderShape = Field(default_factory=EncoderShape)
    """What embeds it."""
    index: IndexConfig = Field(default_factory=IndexConfig)
    """As in a run's config: factory, num_shards or shard_bytes, train_sample, search.nprobe, ..."""
    search: SearchLoad = Field(default_factory=SearchLoad)
    """The load while it is served."""
    rerank: RerankLoad | None = None
    """null: nothing is reranked."""
    train: TrainingLoad | None = None
    """null: nothing is trained."""
    node: NodeShape = Field(default_factory=NodeShape)
    """What embeds (without `gpu_node`), indexes and serves."""
    gpu_node: GpuNodeShape | None = None
    """What embeds, reranks and trains; null: they run on `node`."""
    within_hours: float = Field(default=24.0, gt=0)
    """Embedding, indexing and training each get so many nodes that they end within this."""
    working_share: float = Field(default=0.8, gt=0, le=1)
    """Share of the time paid for in which embedding, indexing and training work; the rest is starting and waiting."""
    memory_share: float = Field(default=0.8, gt=0, le=1)
    """Share of a node's memory that is planned with."""
    passages_per_block: int = Field(default=2048, ge=1)
    """`embed.passages_per_block` of the run: passages in a file."""
    stages: tuple[Literal["embed", "index", "search", "rerank", "train"], ...] = (
        "embed", "index", "search", "rerank", "train",
    )  # fmt: skip
    """What is planned."""
    units: dict[str, Given] = Field(default_factory=dict)
    """Unit figures of your own in the place of the measured ones: `units.gpu_embed_share=0.3`, or what `raydr plan
    --measure` prints."""

    @model_validator(mode="after")
    def _index_can_be_planned(self) -> PlanConfig:
        structure(self.index.factory, self.encoder.dim)
        return self
