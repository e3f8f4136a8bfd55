"""Encoders of queries that read what a first search found for them: one text out of a query and its first k passages.

| template | what the network reads | embedding |
| --- | --- | --- |
| `separated` | [BOS] query [SEP] p1 [SEP] ... pk [SEP] | the retriever's pooling |
| `tct` | [CLS] [Q] query [SEP] p1 [SEP] ... pk, then [MASK] to the end | mean of all tokens from position 4 on |

Source: ANCE-PRF (arXiv 2108.13454) and its reproduction (arXiv 2112.06400), by their code. `separated` is ANCE's with
RoBERTa's tokens, TAS-B's and MiniLM's with BERT's; one [SEP] between parts, passages without [BOS], best first.

Notable: passages and index stay the retriever's, so a `FeedbackEncoder` is an `Encoder` whose queries alone are new,
and its stamp names all that its vectors depend on: the retriever's, k, the format of its input, its weights. A
checkpoint says in `prf.json` what it was trained with, and is refused with anything else.

    encoder.encode_queries([query._replace(feedback=(best, second, third))])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from raydr.config import Config
from raydr.encoders.checkpoint import locate
from raydr.encoders.text import TextEncoder
from raydr.encoders.tokenization import BoundedTokenizer, load_tokenizer
from raydr.errors import ArtifactError, ConfigError, DataError
from raydr.protocols import Encoder
from raydr.types import Embeddings, Found, Passage, Query

SETTINGS = "prf.json"
TCT_FIRST_POOLED = 4
"""[CLS] and the three tokens of "[Q]", which is no special one."""
_TCT_PREFIX = "[Q] "
_MAX_TOKENS = 512


class FeedbackInput(Config):
    """How a query and its feedback become one text."""

    num_feedback: int = Field(default=3, ge=0)
    """Passages of the first search that are read (k), here and wherever the trained encoder is used; 0: none, which
    makes it a query encoder for a frozen index."""
    template: Literal["separated", "tct"] = "separated"
    """The order and the separators of the parts: `separated` for ANCE, TAS-B, MiniLM and the like, `tct` for
    TCT-ColBERT."""
    truncation: Literal["closed", "open"] = "closed"
    """Of an input that is too long: `closed` makes its last token the [SEP] that the whole ends with, as the authors'
    code does; `open` just cuts, as Pyserini does."""
    lowercase: bool = True
    """Whether query and passages are lower-cased, which the authors' tokenizer does for ANCE although RoBERTa tells
    cases apart; their scores depend on it."""
    max_query_tokens: int | None = Field(default=None, ge=1)
    """Longest query in tokens, special ones included; null: the retriever's own limit (`separated`)."""
    max_feedback_tokens: int | None = Field(default=None, ge=3)
    """Longest passage in tokens, special ones included, so that it leaves room for the next; null: all of it."""
    max_tokens: int | None = Field(default=None, ge=4)
    """Longest input in tokens; null: 512, or what the network can read at all where that is less."""


def assembled(
    query: Sequence[int],
    passages: Sequence[Sequence[int]],
    max_tokens: int,
    truncation: Literal["closed", "open"] = "closed",
) -> list[int]:
    """`separated`: token ids of the query, then of the passages without their first token ([BOS])."""
    ids = [*query, *chain.from_iterable(passage[1:] for passage in passages)]
    if len(ids) <= max_tokens:
        return ids
    return [*ids[: max_tokens - 1], ids[-1]] if truncation == "closed" else ids[:max_tokens]


def masked(query: Sequence[int], passages: Sequence[Sequence[int]], max_tokens: int, mask_id: int) -> list[int]:
    """`tct`: `max_tokens` ids: the query's, the passages' without [CLS], and masks in the place of the last [SEP] and
    of all that is missing behind it.
    """
    ids = [*query, *chain.from_iterable(passage[1:] for passage in passages)][:-1][:max_tokens]
    return ids + [mask_id] * (max_tokens - len(ids))


