"""Batches of nearly equal length under a token budget, run side by side, restored to the order of the input.

Notable: texts are sorted by token count and grouped until the padded size reaches the budget, so padding is nearly
nothing and every batch costs about the same; a batch of equal lengths carries no attention mask. When a batch does
not fit in memory the budget is halved and the batch cut in two, down to a single text, instead of dying.

    batcher = TokenBatcher(backend, batch_tokens=1024, pad_id=0)
    batcher.run(token_ids)        # Float32[np.ndarray, "text dim"], in the order of token_ids
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "bad allocation")
_MIN_SHARE_TOKENS = 128

Forward: TypeAlias = Callable[[Int64[np.ndarray, " row"]], Float32[np.ndarray, "row dim"]]
Work: TypeAlias = Callable[[Int64[np.ndarray, " row"]], None]


@runtime_checkable
class Streams(Protocol):
    """What runs batches, `num_streams` of them at once."""

    num_streams: int

    def free_memory(self) -> None:
        """Gives unused memory back after a batch did not fit."""
        ...


@runtime_checkable
class Backend(Streams, Protocol):
    """Runs the network on one batch; must allow `num_streams` calls at once."""

    def forward(
        self, input_ids: Int64[np.ndarray, "text token"], attention_mask: Int64[np.ndarray, "text token"] | None
    ) -> Float32[np.ndarray, "text dim"]: ...


@dataclass
class EncoderStats:
    """What an encoder has done so far."""

    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    """Tokens computed, padding included."""

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that were padding (0 to 1)."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


class RowBatcher:
    """Plans batches of texts of known lengths; `batch_tokens` shrinks when memory runs out and stays small."""

    def __init__(self, streams: Streams, *, dim: int, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.stats = EncoderStats()
        self._streams = streams
        self._dim = dim

    def run_rows(self, lengths: Int64[np.ndarray, " text"], forward: Forward) -> Float32[np.ndarray, "text dim"]:
        """One embedding per text, where `forward` embeds the texts in the given rows.

        Raises what `forward` raises when a single text does not fit in memory.
        """
        embeddings = np.empty((len(lengths), self._dim), dtype=np.float32)

        def keep(rows: Int64[np.ndarray, " row"]) -> None:
            embeddings[rows] = forward(rows)

        self.run_each(lengths, keep)
        return embeddings

    def run_each(self, lengths: Int64[np.ndarray, " text"], work: Work) -> None:
        """Calls `work` with the rows of one batch after the other, every row once; `work` keeps what comes of it.

        Raises what `work` raises when a single text does not fit in memory.
        """
        streams = self._streams.num_streams
        share = max(_MIN_SHARE_TOKENS, -(-int(lengths.sum()) // streams))
        batches = plan(lengths, min(self.batch_tokens, share))
        self.stats.texts += len(lengths)
        self.stats.tokens += int(lengths.sum())
        self.stats.padded_tokens += sum(_padded_size(lengths, rows) for rows in batches)

        def encode(rows: Int64[np.ndarray, " row"]) -> None:
            if len(rows) == 1 or _padded_size(lengths, rows) <= self.batch_tokens:
                if _try(work, rows):
                    return
                self._back_off(_padded_size(lengths, rows))
            middle = len(rows) // 2
            encode(rows[:middle])
            encode(rows[middle:])

        if streams == 1 or len(batches) <= 1:
            for rows in batches:
                encode(rows)
        else:
            with ThreadPoolExecutor(streams) as pool:
                for _ in pool.map(encode, batches):
                    pass

    def _back_off(self, failed_tokens: int) -> None:
        # Outside the except block, where the error's traceback no longer keeps the failed batch's tensors alive.
        self.batch_tokens = max(1, min(self.batch_tokens, failed_tokens) // 2)
        self._streams.free_memory()
        log.warning("out of memory on a batch of %d tokens; going on with %d", failed_tokens, self.batch_tokens)


class TokenBatcher(RowBatcher):
    """Feeds a backend with token ids."""

    def __init__(self, backend: Backend, *, dim: int, batch_tokens: int, pad_id: int) -> None:
        super().__init__(backend, dim=dim, batch_tokens=batch_tokens)
        self._backend, self._pad_id = backend, pad_id

    def run(self, token_ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "text dim"]:
        """One embedding per text. Raises what the backend raises when a single text does not fit in memory."""
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        return self.run_rows(
            lengths, lambda rows: self._backend.forward(*collate([token_ids[row] for row in rows], self._pad_id))
        )


def _try(work: Work, rows: Int64[np.ndarray, " row"]) -> bool:
    """Encodes `rows`; false when more than one text did not fit in memory together."""
    try:
        work(rows)
    except (MemoryError, RuntimeError) as error:
        if len(rows) == 1 or not is_out_of_memory(error):
            raise
        return False
    return True


def plan(lengths: Int64[np.ndarray, " text"], batch_tokens: int) -> list[Int64[np.ndarray, " row"]]:
    """Rows grouped into batches whose padded size stays within `batch_tokens` (a longer text goes alone).

    Longest first: what does not fit in memory shows at once, and short batches even out the end across streams.
    """
    batches: list[Int64[np.ndarray, " row"]] = []
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def collate(
    token_ids: Sequence[Sequence[int]], pad_id: int, *, multiple_of: int = 1
) -> tuple[Int64[np.ndarray, "text token"], Int64[np.ndarray, "text token"] | None]:
    """Token ids padded on the right to a width that is a multiple of `multiple_of`, and their attention mask (None
    where nothing is padded).
    """
    lengths = np.array([len(ids) for ids in token_ids])
    width = -(-lengths.max() // multiple_of) * multiple_of
    if lengths.min() == width:
        return np.array(token_ids, dtype=np.int64), None
    mask = np.arange(width) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    return input_ids, mask.astype(np.int64)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, torch's (a RuntimeError on either device) or OpenVINO's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error).lower()
    return any(phrase in message for phrase in _OUT_OF_MEMORY)


def _padded_size(lengths: Int64[np.ndarray, " text"], rows: Int64[np.ndarray, " row"]) -> int:
    return int(lengths[rows].max()) * len(rows)
