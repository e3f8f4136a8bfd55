"""Tables of passages to tables of embeddings: the work of one embedding process, with or without Ray.

Notable: sparse embeddings are two lists per passage, of dimensions and of weights, so what is 0 takes no room.

Embedder(EncoderFactory(method))(table)       # passage_id, position, embedding
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from raydr.data.passages import passages_of
from raydr.encoders.factory import BuildEncoder
from raydr.encoders.token_batches import EncoderStats
from raydr.stages.columns import require_columns
from raydr.types import DIMS, EMBEDDING, PASSAGE_ID, POSITION, TEXT, WEIGHTS, WeightType

NEEDED = (PASSAGE_ID, POSITION, TEXT)


@dataclass
class Work:
    """What was embedded, summed over blocks; tokens are known of encoders that count them."""

    passages: int = 0
    tokens: int = 0
    padded_tokens: int = 0

    def add(self, other: Work) -> None:
        self.passages += other.passages
        self.tokens += other.tokens
        self.padded_tokens += other.padded_tokens

    @property
    def padding_share(self) -> float:
        return EncoderStats(tokens=self.tokens, padded_tokens=self.padded_tokens).padding_share


class Embedder:
    """Builds its encoder once, then embeds one table after another.

    Needs passage_id, position and text (title and image where there are any); gives passage_id, position and embedding,
    or, of an encoder whose embeddings are sparse, dimensions and weights.
    """

    def __init__(self, build_encoder: BuildEncoder) -> None:
        self._encoder = build_encoder()
        self.work = Work()
        self.seconds = 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        require_columns(table.column_names, NEEDED, stage="embed")
        start = time.perf_counter()
        embeddings = self._encoder.encode_passages(passages_of(table))
        self._count(table.num_rows, time.perf_counter() - start)
        if isinstance(embeddings, np.ndarray):
            flat = pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1))
            columns: dict[str, pa.Array] = {EMBEDDING: pa.FixedSizeListArray.from_arrays(flat, self._encoder.dim)}
        else:
            columns = sparse_columns(embeddings, weight_type_of(self._encoder) or "float32")
        return pa.table({PASSAGE_ID: table[PASSAGE_ID], POSITION: table[POSITION], **columns})

    def _count(self, num_passages: int, seconds: float) -> None:
        stats: EncoderStats = getattr(_inner(self._encoder), "stats", EncoderStats())
        self.work = Work(self.work.passages + num_passages, stats.tokens, stats.padded_tokens)
        self.seconds += seconds


def weight_type_of(encoder: object) -> WeightType | None:
    """How the weights of an encoder's sparse embeddings are stored; None: its embeddings are dense."""
    return getattr(_inner(encoder), "weight_type", None)


def _inner(encoder: object) -> Any:
    """The encoder that a method's encoder wraps."""
    return getattr(encoder, "inner", encoder)


def sparse_columns(embeddings: csr_array, weight_type: WeightType) -> dict[str, pa.Array]:
    """Sparse embeddings as list columns."""
    embeddings.sort_indices()
    bounds = pa.array(embeddings.indptr.astype(np.int32))
    columns = {DIMS: pa.ListArray.from_arrays(bounds, pa.array(embeddings.indices.astype(np.int32)))}
    if weight_type != "ones":
        weights = embeddings.data.astype(np.float16 if weight_type == "float16" else np.float32)
        columns[WEIGHTS] = pa.ListArray.from_arrays(bounds, pa.array(weights))
    return columns