class FeedbackReader:
    """Queries with their feedback to token ids.

    Args:
        encoder: the retriever's encoder, whose tokenizer, prompts and title separator are used.
    """

    def __init__(self, encoder: TextEncoder, settings: FeedbackInput) -> None:
        self._encoder, self._settings = encoder, settings
        readable = encoder.checkpoint.max_positions
        if settings.max_tokens is not None and readable is not None and settings.max_tokens > readable:
            raise ConfigError(f"max_tokens: {settings.max_tokens} is more than the {readable} the model can read")
        self.max_tokens = settings.max_tokens or min(_MAX_TOKENS, readable or _MAX_TOKENS)
        own_limit = encoder.max_query_tokens if settings.template == "separated" else self.max_tokens
        self.max_query_tokens = min(settings.max_query_tokens or own_limit, self.max_tokens)
        self.max_feedback_tokens = min(settings.max_feedback_tokens or self.max_tokens, self.max_tokens)
        self.first_pooled = TCT_FIRST_POOLED if settings.template == "tct" else 0

    @property
    def resolved(self) -> dict[str, Any]:
        """All settings as they are, none left to a default."""
        limits = ("max_tokens", "max_query_tokens", "max_feedback_tokens")
        return self._settings.model_dump(mode="json") | {name: getattr(self, name) for name in limits}

    def ids(self, queries: Sequence[Query]) -> list[list[int]]:
        """What the network reads. Raises `DataError` for a query with less feedback than is read."""
        k, separator = self._settings.num_feedback, self._encoder.config.title_separator
        for query in queries:
            if len(query.feedback) < k:
                raise DataError(
                    f"query {query.query_id!r}: has {len(query.feedback)} passages of feedback, and this encoder reads "
                    f"{k}; search with it (the first search gives them), or mine examples with mine.num_feedback={k}"
                )
        passages = [passage.joined(separator) for query in queries for passage in query.feedback[:k]]
        prefix = self._encoder.query_prompt if self._settings.template == "separated" else _TCT_PREFIX
        query_ids = self._queries.encode([prefix + self._cased(query.text) for query in queries])
        found = iter(self._passages.encode([self._cased(text) for text in passages]))
        groups = [[next(found) for _ in range(k)] for _ in queries]
        if self._settings.template == "tct":
            pairs = zip(query_ids, groups, strict=True)
            return [masked(ids, own, self.max_tokens, self._mask_id) for ids, own in pairs]
        return [
            assembled(ids, own, self.max_tokens, self._settings.truncation)
            for ids, own in zip(query_ids, groups, strict=True)
        ]

    def _cased(self, text: str) -> str:
        return text.lower() if self._settings.lowercase else text

    @cached_property
    def _tokenizer(self) -> Any:
        checkpoint = self._encoder.checkpoint
        tokenizer, _ = load_tokenizer(checkpoint.path, lowercase=checkpoint.lowercase)
        around = tokenizer.num_special_tokens_to_add(is_pair=False)
        if around != 2:
            raise ConfigError(
                f"{checkpoint.path}: its tokenizer puts {around} tokens around a text; reading feedback needs one in "
                "front of it and one that separates (BERT, RoBERTa and their kin have them)"
            )
        return tokenizer

    @cached_property
    def _queries(self) -> BoundedTokenizer:
        return BoundedTokenizer(self._tokenizer, self.max_query_tokens)

    @cached_property
    def _passages(self) -> BoundedTokenizer:
        return BoundedTokenizer(self._tokenizer, self.max_feedback_tokens)

    @cached_property
    def _mask_id(self) -> int:
        mask = self._tokenizer.token_to_id("[MASK]")
        if mask is None:
            raise ConfigError(
                f"{self._encoder.checkpoint.path}: template tct fills with [MASK], which it does not have"
            )
        return mask


