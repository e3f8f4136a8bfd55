r"""Text that a machine read from paper: cleaned before it is used, and made, for training, out of text that is clean.

Notable: cleaning is linear in the length of the text and touches line breaks alone; noise keeps track of where every
character went, so marked entities stay where they are. The confusions are those of newsprint: letters of like shape,
ligatures, the long s, lost and added blanks.

    clean("a hyphen-\nated word\non two lines")                          # "a hyphenated word on two lines"
    text, places = noisy("in Liverpool", rate=0.1, rng=np.random.default_rng(0))
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from raydr.types import Annotation, Query

_WORD = re.compile(r"[^\W\d_]+")
_SHARED_BY = 3
_CONFUSIONS: dict[str, tuple[str, ...]] = {
    "a": ("u", "o", "n"),
    "b": ("h", "6"),
    "c": ("e", "o", "("),
    "d": ("cl", "a"),
    "e": ("c", "o", "é"),
    "f": ("t", "s"),
    "g": ("q", "9"),
    "h": ("b", "li", "k"),
    "i": ("l", "1", "!", "j"),
    "l": ("1", "i", "I", "t"),
    "m": ("rn", "in", "ni"),
    "n": ("u", "ri", "a"),
    "o": ("0", "e", "c"),
    "r": ("t", "i", "v"),
    "s": ("f", "8", "a"),
    "t": ("f", "l", "i"),
    "u": ("n", "ii", "a"),
    "v": ("y", "r"),
    "w": ("vv", "iv", "u"),
    "y": ("v", "j"),
    "B": ("R", "8"),
    "C": ("G", "(", "O"),
    "D": ("I)", "O"),
    "E": ("F", "B"),
    "G": ("C", "6"),
    "H": ("II", "N", "B"),
    "I": ("l", "1", "J"),
    "L": ("I", "J"),
    "M": ("N", "AI"),
    "O": ("0", "Q", "C"),
    "R": ("B", "It", "K"),
    "S": ("8", "5", "s"),
    "T": ("I", "l'"),
    "W": ("VV", "M"),
    ",": (".", "'"),
    ".": (",", ""),
    " ": ("", "  ", " . ", " ' "),
}


def clean(text: str) -> str:
    """Joins words that were hyphenated at a line's end and lines of one paragraph; blank lines between these stay."""
    text = text.replace("\r\n", "\n")
    text = re.sub(r"-\n(?!\n)", "", text)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def noisy(text: str, *, rate: float, rng: np.random.Generator) -> tuple[str, list[int]]:
    """The text with about this share of its characters misread, lost or added to, and where each character (and the
    end of the text) went.
    """
    parts: list[str] = []
    places: list[int] = []
    length = 0
    hit = rng.random(len(text)) < rate
    kind = rng.random(len(text))
    for position, character in enumerate(text):
        written = character
        if hit[position]:
            likely = _CONFUSIONS.get(character)
            if likely and kind[position] < 0.85:
                written = likely[int(rng.integers(len(likely)))]
            elif not character.isspace():
                written = "" if kind[position] < 0.95 else character + "'"
        places.append(length)
        parts.append(written)
        length += len(written)
    return "".join(parts), [*places, length]


def noisy_query(query: Query, *, rate: float, rng: np.random.Generator) -> Query:
    """A marked text misread, with its entities where they went; those of which nothing is left are gone."""
    text, places = noisy(query.text, rate=rate, rng=rng)
    if query.annotation is None:
        return query._replace(text=text)
    moved = (
        entity._replace(start=places[entity.start], end=places[entity.end]) for entity in query.annotation.entities
    )
    kept = tuple(entity for entity in moved if text[entity.start : entity.end].strip())
    return query._replace(text=text, annotation=Annotation(kept, query.annotation.labels))


def readable_shares(texts: Sequence[str]) -> list[float]:
    """How well each text was read, from 0 to 1: the share of its letters in words that `texts` have in common.

    A misreading is rarely made twice, so a word of several texts is most likely a word. No dictionary is needed, and no
    language presumed; of few texts it says little.
    """
    words = [[word.lower() for word in _WORD.findall(text)] for text in texts]
    counts = Counter(word for own in words for word in set(own))
    shared = min(_SHARED_BY, max(1, len(texts) // 2))
    return [
        sum(len(word) for word in own if counts[word] >= shared) / max(1, sum(not c.isspace() for c in text))
        for own, text in zip(words, texts, strict=True)
    ]
