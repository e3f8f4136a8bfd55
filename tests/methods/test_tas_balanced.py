"""TAS-Balanced: the card's loss vector, the sampler's statistics, and what sampling by topic is for."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional

from raydr.errors import ConfigError, DataError
from raydr.losses import margin_mse
from raydr.methods.tas_balanced import (
    DualTeacher,
    TokenTeacher,
    TopicBatches,
    in_batch_margin_mse,
    margin_bounds,
)
from raydr.models.colbert import late_interaction
from raydr.stages.supervision import ScoredPairs
from raydr.train.objective import Labels, Tokens
from raydr.train.sampling import BatchSampler, share

# The card's vector: rows are queries.
POSITIVE = torch.tensor([[5.0, 1, 0], [2, 6, 1], [0, 1, 4]])
NEGATIVE = torch.tensor([[3.0, 0, 1], [1, 2, 0], [1, 0, 3]])
TEACHER_POSITIVE = torch.tensor([[10.0, 2, 1], [3, 12, 2], [1, 2, 9]])
TEACHER_NEGATIVE = torch.tensor([[6.0, 1, 1], [2, 5, 1], [2, 1, 7]])
TEACHER_PAIRS = torch.tensor([[9.0, 4], [8, 5], [7, 1]])


def interleaved(positives, negatives):
    """A query-major score matrix: positive and negative of query 0, of query 1, ..."""
    return torch.stack([positives, negatives], dim=2).flatten(1)


def objective_loss(positives, negatives, *, teacher=(TEACHER_POSITIVE, TEACHER_NEGATIVE), **weights):
    """The objective at these scores: queries are unit vectors, so passages are the columns of the score matrix."""
    scores = interleaved(positives, negatives)
    labels = Labels(
        passage_rows=torch.arange(6),
        positive_rows=torch.tensor([[0], [2], [4]]),
        teacher_scores=TEACHER_PAIRS,
        in_batch_teacher=interleaved(*teacher),
    )
    return DualTeacher(**weights).loss(torch.eye(3), scores.T, labels)


class TestLosses:
    def test_the_cards_vector(self):
        output = objective_loss(POSITIVE, NEGATIVE)
        assert output.metrics["in_batch"].item() == pytest.approx(19.75)
        assert output.metrics["pairwise"].item() == pytest.approx(11.666667)
        assert output.loss.item() == pytest.approx(26.479167)

    def test_is_a_mean_without_the_own_pair(self):
        loss = in_batch_margin_mse(POSITIVE, NEGATIVE, TEACHER_POSITIVE, TEACHER_NEGATIVE)
        by_hand = [
            ((own[i, i] - own[i, j]) - (TEACHER_POSITIVE[i, i] - TEACHER_POSITIVE[i, j])) ** 2 / 2
            + ((own[i, i] - other[i, j]) - (TEACHER_POSITIVE[i, i] - TEACHER_NEGATIVE[i, j])) ** 2 / 2
            for own, other in [(POSITIVE, NEGATIVE)]
            for i in range(3)
            for j in range(3)
            if i != j
        ]
        assert loss.item() == pytest.approx((sum(by_hand) / 6).item())
        assert loss.item() != pytest.approx(41.833333)  # the sum as it is printed

    def test_zero_at_the_teacher_up_to_a_shift_of_a_query(self):
        teacher = (torch.randn(4, 4), torch.randn(4, 4))
        shift = torch.randn(4, 1)
        student = (teacher[0] + shift, teacher[1] + shift)
        assert in_batch_margin_mse(*student, *teacher).item() == pytest.approx(0, abs=1e-10)

    def test_shifting_a_query_changes_neither_loss(self):
        shift = torch.tensor([[3.0], [-1.0], [10.0]])
        before, after = objective_loss(POSITIVE, NEGATIVE), objective_loss(POSITIVE + shift, NEGATIVE + shift)
        torch.testing.assert_close(before.metrics, after.metrics)

    def test_own_negatives_belong_to_the_pairwise_teacher(self):
        before = objective_loss(POSITIVE, NEGATIVE).metrics
        changed = objective_loss(POSITIVE, NEGATIVE + torch.eye(3)).metrics
        assert changed["in_batch"] == before["in_batch"]
        assert changed["pairwise"] != before["pairwise"]
        unheard = objective_loss(POSITIVE, NEGATIVE, teacher=(TEACHER_POSITIVE, TEACHER_NEGATIVE + 5 * torch.eye(3)))
        assert unheard.metrics == before

    def test_one_query_has_no_in_batch_pairs(self):
        assert in_batch_margin_mse(*torch.randn(4, 1, 1)).item() == 0

    def test_float32_whatever_it_is_given(self):
        low = [part.bfloat16() for part in (POSITIVE, NEGATIVE, TEACHER_POSITIVE, TEACHER_NEGATIVE)]
        assert in_batch_margin_mse(*low).dtype == torch.float32

    def test_each_weight_alone_needs_its_own_teacher_only(self):
        scores = torch.eye(3), interleaved(POSITIVE, NEGATIVE).T
        rows = {"passage_rows": torch.arange(6), "positive_rows": torch.tensor([[0], [2], [4]])}
        pairs = Labels(**rows, teacher_scores=TEACHER_PAIRS)
        in_batch = Labels(**rows, in_batch_teacher=interleaved(TEACHER_POSITIVE, TEACHER_NEGATIVE))
        assert DualTeacher(in_batch_weight=0.0).loss(*scores, pairs).loss.item() == pytest.approx(11.666667)
        assert DualTeacher(pairwise_weight=0.0).loss(*scores, in_batch).loss.item() == pytest.approx(0.75 * 19.75)
        with pytest.raises(ConfigError, match="in_batch_weight: no in-batch teacher"):
            DualTeacher().loss(*scores, pairs)
        with pytest.raises(ConfigError, match="pairwise_weight: the batches carry no"):
            DualTeacher().loss(*scores, in_batch)
        with pytest.raises(ConfigError, match="one of them has to be above 0"):
            DualTeacher(pairwise_weight=0.0, in_batch_weight=0.0)


class TokenNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, ids, mask):
        return self.dropout(self.embed(ids))


def tokens(lengths, width, *, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return Tokens(ids * mask, mask)


class TestColbert:
    def test_is_the_sum_of_the_best_matches(self):
        queries, passages = torch.randn(2, 3, 4), torch.randn(3, 5, 4)
        query_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        passage_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
        scores = late_interaction(queries, passages, query_mask, passage_mask)
        for i in range(2):
            for j in range(3):
                pairs = queries[i, : query_mask[i].sum()] @ passages[j, : passage_mask[j].sum()].T
                assert scores[i, j].item() == pytest.approx(pairs.max(dim=1).values.sum().item(), rel=1e-5)

    def test_the_matrix_of_the_card_and_its_diagonal(self):
        queries, passages = torch.randn(4, 6, 8), torch.randn(4, 9, 8)
        masks = tokens([6, 2, 3, 4], 6, seed=0).mask, tokens([9, 1, 5, 7], 9, seed=1).mask
        matrix = late_interaction(queries, passages, *masks)
        assert matrix.shape == (4, 4)
        padded = torch.einsum("qtd,psd->qtps", queries, passages).masked_fill(masks[1] == 0, -1000)
        torch.testing.assert_close(matrix, (padded.amax(dim=3) * masks[0][:, :, None]).sum(dim=1))
        for i in range(4):
            alone = late_interaction(*(part[i : i + 1] for part in (queries, passages, *masks)))
            torch.testing.assert_close(alone[0, 0], matrix[i, i])

    def test_padding_changes_nothing(self):
        queries, passages = tokens([4, 2], 4, seed=0), tokens([5, 3, 1], 5, seed=1)
        teacher = TokenTeacher(TokenNetwork())
        wider = [Tokens(functional.pad(t.ids, (0, 3)), functional.pad(t.mask, (0, 3))) for t in (queries, passages)]
        torch.testing.assert_close(teacher(*wider), teacher(queries, passages))
        unpadded = Tokens(queries.ids[:1], None), Tokens(passages.ids[:1], None)
        torch.testing.assert_close(teacher(*unpadded)[0, 0], teacher(queries, passages)[0, 0])

    def test_only_the_student_learns(self):
        network = TokenNetwork()
        teacher = TokenTeacher(network)
        queries, passages = tokens([4, 2, 3], 4, seed=0), tokens([5, 3, 1, 2, 4, 5], 5, seed=1)
        scores = teacher(queries, passages)
        torch.testing.assert_close(scores, teacher(queries, passages))  # no dropout
        assert not scores.requires_grad
        student = [torch.randn(rows, 8, requires_grad=True) for rows in (3, 6)]
        pair_scores, in_batch = torch.randn(3, 2, requires_grad=True), scores.clone().requires_grad_()
        labels = Labels(torch.arange(6), torch.tensor([[0], [2], [4]]), pair_scores, in_batch_teacher=in_batch)
        DualTeacher().loss(*student, labels).loss.backward()
        assert all((part.grad.abs().sum(dim=1) > 0).all() for part in student)
        assert pair_scores.grad is in_batch.grad is None
        assert all(weight.grad is None for weight in network.parameters())


def pairs_of(sizes, *, num_pairs=3):
    """Clusters of so many queries, each with pairs of margins 0, 1, ...; passages are numbered apart by query."""
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    queries = np.repeat(np.arange(len(clusters)), num_pairs)
    number = np.tile(np.arange(num_pairs), len(clusters))
    scores = np.zeros(len(queries))
    return ScoredPairs(queries, queries * 100, queries * 100 + 1 + number, scores, scores - number), clusters


def draws(sampler, count):
    return list(islice(sampler, count))


class TestTopics:
    @pytest.mark.parametrize(("clusters_per_batch", "num_clusters"), [(1, {1}), (2, {1, 2})])
    def test_a_batch_is_of_one_topic_and_has_no_query_twice(self, clusters_per_batch, num_clusters):
        pairs, clusters = pairs_of([8, 20, 13])
        sampler = TopicBatches(pairs, clusters, batch_size=8, seed=0, clusters_per_batch=clusters_per_batch)
        assert isinstance(sampler, BatchSampler)
        seen = set()
        for batch in draws(sampler, 200):
            assert len(batch) == 8
            assert all(group.cluster == clusters[group.query] for group in batch)
            labels = {group.cluster for group in batch}
            seen.add(len(labels))
            if clusters_per_batch == 1 or len(labels) == 2:
                assert len({group.query for group in batch}) == 8
        assert seen == num_clusters

    def test_small_clusters_are_drawn_as_often_as_large_ones(self):
        sizes, batch_size, num_batches = [10, 40, 16], 8, 6000
        pairs, clusters = pairs_of(sizes)
        batches = draws(TopicBatches(pairs, clusters, batch_size=batch_size, seed=1), num_batches)
        shares = np.bincount([group.query for batch in batches for group in batch]) / num_batches
        for label, size in enumerate(sizes):
            expected = batch_size / (len(sizes) * size)
            assert shares[clusters == label].mean() == pytest.approx(expected, rel=0.05)
            assert shares[clusters == label] == pytest.approx(expected, rel=0.25)

    def test_a_cluster_smaller_than_a_batch_is_topped_up(self):
        """The card's figures for clusters of 10, 40 and 4 queries and batches of 8."""
        pairs, clusters = pairs_of([10, 40, 4])
        batches = draws(TopicBatches(pairs, clusters, batch_size=8, seed=2), 6000)
        counts = np.bincount([group.query for batch in batches for group in batch]) / (8 * len(batches))
        shares = [counts[clusters == label].mean() for label in range(3)]
        assert shares == pytest.approx([0.039, 0.0098, 0.055], rel=0.05)
        mixed = np.mean([len({group.cluster for group in batch}) > 1 for batch in batches])
        repeated = np.mean([len({group.query for group in batch}) < 8 for batch in batches])
        assert mixed == pytest.approx(0.22, abs=0.02)
        assert repeated == pytest.approx(0.11, abs=0.02)

    def test_random_sampling_knows_no_topics(self):
        pairs, _ = pairs_of([5, 50])
        batches = draws(TopicBatches(pairs, None, batch_size=8, seed=0, num_bins=1), 2000)
        assert all(len({group.query for group in batch}) == 8 for batch in batches)
        assert {group.cluster for batch in batches for group in batch} == {-1}
        shares = np.bincount([group.query for batch in batches for group in batch]) / len(batches)
        assert shares == pytest.approx(8 / 55, rel=0.25)

    def test_queries_without_cluster_are_left_out(self):
        pairs, clusters = pairs_of([10, 10])
        clusters[::2] = -1
        drawn = {
            group.query for batch in draws(TopicBatches(pairs, clusters, batch_size=4, seed=0), 100) for group in batch
        }
        assert drawn == set(range(1, 20, 2))

    def test_the_same_seed_and_no_other_gives_the_same_batches(self):
        pairs, clusters = pairs_of([10, 10, 10])
        shuffled = ScoredPairs(*(column[np.random.default_rng(0).permutation(len(column))] for column in pairs))

        def first(pairs, seed):
            return draws(TopicBatches(pairs, clusters, batch_size=4, seed=seed), 20)

        sampler = TopicBatches(pairs, clusters, batch_size=4, seed=0)
        assert draws(sampler, 20) == draws(sampler, 20) == first(pairs, 0) == first(shuffled, 0)
        assert first(pairs, 0) != first(pairs, 1)

    def test_workers_share_a_batch_of_one_topic(self):
        pairs, clusters = pairs_of([10, 10, 10])
        for batch in draws(TopicBatches(pairs, clusters, batch_size=8, seed=0), 20):
            parts = [share(batch, rank, 2) for rank in (0, 1)]
            assert parts[0] + parts[1] == batch
            assert not {group.query for group in parts[0]} & {group.query for group in parts[1]}
            assert {group.cluster for group in parts[0]} == {group.cluster for group in parts[1]}

    def test_what_cannot_make_a_batch_is_refused(self):
        pairs, clusters = pairs_of([10])
        with pytest.raises(ConfigError, match="clusters_per_batch: 5 do not fit"):
            TopicBatches(pairs, clusters, batch_size=4, seed=0, clusters_per_batch=5)
        with pytest.raises(DataError, match="no query has two scored pairs and a cluster"):
            TopicBatches(pairs, np.full(10, -1), batch_size=4, seed=0)
        with pytest.raises(DataError, match="no query has two scored pairs$"):
            TopicBatches(ScoredPairs(*(column[:0] for column in pairs)), None, batch_size=4, seed=0)


