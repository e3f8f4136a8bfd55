"""Which examples make a batch: the groups of every step, decided by ids and a seed alone.

Notable: a sampler is a function of (examples, seed), so every worker runs the same one and takes its own share: nothing
is sent, no example is given twice, and a resumed run replays the ids up to its step and goes on exactly. Nothing after
the sampler shuffles, so a batch that a method composed (one topic, one task, spread margins) stays as it is.

    for batch in RandomBatches(examples, batch_size=32, num_negatives=7, seed=0): ...      # list[Group], for ever
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from raydr.data.examples import ExampleSet
from raydr.errors import ConfigError
from raydr.stages.modality import LOW_RANK, WRONG_MODALITY
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
    """Every query once an epoch (or as often as its copies say) in random order, with a random positive and random ones
    of its first `depth` negatives.

    Args:
        batch_size: queries of all workers together; what is left at the end of an epoch starts the next one.
        num_negatives: negatives of each query; drawn again at every visit, repeated where a query has fewer.
        depth: negatives are drawn from the first (hardest) so many; None: from all.
        only_tasks: only queries of these tasks are given; None: of all, and those that have none.
        without_tasks: queries of these tasks are not given.

    Where negatives are asked for, a query without any (the miner says how many there are) is left out. Raises
    `ConfigError` when none is left, or a task is named that no query has.
    """

    def __init__(
        self,
        examples: ExampleSet,
        *,
        batch_size: int,
        num_negatives: int,
        seed: int,
        depth: int | None = None,
        only_tasks: Collection[str] | None = None,
        without_tasks: Collection[str] = (),
    ) -> None:
        self._examples, self._batch_size, self._num_negatives = examples, batch_size, num_negatives
        self._seed, self._depth = seed, depth
        asked = _of_tasks(examples, only_tasks, without_tasks)
        fit = [row for row in asked if not num_negatives or len(examples.negatives(row))]
        self._rows = [row for row in fit for _ in range(examples.copies(row))]
        if not self._rows:
            raise ConfigError(
                f"none of the {len(asked)} queries has negatives to draw {num_negatives} from: mine some (`raydr "
                "mine`), with weaker filters where these left none, or train with in-batch negatives alone "
                "(num_negatives: 0)"
            )

    def __iter__(self) -> Iterator[list[Group]]:
        rng = np.random.default_rng(self._seed)
        rows = shuffled(self._rows, rng)
        while True:
            yield [self.group(next(rows), rng) for _ in range(self._batch_size)]

    def group(self, row: int, rng: np.random.Generator) -> Group:
        """The query `row` with what is drawn for it; a method may add to it."""
        positive = int(rng.choice(self._examples.positives(row)))
        group = Group(row, (positive, *self.negatives(row, rng)))
        if not self._examples.has_instructions:
            return group
        return group._replace(wording=int(rng.integers(2**31)))

    def negatives(self, row: int, rng: np.random.Generator) -> list[int]:
        """The negatives that one visit of the query `row` draws."""
        return draw(self._examples.negatives(row)[: self._depth], self._num_negatives, rng)


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


class ModalityBatches(RandomBatches):
    """Random groups with negatives of modality-aware mining: each one, at each visit, is of the wrong modality with
    the probability `wrong_modality_share`, otherwise of low rank; of the other kind where a query has none of the one,
    and any of its negatives (drawn at random, or mined in another way) where it has neither.
    """

    def __init__(
        self,
        examples: ExampleSet,
        *,
        batch_size: int,
        seed: int,
        num_negatives: int = 1,
        wrong_modality_share: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(examples, batch_size=batch_size, num_negatives=num_negatives, seed=seed, **settings)
        self._share = wrong_modality_share

    def negatives(self, row: int, rng: np.random.Generator) -> list[int]:
        wrong, low = (self._examples.negatives_from(row, kind)[: self._depth] for kind in (WRONG_MODALITY, LOW_RANK))
        num_wrong = int((rng.random(self._num_negatives) < self._share).sum())
        if not len(wrong) and not len(low):
            return super().negatives(row, rng)
        if not len(wrong) or not len(low):
            num_wrong = self._num_negatives if len(wrong) else 0
        return [*draw(wrong, num_wrong, rng), *draw(low, self._num_negatives - num_wrong, rng)]


class HomogeneousBatches(ModalityBatches):
    """Batches of one task each, so that the other queries' passages are of its kind; tasks as often as they have
    queries. In each task every query comes once in a round of its own; a batch may end one and begin the next.

    Args:
        joined_tasks: sets of tasks that share batches; a task in none of them has batches of its own, and so have,
            together, the queries that have no task.

    Groups carry the number of their task (or set of tasks) as their cluster. Negatives are those of `ModalityBatches`.
    """

    def __init__(self, examples: ExampleSet, *, joined_tasks: Sequence[Collection[str]] = (), **settings: Any) -> None:
        super().__init__(examples, **settings)
        label = {task: number for number, tasks in enumerate(joined_tasks) for task in tasks}
        rows: dict[int | str, list[int]] = {}
        for row in self._rows:
            task = examples.task(row) or ""
            rows.setdefault(label.get(task, task), []).append(row)
        self._tasks = list(rows.values())

    def __iter__(self) -> Iterator[list[Group]]:
        rng = np.random.default_rng(self._seed)
        rows = [shuffled(own, rng) for own in self._tasks]
        sizes = np.array([len(own) for own in self._tasks])
        while True:
            number = int(rng.choice(len(rows), p=sizes / sizes.sum()))
            groups = (self.group(next(rows[number]), rng) for _ in range(self._batch_size))
            yield [group._replace(cluster=number) for group in groups]


def shuffled(rows: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
    """All rows in random order, then all of them in another, without end."""
    while True:
        for place in rng.permutation(len(rows)):
            yield rows[place]


def draw(pool: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """`count` of `pool`, uniformly and without repetition where it is large enough; whole rounds of it where not."""
    if not count:
        return []
    rounds, rest = divmod(count, len(pool))
    return [*pool.tolist() * rounds, *rng.choice(pool, rest, replace=False).tolist()]


def _of_tasks(examples: ExampleSet, only: Collection[str] | None, without: Collection[str]) -> list[int]:
    """The rows of the queries that are to be given, by their tasks."""
    rows = list(range(len(examples)))
    if only is None and not without:
        return rows
    tasks = [examples.task(row) for row in rows]
    if unknown := {*(only or ()), *without} - set(tasks):
        there = sorted(task for task in set(tasks) if task)
        raise ConfigError(
            f"no query has the task {min(unknown)!r}; "
            + (f"the tasks are {', '.join(there)}" if there else "the examples have no tasks")
        )
    return [row for row in rows if (only is None or tasks[row] in only) and tasks[row] not in without]


def share(batch: list[Group], worker_rank: int, num_workers: int) -> list[Group]:
    """The groups of one worker: consecutive ones, the same number for each."""
    size = len(batch) // num_workers
    return batch[worker_rank * size : (worker_rank + 1) * size]
