"""Tables of passages to tables of embeddings: the work of one embedding process, with or without Ray.

Embedder(EncoderFactory(method))(table)       # passage_id, position, embedding
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raydr.data.passages import passages_of
from raydr.encoders.factory import BuildEncoder
from raydr.encoders.token_batches import EncoderStats
from raydr.errors import ConfigError
from raydr.stages.columns import require_columns
from raydr.types import EMBEDDING, PASSAGE_ID, POSITION, TEXT

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

    Needs passage_id, position and text (title and image where there are any); gives passage_id, position, embedding.
    """

    def __init__(self, build_encoder: BuildEncoder) -> None:
        self._encoder = build_encoder()
        self.work = Work()
        self.seconds = 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        require_columns(table.column_names, NEEDED, stage="embed")
        start = time.perf_counter()
        embeddings = self._encoder.encode_passages(passages_of(table))
        if not isinstance(embeddings, np.ndarray):
            raise ConfigError("embed stores dense embeddings; this method's encoder gives sparse ones")
        self._count(table.num_rows, time.perf_counter() - start)
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).reshape(-1)), self._encoder.dim
        )
        return pa.table({PASSAGE_ID: table[PASSAGE_ID], POSITION: table[POSITION], EMBEDDING: vectors})

    def _count(self, num_passages: int, seconds: float) -> None:
        inner = getattr(self._encoder, "inner", self._encoder)  # a method's encoder wraps the one that counts
        stats: EncoderStats = getattr(inner, "stats", EncoderStats())
        self.work = Work(self.work.passages + num_passages, stats.tokens, stats.padded_tokens)
        self.seconds += seconds
