"""Contrastive training: numbers worked by hand, sentence-transformers' losses, and every option of the method."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from raydr.config import Component
from raydr.errors import ConfigError
from raydr.methods.base import build_method
from raydr.methods.contrastive import InBatchContrastive
from raydr.train.objective import Labels

# e^score of two queries (rows) with the positive and the negative of each: columns 0 and 2 are the positives.
SHARES = torch.tensor([[3.0, 1, 2, 1], [1, 2, 4, 1]])


def labels(num_queries: int, group: int, *, positives: list[list[int]] | None = None) -> Labels:
    """A query-major batch; by default the first passage of each group is the only known positive."""
    rows = torch.arange(num_queries * group)
    return Labels(rows, rows[::group, None].clone() if positives is None else torch.tensor(positives))


def by_hand(batch: Labels | None = None, **options) -> torch.Tensor:
    """The loss at `SHARES`: queries are unit vectors, so passages are the columns of the score matrix."""
    objective = InBatchContrastive(**{"temperature": 1.0, **options})
    return objective.loss(torch.eye(2), SHARES.log().T, batch or labels(2, 2)).loss


class TestByHand:
    def test_a_positive_competes_with_every_passage_of_the_batch(self):
        assert by_hand().item() == pytest.approx((math.log(7 / 3) + math.log(8 / 4)) / 2)

    def test_temperature_divides_the_scores(self):
        assert by_hand(temperature=0.5).item() == pytest.approx((math.log(15 / 9) + math.log(22 / 16)) / 2)

    def test_symmetric_positives_compete_for_their_queries(self):
        backwards = (math.log(4 / 3) + math.log(6 / 4)) / 2  # columns 0 and 2, over both queries
        assert by_hand(symmetric=True).item() == pytest.approx((by_hand().item() + backwards) / 2)

    def test_without_in_batch_a_query_has_its_own_negatives_only(self):
        assert by_hand(in_batch=False).item() == pytest.approx((math.log(4 / 3) + math.log(5 / 4)) / 2)

    def test_what_is_known_as_relevant_is_no_negative(self):
        """Passage 2 answers the first query as well; both its positives count, each against the two negatives."""
        both = labels(2, 2, positives=[[0, 2], [2, -1]])
        first = (math.log(5 / 3) + math.log(4 / 2)) / 2
        assert by_hand(both).item() == pytest.approx((first + math.log(8 / 4)) / 2)
        own_group = labels(2, 2, positives=[[0, 1], [2, -1]])  # a mined negative that is a positive after all
        assert by_hand(own_group, in_batch=False).item() == pytest.approx(math.log(5 / 4) / 2)

    def test_accuracy_is_the_share_of_queries_whose_positive_is_first(self):
        def accuracy(shares, batch):
            objective = InBatchContrastive(temperature=1.0)
            return float(objective.loss(torch.eye(2), shares.log().T, batch).metrics["accuracy"])

        assert accuracy(SHARES, labels(2, 2)) == 1.0
        higher = SHARES.clone()
        higher[0, 2] = 9.0
        assert accuracy(higher, labels(2, 2)) == 0.5
        assert accuracy(higher, labels(2, 2, positives=[[0, 2], [2, -1]])) == 1.0


class TestAgainstSentenceTransformers:
    """Their columns are positives and negatives of all queries; ours are query-major."""

    @pytest.fixture(scope="class")
    def losses(self):
        return pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    @pytest.fixture(params=[0, 2])
    def columns(self, request):
        generator = torch.Generator().manual_seed(request.param)
        return list(torch.randn(2 + request.param, 5, 16, generator=generator).unbind())

    @staticmethod
    def ours(columns, **options):
        queries, *passages = (functional.normalize(column, dim=1) for column in columns)
        batch = labels(len(queries), len(passages))
        return InBatchContrastive(**options).loss(queries, torch.stack(passages, dim=1).flatten(0, 1), batch).loss

    @staticmethod
    def theirs(losses, columns, temperature, **options):
        loss = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / temperature, **options)
        return loss.compute_loss_from_embeddings(columns, torch.zeros(len(columns[0])))

    @pytest.mark.parametrize("temperature", [1.0, 0.05])
    def test_in_batch(self, losses, columns, temperature):
        expected = self.theirs(losses, columns, temperature)
        torch.testing.assert_close(self.ours(columns, temperature=temperature), expected)

    def test_symmetric(self, losses, columns):
        both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        expected = self.theirs(losses, columns, 0.05, **both)
        torch.testing.assert_close(self.ours(columns, temperature=0.05, symmetric=True), expected)
        assert not torch.allclose(expected, self.theirs(losses, columns, 0.05))

    def test_matryoshka(self, losses, columns):
        """The mean over the whole embedding and its prefixes, which are normalised again."""
        parts = [[column[:, :size] for column in columns] for size in (16, 8, 4)]
        expected = sum(self.theirs(losses, part, 0.05) for part in parts) / 3
        torch.testing.assert_close(self.ours(columns, temperature=0.05, matryoshka=[8, 4]), expected)
        torch.testing.assert_close(self.ours(columns, temperature=0.05, matryoshka=[16, 8, 4]), expected)
        symmetric = self.ours(columns, temperature=0.05, matryoshka=[8, 4], symmetric=True)
        assert not torch.allclose(symmetric, expected)

    def test_matryoshka_without_normalising(self, losses, columns):
        """Prefixes are compared as they are served: cut, and of any length."""
        dot_score = pytest.importorskip("sentence_transformers.util").dot_score
        whole = [functional.normalize(column, dim=1) for column in columns]
        parts = [whole, [column[:, :4] for column in whole]]
        expected = sum(self.theirs(losses, part, 0.05, similarity_fct=dot_score) for part in parts) / 2
        found = self.ours(columns, temperature=0.05, matryoshka=[4], normalize=False)
        torch.testing.assert_close(found, expected)


def test_gradients_reach_queries_positives_and_hard_negatives():
    queries, passages = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    InBatchContrastive(temperature=1.0, matryoshka=[4]).loss(queries, passages, labels(3, 2)).loss.backward()
    assert (queries.grad.abs().sum(dim=1) > 0).all()
    assert (passages.grad.abs().sum(dim=1) > 0).all()


class TestMethod:
    @staticmethod
    def method(**args):
        return build_method(Component(import_path="raydr.methods.contrastive:Contrastive", args=args))

    def test_every_setting_reaches_the_loss(self):
        for options in ({"temperature": 0.5}, {"symmetric": True}, {"in_batch": False}, {"matryoshka": [1]}):
            objective = self.method(**{"temperature": 1.0, **options}).build_objective()
            loss = objective.loss(torch.eye(2), SHARES.log().T, labels(2, 2)).loss
            torch.testing.assert_close(loss, by_hand(**options))
            assert not torch.allclose(loss, by_hand())
        prefixes = {"temperature": 1.0, "matryoshka": [1]}
        of_any_length, of_length_1 = (
            self.method(normalize=normalize, **prefixes)
            .build_objective()
            .loss(2 * torch.eye(2), SHARES.log().T, labels(2, 2))
            for normalize in (False, True)
        )
        assert not torch.allclose(of_any_length.loss, of_length_1.loss)
        assert self.method().build_objective().gather
        assert not self.method(gather=False).build_objective().gather

    def test_what_cannot_be_together_is_refused(self):
        with pytest.raises(ConfigError, match="set in_batch: true"):
            self.method(symmetric=True, in_batch=False)
        with pytest.raises(ConfigError, match="set num_negatives"):
            self.method(in_batch=False, num_negatives=0)
