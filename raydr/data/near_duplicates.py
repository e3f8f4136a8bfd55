"""Groups of texts that say nearly the same: MinHash over word shingles, candidates confirmed by exact overlap.

Notable: two texts are near-duplicates when the Jaccard overlap of their sets of four-word shingles reaches a threshold;
MinHash bands only propose pairs, so what is grouped never depends on luck, only what is missed does (at 0.8 overlap,
about one pair in three hundred). Deterministic.

    near_duplicate_groups(["a b c d e", "a b c d e", "x"])   # [[0, 1], [2]]
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

_SHINGLE_WORDS = 4
_BANDS, _ROWS_PER_BAND = 10, 4
_PRIME = (1 << 61) - 1


def near_duplicate_groups(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Positions of `texts` in groups of near-duplicates, each sorted, ordered by their first member.

    A group is a connected component: its first and last member may overlap less than `threshold`.
    """
    shingles = [_shingles(text) for text in texts]
    parent = list(range(len(texts)))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    rng = np.random.default_rng(0)
    factors = rng.integers(1, 1 << 31, size=(_BANDS * _ROWS_PER_BAND, 1), dtype=np.uint64)
    offsets = rng.integers(0, 1 << 61, size=(_BANDS * _ROWS_PER_BAND, 1), dtype=np.uint64)
    buckets: dict[tuple[int, bytes], int] = {}
    for row, own in enumerate(shingles):
        hashes = (factors * np.fromiter(own, dtype=np.uint64, count=len(own)) + offsets) % _PRIME
        bands = hashes.min(axis=1).reshape(_BANDS, _ROWS_PER_BAND)
        for band, values in enumerate(bands):
            first = find(buckets.setdefault((band, values.tobytes()), row))
            if first != find(row) and _overlap(shingles[first], own) >= threshold:
                parent[max(first, find(row))] = min(first, find(row))
    groups: dict[int, list[int]] = defaultdict(list)
    for row in range(len(texts)):
        groups[find(row)].append(row)
    return list(groups.values())


def _shingles(text: str) -> frozenset[int]:
    """Hashes of the runs of four words; a shorter text is one shingle."""
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - _SHINGLE_WORDS + 1)
    return frozenset(zlib.crc32(" ".join(words[i : i + _SHINGLE_WORDS]).encode()) for i in range(last))


def _overlap(one: frozenset[int], other: frozenset[int]) -> float:
    return len(one & other) / len(one | other)
