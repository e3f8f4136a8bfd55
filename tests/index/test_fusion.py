"""Fusion against hand-worked numbers and against the definition in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydr.errors import ConfigError
from raydr.index.fusion import FusionConfig, fuse
from raydr.index.topk import TopK, empty
from tests.corpora import as_pairs

IDS = np.array([f"p{row}" for row in range(20)], dtype=object)


def hits(*pairs):
    rows = [row for row, _ in pairs]
    return TopK(
        scores=np.array([[s for _, s in pairs]], dtype=np.float32), rows=np.array([rows], dtype=np.int64).reshape(1, -1)
    )


def test_reciprocal_ranks_by_hand():
    fused = fuse([hits((3, 9.0), (1, 8.0)), hits((1, 0.2), (2, 0.1))], FusionConfig(), 4, IDS.__getitem__)
    assert fused.rows.tolist() == [[1, 3, 2, -1]]
    np.testing.assert_allclose(fused.scores[0, :3], [1 / 62 + 1 / 61, 1 / 61, 1 / 62], rtol=1e-6)


def test_min_max_by_hand():
    config = FusionConfig(method="min_max", weights=(0.5, 2.0))
    fused = fuse([hits((3, 10.0), (1, 6.0), (0, 2.0)), hits((1, 4.0), (2, 1.0))], config, 4, IDS.__getitem__)
    assert as_pairs(fused, IDS) == [[("p1", 0.25 + 2.0), ("p3", 0.5), ("p0", 0.0), ("p2", 0.0)]]


def test_z_scores_by_hand():
    config = FusionConfig(method="z_score")
    fused = fuse([hits((0, 4.0), (1, 2.0)), hits((1, 1.0))], config, 2, IDS.__getitem__)
    # side one: (score - worst) / deviation = 2 / 1; side two has no spread, its only hit counts 1
    assert as_pairs(fused, IDS) == [[("p0", 2.0), ("p1", 1.0)]]


def test_ties_are_decided_by_id_and_missing_sides_are_fine():
    assert fuse([hits((7, 1.0)), hits((4, 1.0))], FusionConfig(), 2, IDS.__getitem__).rows.tolist() == [[4, 7]]
    assert fuse([hits((7, 1.0)), empty(1, 3)], FusionConfig(), 2, IDS.__getitem__).rows.tolist() == [[7, -1]]
    assert fuse([empty(1, 0), empty(1, 0)], FusionConfig(), 2, IDS.__getitem__).rows.tolist() == [[-1, -1]]


def test_weights_must_match():
    with pytest.raises(ConfigError, match=r"fusion.weights: 2 weights for 1"):
        fuse([empty(1, 1)], FusionConfig(), 1, IDS.__getitem__)


@given(
    first=st.lists(st.integers(0, 19), unique=True, max_size=12),
    second=st.lists(st.integers(0, 19), unique=True, max_size=12),
    k=st.integers(1, 25),
)
def test_reciprocal_rank_fusion_is_its_definition(first, second, k):
    expected: dict[int, float] = {}
    for ranking in (first, second):
        for rank, row in enumerate(ranking, start=1):
            expected[row] = expected.get(row, 0.0) + 1 / (60 + rank)
    sides = [hits(*[(row, float(-place)) for place, row in enumerate(ranking)]) for ranking in (first, second)]
    fused = fuse(sides, FusionConfig(), k, IDS.__getitem__)
    ranked = sorted(expected, key=lambda row: (-np.float32(expected[row]), IDS[row]))[:k]
    assert [row for row in fused.rows[0].tolist() if row >= 0] == ranked
    np.testing.assert_allclose(fused.scores[0, : len(ranked)], [expected[row] for row in ranked], rtol=1e-6)
