"""Batches of random groups: every query once an epoch, negatives drawn again, the same for the same seed."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from raydr.data.examples import Example, write_examples
from raydr.errors import ConfigError
from raydr.train.sampling import BatchSampler, RandomBatches, draw, share
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
