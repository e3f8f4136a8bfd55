"""BM25 beside the embeddings: bm25s does the scoring; ties, masks and safe files are ours.

Notable: rows are numbered as in the whole index (shard after shard), so BM25 and dense hits fuse by row. Scores are
memory-mapped arrays and JSON, never a pickle. Only passages that share a word with the query are hits, as in Lucene.

    BM25.build(texts, BM25Config()).save(path)
    BM25.open(path).search(["how do I join two frames"], k=100, ids_of=reader.passage_ids.take)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from raydr.errors import ArtifactError, ConfigError
from raydr.index.config import BM25Config
from raydr.index.topk import IdsOf, empty, order, select
from raydr.protocols import TopK

_SETTINGS = "settings.json"


class BM25:
    """A searchable BM25 index over numbered texts."""

    def __init__(self, scorer: Any, config: BM25Config, path: Path | None = None) -> None:
        self._scorer = scorer
        self._path = path
        self.config = config

    @classmethod
    def build(cls, texts: Iterable[str], config: BM25Config) -> BM25:
        """Indexes `texts`; text i becomes row i. Raises `ConfigError` when no word is left to index."""
        bm25s = _bm25s()
        texts = list(texts)  # what is wrong with these is not the stop words' fault
        try:
            tokens = bm25s.tokenize(texts, **_language(config), show_progress=False)
        except ValueError as error:
            raise ConfigError(f"bm25.stop_words: {error}") from error
        if not tokens.vocab:
            raise ConfigError("bm25: the corpus holds no word to index; set index.bm25=null")
        scorer = bm25s.BM25(method="lucene", k1=config.k1, b=config.b)
        scorer.index(tokens, show_progress=False)
        return cls(scorer, config)

    def save(self, path: Path) -> None:
        self._scorer.save(path, show_progress=False)
        (path / _SETTINGS).write_text(json.dumps(self.config.model_dump()), encoding="utf-8")

    @classmethod
    def open(cls, path: Path) -> BM25:
        """The index in a folder, memory-mapped. Raises `ArtifactError` when it is damaged."""
        bm25s = _bm25s()

        try:
            config = BM25Config.model_validate_json((path / _SETTINGS).read_bytes())
            scorer = bm25s.BM25.load(path, mmap=True, show_progress=False)
            # Still mapped, but as plain arrays: slicing numpy's memmap class costs more than the scores it finds.
            scorer.scores |= {name: np.asarray(scorer.scores[name]) for name in ("data", "indices", "indptr")}
            _ = int(scorer.scores["num_docs"])
            bm25s.tokenize(["a word"], **_language(config), show_progress=False)
        except Exception as error:  # a damaged file: numpy, json and bm25s raise whatever it makes them stumble over
            raise ArtifactError(f"{path}: not a readable BM25 index: {error}; build the index again") from error
        return cls(scorer, config, path)

    @property
    def num_rows(self) -> int:
        return int(self._scorer.scores["num_docs"])

    def search(
        self, queries: Sequence[str], k: int, *, ids_of: IdsOf, allowed: Bool[np.ndarray, " row"] | None = None
    ) -> TopK:
        """The `k` best rows per query text, only among `allowed` rows, ties by id."""
        bm25s = _bm25s()

        if not len(queries):
            return empty(0, k)
        found = empty(len(queries), 2 * k)
        tokens = bm25s.tokenize(list(queries), **self._tokenizer, return_ids=False, show_progress=False)
        weights = None if allowed is None else allowed.astype(np.float32)
        for line, words in enumerate(tokens):
            known = self._scorer.get_tokens_ids(words)
            if known:
                scores = self._scores(known, weights)
                rows = select(scores, k, above=0.0)
                if len(rows) > 2 * k:  # very many ties: decided here, so that one query does not widen all lines
                    rows = order(TopK(scores=scores[None, rows], rows=rows[None]), k, ids_of).rows[0]
                found.scores[line, : len(rows)], found.rows[line, : len(rows)] = scores[rows], rows
        return order(found, k, ids_of)

    def _scores(self, words: list[int], weights: np.ndarray | None) -> np.ndarray:
        try:
            return self._scorer.get_scores_from_ids(words, weight_mask=weights)
        except (IndexError, ValueError, TypeError, OverflowError) as error:
            raise ArtifactError(f"{self._path}: damaged: {error}; build the index again") from error

    @cached_property
    def _tokenizer(self) -> dict[str, Any]:
        return _language(self.config)


def _bm25s() -> Any:
    """The library, which runs JAX once when it is imported, where there is a JAX: that must not take a GPU's memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import bm25s

    return bm25s


def _language(config: BM25Config) -> dict[str, Any]:
    """bm25s's tokenizer arguments for the language of `config`."""
    import Stemmer

    try:
        stemmer = Stemmer.Stemmer(config.stemmer) if config.stemmer else None
    except KeyError:
        raise ConfigError(f"bm25.stemmer {config.stemmer!r}: known are {', '.join(Stemmer.algorithms())}") from None
    return {"stopwords": config.stop_words or [], "stemmer": stemmer}
