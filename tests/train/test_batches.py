"""From groups to tensors: the texts of the groups, the labels of the groups; on Ray Data as in this process."""

import time
from itertools import chain

import pytest
import torch

from raydr.encoders.text import TextEncoder, TextEncoderConfig
from raydr.train.batches import BatchTokenizer, stream
from raydr.train.sampling import RandomBatches
from tests.train.tiny import write_topic_examples


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("batches") / "examples")


TOKENIZER = BatchTokenizer(TextEncoderConfig(max_passage_tokens=16, query_prompt="query: "))


def batches(examples, *, first=0, last=6, rank=0, workers=1, **options):
    sampler = RandomBatches(examples, batch_size=4, num_negatives=2, seed=0)
    options = {"on_ray": False, **options}
    return list(
        stream(sampler, TOKENIZER, examples, first=first, last=last, worker_rank=rank, num_workers=workers, **options)
    )


def same(left, right) -> bool:
    tensors = lambda batch: [*batch.queries.inputs, *batch.passages.inputs, *vars(batch.labels).values()]  # noqa: E731
    pairs = zip(tensors(left), tensors(right), strict=True)
    return left.names == right.names and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
    )


def test_a_batch_holds_the_texts_of_its_groups(examples):
    sampler = RandomBatches(examples, batch_size=4, num_negatives=2, seed=0)
    encoder = TextEncoder(TOKENIZER.config)
    for groups, batch in zip(sampler, batches(examples), strict=False):
        passages = examples.passages(chain.from_iterable(group.passages for group in groups))
        expected = encoder.tokenize_passages(passages)
        found = [ids[:length].tolist() for ids, length in zip(batch.passages.ids, batch.passages.lengths.tolist())]
        assert found == expected
        assert batch.names == [examples.query(group.query).query_id for group in groups]
        assert batch.labels.group_size == 3
        assert batch.labels.positives[torch.arange(4), batch.labels.own_positive].all()
        for row, group in enumerate(groups):
            relevant = set(examples.relevant(group.query).tolist())
            marked = {
                int(r) for r, is_positive in zip(batch.labels.passage_rows, batch.labels.positives[row]) if is_positive
            }
            assert marked == relevant & set(batch.labels.passage_rows.tolist())


def test_widths_can_be_rounded_up_and_the_texts_stay(examples):
    for plain, rounded in zip(batches(examples), batches(examples, multiple_of=8), strict=True):
        for name in ("queries", "passages"):
            own, wide = getattr(plain, name), getattr(rounded, name)
            assert wide.ids.shape[1] == -(-own.ids.shape[1] // 8) * 8
            assert torch.equal(wide.lengths, own.lengths)
            assert torch.equal(wide.ids[:, : own.ids.shape[1]], own.ids)
            assert not (wide.mask is None and wide.ids.shape[1] > own.ids.shape[1])


def test_workers_share_a_batch_and_nobody_is_fed_twice(examples):
    whole = batches(examples)
    parts = [batches(examples, rank=rank, workers=2) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert batch.names == [*parts[0][number].names, *parts[1][number].names]


def test_a_resumed_stream_goes_on_exactly(examples):
    whole, rest = batches(examples), batches(examples, first=3)
    assert len(rest) == 3
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.ray
@pytest.mark.slow
def test_ray_data_gives_the_same_in_the_same_order(ray_cluster, examples):
    here, there = batches(examples, last=40), batches(examples, last=40, on_ray=True)
    assert len(there) == 40
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


def test_a_stream_that_waits_for_the_training_leaves_it_the_processor(ray_cluster, examples, monkeypatch):
    """With a core of its own, and half of Python's lock, Ray Data's loop would take half of a training on two cores."""
    from ray.data import DataContext

    from raydr.train import batches as module

    limited = DataContext.get_current().copy()
    limited.execution_options.resource_limits = limited.execution_options.resource_limits.copy(object_store_memory=1)
    monkeypatch.setattr(module, "_BATCHES_PER_BLOCK", 1)
    sampler = RandomBatches(examples, batch_size=4, num_negatives=2, seed=0)
    with DataContext.current(limited):
        rows = stream(sampler, TOKENIZER, examples, first=0, last=60, worker_rank=0, num_workers=1)
        assert next(rows).labels.group_size == 3
        used = []
        for _ in range(3):
            before = time.process_time()
            time.sleep(1)  # a step of training
            used.append(time.process_time() - before)
        assert sum(1 for _ in rows) == 59
    assert min(used) < 0.2
