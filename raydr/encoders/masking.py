"""Names out of texts: every entity that a tagger finds gives way to one mask token.

Notable: entities are cut out by their offsets in the original string, so all else stays as it is, to the last blank and
however long the text; `form: package` rebuilds the text from the tagger's output instead, as the package newsdejavu
0.0.3 does: the spacing changes, and what lies beyond the tagger's window is lost. Query and passage go through the same
function, and `version` says which.

    masker = Masker(MaskConfig(), EntityTagger(config))
    masker.mask(["Mr. Pitt went to Bath."])[0].masked                     # "Mr. [MASK] went to [MASK]."
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from raydr.config import Config
from raydr.data.entities import KINDS
from raydr.data.ocr import clean
from raydr.encoders.tagger import EntityTagger, Word, entities_in
from raydr.types import Entity

MASK = "[MASK]"
"""What stands for a name until the encoder's own mask token does."""
_ENDS = ".,!?"
_RULES = 1
"""Raised when masking changes, so that texts masked in two ways are never compared."""


class MaskConfig(Config):
    """Which names are masked, and how."""

    labels_to_mask: tuple[str, ...] = KINDS
    """Kinds of entities that are masked; the others stay."""
    all_masks_same: bool = True
    """One mask for all kinds; false: the kind's name (PER, ORG, ...) in its place."""
    clean_ocr: bool = False
    """Join words hyphenated at a line's end, and the lines of a paragraph, before anything else."""
    form: Literal["offsets", "package"] = "offsets"
    """`offsets`: all but the names stays as it is. `package`: as newsdejavu 0.0.3 rebuilds the text, spacing, loss
    and all."""


class Masked(NamedTuple):
    """A text, its names, and the text without them."""

    text: str
    """As it was tagged: cleaned, where that is asked for."""
    entities: tuple[Entity, ...]
    """What was masked of it."""
    masked: str


class Masker:
    """Tags and masks texts in batches."""

    def __init__(self, config: MaskConfig, tagger: EntityTagger) -> None:
        self.config, self.tagger = config, tagger

    @property
    def version(self) -> str:
        """SHA-256 (hex) over the tagger and everything that changes what is masked."""
        settings = [_RULES, self.config.model_dump(mode="json"), self.tagger.version]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def mask(self, texts: Sequence[str]) -> list[Masked]:
        """Each text with its names and without them."""
        config = self.config
        sources = [clean(text) for text in texts] if config.clean_ocr else list(texts)
        if config.form == "package":
            words = self.tagger.words(sources, truncate=True)
            return [self._rebuilt(text, own) for text, own in zip(sources, words, strict=True)]
        tagged = self.tagger.tag(sources)
        found = [tuple(e for e in own if e.label in config.labels_to_mask) for own in tagged]
        return [
            Masked(text, entities, masked(text, entities, all_masks_same=config.all_masks_same))
            for text, entities in zip(sources, found, strict=True)
        ]

    def _rebuilt(self, text: str, words: list[Word]) -> Masked:
        groups = package_groups(words, self.tagger.written)
        config = self.config
        entities = tuple(e for e in entities_in(words) if e.label in config.labels_to_mask)
        return Masked(
            text,
            entities,
            masked_groups(groups, labels_to_mask=config.labels_to_mask, all_masks_same=config.all_masks_same),
        )


def masked(text: str, entities: Sequence[Entity], *, all_masks_same: bool = True) -> str:
    """The text with each of the entities (in their order) replaced by one mask; punctuation at its ends stays."""
    parts, done = [], 0
    for entity in entities:
        start, end = entity.start, entity.end
        while start < end and _stays(text[start]):
            start += 1
        while end > start and _stays(text[end - 1]):
            end -= 1
        if start == end:  # nothing but punctuation
            continue
        parts += [text[done:start], MASK if all_masks_same else entity.label]
        done = end
    return "".join([*parts, text[done:]])


def _stays(character: str) -> bool:
    return character in _ENDS or character.isspace()


def package_groups(words: Sequence[Word], written: Callable[[list[str]], str]) -> list[tuple[str, str]]:
    """Label and surface of the groups that transformers' pipeline would give, those outside of entities included.

    `written` turns tokens into the text that the tokenizer makes of them.
    """
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        prefix, _, kind = word.label.partition("-")
        surface = written(list(word.tokens))
        if groups and prefix != "B" and groups[-1][0] == (kind or "O"):
            groups[-1][1].append(surface)
        else:
            groups.append((kind or "O", [surface]))
    return [(label, written(surfaces)) for label, surfaces in groups]


def masked_groups(
    groups: Sequence[tuple[str, str]], *, labels_to_mask: Sequence[str] = KINDS, all_masks_same: bool = True
) -> str:
    """The package's masking: the surfaces of the groups with blanks between them, those of entities as one mask each
    that keeps a punctuation mark before or behind it.
    """
    parts = []
    for label, surface in groups:
        mask = MASK if all_masks_same else label
        if label not in labels_to_mask:
            parts.append(surface)
        elif surface[:1] and surface[0] in _ENDS:
            parts.append(f"{surface[0]} {mask}")
        elif surface[:1] and surface[-1] in _ENDS:
            parts.append(f"{mask}{surface[-1]}")
        else:
            parts.append(mask)
    return " ".join(parts)
