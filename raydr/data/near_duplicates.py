"""Groups of texts that say nearly the same: MinHash over shingles, candidates confirmed by exact overlap.

Notable: two texts are near-duplicates when the Jaccard overlap of their sets of shingles reaches a threshold; MinHash
bands only propose pairs, so what is grouped never depends on luck, only what is missed does. Shingles are runs of four
words (at 0.8 overlap about one pair in three hundred is missed), or, for articles that were reprinted and misread, runs
of five letters: a word is rarely read rightly twice, five letters often are. Deterministic.

    near_duplicate_groups(["a b c d e", "a b c d e", "x"])   # [[0, 1], [2]]
    reprint_groups(texts, days, within_days=30)              # the same wire story in many newspapers
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_SHINGLE_WORDS, _SHINGLE_LETTERS = 4, 5
_PRIME = (1 << 61) - 1
_COMPARED = 16
"""With so many of a bucket's latest texts a further one is compared."""


def near_duplicate_groups(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Positions of `texts` in groups of near-duplicates, each sorted, ordered by their first member.

    A group is a connected component: its first and last member may overlap less than `threshold`.
    """
    groups = _Groups([_shingles(text) for text in texts], threshold, bands=10, rows=4)
    for row in range(len(texts)):
        groups.place(row)
    return groups.groups()


def reprint_groups(
    texts: Sequence[str],
    days: Sequence[int | None] | None = None,
    *,
    threshold: float = 0.3,
    within_days: int = 30,
) -> list[list[int]]:
    """Positions of articles in groups of reprints of one text, misreadings and all; as `near_duplicate_groups`.

    `days` numbers the day of each article (None where it is not known): two that are more than `within_days` apart are
    no reprints of each other. At 5% of misread letters in both, two copies overlap by about 0.4; unrelated articles do
    by less than 0.1.
    """
    known = list(days) if days is not None else [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda row: (known[row] is None, known[row] or 0, row))
    groups = _Groups([_letter_shingles(text) for text in texts], threshold, bands=40, rows=3)
    for row in order:
        day = known[row]

        def is_near(other: int, day: int | None = day) -> bool:
            before = known[other]
            return day is None or before is None or abs(day - before) <= within_days

        groups.place(row, is_near)
    return groups.groups()


def best_copies(groups: Iterable[Sequence[int]], quality: Sequence[float]) -> list[int]:
    """Of each group the member of the highest quality, the first of equals."""
    return [max(group, key=lambda row: (quality[row], -row)) for group in groups]


class _Groups:
    """Union-find over texts that share a MinHash band and overlap enough."""

    def __init__(self, shingles: Sequence[frozenset[int]], threshold: float, *, bands: int, rows: int) -> None:
        self._shingles, self._threshold, self._shape = shingles, threshold, (bands, rows)
        self._parent = list(range(len(shingles)))
        rng = np.random.default_rng(0)
        self._factors = rng.integers(1, 1 << 31, size=(bands * rows, 1), dtype=np.uint64)
        self._offsets = rng.integers(0, 1 << 61, size=(bands * rows, 1), dtype=np.uint64)
        self._buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)

    def place(self, row: int, is_near: Callable[[int], bool] = lambda _: True) -> None:
        """Joins a text with those that were placed before it."""
        own = self._shingles[row]
        hashes = (self._factors * np.fromiter(own, dtype=np.uint64, count=len(own)) + self._offsets) % _PRIME
        compared: set[int] = set()
        for band, values in enumerate(hashes.min(axis=1).reshape(self._shape)):
            bucket = self._buckets[band, values.tobytes()]
            for other in bucket[-_COMPARED:]:
                if other in compared or not is_near(other):
                    continue
                compared.add(other)
                first, second = self._find(other), self._find(row)
                if first != second and _overlap(self._shingles[other], own) >= self._threshold:
                    self._parent[max(first, second)] = min(first, second)
            bucket.append(row)

    def groups(self) -> list[list[int]]:
        members: dict[int, list[int]] = defaultdict(list)
        for row in range(len(self._parent)):
            members[self._find(row)].append(row)
        return list(members.values())

    def _find(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node


def _shingles(text: str) -> frozenset[int]:
    """Hashes of the runs of four words; a shorter text is one shingle."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    return frozenset(zlib.crc32(" ".join(words[i : i + _SHINGLE_WORDS]).encode()) for i in range(last))


def _letter_shingles(text: str) -> frozenset[int]:
    """Hashes of the runs of five letters, whatever stands between them; a shorter text is one shingle."""
    letters = "".join(re.findall(r"[^\W_]+", text.lower()))
    last = max(1, len(letters) - _SHINGLE_LETTERS + 1)
    return frozenset(zlib.crc32(letters[i : i + _SHINGLE_LETTERS].encode()) for i in range(last))


def _overlap(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
