"""Batching: the token budget holds, order is restored, and running out of memory makes batches smaller."""

import logging
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydr.encoders.token_batches import TokenBatcher, collate, is_out_of_memory, plan

LENGTHS = st.lists(st.integers(1, 60), max_size=80)


class Sums:
    """A backend whose embedding is (number of tokens, sum of ids), with a limit on what fits in memory."""

    def __init__(self, *, num_streams=1, capacity=None):
        self.num_streams = num_streams
        self.capacity = capacity
        self.sizes = []
        self.freed = 0

    def forward(self, input_ids, attention_mask):
        self.sizes.append(input_ids.size)
        if self.capacity is not None and input_ids.size > self.capacity:
            raise MemoryError
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        return np.stack([mask.sum(1), (input_ids * mask).sum(1)], axis=1).astype(np.float32)

    def free_memory(self):
        self.freed += 1


def texts_of(lengths):
    return [list(range(i, i + length)) for i, length in enumerate(lengths)]


def expected(token_ids):
    return np.array([[len(ids), sum(ids)] for ids in token_ids], dtype=np.float32).reshape(-1, 2)


@given(lengths=LENGTHS, budget=st.integers(1, 200))
def test_plan_covers_every_row_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=np.int64)
    batches = plan(lengths, budget)
    assert sorted(np.concatenate([*batches, np.array([], dtype=np.int64)])) == list(range(len(lengths)))
    assert all(len(rows) == 1 or lengths[rows].max() * len(rows) <= budget for rows in batches)


@given(lengths=LENGTHS, budget=st.integers(1, 200), num_streams=st.integers(1, 3))
def test_order_is_restored(lengths, budget, num_streams):
    batcher = TokenBatcher(Sums(num_streams=num_streams), dim=2, batch_tokens=budget, pad_id=7)
    token_ids = texts_of(lengths)
    np.testing.assert_array_equal(batcher.run(token_ids), expected(token_ids))
    assert batcher.stats.tokens == sum(lengths) <= batcher.stats.padded_tokens


def test_collate_pads_on_the_right_and_needs_no_mask_for_equal_lengths():
    ids, mask = collate([[5, 6], [7]], pad_id=1)
    assert ids.tolist() == [[5, 6], [7, 1]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert collate([[5, 6], [7, 8]], pad_id=1)[1] is None


@pytest.mark.parametrize("num_streams", [1, 2])
def test_backs_off_until_it_fits_and_remembers(num_streams, caplog):
    backend = Sums(num_streams=num_streams, capacity=100)
    batcher = TokenBatcher(backend, dim=2, batch_tokens=1000, pad_id=0)
    token_ids = texts_of([10] * 200)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(batcher.run(token_ids), expected(token_ids))
    assert 50 <= batcher.batch_tokens <= 100
    assert "out of memory on a batch of" in caplog.text
    assert backend.freed >= 1
    backend.sizes.clear()
    batcher.run(token_ids)
    assert max(backend.sizes) <= 100  # what did not fit once is not tried again


def test_one_text_that_does_not_fit_is_an_error():
    with pytest.raises(MemoryError):
        TokenBatcher(Sums(capacity=5), dim=2, batch_tokens=100, pad_id=0).run(texts_of([10, 3]))


def test_other_errors_are_not_taken_for_memory():
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_survives_a_real_lack_of_memory():
    """A process whose address space is capped encodes what does not fit as one batch."""
    program = textwrap.dedent(
        """
        import logging, resource, sys
        import numpy as np
        from raydr.encoders.text import TextEncoder
        from raydr.types import Passage

        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        passages = [Passage(str(i), "word " * 400) for i in range(48)]
        config = TextEncoder.Config(backend="torch", precision="float32", batch_tokens=100_000, num_threads=1)
        encoder = TextEncoder(config)
        encoder.encode_passages(passages[:2])
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, -1))
        embeddings = encoder.encode_passages(passages)
        assert embeddings.shape == (48, 384)
        assert np.allclose(embeddings, embeddings[0], atol=1e-5)
        print("tokens per batch", encoder._batcher.batch_tokens)
        """
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr
    assert "out of memory on a batch of" in result.stderr
    assert int(result.stdout.split()[-1]) < 100_000
