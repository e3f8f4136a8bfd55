"""Settings of the stages: what `embed:` and `search:` in a run's YAML may say."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from raydr.config import Config
from raydr.index.config import Device, SearchParameters
from raydr.index.fusion import FusionConfig


class EmbedConfig(Config):
    """Embedding a corpus. Nothing here changes the embeddings."""

    passages_per_block: int = Field(default=2048, ge=1)
    """Passages per call of the encoder and per file: what an interruption costs at most, per worker."""
    num_workers: tuple[int, int] | None = None
    """On Ray: fewest and most encoder actors; null: from one to as many as the cluster's CPUs (or GPUs)
    hold, starting with all of them."""
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


class SearchConfig(Config):
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
