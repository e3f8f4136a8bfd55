"""Near-duplicate groups against the definition, on every pair."""

from __future__ import annotations

import random

import numpy as np

from raydr.data.near_duplicates import best_copies, near_duplicate_groups, reprint_groups
from raydr.data.ocr import noisy, readable_shares

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


def _reprinted() -> tuple[list[str], list[int]]:
    """Twelve stories, each printed five times, misread at 1% to 5%; the story of each text."""
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdefghilmnoprstuvw"), size=rng.integers(2, 9))) for _ in range(400)]
    stories = [" ".join(rng.choice(words, size=90)) for _ in range(12)]
    texts = [noisy(story, rate=0.01 * (copy + 1), rng=rng)[0] for copy in range(5) for story in stories]
    return texts, [place % 12 for place in range(60)]


def test_misread_reprints_are_one_group_and_the_best_copy_stays():
    """News Deja Vu's card, test 10: exactly one copy of each cluster, the one with the best reading."""
    texts, story = _reprinted()
    groups = reprint_groups(texts)
    assert sorted(groups) == sorted([place for place in range(60) if story[place] == one] for one in range(12))
    assert len(near_duplicate_groups(texts)) > 40, "words are rarely read rightly twice"
    kept = best_copies(groups, readable_shares(texts))
    assert sorted(story[place] for place in kept) == list(range(12))
    assert sum(place < 24 for place in kept) >= 11, "the copies with the fewest misread letters"
    assert best_copies([[0, 1, 2], [3]], [0.1, 0.9, 0.9, 0.0]) == [1, 3]


def test_what_is_printed_again_years_later_is_no_reprint():
    texts, _ = _reprinted()
    one = [texts[0], texts[12], texts[24]]
    assert reprint_groups(one, [0, 20, 4000]) == [[0, 1], [2]]
    assert reprint_groups(one, [4000, 0, 20]) == [[0], [1, 2]]
    assert reprint_groups(one, [0, None, 4000]) == [[0, 1, 2]]
    assert reprint_groups(one, [0, 25, 50], within_days=30) == [[0, 1, 2]], "week after week"
    assert reprint_groups([]) == []
