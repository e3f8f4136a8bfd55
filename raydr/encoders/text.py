"""Encodes queries and passages with any transformers encoder checkpoint, on the fastest backend of this machine.

Notable: nothing is loaded before the first text is encoded, so asking for `dim` or `version` is cheap; large inputs
are tokenised one chunk ahead of the network; the embeddings are sentence-transformers' for the same checkpoint.

    encoder = TextEncoder(TextEncoder.Config())                  # the packaged all-MiniLM-L6-v2
    encoder.encode_passages([Passage("d1", "text", title="title")])
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import Field
from tokenizers import Tokenizer

from raydr.config import Config
from raydr.encoders.checkpoint import MINILM, open_checkpoint
from raydr.encoders.device import choose_device
from raydr.encoders.precision import Precision, choose_precision
from raydr.encoders.token_batches import Backend, EncoderStats, TokenBatcher
from raydr.encoders.tokenization import BoundedTokenizer, load_tokenizer
from raydr.errors import ConfigError
from raydr.models.pooling import Pooling
from raydr.types import Passage, Query

if TYPE_CHECKING:
    from raydr.models.dual_encoder import DualEncoder

log = logging.getLogger(__name__)

SPEED_SETTINGS = frozenset({"batch_tokens", "device", "num_threads"})
"""Fields of the config that decide how fast texts are encoded, and nothing else."""
_CHUNK_TEXTS = 1024
_BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}


class TextEncoderConfig(Config):
    """Which checkpoint, how its tokens become embeddings, and how it runs here."""

    model: str = MINILM
    """Folder or hub name of a transformers or sentence-transformers checkpoint (safetensors); `minilm` is the
    all-MiniLM-L6-v2 that is installed with raydr."""
    pooling: Literal["auto"] | Pooling = "auto"
    """`auto`: what the checkpoint's folder says, mean where it says nothing."""
    normalize: bool | None = None
    """Embeddings of length 1; null: what the folder of a sentence-transformers model says, true for any other."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep this many leading dimensions (for Matryoshka models); null keeps all."""
    max_query_tokens: int | None = Field(default=None, ge=1)
    """Longest query in tokens, special ones included; null: the model's own limit."""
    max_passage_tokens: int | None = Field(default=None, ge=1)
    """Longest passage in tokens, special ones included; null: the model's own limit."""
    query_prompt: str | None = None
    """Text put before every query; null: the checkpoint's own prompt, if it has one."""
    passage_prompt: str | None = None
    """Text put before every passage; null: the checkpoint's own prompt, if it has one."""
    title_separator: str = " "
    """Stands between title and text of a passage that has a title."""
    precision: Literal["auto"] | Precision = "auto"
    """`auto`: bfloat16 where it is measured to be faster, float16 on older GPUs, float32 elsewhere."""
    backend: Literal["auto", "torch", "openvino"] = "auto"
    """`auto`: OpenVINO on an x86 CPU where it is installed, torch elsewhere."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto`: a GPU if there is one."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per batch, padding included; null: 1024 on a CPU, 32768 on a GPU. Halved when memory runs out."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: OMP_NUM_THREADS (which Ray sets to an actor's CPUs), else all cores this process may use."""


