"""Negatives of two kinds in equal shares, and batches of one task: what the samplers of multimodal training draw."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from raydr.artifacts import write_artifact
from raydr.data.examples import Example, ExampleSet, ExampleWriter, QueryLabels, passage_table
from raydr.errors import ConfigError
from raydr.train.sampling import BatchSampler, HomogeneousBatches, ModalityBatches, RandomBatches
from raydr.types import Passage, Query

WRONG, LOW = "wrong_modality", "low_rank"
PASSAGES = {f"p{n}": Passage(f"p{n}", f"text {n}") for n in range(12)}
TASKS = {"cirr": 20, "webqa": 60, "nights": 15, None: 5}


def written(folder: Path, examples: list[Example], labels: QueryLabels | None = None) -> ExampleSet:
    with write_artifact(folder, kind="examples", config={}), ExampleWriter(folder, labels=labels) as writer:
        writer.add(examples, passage_table(list(PASSAGES.values())))
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


def drawn(examples, sampler, query, num):
    """How often each of the query's negatives is drawn in so many visits, by its source and its row."""
    sources = dict(zip(examples.negatives(query).tolist(), examples.negative_sources(query), strict=True))
    rng = np.random.default_rng(7)
    rows = Counter(sampler.group(query, rng).passages[1] for _ in range(num))
    kinds = Counter()
    for row, count in rows.items():
        kinds[sources[row]] += count
    return kinds, rows


def test_both_kinds_as_often_whatever_their_numbers(of_two_kinds):
    """The paper's rule: 1:1 within three sigma over ten thousand draws, though there are three of the one kind."""
    kinds, rows = drawn(of_two_kinds, ModalityBatches(of_two_kinds, batch_size=6, seed=1), 0, 10_000)
    assert set(kinds) == {WRONG, LOW}
    assert abs(kinds[WRONG] - 5000) < 3 * 2500**0.5
    for row in of_two_kinds.negatives_from(0, WRONG).tolist():
        assert abs(rows[row] - kinds[WRONG] / 3) < 4 * (kinds[WRONG] * 2 / 9) ** 0.5


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_share_is_a_setting(of_two_kinds, share):
    sampler = ModalityBatches(of_two_kinds, batch_size=6, seed=1, wrong_modality_share=share)
    kinds, _ = drawn(of_two_kinds, sampler, 1, 2000)
    assert abs(kinds[WRONG] - 2000 * share) <= 3 * (2000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("query", "source"), [(2, WRONG), (3, LOW), (4, "random"), (5, "model")])
def test_the_other_kind_where_one_is_empty_and_what_there_is_where_both_are(of_two_kinds, query, source):
    kinds, rows = drawn(of_two_kinds, ModalityBatches(of_two_kinds, batch_size=6, seed=1), query, 60)
    assert kinds == {source: 60}
    assert set(rows) == set(of_two_kinds.negatives(query).tolist())


def test_several_negatives_of_a_query(of_two_kinds):
    sampler = ModalityBatches(of_two_kinds, batch_size=2, seed=0, num_negatives=4)
    groups = [group for batch in islice(sampler, 200) for group in batch]
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
    names = [task for task, number in TASKS.items() for _ in range(number)]
    order = np.random.default_rng(0).permutation(len(names))
    tasks = {f"q{n}": names[place] for n, place in enumerate(order) if names[place] is not None}
    folder = tmp_path_factory.mktemp("tasks") / "examples"
    return written(folder, [example(n, [WRONG, LOW]) for n in range(len(names))], QueryLabels(tasks=tasks))


def test_a_batch_is_of_one_task_and_tasks_come_as_often_as_they_have_queries(of_tasks):
    sampler = HomogeneousBatches(of_tasks, batch_size=2, seed=3)
    assert isinstance(sampler, BatchSampler)
    batches = list(islice(sampler, 2000))
    assert {len(batch) for batch in batches} == {2}
    of_batch = Counter()
    for batch in batches:
        (task,) = {of_tasks.task(group.query) for group in batch}
        (_,) = {group.cluster for group in batch}
        assert batch[0].cluster >= 0
        of_batch[task] += 1
    for task, number in TASKS.items():
        share = number / 100
        assert abs(of_batch[task] - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    visits = Counter(group.query for batch in batches for group in batch)
    for task, number in TASKS.items():
        own = [visits[row] for row in range(len(of_tasks)) if of_tasks.task(row) == task]
        assert len(own) == number
        assert max(own) - min(own) <= 1, "every query once in a round of its task"


def test_copies_count_as_rows_and_wordings_are_drawn(tmp_path):
    """A task is drawn as often as an epoch shows its queries; each visit is given with a wording of its own."""
    labels = QueryLabels(
        tasks={"q0": "few", "q1": "many"}, copies={"q0": 3}, instructions={"q0": ["a", "b"], "q1": ["c", "d"]}
    )
    examples = written(tmp_path / "out", [example(0, [WRONG]), example(1, [LOW])], labels)
    groups = [batch[0] for batch in islice(HomogeneousBatches(examples, batch_size=1, seed=0), 800)]
    visits = Counter(group.query for group in groups)
    assert abs(visits[0] - 600) < 4 * (800 * 3 / 16) ** 0.5
    wordings = Counter(group.wording % 2 for group in groups)
    assert abs(wordings[0] - 400) < 4 * 200**0.5


def test_joined_tasks_share_batches(of_tasks):
    sampler = HomogeneousBatches(of_tasks, batch_size=8, seed=0, joined_tasks=[["cirr", "nights"]])
    seen = {frozenset(of_tasks.task(group.query) for group in batch) for batch in islice(sampler, 80)}
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
        return {of_tasks.task(group.query) for batch in islice(sampler, 40) for group in batch}

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
