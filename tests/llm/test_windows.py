"""Windows of every length of list, and what sliding them does to an oracle's ranking."""

import asyncio

import numpy as np
import pytest

from raydr.errors import ConfigError
from raydr.llm.windows import ranked_by_windows, windows

CARD = {
    100: [(80, 100), (70, 90), (60, 80), (50, 70), (40, 60), (30, 50), (20, 40), (10, 30), (0, 20)],
    95: [(75, 95), (65, 85), (55, 75), (45, 65), (35, 55), (25, 45), (15, 35), (5, 25), (0, 15)],
    40: [(20, 40), (10, 30), (0, 20)],
    30: [(10, 30), (0, 20)],
    21: [(1, 21), (0, 11)],
    20: [(0, 20)],
    15: [(0, 15)],
    10: [(0, 10)],  # the released loop ranks nothing here
    1: [(0, 1)],
    0: [],
}


@pytest.mark.parametrize("num_hits", CARD)
def test_the_windows_of_the_card(num_hits):
    assert windows(num_hits, window_size=20, stride=10) == CARD[num_hits]


@pytest.mark.parametrize("num_hits", range(1, 120))
def test_every_list_is_ranked_to_its_head(num_hits):
    found = windows(num_hits, window_size=20, stride=10)
    assert found[-1][0] == 0
    assert {place for start, end in found for place in range(start, end)} == set(range(num_hits))


def test_strides():
    assert len(windows(100, window_size=20, stride=20)) == 5
    assert len(windows(100, window_size=20, stride=5)) == 17
    with pytest.raises(ConfigError, match="stride"):
        windows(100, window_size=20, stride=21)


def test_an_oracle_brings_the_best_to_the_top():
    rng = np.random.default_rng(0)
    relevance = rng.permutation(100)
    relevance[99] = 100  # the last passage is the best of all

    async def oracle(places):
        return sorted(places, key=lambda place: -relevance[place])

    order = asyncio.run(ranked_by_windows(100, oracle, window_size=20, stride=10))
    assert order[:10] == np.argsort(-relevance)[:10].tolist()
    assert order[0] == 99
    assert sorted(order) == list(range(100))
