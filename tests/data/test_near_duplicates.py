"""Near-duplicate groups against the definition, on every pair."""

from __future__ import annotations

import random

from raydr.data.near_duplicates import near_duplicate_groups

WORDS = [f"w{i}" for i in range(500)]


def _overlap(one: str, other: str) -> float:
    shingles = [{tuple(t.split()[i : i + 4]) for i in range(max(1, len(t.split()) - 3))} for t in (one, other)]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


def test_what_is_grouped_overlaps_and_what_overlaps_is_grouped():
    rng = random.Random(0)
    bases = [" ".join(rng.choices(WORDS, k=80)) for _ in range(40)]
    # Each base with its last two words changed (overlap about 0.9), and with half of it changed (far below 0.8).
    near = [" ".join([*text.split()[:-2], "x", "y"]) for text in bases]
    far = [" ".join([*text.split()[:40], *rng.choices(WORDS, k=40)]) for text in bases]
    texts = [*bases, *near, *far]
    groups = near_duplicate_groups(texts, threshold=0.8)
    expected = sorted([[i, i + 40] for i in range(40)] + [[i] for i in range(80, 120)])
    assert all(_overlap(texts[i], texts[i + 40]) > 0.85 for i in range(40))
    assert sorted(groups) == expected


def test_case_and_punctuation_do_not_matter_but_words_do():
    texts = ["Return the mean of a.", "return THE mean, of a", "return the median of a"]
    assert near_duplicate_groups(texts) == [[0, 1], [2]]


def test_short_and_empty_texts_and_none():
    assert near_duplicate_groups(["", "one", "", "one two"]) == [[0, 2], [1], [3]]
    assert near_duplicate_groups([]) == []
