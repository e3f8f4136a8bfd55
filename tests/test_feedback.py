"""Relevance feedback at inference: the card's numbers, queries apart from one another, and nothing moved in vain."""

import pytest
import torch

from raydr.feedback import towards_order, towards_scores

P = torch.tensor([[[1, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8], [0, 1, 0]]], dtype=torch.float64)
Q = torch.tensor([[1, 0.2, 0.1]], dtype=torch.float64)
T = torch.tensor([[-2.0, 4, 1, 3]], dtype=torch.float64)
ALL = torch.ones(1, 4, dtype=torch.bool)
# The order 1 > 3 > 2 > 0, with the scores of the first search handed out in it.
RANKS, HANDED_OUT = torch.tensor([[4, 1, 3, 2]]), torch.tensor([[0.2, 1.0, 0.68, 0.92]], dtype=torch.float64)


def test_a_cross_encoders_scores_move_the_query_as_the_card_says():
    once = towards_scores(Q, P, T, ALL, steps=1)
    torch.testing.assert_close(once, torch.tensor([[0.995, 0.205, 0.095]], dtype=torch.float64), atol=1e-7, rtol=0)
    moved = towards_scores(Q, P, T, ALL)
    expected = torch.tensor([[0.5845949362, 0.6125299419, -0.2282696079]], dtype=torch.float64)
    torch.testing.assert_close(moved, expected, atol=1e-8, rtol=0)


def test_an_order_moves_the_query_as_the_card_says():
    moved = towards_order(Q, P, HANDED_OUT, RANKS, ALL)
    expected = torch.tensor([[0.9800305723, 0.2199873475, 0.0800162737]], dtype=torch.float64)
    torch.testing.assert_close(moved, expected, atol=1e-8, rtol=0)
    assert (moved - Q).abs().max() <= 0.0201  # Adam's bound: steps times rate


def test_queries_move_each_on_its_own_and_padding_is_nothing():
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(1, 3, 3, generator=generator, dtype=torch.float64)
    junk = torch.full((1, 1, 3), 50.0, dtype=torch.float64)
    passages = torch.cat([P, torch.cat([other, junk], dim=1)])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    queries = torch.cat([Q, -Q])
    teacher = torch.cat([T, torch.tensor([[1.0, 2.0, 0.5, 99.0]], dtype=torch.float64)])
    ranks = torch.cat([RANKS, torch.tensor([[2, 1, 3, 4]])])
    both = towards_scores(queries, passages, teacher, mask)
    alone = towards_scores(-Q, other, teacher[1:, :3], mask[1:, :3])
    torch.testing.assert_close(both[:1], towards_scores(Q, P, T, ALL))
    torch.testing.assert_close(both[1:], alone)
    both = towards_order(queries, passages, teacher, ranks, mask)
    alone = towards_order(-Q, other, teacher[1:, :3], ranks[1:, :3], mask[1:, :3])
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("teacher", [torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])], ids=["flat", "unseen"])
def test_where_there_is_no_direction_the_query_stays(teacher):
    mask = ALL if teacher.std() == 0 else torch.zeros(1, 4, dtype=torch.bool)
    teacher = teacher.double()
    assert torch.equal(towards_scores(Q, P, teacher, mask), Q)
    assert torch.equal(towards_order(Q, P, teacher, RANKS, mask), Q)
    same = P[:, :1].expand(1, 4, 3)
    assert torch.equal(towards_order(Q, same, T, RANKS, ALL), Q)
