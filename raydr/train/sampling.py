"""Which examples make a batch: the groups of every step, decided by ids and a seed alone.

Notable: a sampler is a function of (examples, seed), so every worker runs the same one and takes its own share: nothing
is sent, no example is given twice, and a resumed run replays the ids up to its step and goes on exactly. Nothing after
the sampler shuffles, so a batch that a method composed (one topic, spread margins) stays as it is.

    for batch in RandomBatches(examples, batch_size=32, num_negatives=7, seed=0): ...      # list[Group], for ever
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from raydr.data.examples import ExampleSet
from raydr.errors import ConfigError
from raydr.stages.score import open_scores


class Group(NamedTuple):
    """One query of a batch and the passages drawn for it, as rows of the example set; the first one is a positive."""

    query: int
    passages: tuple[int, ...]
    teacher_scores: tuple[float, ...] = ()
    """A teacher's score of each passage, where the method has one."""
    cluster: int = -1
    """A label that queries of one topic or task share; -1: none."""
    wording: int = 0
    """Which of its instruction's wordings the query is given with, modulo their number."""


@runtime_checkable
class BatchSampler(Protocol):
    """Yields batches of groups of one size, without end; iterating again starts the same sequence again."""

    def __iter__(self) -> Iterator[list[Group]]: ...


class RandomBatches:
    """Every query once an epoch in random order, with a random positive and random ones of its first `depth` negatives.

    Args:
        batch_size: queries of all workers together; what is left at the end of an epoch starts the next one.
        num_negatives: negatives of each query; drawn again at every visit, repeated where a query has fewer.
        depth: negatives are drawn from the first (hardest) so many; None: from all.

    Where negatives are asked for, a query without any (the miner says how many there are) is left out. Raises
    `ConfigError` when none is left.
    """

    def __init__(
        self, examples: ExampleSet, *, batch_size: int, num_negatives: int, seed: int, depth: int | None = None
    ) -> None:
        self._examples, self._batch_size, self._num_negatives = examples, batch_size, num_negatives
        self._seed, self._depth = seed, depth
        self._rows = [row for row in range(len(examples)) if not num_negatives or len(examples.negatives(row))]
        if not self._rows:
            raise ConfigError(
                f"none of the {len(examples)} queries has negatives to draw {num_negatives} from: mine some (`raydr "
                "mine`), with weaker filters where these left none, or train with in-batch negatives alone "
                "(num_negatives: 0)"
            )

    def __iter__(self) -> Iterator[list[Group]]:
        rng = np.random.default_rng(self._seed)
        batch: list[Group] = []
        while True:
            for place in rng.permutation(len(self._rows)):
                batch.append(self.group(self._rows[place], rng))
                if len(batch) == self._batch_size:
                    yield batch
                    batch = []

    def group(self, row: int, rng: np.random.Generator) -> Group:
        """The query `row` with what is drawn for it; a method may add to it."""
        positive = int(rng.choice(self._examples.positives(row)))
        pool = self._examples.negatives(row)[: self._depth]
        return Group(row, (positive, *draw(pool, self._num_negatives, rng)))


class ScoredBatches(RandomBatches):
    """Random groups that carry the ranker's scores."""

    def __init__(self, examples: ExampleSet, *, scores: Path, **settings: Any) -> None:
        super().__init__(examples, **settings)
        self._scores = [
            dict(zip([*examples.positives(row), *examples.negatives(row)], own, strict=True))
            for row, own in enumerate(open_scores(scores, examples))
        ]

    def group(self, row: int, rng: np.random.Generator) -> Group:
        group = super().group(row, rng)
        return group._replace(teacher_scores=tuple(float(self._scores[row][p]) for p in group.passages))


def draw(pool: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """`count` of `pool`, uniformly and without repetition where it is large enough; whole rounds of it where not."""
    if not count:
        return []
    rounds, rest = divmod(count, len(pool))
    return [*(int(row) for row in np.tile(pool, rounds)), *(int(row) for row in rng.choice(pool, rest, replace=False))]


def share(batch: list[Group], worker_rank: int, num_workers: int) -> list[Group]:
    """The groups of one worker: consecutive ones, the same number for each."""
    size = len(batch) // num_workers
    return batch[worker_rank * size : (worker_rank + 1) * size]
