"""Pooling: padding never shows in an embedding."""

import pytest
import torch

from raydr.models.dual_encoder import DualEncoder
from raydr.models.pooling import pool

HIDDEN = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[2.0, 4.0], [3.0, 1.0]]),
        ("cls", [[1.0, 2.0], [1.0, 0.0]]),
        ("last", [[3.0, 6.0], [6.0, 3.0]]),
    ],
)
def test_hand_worked(pooling, expected):
    assert pool(HIDDEN, MASK, pooling).tolist() == expected


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_no_mask_is_a_mask_of_ones(pooling):
    torch.testing.assert_close(pool(HIDDEN, None, pooling), pool(HIDDEN, torch.ones_like(MASK), pooling))


class Fixed(torch.nn.Module):
    """A transformer that gives known hidden states in half precision."""

    def forward(self, input_ids, attention_mask=None):
        class Output:
            last_hidden_state = HIDDEN.to(torch.bfloat16)

        return Output


def test_dimensions_are_cut_before_normalising_and_the_result_is_float32():
    ids = torch.zeros((2, 3), dtype=torch.int64)
    full = DualEncoder(Fixed(), pooling="mean", normalize=False)(ids, MASK)
    assert full.dtype == torch.float32
    assert full.tolist() == [[2.0, 4.0], [3.0, 1.0]]
    assert DualEncoder(Fixed(), pooling="mean", dimensions=1)(ids, MASK).tolist() == [[1.0], [1.0]]
    torch.testing.assert_close(
        DualEncoder(Fixed(), pooling="mean")(ids, MASK).norm(dim=1), torch.ones(2), atol=1e-6, rtol=0
    )
