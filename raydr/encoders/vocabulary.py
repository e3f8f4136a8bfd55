"""Encodes texts as sparse weights over a vocabulary (VDR), or as the binary bags of their tokens.

Notable: of each side it is set what is searched: `vector`, the network's weights, the `topk` highest and those of the
text's own tokens; or `bag`, 1 for each of the text's tokens, for which a tokenizer is enough and no weights are loaded.
Which view of a query is taken is decided while searching, so it is no part of the version stamp; and an index of bags
depends on the tokenizer alone, so it is never stale.

| search | query_view | passage_view | then |
| --- | --- | --- | --- |
| parametric | vector | vector | |
| alpha | bag | vector | |
| beta | vector | bag | |
| late parametric | vector | bag | search.rerank: the first hits by `VocabularyReranker` |

    encoder = VocabularyEncoder(VocabularyEncoder.Config(model="runs/vdr/train/model"))
    encoder.encode_passages([Passage("d1", "text")])        # scipy.sparse.csr_array, (1, dim)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int, Int64
from pydantic import Field, model_validator
from scipy.sparse import csr_array

from raydr.config import Config
from raydr.encoders.device import OneStream
from raydr.encoders.text import TextEncoder, TextEncoderConfig, available_cpus
from raydr.encoders.token_batches import EncoderStats, RowBatcher, collate
from raydr.encoders.vocabulary_weights import (
    TowerCount,
    load_towers,
    settings_of,
    vocabulary_size,
    weights_fingerprint,
)
from raydr.types import Hit, Passage, Query, WeightType

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from raydr.models.tokens import Side

View: TypeAlias = Literal["vector", "bag"]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


class SparseConfig(Config):
    """What is kept of a vector over the vocabulary."""

    query_topk: int | None = Field(default=768, ge=0)
    """Dimensions of a query's vector that are kept, the highest; null: all; 0: those of its own tokens."""
    passage_topk: int | None = Field(default=768, ge=0)
    """Dimensions of a passage's vector that are kept, the highest; null: all; 0: those of its own tokens."""
    own_tokens: bool = True
    """Whether a vector keeps the dimensions of the text's own tokens as well, however low they are."""
    weights: Literal["float32", "float16"] = "float32"
    """How precise a passage's weights are, and how they are stored; half the size in float16."""

    @model_validator(mode="after")
    def _keeps_something(self) -> SparseConfig:
        if not self.own_tokens and 0 in (self.query_topk, self.passage_topk):
            raise ValueError("topk 0 keeps the text's own tokens only; set own_tokens: true")
        return self


class VocabularyEncoderConfig(TextEncoderConfig, SparseConfig):
    """Which checkpoint, which views of its texts, and how it runs here. `pooling`, `dimensions` and `backend` are those
    of dense encoders, and stay as they are.
    """

    query_view: View = "vector"
    """`vector`: the network's weights; `bag`: the query's own tokens, without a network."""
    passage_view: View = "vector"
    """`vector`: the network's weights; `bag`: the passage's own tokens, without a network (an index of them needs a
    tokenizer only)."""
    towers: TowerCount = "auto"
    """Whether queries and passages share one network; `auto`: as the checkpoint has it, `two` for a plain one."""
    shift: int | None = Field(default=None, ge=0)
    """Token ids below it have no dimension; null: as the checkpoint has it, 999 for BERT's uncased vocabulary."""
    pools_padding: bool | None = None
    """Whether padding takes part in the maximum over positions, which makes a text's vector depend on its batch; null:
    as the checkpoint has it (the released ones were trained so), not for a plain one."""

    @model_validator(mode="after")
    def _possible(self) -> VocabularyEncoderConfig:
        if self.pooling != "auto" or self.dimensions is not None or self.backend == "openvino":
            raise ValueError(
                "pooling, dimensions and backend are settings of dense encoders; leave them out: VDR takes the maximum "
                "over positions, its dimensions are the vocabulary's, and torch runs it"
            )
        return self


