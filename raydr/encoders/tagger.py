"""Finds the named entities of texts of any length with any token classifier of transformers'.

Notable: a text longer than the network reads is cut into windows that overlap, and every token is judged in the window
that shows most of what stands around it; entities are character offsets in the original string, so nothing is lost and
nothing is found twice. A word gets the label of its surest token (transformers' aggregation `max`), and an entity is
never part of a word. Batches hold windows of like length, of many texts at once.

    tagger = EntityTagger(EntityTagger.Config(model="runs/a/tagger/train/model"))
    tagger.tag(["Mr. Pitt went to Bath."])                                            # [[Entity(4, 8, "PER"), ...]]

Any checkpoint with BIO labels will do: `dell-research-harvard/historical_newspaper_ner` (RoBERTa-large, on newspapers
of 1840 to 1970) is News Deja Vu's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import Field

from raydr.config import Config
from raydr.data.tagged import USUAL_LABELS
from raydr.encoders.checkpoint import Checkpoint, load_transformer, open_checkpoint
from raydr.encoders.device import OneStream, choose_device
from raydr.encoders.precision import Precision, choose_precision
from raydr.encoders.text import available_cpus
from raydr.encoders.token_batches import RowBatcher, collate
from raydr.encoders.tokenization import load_tokenizer
from raydr.errors import ConfigError
from raydr.types import Entity

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from raydr.models.token_classifier import TokenClassifier

_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
_TEXTS_AT_ONCE = 512
TRAIN_ONE = (
    "train one with `raydr deja-vu ... --train-tagger FILE`, where FILE holds texts with marked entities, or name a "
    "checkpoint of transformers' token classification"
)


class TaggerConfig(Config):
    """Which checkpoint tags, and how it runs here."""

    model: str
    """Folder or hub name of a token classifier (safetensors) with BIO labels."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Longest window in tokens, special ones included; null: what the network can read, at most 512."""
    overlap_tokens: int = Field(default=64, ge=0)
    """So many tokens of a window are in the next one as well; at most half of them."""
    precision: Literal["auto"] | Precision = "auto"
    """`auto`: bfloat16 where it is measured to be faster, float32 elsewhere."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto`: a GPU if there is one."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per batch, padding included; null: 2048 on a CPU, 65536 on a GPU."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: as for encoders."""


class Word(NamedTuple):
    """A word as the tagger judged it."""

    start: int
    end: int
    label: str
    """O, or B- or I- and a kind."""
    tokens: tuple[str, ...]
    """As the tokenizer writes them."""


