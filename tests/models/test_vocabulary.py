"""The vocabulary-space network: its formulas, its pooling, and gradients that are autograd's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raydr.models.tokens import Tokens
from raydr.models.towers import Towers
from raydr.models.vocabulary import VocabularyTower, bag_of_tokens, elu1p, highest_over_positions, top_mask

SHIFT, WORDS, TOPK = 10, 200, 16


def tower(*, seed: int = 0, **options: Any) -> VocabularyTower:
    """BERT of two layers of 32 over 200 words."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    made = VocabularyTower(BertModel(config, add_pooling_layer=False), shift=SHIFT, **options).eval()
    with torch.no_grad():  # untrained word embeddings are so small that every logit is near 0
        made.transformer.get_input_embeddings().weight.mul_(20)  # pyrefly: ignore
    return made


def texts(*lengths: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHIFT, WORDS, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids[:, 0] = 1  # a special token, which has no dimension
    return ids * mask, mask


def whole(network: VocabularyTower, ids: Tensor, mask: Tensor) -> Tensor:
    """The formula as it stands, with all logits at once."""
    hidden = network.norm(network.transformer(input_ids=ids, attention_mask=mask).last_hidden_state)
    logits = hidden @ network.transformer.get_input_embeddings().weight[SHIFT:].T  # pyrefly: ignore
    return elu1p(logits.masked_fill(mask[:, :, None] == 0, float("-inf"))).amax(dim=1)


def test_elu1p():
    values = torch.tensor([-2.0, 0.0, 1.5, -40.0], requires_grad=True)
    torch.testing.assert_close(elu1p(values), torch.tensor([math.exp(-2), 1.0, 2.5, math.exp(-40)]))
    elu1p(values).sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([math.exp(-2), 1.0, 1.0, math.exp(-40)]))
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert (elu1p(logits) > 0).all()
    assert torch.equal(elu1p(logits.amax(dim=0)), elu1p(logits).amax(dim=0))


@pytest.mark.parametrize("max_logits", [1, 3 * 190 * 4, 10**6])
def test_weights_and_gradients_are_those_of_all_logits_at_once(max_logits):
    network = tower(max_logits=max_logits)
    ids, mask = texts(3, 12, 7)
    upstream = torch.randn(3, WORDS - SHIFT, generator=torch.Generator().manual_seed(2))
    found: dict[str, dict[str, Tensor]] = {}
    for name, forward in (("chunks", network), ("whole", lambda i, m: whole(network, i, m))):
        network.zero_grad()
        weights = forward(ids, mask)
        (weights * upstream).sum().backward()
        found[name] = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        found[name]["weights"] = weights.detach()
    assert (found["chunks"]["weights"] > 0).all()
    assert found["chunks"].keys() == found["whole"].keys()
    for name, value in found["whole"].items():
        torch.testing.assert_close(found["chunks"][name], value, atol=1e-4, rtol=1e-4, msg=name)
    tied = found["chunks"]["transformer.embeddings.word_embeddings.weight"]
    assert tied[SHIFT:].abs().sum() > 0
    assert found["chunks"]["norm.weight"].abs().sum() > 0


@pytest.mark.parametrize("max_logits", [1, 50, 130, 10**6])
def test_the_highest_is_looked_for_wherever_the_mask_is_1(max_logits):
    """Padding on the left, gaps, a text of which nothing counts, and texts of very different lengths."""
    generator = torch.Generator().manual_seed(3)
    hidden, words = torch.randn(7, 9, 4, generator=generator), torch.randn(13, 4, generator=generator)
    mask = torch.zeros(7, 9, dtype=torch.long)
    mask[0, 6:], mask[1, ::2], mask[2, :2], mask[4], mask[5, 0], mask[6, 8] = 1, 1, 1, 1, 1, 1
    found, wanted = [], []
    for results, highest in (
        (found, lambda h, w: highest_over_positions(h, w, mask, max_logits=max_logits)),
        (wanted, lambda h, w: (h @ w.T).masked_fill(mask[:, :, None] == 0, float("-inf")).amax(dim=1)),
    ):
        own = hidden.clone().requires_grad_(), words.clone().requires_grad_()
        best = highest(*own)
        (best.sigmoid() * torch.arange(13)).sum().backward()
        results += [best.detach(), *(value.grad for value in own)]
    assert (found[0][3] == float("-inf")).all()
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other)


def test_a_texts_weights_do_not_depend_on_its_batch_unless_padding_is_pooled():
    ids, mask = texts(4, 20)
    alone = tower()(ids[:1, :4], None)
    torch.testing.assert_close(tower()(ids, mask)[:1], alone, atol=1e-5, rtol=0)
    released = tower(pools_padding=True)
    assert (released(ids, mask)[:1] - alone).abs().max() > 0.05
    torch.testing.assert_close(released(ids[:1, :4], None), alone)


def test_normalised_weights_have_length_one():
    norms = tower(normalize=True)(*texts(4, 9)).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))


def test_topk_keeps_exactly_k_and_own_tokens_come_on_top():
    ids, mask = texts(4, 20)
    network = tower()
    weights = network(ids, mask)
    assert (weights * top_mask(weights, TOPK) != 0).sum(dim=1).tolist() == [TOPK, TOPK]
    assert top_mask(weights, 10**6).all()
    bags = bag_of_tokens(ids, mask, shift=SHIFT, num_dims=network.num_dims)
    kept = weights * (top_mask(weights, TOPK) | bags) != 0
    assert (kept.sum(dim=1) <= TOPK + bags.sum(dim=1)).all()
    assert kept[bags].all()


def test_a_bag_has_each_token_once_and_no_special_one():
    ids = torch.tensor([[1, 12, 12, 199, 2, 0, 0], [1, 10, 50, 51, 52, 53, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    bags = bag_of_tokens(ids, mask, shift=SHIFT, num_dims=WORDS - SHIFT)
    assert bags.shape == (2, 190)
    assert [row.nonzero().flatten().tolist() for row in bags] == [[2, 189], [0, 40, 41, 42, 43]]
    without = bag_of_tokens(ids, mask, shift=0, num_dims=WORDS, special=[0, 1, 2])
    assert without[0].nonzero().flatten().tolist() == [12, 199]


def test_each_side_has_its_own_tower():
    network = Towers(queries=tower(seed=0), passages=tower(seed=5))
    ids, mask = texts(6, 6)
    as_query = network(*Tokens(ids, mask, side="query").inputs)
    assert torch.equal(as_query, network.queries(ids, mask))
    as_passage = network(*Tokens(ids, mask, side="passage").take(torch.tensor([1, 0])).part(0, 2).inputs)
    torch.testing.assert_close(as_passage[[1, 0]], network.passages(ids, mask))
    assert not torch.allclose(as_query, as_passage[[1, 0]])
