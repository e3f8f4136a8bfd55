"""Negatives of two kinds in equal shares, and batches of one task: what the samplers of multimodal training draw."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raydr.artifacts import write_artifact
from raydr.data.examples import QUERIES, Example, ExampleSet, write_examples
from raydr.errors import ConfigError
from raydr.train.sampling import BatchSampler, HomogeneousBatches, ModalityBatches, RandomBatches
from raydr.types import TASK, Passage, Query

WRONG, LOW = "wrong_modality", "low_rank"
PASSAGES = {f"p{n}": Passage(f"p{n}", f"text {n}") for n in range(12)}
TASKS = {"cirr": 20, "webqa": 60, "nights": 15, None: 5}


def written(folder: Path, examples: list[Example], tasks: list[str | None] | None = None) -> ExampleSet:
    with write_artifact(folder, kind="examples", config={}) as writer:
        writer.counts.update(write_examples(writer.path, examples, PASSAGES))
        if tasks is not None:
            file = writer.path / QUERIES
            table = pa.ipc.open_file(pa.py_buffer(file.read_bytes())).read_all()
            table = table.append_column(TASK, pa.array(tasks, pa.string()))
            with pa.ipc.new_file(str(file), table.schema) as stream:
                stream.write_table(table)
    return ExampleSet.open(folder)


def example(number: int, sources: list[str]) -> Example:
    """Its positive is p0, its negatives p1, p2, ... are from `sources`."""
    return Example(
        Query(f"q{number}", "x"), ["p0"], [f"p{n + 1}" for n in range(len(sources))], negative_sources=sources
    )


@pytest.fixture(scope="module")
def of_two_kinds(tmp_path_factory):
    sources = [[WRONG, WRONG, WRONG, LOW], [WRONG, LOW, LOW], [WRONG, WRONG], [LOW], ["random", "random"], ["model"]]
    folder = tmp_path_factory.mktemp("kinds") / "examples"
    return written(folder, [example(number, own) for number, own in enumerate(sources)])


def drawn(examples, sampler, num_groups):
    """Of each query, how often a negative of each source was drawn."""
    batches = islice(sampler, num_groups // len(next(iter(sampler))))
    counts: dict[int, Counter[str]] = {}
    for group in (group for batch in batches for group in batch):
        source = dict(
            zip(examples.negatives(group.query).tolist(), examples.negative_sources(group.query), strict=True)
        )
        assert group.passages[0] in examples.positives(group.query)
        counts.setdefault(group.query, Counter()).update(source[row] for row in group.passages[1:])
    return counts


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_both_kinds_in_their_shares_whatever_their_numbers(of_two_kinds, share):
    sampler = ModalityBatches(of_two_kinds, batch_size=6, seed=1, wrong_modality_share=share)
    counts = drawn(of_two_kinds, sampler, 60_000)
    for query in (0, 1):
        num = counts[query].total()
        assert num == 10_000
        assert abs(counts[query][WRONG] - share * num) < 3 * (num * share * (1 - share)) ** 0.5
    assert counts[2] == {WRONG: 10_000}, "the other kind where one is empty"
    assert counts[3] == {LOW: 10_000}
    assert counts[4] == {"random": 10_000}, "and what there is where both are"
    assert counts[5] == {"model": 10_000}


def test_each_negative_of_a_kind_as_often(of_two_kinds):
    sampler = ModalityBatches(of_two_kinds, batch_size=6, seed=2)
    rows = Counter(g.passages[1] for batch in islice(sampler, 6000) for g in batch if g.query == 0)
    wrong = of_two_kinds.negatives_from(0, WRONG).tolist()
    num = sum(rows[row] for row in wrong)
    assert all(abs(rows[row] - num / 3) < 4 * (num * 2 / 9) ** 0.5 for row in wrong)


def test_several_negatives_of_a_query(of_two_kinds):
    sampler = ModalityBatches(of_two_kinds, batch_size=2, seed=0, num_negatives=4)
    groups = [group for batch in islice(sampler, 300) for group in batch]
    assert {len(group.passages) for group in groups} == {5}
    kinds = Counter(
        row in of_two_kinds.negatives_from(0, WRONG)
        for group in groups
        if group.query == 0
        for row in group.passages[1:]
    )
    assert abs(kinds[True] - kinds.total() / 2) < 4 * (kinds.total() / 4) ** 0.5


def test_negatives_by_their_source(of_two_kinds):
    ids = of_two_kinds.passage_ids
    assert [ids[row] for row in of_two_kinds.negatives_from(1, LOW)] == ["p2", "p3"]
    assert len(of_two_kinds.negatives_from(1, "bm25")) == 0


def test_negatives_of_nobody_knows_where_are_drawn_as_they_are(tmp_path):
    examples = written(tmp_path / "out", [Example(Query("q", "x"), ["p0"], ["p1", "p2"])])
    assert len(examples.negatives_from(0, WRONG)) == 0
    groups = [batch[0] for batch in islice(ModalityBatches(examples, batch_size=1, seed=0), 50)]
    assert {group.passages[1] for group in groups} == set(examples.negatives(0).tolist())


@pytest.fixture(scope="module")
def of_tasks(tmp_path_factory):
    tasks = [task for task, number in TASKS.items() for _ in range(number)]
    folder = tmp_path_factory.mktemp("tasks") / "examples"
    order = np.random.default_rng(0).permutation(len(tasks))
    return written(folder, [example(n, [WRONG, LOW]) for n in range(len(tasks))], [tasks[place] for place in order])


def test_a_batch_is_of_one_task_and_tasks_come_as_often_as_they_have_queries(of_tasks):
    sampler = HomogeneousBatches(of_tasks, batch_size=4, seed=3)
    assert isinstance(sampler, BatchSampler)
    batches = list(islice(sampler, 5000))
    assert {len(batch) for batch in batches} == {4}
    of_batch = Counter()
    for batch in batches:
        (task,) = {of_tasks.task(group.query) for group in batch}
        (_,) = {group.cluster for group in batch}
        assert batch[0].cluster >= 0
        of_batch[task] += 1
    for task, number in TASKS.items():
        share = number / 100
        assert abs(of_batch[task] - 5000 * share) < 4 * (5000 * share * (1 - share)) ** 0.5
    visits = Counter(group.query for batch in batches for group in batch)
    for task, number in TASKS.items():
        own = [visits[row] for row in range(len(of_tasks)) if of_tasks.task(row) == task]
        assert len(own) == number
        assert max(own) - min(own) <= 1, "every query once in a round of its task"


def test_joined_tasks_share_batches(of_tasks):
    sampler = HomogeneousBatches(of_tasks, batch_size=8, seed=0, joined_tasks=[["cirr", "nights"]])
    seen = {frozenset(of_tasks.task(group.query) for group in batch) for batch in islice(sampler, 300)}
    assert frozenset({"cirr", "nights"}) in seen
    assert seen <= {frozenset(own) for own in ({"cirr", "nights"}, {"cirr"}, {"nights"}, {"webqa"}, {None})}


def test_the_seed_decides_and_a_resumed_run_goes_on(of_tasks):
    def batches(first, last, seed=5):
        return list(islice(HomogeneousBatches(of_tasks, batch_size=4, seed=seed), first, last))

    assert batches(0, 90) == batches(0, 40) + batches(40, 90)
    assert batches(0, 20) != batches(0, 20, seed=6)


@pytest.mark.parametrize("kind", [RandomBatches, ModalityBatches, HomogeneousBatches])
def test_some_tasks_only(of_tasks, kind):
    def tasks(**settings):
        sampler = kind(of_tasks, batch_size=5, seed=0, num_negatives=1, **settings)
        return {of_tasks.task(group.query) for batch in islice(sampler, 60) for group in batch}

    assert tasks() == {"cirr", "webqa", "nights", None}
    assert tasks(only_tasks=["cirr", "nights"]) == {"cirr", "nights"}
    assert tasks(without_tasks={"webqa"}) == {"cirr", "nights", None}
    assert tasks(only_tasks=["cirr", "nights"], without_tasks=["cirr"]) == {"nights"}
    with pytest.raises(ConfigError, match="no query has the task 'CIRR'; the tasks are cirr, nights, webqa"):
        tasks(without_tasks=["CIRR"])


def test_tasks_of_examples_that_have_none(of_two_kinds):
    with pytest.raises(ConfigError, match="no query has the task 'cirr'; the examples have no tasks"):
        RandomBatches(of_two_kinds, batch_size=1, seed=0, num_negatives=1, only_tasks=["cirr"])
    first = next(iter(HomogeneousBatches(of_two_kinds, batch_size=6, seed=0)))
    assert {group.query for group in first} == set(range(6)), "they make one task together"
