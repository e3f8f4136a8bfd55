"""The shared formulas: numbers worked by hand, sentence-transformers' losses, and inputs at the edge."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from raydr.losses import contrastive, kl_distillation, listwise, margin_mse, pointwise

LN2, LN3 = math.log(2), math.log(3)
FORMULAS = {
    "contrastive": lambda scores, positives, teacher: contrastive(scores, positives, temperature=0.5),
    "pointwise": lambda scores, positives, teacher: pointwise(scores, positives),
    "listwise": lambda scores, positives, teacher: listwise(scores, positives, temperature=0.5),
    "margin_mse": lambda scores, positives, teacher: margin_mse(scores, teacher),
    "kl_distillation": lambda scores, positives, teacher: kl_distillation(scores, teacher, temperature=0.5),
}
every_formula = pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)


def matrix(*rows):
    return torch.tensor(rows)


def first_of_each(num_queries, num_passages):
    positives = torch.zeros(num_queries, num_passages, dtype=torch.bool)
    positives[:, 0] = True
    return positives


def own_columns(num_queries, num_passages):
    """Positives of a query-major batch."""
    columns = torch.arange(num_queries) * (num_passages // num_queries)
    return functional.one_hot(columns, num_passages).bool()


class TestContrastive:
    def test_hand_worked(self):
        scores = matrix([LN3, 0.0, LN2], [0.0, LN2, LN3])  # e^s: 3 against 1 and 2; 2 against 1 and 3
        positives = matrix([True, False, False], [False, True, False])
        assert contrastive(scores, positives).item() == pytest.approx((math.log(6 / 3) + math.log(6 / 2)) / 2)

    def test_temperature_divides(self):
        scores, positives = torch.randn(3, 6), own_columns(3, 6)
        torch.testing.assert_close(contrastive(scores, positives, temperature=0.1), contrastive(scores * 10, positives))

    @pytest.mark.parametrize("num_passages", [4, 12])
    def test_one_positive_each_is_cross_entropy(self, num_passages):
        scores = torch.randn(4, num_passages, generator=torch.Generator().manual_seed(0))
        positives = own_columns(4, num_passages)
        expected = functional.cross_entropy(scores / 0.05, positives.int().argmax(dim=1))
        torch.testing.assert_close(contrastive(scores, positives, temperature=0.05), expected)

    def test_several_positives_do_not_compete(self):
        scores = matrix([LN3, LN2, 0.0])
        # each positive against the one negative, then their mean
        expected = (math.log(4 / 3) + math.log(3 / 2)) / 2
        assert contrastive(scores, matrix([True, True, False])).item() == pytest.approx(expected)

    def test_a_repeated_positive_changes_nothing(self):
        scores, positives = torch.randn(1, 4), first_of_each(1, 4)
        columns = [0, 1, 2, 3, 0]
        torch.testing.assert_close(
            contrastive(scores[:, columns], positives[:, columns]), contrastive(scores, positives)
        )

    def test_a_query_without_positive_contributes_nothing(self):
        scores = torch.randn(3, 4, requires_grad=True)
        positives = matrix([True, False, False, False], [False] * 4, [False, False, True, False])
        loss = contrastive(scores, positives)
        torch.testing.assert_close(loss, contrastive(scores[[0, 2]], positives[[0, 2]]))
        loss.backward()
        assert scores.grad is not None
        assert scores.grad[1].tolist() == [0.0] * 4

    def test_nothing_to_compare_costs_nothing(self):
        assert contrastive(matrix([0.3, 2.0]), matrix([True, True])).item() == 0.0
        assert contrastive(matrix([0.3, 2.0]), matrix([False, False])).item() == 0.0

    def test_gradient_of_a_row_sums_to_zero(self):
        scores = torch.randn(4, 8, requires_grad=True)
        contrastive(scores, own_columns(4, 8), temperature=0.2).backward()
        torch.testing.assert_close(scores.grad.sum(dim=1), torch.zeros(4), atol=1e-6, rtol=0)


def test_pointwise_hand_worked():
    scores = matrix([LN3, 0.0])  # sigmoid: 3/4 and 1/2
    assert pointwise(scores, matrix([True, False])).item() == pytest.approx((math.log(4 / 3) + LN2) / 2)


class TestListwise:
    def test_hand_worked(self):
        scores = matrix([LN3, LN2, 0.0])  # shares 3/6, 2/6, 1/6
        assert listwise(scores, matrix([True, False, False])).item() == pytest.approx(LN2)
        assert listwise(scores, matrix([True, True, False])).item() == pytest.approx((LN2 + LN3) / 2)

    def test_one_positive_is_cross_entropy(self):
        scores = torch.randn(5, 4)
        expected = functional.cross_entropy(scores / 0.1, torch.zeros(5, dtype=torch.int64))
        torch.testing.assert_close(listwise(scores, first_of_each(5, 4), temperature=0.1), expected)


class TestMarginMse:
    def test_hand_worked(self):
        scores, teacher = matrix([5.0, 3.0, 4.0], [1.0, 1.0, 0.0]), matrix([9.0, 4.0, 9.0], [2.0, 0.0, 2.0])
        # margins 2, 1, 0, 1; the teacher's 5, 0, 2, 0
        assert margin_mse(scores, teacher).item() == (9 + 1 + 4 + 1) / 4

    def test_only_margins_count(self):
        scores, teacher = torch.randn(3, 4), torch.randn(3, 4)
        shifted = margin_mse(scores + torch.randn(3, 1), teacher + torch.randn(3, 1))
        torch.testing.assert_close(shifted, margin_mse(scores, teacher))
        assert margin_mse(teacher + 7, teacher).item() == pytest.approx(0, abs=1e-10)


class TestKlDistillation:
    def test_hand_worked(self):
        student, teacher = matrix([0.0, 0.0]), matrix([LN3, 0.0])  # 1/2, 1/2 and 3/4, 1/4
        assert kl_distillation(student, teacher).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))

    def test_temperature_divides_both(self):
        scores, teacher = torch.randn(3, 4), torch.randn(3, 4)
        torch.testing.assert_close(
            kl_distillation(scores, teacher, temperature=0.5), kl_distillation(scores * 2, teacher * 2)
        )

    def test_zero_at_the_teacher_up_to_a_shift(self):
        teacher = torch.randn(3, 4)
        assert kl_distillation(teacher + torch.randn(3, 1), teacher).item() == pytest.approx(0, abs=1e-6)


@every_formula
def test_bfloat16_is_raised_to_float32_first(formula):
    scores, teacher = torch.randn(2, 4, 6).bfloat16()
    low, full = (formula(x, first_of_each(4, 6), t) for x, t in ((scores, teacher), (scores.float(), teacher.float())))
    assert low.dtype == torch.float32
    assert low == full


@every_formula
@pytest.mark.parametrize("worst", [False, True])
def test_extreme_scores_stay_finite(formula, worst):
    # Cosines at a temperature of 0.01 and logits of large models: arguments of some hundreds.
    positives = first_of_each(2, 3)
    scores = torch.where(positives ^ worst, 200.0, -200.0).requires_grad_()
    loss = formula(scores, positives, -scores.detach())
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


@every_formula
def test_a_mean_over_queries(formula):
    """So that the mean over workers is the loss of the joined batch."""
    scores, teacher = torch.randn(2, 4, 3)
    positives = first_of_each(4, 3)
    halves = [formula(scores[part], positives[part], teacher[part]) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(formula(scores, positives, teacher), sum(halves) / 2)


class TestAgainstSentenceTransformers:
    @pytest.fixture(scope="class")
    def losses(self):
        return pytest.importorskip("sentence_transformers.sentence_transformer.losses")

    @pytest.mark.parametrize("num_negatives", [0, 2])
    def test_contrastive(self, losses, num_negatives):
        queries, *columns = torch.randn(2 + num_negatives, 5, 16)
        theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0)
        expected = theirs.compute_loss_from_embeddings([queries, *columns], torch.zeros(5))
        passages = functional.normalize(torch.stack(columns, dim=1).flatten(0, 1), dim=1)
        scores = functional.normalize(queries, dim=1) @ passages.T
        torch.testing.assert_close(contrastive(scores, own_columns(*scores.shape), temperature=0.05), expected)

    @pytest.mark.parametrize("num_negatives", [1, 3])
    def test_margin_mse(self, losses, num_negatives):
        queries, *columns = torch.randn(2 + num_negatives, 5, 16)
        teacher = torch.randn(5, 1 + num_negatives)
        expected = losses.MarginMSELoss(torch.nn.Identity()).compute_loss_from_embeddings([queries, *columns], teacher)
        scores = torch.einsum("qd,gqd->qg", queries, torch.stack(columns))
        torch.testing.assert_close(margin_mse(scores, teacher), expected)