class TextEncoder:
    """An `Encoder` of one checkpoint; safe to call from several threads once built.

    `first_pooled` tokens at the start of every text are left out of its embedding.
    """

    Config: ClassVar[type[TextEncoderConfig]] = TextEncoderConfig

    def __init__(self, config: TextEncoderConfig, *, first_pooled: int = 0) -> None:
        self.config = config
        self.first_pooled = first_pooled
        self.checkpoint = checkpoint = open_checkpoint(config.model)
        self.pooling: Pooling = checkpoint.pooling if config.pooling == "auto" else config.pooling
        self.normalize = checkpoint.normalize if config.normalize is None else config.normalize
        self.query_prompt = checkpoint.query_prompt if config.query_prompt is None else config.query_prompt
        self.passage_prompt = checkpoint.passage_prompt if config.passage_prompt is None else config.passage_prompt
        self.max_query_tokens = self._limit("max_query_tokens", config.max_query_tokens)
        self.max_passage_tokens = self._limit("max_passage_tokens", config.max_passage_tokens)
        if config.dimensions is not None and config.dimensions > checkpoint.hidden_size:
            raise ConfigError(f"dimensions: {config.dimensions} is more than the model's {checkpoint.hidden_size}")

    @property
    def dim(self) -> int:
        return self.config.dimensions or self.checkpoint.hidden_size

    @cached_property
    def version(self) -> str:
        """SHA-256 (hex) over weights, tokenizer and every setting that changes the vectors, whatever the backend."""
        settings = {
            "checkpoint": self.checkpoint.fingerprint(),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "dimensions": self.dim,
            "max_tokens": [self.max_query_tokens, self.max_passage_tokens],
            "prompts": [self.query_prompt, self.passage_prompt],
            "title_separator": self.config.title_separator,
            **({"first_pooled": self.first_pooled} if self.first_pooled else {}),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def stats(self) -> EncoderStats:
        """Texts, tokens and padding since the encoder was built."""
        return self._batcher.stats

    @cached_property
    def device(self) -> str:
        return choose_device(self.config.device)

    @cached_property
    def precision(self) -> Precision:
        return choose_precision(self.config.precision, self.device)

    @cached_property
    def backend_name(self) -> Literal["torch", "openvino"]:
        """The backend `auto` stands for here, or the one asked for."""
        if self.config.backend != "auto":
            return self.config.backend
        is_x86 = platform.machine().lower() in {"x86_64", "amd64"}
        installed = importlib.util.find_spec("openvino") is not None
        return "openvino" if self.device == "cpu" and is_x86 and installed else "torch"

    def encode_queries(self, queries: Sequence[Query]) -> Float32[np.ndarray, "query dim"]:
        return self._encode(self._query_texts(queries), self._query_tokenizer)

    def encode_passages(self, passages: Sequence[Passage]) -> Float32[np.ndarray, "passage dim"]:
        return self._encode(self._passage_texts(passages), self._passage_tokenizer)

    def tokenize_queries(self, queries: Sequence[Query]) -> list[list[int]]:
        """The token ids that the network reads, prompt and special tokens included."""
        return self._query_tokenizer.encode(self._query_texts(queries))

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[list[int]]:
        """The token ids that the network reads, prompt, title and special tokens included."""
        return self._passage_tokenizer.encode(self._passage_texts(passages))

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's; truncation and padding are not set by anyone here."""
        return self._tokenizer[0]

    @property
    def pad_id(self) -> int:
        """What token ids are padded with."""
        return self._tokenizer[1]

    def embed_tokens(self, token_ids: Sequence[Sequence[int]]) -> Float32[np.ndarray, "text dim"]:
        """Embeddings of texts as the network reads them, special tokens included."""
        embeddings = np.empty((len(token_ids), self.dim), dtype=np.float32)
        if token_ids:
            embeddings[:] = self._batcher.run(token_ids)
        return embeddings

    def load_network(self, precision: Precision) -> DualEncoder:
        """The network itself, with the weights of the checkpoint."""
        from raydr.encoders import torch_backend

        return torch_backend.load_network(
            self.checkpoint,
            pooling=self.pooling,
            normalize=self.normalize,
            dimensions=self.config.dimensions,
            precision=precision,
            first_pooled=self.first_pooled,
        )

    def _query_texts(self, queries: Sequence[Query]) -> list[str]:
        return [self.query_prompt + query.text for query in queries]

    def _passage_texts(self, passages: Sequence[Passage]) -> list[str]:
        separator = self.config.title_separator
        return [self.passage_prompt + passage.joined(separator) for passage in passages]

    def _encode(self, texts: list[str], tokenizer: BoundedTokenizer) -> Float32[np.ndarray, "text dim"]:
        if len(texts) <= _CHUNK_TEXTS:  # nothing to read ahead: a query pays for no thread
            return self.embed_tokens(tokenizer.encode(texts) if texts else [])
        embeddings = np.empty((len(texts), self.dim), dtype=np.float32)
        with ThreadPoolExecutor(1) as ahead:
            upcoming = ahead.submit(tokenizer.encode, texts[:_CHUNK_TEXTS])
            for start in range(0, len(texts), _CHUNK_TEXTS):
                token_ids = upcoming.result()
                upcoming = ahead.submit(tokenizer.encode, texts[start + _CHUNK_TEXTS : start + 2 * _CHUNK_TEXTS])
                embeddings[start : start + _CHUNK_TEXTS] = self._batcher.run(token_ids)
        return embeddings

    @cached_property
    def _tokenizer(self) -> tuple[Tokenizer, int]:
        return load_tokenizer(self.checkpoint.path, lowercase=self.checkpoint.lowercase)

    @cached_property
    def _query_tokenizer(self) -> BoundedTokenizer:
        return BoundedTokenizer(self._tokenizer[0], self.max_query_tokens)

    @cached_property
    def _passage_tokenizer(self) -> BoundedTokenizer:
        return BoundedTokenizer(self._tokenizer[0], self.max_passage_tokens)

    @cached_property
    def _batcher(self) -> TokenBatcher:
        kind = "cuda" if self.device.startswith("cuda") else "cpu"
        return TokenBatcher(
            self._build_backend(),
            dim=self.dim,
            batch_tokens=self.config.batch_tokens or _BATCH_TOKENS[kind],
            pad_id=self.pad_id,
        )

    def _build_backend(self) -> Backend:
        from raydr.encoders import torch_backend

        num_threads = self.config.num_threads or available_cpus()
        if self.backend_name == "openvino":
            from raydr.encoders import openvino_backend

            key = f"{self.checkpoint.fingerprint()} {self.pooling} {self.normalize} {self.dim}"
            key += f" {self.first_pooled}" if self.first_pooled else ""
            try:
                model = openvino_backend.cached_model(key, lambda: self.load_network("float32"))
                return openvino_backend.OpenVinoBackend(model, precision=self.precision, num_threads=num_threads)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                # What a network that cannot be traced or converted raises, and only `auto` has another way to run it.
                if self.config.backend != "auto":
                    raise
                log.warning("OpenVINO cannot run %s, torch does: %s", self.config.model, str(error).splitlines()[0])
        return torch_backend.TorchBackend(
            self.load_network(self.precision), device=self.device, num_threads=num_threads
        )

    def _limit(self, field: str, requested: int | None) -> int:
        readable = self.checkpoint.max_positions
        if requested is not None and readable is not None and requested > readable:
            raise ConfigError(f"{field}: {requested} is more than the {readable} the model can read")
        return requested or self.checkpoint.max_tokens


def available_cpus() -> int:
    """OMP_NUM_THREADS where it is set, else the number of cores this process may run on."""
    if threads := os.environ.get("OMP_NUM_THREADS", "").strip():
        return max(1, int(threads.partition(",")[0]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
