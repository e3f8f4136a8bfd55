"""How the network is prepared for training, apart from DeepSpeed (whose results test_parity.py compares)."""

from __future__ import annotations

import torch

from raydr.train.engine import _Attention
from tests.train.tiny import tiny_network


def test_short_texts_are_attended_to_by_plain_products_and_long_ones_as_before():
    network = tiny_network().eval()
    attention = _Attention(network)
    ids, mask = torch.randint(5, 40, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    fused = network(ids, mask)
    attention.choose(192)
    assert network.transformer.config._attn_implementation == "eager"
    torch.testing.assert_close(network(ids, mask), fused, atol=1e-6, rtol=0)
    attention.choose(193)
    assert network.transformer.config._attn_implementation == "sdpa"
    assert torch.equal(network(ids, mask), fused)


def test_what_was_chosen_for_a_network_stays():
    """Another attention than PyTorch's fused one was somebody's choice, and a network may have none at all."""
    network = tiny_network()
    network.transformer.set_attn_implementation("eager")
    attention = _Attention(network)
    for num_tokens in (8, 1000):
        attention.choose(num_tokens)
        assert network.transformer.config._attn_implementation == "eager"
    plain = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    _Attention(plain).choose(8)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