class EntityTagger:
    """Tags batches of texts; nothing is loaded before the first."""

    Config: ClassVar[type[TaggerConfig]] = TaggerConfig

    def __init__(self, config: TaggerConfig) -> None:
        self.config = config
        self.checkpoint: Checkpoint = open_checkpoint(config.model)
        self.labels = _labels(self.checkpoint)

    @cached_property
    def version(self) -> str:
        """SHA-256 (hex) over weights, tokenizer and windows: of everything that changes what is found."""
        settings = [self.checkpoint.fingerprint(), self.max_tokens, self._overlap]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    @property
    def max_tokens(self) -> int:
        """Longest window in tokens, special ones included."""
        readable = self.checkpoint.max_positions or 512
        if self.config.max_tokens is not None and self.config.max_tokens > readable:
            raise ConfigError(f"max_tokens: {self.config.max_tokens} is more than the {readable} the tagger can read")
        return self.config.max_tokens or min(readable, 512)

    @property
    def _overlap(self) -> int:
        return min(self.config.overlap_tokens, self.max_tokens // 2 - 1)

    def tag(self, texts: Sequence[str]) -> list[list[Entity]]:
        """The entities of each text, in their order; none overlaps another."""
        return [entities_in(words) for words in self.words(texts)]

    def written(self, tokens: list[str]) -> str:
        """The text that the tokenizer makes of its tokens."""
        return self.tokenizer.decoder.decode(tokens) if self.tokenizer.decoder is not None else " ".join(tokens)

    def words(self, texts: Sequence[str], *, truncate: bool = False) -> Iterator[list[Word]]:
        """The words of each text with their labels; with `truncate` only those of its first window."""
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            yield from self._words(list(texts[start : start + _TEXTS_AT_ONCE]), truncate=truncate)

    def _words(self, texts: list[str], *, truncate: bool) -> Iterator[list[Word]]:
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        before, after = self._special
        room = self.max_tokens - len(before) - len(after)
        step = room - self._overlap
        windows = []  # (text, first token, token behind the last)
        for text, encoding in enumerate(encodings):
            count = min(len(encoding), room) if truncate else len(encoding)
            for first in range(0, max(1, count - self._overlap), step) if count else ():
                windows.append((text, first, min(first + room, count)))
        ids = [[*before, *encodings[text].ids[first:last], *after] for text, first, last in windows]
        scores = self._scores(ids)
        known = [np.zeros((len(encoding), len(self.labels)), np.float32) for encoding in encodings]
        for number, (text, first, last) in enumerate(windows):
            overlaps = number and windows[number - 1][0] == text
            # The first half of what two windows share is better seen by the earlier one.
            own = (first + windows[number - 1][2] + 1) // 2 if overlaps else first
            skipped = len(before) + own - first
            known[text][own:last] = scores[number][skipped : len(before) + last - first]
        for text, encoding in enumerate(encodings):
            count = min(len(encoding), room) if truncate else len(encoding)
            yield list(self._judged(encoding, known[text], count))

    def _judged(self, encoding: Encoding, scores: Float32[np.ndarray, "token label"], count: int) -> Iterator[Word]:
        word_ids, offsets, tokens = encoding.word_ids, encoding.offsets, encoding.tokens
        surest = scores.max(axis=1) if len(scores) else scores
        first = 0
        while first < count:
            last = first + 1
            while last < count and word_ids[last] is not None and word_ids[last] == word_ids[first]:
                last += 1
            token = first + int(surest[first:last].argmax())
            label = self.labels[int(scores[token].argmax())]
            start, end = offsets[first][0], offsets[last - 1][1]
            yield Word(start, end, label, tuple(tokens[first:last]))
            first = last

    def _scores(self, ids: list[list[int]]) -> list[Float32[np.ndarray, "token label"]]:
        """Each window's share of every label at every token, special ones included."""
        found: list[Any] = [None] * len(ids)

        def forward(rows: Int64[np.ndarray, " row"]) -> Float32[np.ndarray, "row 0"]:
            scores = self._network.run(*collate([ids[row] for row in rows], self._pad_id))
            shares = scores.softmax(dim=-1).cpu().numpy()
            for row, own in zip(rows, shares, strict=True):
                found[row] = own[: len(ids[row])]
            return np.empty((len(rows), 0), np.float32)

        if ids:
            self._batcher.run_rows(np.array([len(own) for own in ids], dtype=np.int64), forward)
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        """What cuts texts into tokens; it cuts nothing off."""
        return self._loaded[0]

    @property
    def _pad_id(self) -> int:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[Tokenizer, int]:
        tokenizer, pad_id = load_tokenizer(self.checkpoint.path, lowercase=self.checkpoint.lowercase)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, pad_id

    @cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        encoding = self.tokenizer.encode("a")
        inner = encoding.special_tokens_mask.index(0)
        count = encoding.special_tokens_mask.count(0)
        return encoding.ids[:inner], encoding.ids[inner + count :]

    @cached_property
    def _device(self) -> str:
        return choose_device(self.config.device)

    @cached_property
    def _network(self) -> OneStream:
        precision = choose_precision(self.config.precision, self._device)
        num_threads = self.config.num_threads or available_cpus()
        return OneStream(load_tagger(self.checkpoint, precision), self._device, num_threads)

    @cached_property
    def _batcher(self) -> RowBatcher:
        kind = "cuda" if self._device.startswith("cuda") else "cpu"
        return RowBatcher(self._network, dim=0, batch_tokens=self.config.batch_tokens or _BATCH_TOKENS[kind])


def load_tagger(checkpoint: Checkpoint, precision: Precision = "float32", **options: Any) -> TokenClassifier:
    """The checkpoint's token classifier. Raises `ConfigError` where transformers cannot make one of it."""
    import torch
    from transformers import AutoModelForTokenClassification

    from raydr.models.token_classifier import TokenClassifier

    try:
        network = load_transformer(
            AutoModelForTokenClassification, checkpoint.path, dtype=getattr(torch, precision), **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot load this as a tagger: {error}") from error
    return TokenClassifier(network).eval()


def _labels(checkpoint: Checkpoint) -> list[str]:
    """The network's labels in order, with the kinds as raydr calls them."""
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    if not any("TokenClassification" in name for name in config.get("architectures") or ()):
        raise ConfigError(f"tagger: {checkpoint.path} is no token classifier; {TRAIN_ONE}")
    named = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    labels = []
    for number in range(len(named)):
        prefix, _, kind = named.get(number, "").partition("-")
        if (prefix, kind) != ("O", "") and (prefix not in ("B", "I") or not kind):
            raise ConfigError(
                f"tagger: {checkpoint.path}: id2label of its config.json has {named.get(number)!r} at {number}; a "
                "tagger has O, and B- and I- before each kind of entity"
            )
        labels.append(f"{prefix}-{USUAL_LABELS.get(kind.lower(), kind)}" if kind else prefix)
    return labels


def entities_in(words: Sequence[Word]) -> list[Entity]:
    """Runs of words of one kind; a B- begins another entity."""
    found: list[Entity] = []
    kind = ""
    for word in words:
        prefix, _, own = word.label.partition("-")
        if own and own == kind and prefix != "B":
            found[-1] = found[-1]._replace(end=word.end)
        elif own:
            found.append(Entity(word.start, word.end, own))
        kind = own
    return found
