"""Settings of an index: what `index:` in a run's YAML may say.

Notable: nothing heavy is imported here, so the command line can read and check a config at once. An example:

    index: {factory: "IVF4096,SQ8", search: {nprobe: 32}, bm25: null}
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from raydr.config import Config
from raydr.runtime import Placement

Device: TypeAlias = Literal["auto", "cpu", "gpu"]


class SearchParameters(Config):
    """How hard an approximate index searches; null keeps what FAISS has by default. Exact indexes ignore all of it."""

    ef_search: int | None = Field(default=None, ge=1)
    """HNSW: number of candidates kept while walking the graph (FAISS: 16)."""
    nprobe: int | None = Field(default=None, ge=1)
    """IVF: number of lists visited per query (FAISS: 1)."""
    rescore_factor: float | None = Field(default=None, ge=1)
    """`...,RFlat`: `k * rescore_factor` candidates are rescored with the exact embeddings (FAISS: 1)."""


class BM25Config(Config):
    """Lucene's BM25. The defaults are Lucene's own, with English stop words and Snowball's English stemmer."""

    k1: float = Field(default=1.2, ge=0)
    """How soon further occurrences of a word count less."""
    b: float = Field(default=0.75, ge=0, le=1)
    """How much a passage's length counts: 0 not at all, 1 fully."""
    stop_words: str | None = "english"
    """Language of the stop words that are dropped (a name bm25s knows); null keeps every word."""
    stemmer: str | None = "english"
    """Language of the Snowball stemmer; null keeps words as they are."""


class RecallProbe(Config):
    """The recall report of an approximate index: embeddings of the corpus as queries, exact search as the truth."""

    num_queries: int = Field(default=200, ge=1)
    """Embeddings of the corpus, drawn at random, that are searched with."""
    at: tuple[int, ...] = (10, 100)
    """Depths k of recall@k."""


class IndexConfig(Placement):
    """Building an index."""

    factory: str = "Flat"
    """FAISS factory string: `Flat` (exact), `SQfp16`, `SQ8`, `SQ8,RFlat` (rescored), `HNSW32`, `IVF4096,Flat`,
    `IVF4096,PQ48`, ... ; a `PCA` or `OPQ` may stand in front. `Flat` of sparse embeddings is an inverted index."""
    metric: Literal["inner_product"] = "inner_product"
    """Embeddings are compared by inner product; normalised ones therefore by cosine."""
    num_shards: int | None = Field(default=None, ge=1)
    """null: as many as keep a shard's embeddings under `shard_bytes`."""
    shard_bytes: int = Field(default=512 * 2**20, ge=1)
    """Size of a shard's embeddings (float32; of sparse ones with their dimensions) from which on another shard is made,
    when `num_shards` is null."""
    train_sample: int = Field(default=200_000, ge=1)
    """Number of embeddings, drawn over all shards, that an index with a training phase (IVF, PQ, SQ8) learns from."""
    ef_construction: int = Field(default=40, ge=1)
    """HNSW: candidates kept while building."""
    search: SearchParameters = Field(default_factory=SearchParameters)
    """How the index is searched when a search does not say otherwise."""
    bm25: BM25Config | None = Field(default_factory=BM25Config)
    """The BM25 side, over title and text; null builds none."""
    recall: RecallProbe | None = Field(default_factory=RecallProbe)
    """Measured for approximate indexes after building; null skips it."""
    device: Device = "auto"
    """Where an index is trained: `auto` uses a GPU where FAISS has one."""
    seed: int = 0
    """Draws the training sample and the recall queries."""