class FeedbackEncoder:
    """An `Encoder` whose queries carry feedback, and whose passages are a retriever's.

    Args:
        retriever: the encoder of the index, which does its own preprocessing; queries come as it leaves them.
        text: the retriever's encoder of texts, behind any preprocessing.
        model: folder of a trained checkpoint; None: the retriever's own weights.
    """

    def __init__(
        self, retriever: Encoder, text: TextEncoder, settings: FeedbackInput, model: str | None = None
    ) -> None:
        self._retriever = retriever
        self.num_feedback = settings.num_feedback
        self.reader = FeedbackReader(text, settings)
        changes = {
            "model": text.config.model if model is None else model,
            "pooling": text.pooling if settings.template == "separated" else "mean",
            "normalize": text.normalize,
            "query_prompt": text.query_prompt,
            "passage_prompt": text.passage_prompt,
            "max_query_tokens": self.reader.max_tokens,
            "max_passage_tokens": self.reader.max_tokens,
        }
        self.network = TextEncoder(text.config.model_copy(update=changes), first_pooled=self.reader.first_pooled)
        """The encoder of what `reader` gives."""
        if model is not None:
            _check_trained_with(locate(model), self.trained_with)

    @property
    def dim(self) -> int:
        return self._retriever.dim

    @property
    def trained_with(self) -> dict[str, Any]:
        """What a checkpoint's vectors depend on beside its weights: the retriever's stamp, k, the input's format."""
        return {"base_encoder": self._retriever.version, **self.reader.resolved}

    @cached_property
    def version(self) -> str:
        """SHA-256 (hex) over the retriever's stamp, k, the format of the input and the checkpoint."""
        settings = {**self.trained_with, "network": self.network.version}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def encode_queries(self, queries: Sequence[Query]) -> Float32[np.ndarray, "query dim"]:
        """Raises `DataError` for a query with fewer than `num_feedback` passages."""
        return self.network.embed_tokens(self.reader.ids(queries))

    def encode_passages(self, passages: Sequence[Passage]) -> Embeddings:
        return self._retriever.encode_passages(passages)

    def save(self, network: Any, folder: Path) -> None:
        """Writes trained weights as a checkpoint that knows what it was trained with; `folder` exists and is empty."""
        from raydr.encoders.export import save_dual_encoder

        save_dual_encoder(network, self.network, folder)
        (folder / SETTINGS).write_text(json.dumps(self.trained_with, indent=2), encoding="utf-8")


def _check_trained_with(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises `ConfigError` naming the first setting in which a checkpoint differs from what is asked of it."""
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"{folder}: no encoder that reads feedback: it has no {SETTINGS}; train one (ANCE-PRF)")
    try:
        known = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        differing = next((name for name in wanted if known[name] != wanted[name]), None)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / SETTINGS}: cannot be read: {error!r}; train the encoder again") from error
    if differing == "base_encoder":
        raise ConfigError(
            f"{folder}: was trained for the encoder {known[differing]}, but the retriever's is {wanted[differing]}: "
            "train it again for this one, or name the retriever that it was trained for"
        )
    if differing is not None:
        raise ConfigError(
            f"{differing}: {folder} was trained with {known[differing]}, not with {wanted[differing]}; set "
            f"{differing} to {known[differing]}, or train one with {wanted[differing]}"
        )


class LearnedFeedback:
    """A `QueryRefiner`: a `FeedbackEncoder` reads query and hits anew; the first embedding is not mixed in.

    Args:
        prepare: what is done to queries, their feedback included, before they are encoded.
    """

    def __init__(self, encoder: FeedbackEncoder, prepare: Callable[[Sequence[Query]], list[Query]]) -> None:
        self._encoder, self._prepare = encoder, prepare

    @property
    def num_feedback(self) -> int:
        return self._encoder.num_feedback

    @property
    def reads(self) -> Literal["passages"]:
        return "passages"

    @property
    def version(self) -> str:
        return self._encoder.version

    def refine(self, queries: Sequence[Query], embeddings: Embeddings, found: Sequence[Found]) -> Embeddings:
        del embeddings
        read = [query._replace(feedback=tuple(own.passages)) for query, own in zip(queries, found, strict=True)]
        return self._encoder.encode_queries(self._prepare(read))