def one_query(margins):
    zeros = np.zeros(len(margins), dtype=np.int64)
    scores = np.zeros(len(margins))
    return ScoredPairs(zeros, zeros, np.arange(len(margins)), scores, -np.asarray(margins, dtype=float))


def drawn_margins(margins, count, **settings):
    sampler = TopicBatches(one_query(margins), None, batch_size=1, seed=0, **settings)
    groups = [batch[0] for batch in draws(sampler, count)]
    assert all(group.teacher_scores == (0.0, -margins[group.passages[1]]) for group in groups)
    return np.array([group.teacher_scores[0] - group.teacher_scores[1] for group in groups])


class TestMargins:
    def test_bins_are_of_equal_width_and_include_their_lower_edge(self):
        margins = np.array([0.0, 0.5, 1.0, 2.5, 3.0, 4.0])
        assert margin_bounds(margins, 4).tolist() == [0, 2, 3, 4, 6]
        assert margin_bounds(margins, 1).tolist() == [0, 6]

    def test_every_margin_is_in_its_bin(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            margins = np.sort(rng.normal(3, 5, size=rng.integers(2, 60)))
            bounds = margin_bounds(margins, 10)
            assert (bounds[0], bounds[-1], len(bounds)) == (0, len(margins), 11)
            edges = np.linspace(margins[0], margins[-1], 11)
            for number, (low, high) in enumerate(pairwise(bounds)):
                assert (margins[low:high] >= edges[number] - 1e-9).all()
                assert (margins[low:high] <= edges[number + 1] + 1e-9).all()

    def test_two_bins_are_drawn_equally_often_whatever_they_hold(self):
        margins = np.concatenate([np.linspace(9.1, 10, 90), np.linspace(0, 0.5, 10)])
        drawn = drawn_margins(margins, 4000)
        assert (drawn > 9).mean() == pytest.approx(0.5, abs=0.03)
        assert drawn.max() == margins.max()  # the largest margin can be drawn
        assert drawn.min() == margins.min()
        assert (drawn_margins(margins, 4000, num_bins=1) > 9).mean() == pytest.approx(0.9, abs=0.02)

    def test_margins_are_spread_more_evenly_than_by_chance(self):
        margins = np.random.default_rng(0).gamma(2, 1, size=100)
        edges = np.linspace(margins.min(), margins.max(), 11)
        filled = np.histogram(margins, edges)[0] > 0
        assert filled.sum() < 10  # some bins are empty
        balanced, random = (
            np.histogram(drawn_margins(margins, 3000, num_bins=bins), edges)[0][filled] for bins in (10, 1)
        )
        assert chisquare(balanced).pvalue > 0.001
        assert chisquare(random).statistic > 20 * chisquare(balanced).statistic

    def test_equal_margins_are_one_bin(self):
        assert margin_bounds(np.full(5, 2.5), 10).tolist() == [0] * 10 + [5]
        sampler = TopicBatches(one_query([2.5] * 5), None, batch_size=1, seed=0)
        assert {batch[0].passages[1] for batch in draws(sampler, 100)} == set(range(5))

    def test_a_query_with_one_pair_is_left_out(self):
        pairs, clusters = pairs_of([6])
        without = np.flatnonzero((pairs.queries != 2) | (pairs.negatives % 100 == 1))
        sampler = TopicBatches(ScoredPairs(*(column[without] for column in pairs)), clusters, batch_size=2, seed=0)
        assert {group.query for batch in draws(sampler, 50) for group in batch} == {0, 1, 3, 4, 5}


def mrr_after_training(sampling, *, seed, in_batch, num_steps=300, num_topics=64, per_topic=20):
    """A small student of features that hold a topic (8 numbers, far apart), a place in it (8) and noise (8)."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.arange(num_topics * per_topic) // per_topic
    centres = functional.normalize(torch.randn(num_topics, 8, generator=generator), dim=1) * 1.5 * 8**0.5
    latent = torch.cat([centres[topics], torch.randn(len(topics), 8, generator=generator)], dim=1)
    mixing = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q

    def features():
        seen = latent + 0.2 * torch.randn(latent.shape, generator=generator)
        return torch.cat([seen, torch.randn(len(seen), 8, generator=generator)], dim=1) @ mixing

    query_features, passage_features = features(), features()
    teacher = 4 * functional.normalize(latent, dim=1)
    rng = np.random.default_rng(seed)
    queries = np.repeat(np.arange(len(topics)), 6)
    same_topic = queries // per_topic * per_topic + rng.integers(per_topic, size=len(queries))
    negatives = np.where(rng.random(len(queries)) < 0.5, same_topic, rng.integers(len(topics), size=len(queries)))
    queries, negatives = queries[negatives != queries], negatives[negatives != queries]
    scores = [(teacher[queries] * teacher[rows]).sum(dim=1).double().numpy() for rows in (queries, negatives)]
    clusters = None if sampling == "random" else topics.numpy()
    sampler = TopicBatches(
        ScoredPairs(queries, queries, negatives, *scores), clusters, batch_size=16, seed=seed, num_bins=1
    )

    torch.manual_seed(seed)
    student = torch.nn.Linear(24, 16)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    objective = DualTeacher(pairwise_weight=1 - in_batch, in_batch_weight=in_batch)
    for batch in islice(sampler, num_steps):
        rows = torch.tensor([group.query for group in batch])
        passages = torch.tensor([group.passages for group in batch]).flatten()
        labels = Labels(
            passages,
            rows[:, None],
            teacher_scores=torch.tensor([group.teacher_scores for group in batch]),
            in_batch_teacher=teacher[rows] @ teacher[passages].T,
        )
        optimizer.zero_grad()
        objective.loss(student(query_features[rows]), student(passage_features[passages]), labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = student(query_features) @ student(passage_features).T
    return (1 / (scores >= scores.diagonal()[:, None]).sum(dim=1)).mean().item()


def test_topics_help_the_in_batch_teacher_and_hardly_the_pairwise_one():
    """The reading of Table 4, on topics that lie far apart."""
    for seed in range(2):
        random, topics = (mrr_after_training(sampling, seed=seed, in_batch=1.0) for sampling in ("random", "tas"))
        assert topics > random + 0.1
        random, topics = (mrr_after_training(sampling, seed=seed, in_batch=0.0) for sampling in ("random", "tas"))
        assert topics == pytest.approx(random, abs=0.06)


def test_the_pairwise_loss_is_margin_mse():
    scores, teacher = torch.randn(3, 2), torch.randn(3, 2)
    by_hand = ((scores[:, 0] - scores[:, 1]) - (teacher[:, 0] - teacher[:, 1])).square().mean()
    torch.testing.assert_close(margin_mse(scores, teacher), by_hand)
