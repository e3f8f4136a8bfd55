"""Batches of random groups: every query once an epoch, negatives drawn again, the same for the same seed."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from raydr.artifacts import write_artifact
from raydr.data.examples import Example, ExampleSet, QueryLabels, write_examples
from raydr.errors import ConfigError
from raydr.train.sampling import BatchSampler, Group, RandomBatches, draw, share
from raydr.types import Passage, Query
from tests.train.tiny import write_topic_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("sampling") / "examples")


def test_every_query_once_an_epoch(examples):
    sampler = RandomBatches(examples, batch_size=5, num_negatives=2, seed=1)
    assert isinstance(sampler, BatchSampler)
    groups = [group for batch in islice(sampler, 2 * len(examples) // 5) for group in batch]
    counts = Counter(group.query for group in groups)
    assert set(counts.values()) <= {1, 2}
    assert len(counts) == len(examples)
    first_epoch = groups[: len(examples) // 5 * 5]
    assert len({group.query for group in first_epoch}) == len(first_epoch)
    for group in groups:
        assert group.passages[0] in examples.positives(group.query)
        assert set(group.passages[1:]) <= set(examples.negatives(group.query).tolist())


def test_the_seed_decides(examples):
    def first(seed):
        return list(islice(RandomBatches(examples, batch_size=4, num_negatives=2, seed=seed), 12))

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_depth_limits_the_pool(examples):
    sampler = RandomBatches(examples, batch_size=4, num_negatives=1, seed=0, depth=2)
    for batch in islice(sampler, 40):
        for group in batch:
            assert group.passages[1] in examples.negatives(group.query)[:2]


def test_shares_make_up_the_batch(examples):
    batch = next(iter(RandomBatches(examples, batch_size=12, num_negatives=1, seed=0)))
    parts = [share(batch, rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert [group for part in parts for group in part] == batch


def test_draw_repeats_only_where_it_must():
    rng = np.random.default_rng(0)
    pool = np.array([3, 5, 8])
    assert sorted(draw(pool, 3, rng)) == [3, 5, 8]
    assert Counter(draw(pool, 7, rng)).most_common()[0][1] == 3
    assert draw(pool, 0, rng) == []


def test_queries_without_negatives_are_left_out(tmp_path):
    """Not even random ones may be left by a strict filter; one such query must not end hours of training."""
    from raydr.artifacts import write_artifact
    from raydr.data.examples import ExampleSet
    from raydr.types import Passage, Query

    passages = {name: Passage(name, name) for name in ("d1", "d2")}
    for name, negatives in (("bare", []), ("mixed", ["d2"])):
        with write_artifact(tmp_path / name, kind="examples", config={}) as writer:
            examples = [Example(Query("q7", "x"), ["d1"]), Example(Query("q8", "y"), ["d1"], negatives)]
            write_examples(writer.path, examples, passages)
    bare, mixed = (ExampleSet.open(tmp_path / name) for name in ("bare", "mixed"))
    with pytest.raises(ConfigError, match="none of the 2 queries has negatives to draw 3 from.*raydr mine"):
        RandomBatches(bare, batch_size=1, num_negatives=3, seed=0)
    batches = islice(RandomBatches(mixed, batch_size=1, num_negatives=3, seed=0), 6)
    assert {group.query for batch in batches for group in batch} == {1}
    batches = islice(RandomBatches(bare, batch_size=1, num_negatives=0, seed=0), 6)
    assert {group.query for batch in batches for group in batch} == {0, 1}


def labelled(folder, *, copies=None, instructions=None):
    """Six queries with two positives and three negatives each."""
    passages = {f"p{n}": Passage(f"p{n}", f"text {n}") for n in range(30)}
    rows = [[f"p{5 * n + i}" for i in range(5)] for n in range(6)]
    examples = [Example(Query(f"q{n}", f"query {n}"), own[:2], own[2:]) for n, own in enumerate(rows)]
    labels = QueryLabels(copies=copies or {}, instructions=instructions or {})
    with write_artifact(folder, kind="examples", config={}):
        write_examples(folder, examples, passages, labels=labels)
    return ExampleSet.open(folder)


def sequence(examples, num, **settings):
    sampler = RandomBatches(examples, **{"batch_size": 3, "num_negatives": 1, "seed": 5, **settings})
    return [group for batch in islice(sampler, num) for group in batch]


def test_copies_say_how_often_an_epoch_shows_a_query(tmp_path):
    examples = labelled(tmp_path / "examples", copies={"q1": 4, "q3": 3, "q5": 1})
    groups = sequence(examples, 8)
    for epoch in (groups[:11], groups[11:22]):
        assert Counter(group.query for group in epoch) == {0: 1, 1: 4, 2: 1, 3: 3, 4: 1, 5: 1}
    assert len({group.passages for group in groups if group.query == 1}) > 1, "each visit draws again"


def test_wordings_are_drawn_only_where_there_are_instructions(tmp_path):
    """Sequences of sets without stay what they were."""
    plain, worded = labelled(tmp_path / "plain"), labelled(tmp_path / "worded", instructions={"q1": ["a", "b", "c"]})
    groups = sequence(worded, 60)
    assert {group.wording % 3 for group in groups if group.query == 1} == {0, 1, 2}
    assert {group.wording for group in sequence(plain, 60)} == {0}
    rng = np.random.default_rng(5)
    order = [int(place) for place in rng.permutation(6)]
    expected = []
    for row in order[:3]:
        positive = int(rng.choice(plain.positives(row)))
        expected.append(Group(row, (positive, *draw(plain.negatives(row), 1, rng))))
    assert sequence(plain, 1) == expected
