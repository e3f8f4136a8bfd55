"""A cross-encoder checkpoint as a `Reranker`: scores the pairs of a query and its hits in token-sorted batches.

reranker: {import_path: "raydr.encoders.cross_encoder:CrossEncoderReranker", args: {model: runs/a/ranker/model}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import Field

from raydr.config import Config
from raydr.encoders.checkpoint import load_transformer, locate
from raydr.encoders.device import OneStream, choose_device
from raydr.encoders.precision import Precision, choose_precision
from raydr.encoders.text import available_cpus
from raydr.encoders.token_batches import TokenBatcher
from raydr.encoders.tokenization import load_tokenizer
from raydr.errors import ConfigError
from raydr.types import Hit, Passage, Query

if TYPE_CHECKING:
    from raydr.models.cross_encoder import CrossEncoder

_BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}


class PairConfig(Config):
    """Which checkpoint, and how a pair is read."""

    model: str = "minilm"
    """Folder or hub name of a transformers sequence classifier with one label, or of an encoder to train one from."""
    max_pair_tokens: int = Field(default=256, ge=8)
    """Longest pair in tokens, special ones included; what is too long is cut off the passage."""
    title_separator: str = " "
    """Stands between title and text of a passage that has a title."""


class PairEncoding:
    """Tokenises pairs as the checkpoint of a config reads them."""

    def __init__(self, config: PairConfig) -> None:
        self._config = config
        self.tokenizer, self.pad_id = load_tokenizer(locate(config.model))
        self.tokenizer.enable_truncation(config.max_pair_tokens, strategy="only_second")
        self.tokenizer.no_padding()

    def encode(self, pairs: Sequence[tuple[Query, Passage]]) -> list[list[int]]:
        """Token ids of each pair. Raises `ConfigError` for a query that leaves no room for a passage."""
        separator = self._config.title_separator
        texts = [(query.text, passage.joined(separator)) for query, passage in pairs]
        try:
            return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        except Exception as error:  # tokenizers raises plain Exception where a query fills the whole pair
            longest = max(pairs, key=lambda pair: len(pair[0].text))[0]
            raise ConfigError(
                f"query {longest.query_id!r} leaves no room for a passage in {self._config.max_pair_tokens} tokens; "
                "raise max_pair_tokens"
            ) from error


def load_cross_encoder(config: PairConfig, precision: Precision = "float32") -> CrossEncoder:
    """The checkpoint's classifier; the head of a checkpoint that has none is new. Raises `ConfigError` otherwise."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from raydr.models.cross_encoder import CrossEncoder

    path = locate(config.model)
    try:
        network = load_transformer(
            AutoModelForSequenceClassification, path, num_labels=1, dtype=getattr(torch, precision)
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{path}: transformers cannot load this as a cross-encoder: {error}") from error
    tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    has_segments = getattr(network.config, "type_vocab_size", 0) > 1
    return CrossEncoder(network, separator=tokenizer.sep_token_id if has_segments else None).eval()


class _Backend(OneStream):
    """The network behind a `TokenBatcher`; an "embedding" is one score."""

    def forward(
        self, input_ids: Int64[np.ndarray, "text token"], attention_mask: Int64[np.ndarray, "text token"] | None
    ) -> Float32[np.ndarray, "text 1"]:
        return self.run(input_ids, attention_mask).cpu().numpy()[:, None]


class CrossEncoderReranker:
    """A `Reranker` by a cross-encoder's scores; equal scores keep the order they came in."""

    class Config(PairConfig):
        precision: Literal["auto"] | Precision = "auto"
        """`auto`: bfloat16 where it was measured to be faster, float32 elsewhere."""
        device: str = "auto"
        """`cpu`, `cuda`, `cuda:1`; `auto`: a GPU if there is one."""
        batch_tokens: int | None = Field(default=None, ge=1)
        """Tokens per batch, padding included; null: 1024 on a CPU, 32768 on a GPU."""
        num_threads: int | None = Field(default=None, ge=1)
        """CPU threads; null: as for encoders."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def rerank(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        scores = self.score([(query, passages[hit.passage_id]) for hit in hits])
        order = np.argsort(-scores, kind="stable")
        return [Hit(hits[place].passage_id, float(scores[place])) for place in order]

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> Float32[np.ndarray, " pair"]:
        """One score per pair, in order; equal texts are scored once, so their scores are equal to the last bit."""
        if not pairs:
            return np.empty(0, dtype=np.float32)
        texts = [(query.text, passage.title, passage.text) for query, passage in pairs]
        distinct = dict(zip(texts, pairs, strict=True))
        scores = self._batcher.run(self._tokenizer.encode(list(distinct.values())))[:, 0]
        score_of = dict(zip(distinct, scores, strict=True))
        return np.array([score_of[text] for text in texts], dtype=np.float32)

    @cached_property
    def _tokenizer(self) -> PairEncoding:
        return PairEncoding(self.config)

    @cached_property
    def _batcher(self) -> TokenBatcher:
        device = choose_device(self.config.device)
        precision = choose_precision(self.config.precision, device)
        num_threads = self.config.num_threads or available_cpus()
        kind = "cuda" if device.startswith("cuda") else "cpu"
        return TokenBatcher(
            _Backend(load_cross_encoder(self.config, precision), device, num_threads),
            dim=1,
            batch_tokens=self.config.batch_tokens or _BATCH_TOKENS[kind],
            pad_id=self._tokenizer.pad_id,
        )


def save_cross_encoder(network: CrossEncoder, source: str, folder: Path) -> None:
    """Writes a trained cross-encoder; transformers and sentence-transformers' CrossEncoder open it."""
    from raydr.encoders.export import save_transformer

    save_transformer(network.transformer, locate(source), folder)
