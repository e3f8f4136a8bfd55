"""ANCE-PRF: the loss of the card's fifth test, and the slices of negatives of its sixth."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.nn import functional

from raydr.artifacts import write_artifact
from raydr.data.examples import Example, ExampleSet, write_examples
from raydr.methods.ance_prf import AncePrf, AncePrfConfig, SlicedBatches
from raydr.train.objective import Labels
from raydr.types import Passage, Query


class TestLoss:
    """5."""

    def output(self, queries, passages, *, in_batch=False, temperature=1.0):
        rows = torch.arange(len(passages))
        group = len(passages) // len(queries)
        labels = Labels(passage_rows=rows, positive_rows=rows[::group, None])
        objective = AncePrf(AncePrfConfig(in_batch=in_batch, temperature=temperature)).build_objective()
        return objective.loss(queries, passages, labels)

    def test_of_two_candidates_it_is_softplus(self):
        queries, passages = torch.randn(1, 6), torch.randn(2, 6)
        positive, negative = passages @ queries[0]
        torch.testing.assert_close(self.output(queries, passages).loss, functional.softplus(negative - positive))

    def test_is_the_cards_formula_and_blind_to_the_order_of_negatives(self):
        queries, passages = torch.randn(3, 6), torch.randn(3 * 5, 6)
        scores = torch.einsum("qd,qgd->qg", queries, passages.view(3, 5, 6))
        expected = -(scores[:, 0].exp() / scores.exp().sum(dim=1)).log().mean()
        torch.testing.assert_close(self.output(queries, passages).loss, expected)
        turned = passages.view(3, 5, 6)[:, [0, 3, 1, 4, 2]].flatten(0, 1)
        torch.testing.assert_close(self.output(queries, turned).loss, expected)

    @pytest.mark.parametrize("in_batch", [False, True])
    def test_a_temperature_is_longer_vectors(self, in_batch):
        queries, passages = torch.randn(2, 6), torch.randn(2 * 4, 6)
        cold = self.output(queries, passages, in_batch=in_batch, temperature=0.05)
        torch.testing.assert_close(cold.loss, self.output(queries * 20, passages, in_batch=in_batch).loss)

    def test_others_passages_count_in_batch_only(self):
        queries, passages = torch.randn(2, 6, requires_grad=True), torch.randn(2 * 4, 6)
        moved = torch.cat([passages[:4], passages[4:] + 1])
        for in_batch in (False, True):
            gradients = []
            for own in (passages, moved):
                (gradient,) = torch.autograd.grad(self.output(queries, own, in_batch=in_batch).loss, queries)
                gradients.append(gradient[0])
            assert torch.equal(*gradients) is not in_batch

    def test_only_in_batch_joins_the_workers(self):
        objectives = [AncePrf(AncePrfConfig(**args)).build_objective() for args in ({}, {"in_batch": True})]
        assert [objective.gather for objective in objectives] == [False, True]
        assert AncePrf(AncePrfConfig(in_batch=True, gather=False)).build_objective().gather is False


class TestSlices:
    """6."""

    @pytest.fixture
    def hundred(self, tmp_path) -> ExampleSet:
        """Two queries with 150 negatives each, one of them with two positives."""
        passages = {f"p{n}": Passage(f"p{n}", f"text {n}") for n in range(320)}
        examples = [
            Example(Query("a", "a"), ["p300"], [f"p{n}" for n in range(150)]),
            Example(Query("b", "b"), ["p301", "p302"], [f"p{n}" for n in range(100, 250)]),
        ]
        with write_artifact(tmp_path / "examples", kind="examples", config={}) as writer:
            write_examples(writer.path, examples, passages)
        return ExampleSet.open(tmp_path / "examples")

    def test_five_epochs_take_five_slices_of_a_hundred_and_the_sixth_the_first_again(self, hundred):
        sampler = SlicedBatches(hundred, num_candidates=100, num_negatives=20, batch_size=3, seed=5)
        epochs = list(islice(sampler, 6))
        for epoch in epochs:  # a pair of query and positive each
            assert sorted((group.query, group.passages[0]) for group in epoch) == [
                (0, hundred.passage_ids.index("p300")),
                (1, hundred.passage_ids.index("p301")),
                (1, hundred.passage_ids.index("p302")),
            ]
        slices = [{(g.query, g.passages[0]): set(g.passages[1:]) for g in epoch} for epoch in epochs]
        for pair in slices[0]:
            own = [part[pair] for part in slices]
            assert all(len(part) == 20 for part in own)
            assert len(set.union(*own[:5])) == 100
            assert own[5] == own[0]
            assert set.union(*own) <= set(hundred.negatives(pair[0]).tolist())
        assert list(islice(sampler, 6)) == epochs
        other = SlicedBatches(hundred, num_candidates=100, num_negatives=20, batch_size=3, seed=6)
        assert list(islice(other, 1)) != epochs[:1]
