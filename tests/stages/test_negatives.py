"""Filters, turns and order of negatives, against a brute force that goes through candidates one by one."""

from __future__ import annotations

import numpy as np
import pytest

from raydr.stages.config import MineConfig
from raydr.stages.negatives import Candidates, choose, score_limits

IDS = np.array([f"p{number:03d}" for number in np.random.default_rng(9).permutation(200)], dtype=object)


def chosen(candidates, relevant, limits, num_negatives):
    choice = choose(candidates, relevant, limits, num_negatives=num_negatives, ids_of=IDS.take)
    rows = [candidates.rows[line, columns[columns >= 0]] for line, columns in enumerate(choice.columns)]
    return [own.tolist() for own in rows], choice.counts


def brute_force(rows, sources, scores, relevant, limits, num_negatives):
    """Negatives of one query, and what was removed, by the definition."""
    removed: dict[str, int] = {}
    lists: dict[str, list[tuple[int, float]]] = {source: [] for source in sources}
    seen: set[int] = set()
    for row, source, score in zip(rows, sources, scores, strict=True):
        if row < 0:
            continue
        reasons = [("relevant", row in relevant), ("duplicate", row in seen)]
        reasons += [(name, not score < limit) for name, limit in limits.items()]
        seen.add(row)
        for name, applies in reasons:
            if applies:
                removed[name] = removed.get(name, 0) + 1
                break
        else:
            lists[source].append((row, score))
    kept: list[tuple[int, float]] = []
    while any(lists.values()) and len(kept) < num_negatives:
        for own in lists.values():
            if own and len(kept) < num_negatives:
                kept.append(own.pop(0))
    return [row for row, score in sorted(kept, key=lambda hit: (-hit[1], IDS[hit[0]]))], removed


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    widths = {"model": 12, "bm25": 9, "random": 5}
    sources = [source for source, width in widths.items() for _ in range(width)]
    rows = rng.integers(-1, 40, size=(30, len(sources)))
    scores = rng.integers(-6, 7, size=200).astype(np.float32)[rows]  # a passage has one score; many are equal
    relevant = [rng.choice(40, size=rng.integers(1, 4), replace=False) for _ in rows]
    positive = rng.integers(-4, 12, size=30).astype(np.float32)
    limits = score_limits(positive, MineConfig(max_score=4, margin=1, fraction=0.5))
    found, counts = chosen(Candidates(rows, sources, scores), relevant, limits, 6)
    removed: dict[str, int] = {}
    for line, own in enumerate(found):
        mine = {name: limit[line] for name, limit in limits.items()}
        expected, gone = brute_force(rows[line], sources, scores[line], relevant[line].tolist(), mine, 6)
        assert own == expected
        removed = {name: removed.get(name, 0) + gone.get(name, 0) for name in {*removed, *gone}}
    assert len(removed) == 5, "every filter had something to remove"
    assert counts == {"candidates": int((rows >= 0).sum()), **{f"removed_{name}": n for name, n in removed.items()}}


def test_limits_are_the_papers():
    positive = np.array([0.8, 0.1, 0.0, -0.2], dtype=np.float32)
    limits = score_limits(positive, MineConfig(max_score=0.7, margin=0.05, fraction=0.95))
    assert limits["max_score"].tolist() == [0.7] * 4
    np.testing.assert_allclose(limits["margin"], [0.75, 0.05, -0.05, -0.25], atol=1e-7)
    np.testing.assert_allclose(limits["fraction"], [0.76, 0.095, 0.0, -0.21], atol=1e-7)
    assert (limits["fraction"] <= positive).all(), "also where the positive's score is negative"
    assert score_limits(positive, MineConfig()) == {}


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (MineConfig(), [0, 1, 2, 3, 4]),
        (MineConfig(max_score=0.75), [2, 3, 4]),
        (MineConfig(margin=0.0), [2, 3, 4]),
        (MineConfig(margin=0.25), [3, 4]),
        (MineConfig(fraction=1.0), [2, 3, 4]),
        (MineConfig(fraction=0.5), [4]),
    ],
)
def test_a_negative_scores_strictly_below_its_limit(config, kept):
    scores = np.array([[1.0, 0.75, 0.5, 0.375, 0.25]], dtype=np.float32)
    candidates = Candidates(np.arange(5)[None], ["model"] * 5, scores)
    limits = score_limits(np.array([0.75], dtype=np.float32), config)
    assert chosen(candidates, [np.array([9])], limits, 5)[0] == [kept]


def test_without_scores_the_order_is_that_of_the_columns():
    candidates = Candidates(np.array([[7, 3, 5, 9, 3, 1]]), ["bm25"] * 3 + ["random"] * 3, None)
    rows, counts = chosen(candidates, [np.array([5])], {}, 4)
    assert rows == [[7, 3, 9, 1]], "turns: 7, 9, 3, 1; those by words are harder than random ones"
    assert counts == {"candidates": 6, "removed_relevant": 1, "removed_duplicate": 1}
    assert chosen(candidates, [np.array([5])], {}, 3)[0] == [[7, 3, 9]]


def test_nothing_is_left():
    candidates = Candidates(np.array([[4, -1], [-1, -1]]), ["model"] * 2, np.zeros((2, 2), dtype=np.float32))
    assert chosen(candidates, [np.array([4]), np.array([4])], {}, 3)[0] == [[], []]
