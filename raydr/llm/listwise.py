"""A reranker that ranks windows of passages with a language model: everything but how one window is ranked.

Notable: windows of one list are ranked in turn, lists at the same time, so an engine that batches sees the windows of
all callers together. Scores are the model's own, but that none rises down the list: where a passage of a later window
scored higher than the one before it, it takes that one's. They compare passages within a window; `scores: calibrated`
shifts each window so that the passages it shares with the one before have the same mean there, so that they compare
over the whole list.

    reranker = FirstReranker(FirstReranker.Config(engine=EngineConfig(model=FOLDER)))
    await reranker.rerank_async(query, hits, passages)        reranker.rerank(query, hits, passages)
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from raydr import series
from raydr.config import Config
from raydr.llm.engine import EngineConfig
from raydr.llm.prompt import IDENTIFIERS, ListwisePrompt, PromptConfig
from raydr.llm.reranker import EngineReranker
from raydr.llm.windows import ranked_by_windows
from raydr.types import Hit, Passage, Query


class ListwiseConfig(Config):
    """How a list is ranked by windows, whatever ranks a window."""

    engine: EngineConfig
    """The language model, and what runs it."""
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    """Wording, and how much of a passage is read."""
    window_size: int = Field(default=20, ge=2, le=len(IDENTIFIERS))
    """Passages ranked at once; beyond 26 the letters a to z follow A to Z."""
    stride: int = Field(default=10, ge=1)
    """How far the window moves up the list; `window_size - stride` passages are carried along."""
    scores: Literal["window", "calibrated"] = "window"
    """`window`: the model's scores, comparable within a window; `calibrated`: shifted to fit over the whole list."""

    @model_validator(mode="after")
    def _possible(self) -> ListwiseConfig:
        if self.stride > self.window_size:
            raise ValueError(f"stride ({self.stride}) must not exceed window_size ({self.window_size})")
        if self.scores == "calibrated" and self.stride == self.window_size:
            raise ValueError("calibrated scores need windows that overlap; set stride below window_size")
        return self


class RankedWindow(NamedTuple):
    """The places of a window, best first, and the score of each place (in the order of the places themselves)."""

    order: Sequence[int]
    scores: Sequence[float]


class ListwiseReranker(EngineReranker):
    """A `Reranker` over an engine; a subclass says how a window is ranked."""

    def __init__(self, config: ListwiseConfig) -> None:
        super().__init__(config.engine)
        self._config = config

    @abstractmethod
    async def rank_window(self, query: str, passages: Sequence[str]) -> RankedWindow:
        """Ranks at most `window_size` passages. Raises `EngineError` when the engine does not answer."""

    @cached_property
    def prompt(self) -> ListwisePrompt:
        """Checks the tokenizer; raises `ConfigError` for one that cannot tell the identifiers apart."""
        return ListwisePrompt(
            self.engine.tokenizer,
            self._config.prompt,
            max_tokens=self.engine.max_model_tokens,
            num_identifiers=self._config.window_size,
        )

    async def rerank_async(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        separator = self._config.prompt.title_separator
        texts = [passages[hit.passage_id].joined(separator) for hit in hits]
        scores: dict[int, float] = {}

        async def rank(places: Sequence[int]) -> list[int]:
            started = time.perf_counter()
            ranked = await self.rank_window(query.text, [texts[place] for place in places])
            series.observe("raydr_rerank_window_seconds", time.perf_counter() - started)
            new = np.asarray(ranked.scores, dtype=np.float64)
            if self._config.scores == "calibrated":
                shared = [n for n, place in enumerate(places) if place in scores]
                if shared:
                    new += np.mean([scores[places[n]] for n in shared]) - new[shared].mean()
            scores.update(zip(places, new.tolist(), strict=True))
            return [places[n] for n in ranked.order]

        order = await ranked_by_windows(
            len(hits), rank, window_size=self._config.window_size, stride=self._config.stride
        )
        values = np.minimum.accumulate([scores[place] for place in order]) if order else []
        return [Hit(hits[place].passage_id, float(value)) for place, value in zip(order, values, strict=True)]

    def start(self) -> None:
        _ = self.prompt
