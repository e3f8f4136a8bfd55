"""Ranking a long list by ranking windows of it, from the tail to the head, so that the best rise to the top.

Notable: the windows of one list depend on one another and are ranked in turn; those of different lists do not, and run
at the same time. A list is always ranked whole: the literal loop of the paper's code ranks nothing when the list is
`window_size - stride` long, and stops before the head for other lengths.

    order = await ranked_by_windows(len(passages), rank_window, window_size=20, stride=10)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from raydr.errors import ConfigError

RankWindow: TypeAlias = Callable[[Sequence[int]], Awaitable[Sequence[int]]]
"""Places of a list, in their present order -> the same places, best first."""


def windows(num_hits: int, *, window_size: int, stride: int) -> list[tuple[int, int]]:
    """The windows `[start, end)` of a list, in the order they are ranked: from the tail, ending with one at 0."""
    if not 1 <= stride <= window_size:
        raise ConfigError(f"stride ({stride}) must be between 1 and window_size ({window_size})")
    found = []
    end = num_hits
    while end > 0:
        start = max(0, end - window_size)
        found.append((start, end))
        if start == 0:
            break
        end -= stride
    return found


async def ranked_by_windows(num_hits: int, rank_window: RankWindow, *, window_size: int, stride: int) -> list[int]:
    """Places 0 to `num_hits` - 1, best first. What `rank_window` gives must hold every place it got, once."""
    order = list(range(num_hits))
    for start, end in windows(num_hits, window_size=window_size, stride=stride):
        order[start:end] = await rank_window(order[start:end])
    return order