class VocabularyEncoder:
    """An `Encoder` of sparse embeddings; safe to call from several threads once built."""

    Config: ClassVar[type[VocabularyEncoderConfig]] = VocabularyEncoderConfig

    def __init__(self, config: VocabularyEncoderConfig) -> None:
        self.config = config
        self.texts = TextEncoder(config)
        """The checkpoint, its tokenizer and the lengths of texts."""
        self._path = self.texts.checkpoint.path
        settings = settings_of(self._path, config.towers)
        self.num_towers = 2 if settings.towers == "two" else 1
        self.shift = settings.shift if config.shift is None else config.shift
        self.normalize = settings.normalize if config.normalize is None else config.normalize
        self._pools_padding = settings.pools_padding if config.pools_padding is None else config.pools_padding

    @property
    def dim(self) -> int:
        return vocabulary_size(self._path) - self.shift

    @property
    def weight_type(self) -> WeightType:
        """How passages' weights are stored without losing anything."""
        return "ones" if self.config.passage_view == "bag" and not self.normalize else self.config.weights

    @cached_property
    def version(self) -> str:
        """SHA-256 (hex) over what changes passages' embeddings and how queries' compare with them: of bags that is the
        tokenizer, whatever the weights. The view of queries and their `topk` are chosen while searching.
        """
        passages: dict[str, Any] = {
            "tokenizer": self._tokenizer_content,
            "dim": self.dim,
            "shift": self.shift,
            "normalize": self.normalize,
            "max_tokens": self.texts.max_passage_tokens,
            "prompt": self.texts.passage_prompt,
            "title_separator": self.config.title_separator,
            "weights": self.weight_type,
        }
        if self.config.passage_view == "vector":
            passages |= {
                "weights_of": weights_fingerprint(self._path),
                "towers": self.num_towers,
                "topk": self.config.passage_topk,
                "own_tokens": self.config.own_tokens,
                "pools_padding": self._pools_padding,
                "queries": [self.texts.max_query_tokens, self.texts.query_prompt],
            }
        return hashlib.sha256(json.dumps(passages, sort_keys=True).encode()).hexdigest()

    @property
    def stats(self) -> EncoderStats:
        """Texts, tokens and padding that went through the network since the encoder was built."""
        return self._batcher.stats if "_batcher" in self.__dict__ else EncoderStats()

    def encode_queries(self, queries: Sequence[Query]) -> csr_array:
        return self.embed(self.texts.tokenize_queries(queries), "query")

    def encode_passages(self, passages: Sequence[Passage]) -> csr_array:
        embeddings = self.embed(self.texts.tokenize_passages(passages), "passage")
        if self.weight_type == "float16":
            embeddings.data = embeddings.data.astype(np.float16).astype(np.float32)
        return embeddings

    def embed(self, token_ids: Sequence[Sequence[int]], side: Side, *, view: View | None = None) -> csr_array:
        """One row of weights per tokenised text, of the `view` that the config has for its side (or of another one)."""
        config = self.config
        configured, topk = (
            (config.query_view, config.query_topk) if side == "query" else (config.passage_view, config.passage_topk)
        )
        bags = self.bags(token_ids)
        if (view or configured) == "bag":
            return _normalized(bags) if self.normalize else bags
        return self._vectors(token_ids, side, topk)

    def bags(self, token_ids: Sequence[Sequence[int]]) -> csr_array:
        """1 for each token that a text has; special ones and those below `shift` have no dimension."""
        lengths = [len(ids) for ids in token_ids]
        flat = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(ids, dtype=np.int64) for ids in token_ids)])
        rows = np.repeat(np.arange(len(token_ids)), lengths)
        counted = (flat >= self.shift) & ~np.isin(flat, self.special_ids)
        places = np.unique(rows[counted] * self.dim + flat[counted] - self.shift)
        bounds = np.searchsorted(places, np.arange(len(token_ids) + 1) * self.dim)
        return _csr(np.ones(len(places), dtype=np.float32), places % self.dim, bounds, self.dim)

    def tokens_of(self, dims: Sequence[int] | Int[np.ndarray, " dim"]) -> list[str]:
        """The word pieces that dimensions stand for."""
        return word_pieces(self.texts.tokenizer, dims, shift=self.shift)

    @cached_property
    def special_ids(self) -> list[int]:
        """Ids of the tokens that stand for no word."""
        return special_tokens(self.texts.tokenizer)

    @cached_property
    def _tokenizer_content(self) -> str:
        """SHA-256 (hex) of what the tokenizer does, however its files are written."""
        content = json.loads(self.texts.tokenizer.to_str()) | {"truncation": None, "padding": None}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _vectors(self, token_ids: Sequence[Sequence[int]], side: Side, topk: int | None) -> csr_array:
        """The network's weights, sparsified batch by batch, so that they are never dense all together."""
        import torch

        from raydr.models.towers import towers_of

        network: Any = towers_of(self._stream.network)[0 if side == "query" else -1]
        own = {"own_tokens": self.config.own_tokens, "shift": self.shift, "special": self.special_ids}
        parts: list[tuple[np.ndarray, csr_array]] = []

        def encode(rows: Int64[np.ndarray, " row"]) -> None:
            padded, real = collate([token_ids[row] for row in rows], self.texts.pad_id)
            ids = torch.from_numpy(padded).to(self.texts.device)
            mask = None if real is None else torch.from_numpy(real).to(self.texts.device)
            with torch.inference_mode():
                parts.append((rows, sparsified(network(ids, mask), ids, mask, topk=topk, **own)))

        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        if not len(lengths):
            return csr_array((0, self.dim), dtype=np.float32)
        self._batcher.run_each(lengths, encode)
        return in_order(parts)

    @cached_property
    def _batcher(self) -> RowBatcher:
        kind = "cuda" if self.texts.device.startswith("cuda") else "cpu"
        return RowBatcher(self._stream, dim=self.dim, batch_tokens=self.config.batch_tokens or _BATCH_TOKENS[kind])

    @cached_property
    def _stream(self) -> OneStream:
        network = load_towers(
            self.config.model,
            towers=self.config.towers,
            shift=self.shift,
            normalize=self.normalize,
            pools_padding=self._pools_padding,
            precision=self.texts.precision,
        )
        return OneStream(network, self.texts.device, self.config.num_threads or available_cpus())


class VocabularyReranker:
    """Late parametric search: hits that were found by their tokens, by the network's vectors of query and passage.

    A `Reranker`; equal scores keep the order they came in.
    """

    def __init__(self, encoder: VocabularyEncoder) -> None:
        changes = {"query_view": "vector", "passage_view": "vector"}
        self.encoder = VocabularyEncoder(encoder.config.model_copy(update=changes))

    def rerank(self, query: Query, hits: Sequence[Hit], passages: Mapping[str, Passage]) -> list[Hit]:
        return self.rerank_many([(query, hits)], passages)[0]

    def rerank_many(
        self, lists: Sequence[tuple[Query, Sequence[Hit]]], passages: Mapping[str, Passage]
    ) -> list[list[Hit]]:
        """Many lists at once: a passage that is in several is embedded once."""
        ids = sorted({hit.passage_id for _, hits in lists for hit in hits})
        row_of = {passage_id: row for row, passage_id in enumerate(ids)}
        queries: Any = self.encoder.encode_queries([query for query, _ in lists])
        embedded = self.encoder.encode_passages([passages[passage_id] for passage_id in ids])
        ranked = []
        for line, (_, hits) in enumerate(lists):
            own = embedded[[row_of[hit.passage_id] for hit in hits]]
            scores = own @ queries[[line]].toarray()[0]
            order = np.argsort(-scores, kind="stable")
            ranked.append([Hit(hits[place].passage_id, float(scores[place])) for place in order])
        return ranked


def word_pieces(tokenizer: Tokenizer, dims: Sequence[int] | Int[np.ndarray, " dim"], *, shift: int) -> list[str]:
    """The word pieces that dimensions stand for."""
    return [tokenizer.id_to_token(int(dim) + shift) or f"[{int(dim) + shift}]" for dim in dims]


def special_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that stand for no word."""
    known = json.loads(tokenizer.to_str())
    return sorted(token["id"] for token in known.get("added_tokens", ()) if token.get("special"))


def sparsified(
    weights: Tensor, ids: Tensor, mask: Tensor | None, *, topk: int | None, own_tokens: bool, **own: Any
) -> csr_array:
    """The `topk` highest weights of each row (None: all) and, with `own_tokens`, those of the row's tokens; `own` says
    which tokens count (`raydr.models.vocabulary.bag_of_tokens`).
    """
    import torch

    from raydr.models.vocabulary import bag_of_tokens, top_mask

    kept = torch.ones_like(weights, dtype=torch.bool) if topk is None else top_mask(weights, topk)
    if own_tokens and topk is not None:
        kept |= bag_of_tokens(ids, mask, num_dims=weights.shape[1], **own)
    counts, dims, values = kept.sum(dim=1), kept.nonzero()[:, 1], weights[kept]
    bounds = np.concatenate([[0], np.cumsum(counts.cpu().numpy())])
    return _csr(values.float().cpu().numpy(), dims.cpu().numpy(), bounds, weights.shape[1])


def in_order(parts: Sequence[tuple[np.ndarray, csr_array]]) -> csr_array:
    """The batches of `parts` as one; the numbers before each say where its rows belong."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return csr_array(sp.vstack([part for _, part in parts], format="csr")[order])


def _csr(values: np.ndarray, dims: np.ndarray, bounds: np.ndarray, num_dims: int) -> csr_array:
    parts = (values, dims.astype(np.int32), bounds.astype(np.int32 if len(values) < 2**31 else np.int64))
    return csr_array(parts, shape=(len(bounds) - 1, num_dims))


def _normalized(embeddings: csr_array) -> csr_array:
    """Rows of length 1; rows without a weight stay as they are."""
    norms = np.sqrt(embeddings.multiply(embeddings).sum(axis=1))
    counts = np.diff(embeddings.indptr)
    data = embeddings.data / np.repeat(np.where(norms > 0, norms, 1), counts)
    return csr_array((data.astype(np.float32), embeddings.indices, embeddings.indptr), shape=embeddings.shape)
