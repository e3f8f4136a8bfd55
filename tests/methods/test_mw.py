"""MW loss: the card's reference numbers, its theory, its gradients, and memory that does not grow with the pairs."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydr.artifacts import write_artifact
from raydr.config import Component
from raydr.data.examples import Example, ExampleSet, write_examples
from raydr.errors import ConfigError
from raydr.evaluation.curves import roc_curve
from raydr.losses import contrastive
from raydr.methods.base import build_method
from raydr.methods.mw import MannWhitney, mann_whitney, pooled_area
from raydr.train.batches import to_batch, tokenized
from raydr.train.objective import EmbeddingObjective, Labels
from raydr.train.sampling import Group
from raydr.types import Passage, Query

SCORES = torch.tensor([[0.9, 0.2], [0.6, 0.5]])
DIAGONAL = torch.eye(2, dtype=torch.bool)


def random_batch(num_queries, group_size, *, seed=0):
    """Scores, and the positives of a query-major batch."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_queries, num_queries * group_size, generator=generator) * 2 - 1
    return scores, functional.one_hot(torch.arange(num_queries) * group_size, num_queries * group_size).bool()


def all_pairs(scores, positives, temperature, *, same_query=False):
    """The definition, with the whole matrix of pairs: (positive - negative) of every two."""
    differences = scores[positives][:, None] - scores[~positives]
    losses = -functional.logsigmoid(differences / temperature)
    if same_query:
        rows, negative_rows = positives.nonzero()[:, 0], (~positives).nonzero()[:, 0]
        return losses[rows[:, None] == negative_rows].mean()
    return losses.mean()


def gradient(loss_of, scores):
    scores = scores.clone().requires_grad_()
    loss = loss_of(scores)
    loss.backward()
    return loss.detach(), scores.grad


class TestReferenceVector:
    @pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.564073), (0.1, 0.352837), (0.01, 2.500011)])
    def test_mean(self, temperature, expected):
        assert mann_whitney(SCORES, DIAGONAL, temperature=temperature).item() == pytest.approx(expected, abs=2e-6)

    @pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.128147), (0.1, 0.705674), (0.01, 5.000023)])
    def test_paper(self, temperature, expected):
        loss = mann_whitney(SCORES, DIAGONAL, temperature=temperature, reduction="paper")
        assert loss.item() == pytest.approx(expected, abs=2e-6)

    @pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.573791), (0.1, 0.657087), (0.01, 5.000023)])
    def test_contrastive_beside_it(self, temperature, expected):
        assert contrastive(SCORES, DIAGONAL, temperature=temperature).item() == pytest.approx(expected, abs=2e-6)

    def test_area(self):
        assert pooled_area(SCORES[DIAGONAL], SCORES[~DIAGONAL]).item() == 0.75


@pytest.mark.parametrize(("num_queries", "num_negatives"), [(2, 0), (4, 1), (5, 3)])
def test_the_pool_holds_every_other_score(num_queries, num_negatives):
    scores, positives = random_batch(num_queries, 1 + num_negatives)
    pool = num_queries * (num_negatives * num_queries + num_queries - 1)
    assert (~positives).sum() == pool
    mean, paper = (mann_whitney(scores, positives, temperature=0.1, reduction=name) for name in ("mean", "paper"))
    torch.testing.assert_close(paper, mean * pool)


def test_sees_the_shift_of_a_query_that_contrastive_does_not():
    scores, positives = random_batch(4, 2)
    shifted = scores + torch.tensor([[0.0], [0.5], [-0.3], [1.0]])
    before, after = (contrastive(s, positives, temperature=0.1) for s in (scores, shifted))
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)
    before, after, everywhere = (
        mann_whitney(s, positives, temperature=0.1).item() for s in (scores, shifted, scores + 0.7)
    )
    assert abs(before - after) > 0.1
    assert before == pytest.approx(everywhere, abs=1e-5)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 4), st.floats(0.01, 10), st.booleans())
@settings(max_examples=60)
def test_bounds_the_area_over_the_curve(seed, num_queries, group_size, temperature, tied):
    scores, positives = random_batch(num_queries, group_size, seed=seed)
    scores = scores.round(decimals=1) if tied else scores
    lost = (scores[positives][:, None] <= scores[~positives]).float().mean().item()
    assert lost <= mann_whitney(scores, positives, temperature=temperature).item() / np.log(2) + 1e-6


class TestGradient:
    @pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
    def test_is_the_cards_formula_and_autograds(self, temperature):
        scores, positives = random_batch(5, 3)
        loss, computed = gradient(lambda s: mann_whitney(s, positives, temperature=temperature, chunk_size=2), scores)
        expected_loss, expected = gradient(lambda s: all_pairs(s, positives, temperature), scores)
        torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(computed, expected, atol=1e-6, rtol=1e-5)

        num_pairs = positives.sum() * (~positives).sum()
        pulls = ((scores[~positives] - scores[positives][:, None]) / temperature).sigmoid() / (num_pairs * temperature)
        torch.testing.assert_close(computed[positives], -pulls.sum(dim=1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(computed[~positives], pulls.sum(dim=0), atol=1e-6, rtol=1e-5)

    def test_sums_to_zero_over_the_batch_but_not_over_a_query(self):
        scores, positives = random_batch(5, 2)
        _, computed = gradient(lambda s: mann_whitney(s, positives, temperature=0.1), scores)
        assert computed.sum().item() == pytest.approx(0, abs=1e-6)
        assert (computed.sum(dim=1).abs() > 1e-3).all()
        _, of_contrastive = gradient(lambda s: contrastive(s, positives, temperature=0.1), scores)
        torch.testing.assert_close(of_contrastive.sum(dim=1), torch.zeros(5), atol=1e-6, rtol=0)

    def test_limits_of_the_temperature(self):
        scores, positives = random_batch(4, 2)
        differences = scores[~positives] - scores[positives][:, None]
        cold, hot = (mann_whitney(scores, positives, temperature=t).item() for t in (1e-4, 1e4))
        assert 1e-4 * cold == pytest.approx(differences.relu().mean().item(), abs=1e-4)
        assert hot == pytest.approx(np.log(2) + differences.mean().item() / 2e4, abs=1e-6)

    def test_reaches_both_towers(self):
        queries, passages = torch.randn(2, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        MannWhitney(temperature=0.1).loss(queries, passages, labels([0, 1, 2, 3], [[0], [2]])).loss.backward()
        assert (queries.grad.abs().sum(dim=1) > 0).all()
        assert (passages.grad.abs().sum(dim=1) > 0).all()


class TestRestriction:
    def test_within_a_query_it_is_ranknet(self):
        scores, positives = random_batch(5, 3)
        expected = gradient(lambda s: all_pairs(s, positives, 0.1, same_query=True), scores)
        clusters = torch.arange(5)
        computed = gradient(
            lambda s: mann_whitney(s, positives, temperature=0.1, clusters=clusters, chunk_size=2), scores
        )
        torch.testing.assert_close(computed, expected, atol=1e-6, rtol=1e-5)

    def test_one_cluster_restricts_nothing(self):
        scores, positives = random_batch(4, 2)
        restricted = mann_whitney(scores, positives, clusters=torch.full((4,), 7), temperature=0.1)
        torch.testing.assert_close(restricted, mann_whitney(scores, positives, temperature=0.1))

    def test_clusters_are_losses_of_their_own(self):
        scores, positives = random_batch(5, 2)
        clusters = torch.tensor([3, 0, 3, 0, 3])
        mixed = mann_whitney(scores, positives, temperature=0.1, clusters=clusters)
        alone = [mann_whitney(scores[clusters == c], positives[clusters == c], temperature=0.1) for c in (3, 0)]
        torch.testing.assert_close(mixed, (3 * alone[0] + 2 * alone[1]) / 5)

    def test_of_the_objective(self):
        scores, positives = random_batch(4, 1)
        batch = labels([0, 1, 2, 3], [[0], [1], [2], [3]], clusters=torch.tensor([0, 0, 1, 1]))

        def loss(within):
            return MannWhitney(temperature=0.1, within=within).loss(scores, torch.eye(4), batch).loss

        torch.testing.assert_close(loss("batch"), mann_whitney(scores, positives, temperature=0.1))
        for within, clusters in (("cluster", batch.clusters), ("query", torch.arange(4))):
            expected = mann_whitney(scores, positives, temperature=0.1, clusters=clusters)
            torch.testing.assert_close(loss(within), expected)

    def test_clusters_must_be_there(self):
        objective = MannWhitney(within="cluster")
        with pytest.raises(ConfigError, match="batches that carry clusters"):
            objective.loss(torch.eye(2), torch.eye(2), labels([0, 1], [[0], [1]]))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while they are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self.alive:
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage):
        key, size = id(storage), storage.nbytes()
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed():
            self.alive.discard(key)
            self.now -= size

        weakref.finalize(storage, freed)


class TestChunking:
    @pytest.mark.parametrize("chunk_size", [1, 7])
    @pytest.mark.parametrize("clusters", [None, torch.arange(16) % 3])
    def test_changes_nothing(self, chunk_size, clusters):
        scores, positives = random_batch(16, 3)

        def run(size):
            return gradient(
                lambda s: mann_whitney(s, positives, temperature=0.05, clusters=clusters, chunk_size=size), scores
            )

        torch.testing.assert_close(run(chunk_size), run(1000), atol=1e-6, rtol=1e-5)

    def test_peak_memory(self):
        scores, positives = random_batch(64, 2)
        num_negatives = int((~positives).sum())

        def peak(loss_of):
            with PeakMemory() as memory:
                gradient(loss_of, scores)
            return memory.peak

        plain = peak(lambda s: all_pairs(s, positives, 0.1))
        whole, chunked = (
            peak(lambda s, size=size: mann_whitney(s, positives, temperature=0.1, chunk_size=size)) for size in (64, 4)
        )
        assert plain > 2 * 64 * num_negatives * 4  # the differences, and what autograd keeps for the way back
        assert whole > 64 * num_negatives * 4
        assert chunked < 4 * 4 * num_negatives * 4 + 10 * num_negatives * 4  # a few chunks, and a few lists of scores
        assert chunked < whole / 4


class TestStability:
    def test_arguments_of_hundreds(self):
        for scores in (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.tensor([[-1.0, 1.0], [1.0, -1.0]])):
            loss, computed = gradient(lambda s: mann_whitney(s, DIAGONAL), scores)
            assert loss.isfinite()
            assert computed.isfinite().all()
        assert loss.item() == pytest.approx(200)
        assert computed.tolist() == [[-50.0, 50.0], [50.0, -50.0]]

    def test_bfloat16_is_raised_to_float32_first(self):
        scores = random_batch(4, 2)[0].bfloat16()
        positives = random_batch(4, 2)[1]
        loss = mann_whitney(scores, positives)
        assert loss.dtype == torch.float32
        assert loss == mann_whitney(scores.float(), positives)


def labels(passage_rows, positive_rows, **more):
    return Labels(torch.tensor(passage_rows), torch.tensor(positive_rows), **more)


class TestMasking:
    def test_what_is_known_as_positive_is_no_negative(self):
        # Passage 7 occurs twice and is right for both queries; the second query has another positive, 8, in the batch.
        batch = labels([7, 1, 7, 8], [[7, -1], [7, 8]])
        assert batch.positives.tolist() == [[True, False, True, False], [True, False, True, True]]
        scores = torch.tensor([[0.9, 0.1, 0.9, 0.3], [0.5, 0.2, 0.5, 0.7]])
        _, computed = gradient(lambda s: MannWhitney(temperature=0.1).loss(s, torch.eye(4), batch).loss, scores)
        assert ((computed > 0) == ~batch.positives).all()  # only negatives are pushed down
        assert ((computed < 0) == batch.positives).all()

    def test_a_copy_of_a_positive_is_no_negative(self, tmp_path):
        """Another query's passage with the same text, under another id; with the labels that training gives a batch."""
        passages = {id_: Passage(id_, text) for id_, text in {"a": "cats purr", "b": "cats purr", "c": "waves"}.items()}
        made = [
            Example(Query("q0", "cat"), ["a"]),
            Example(Query("q1", "pet"), ["b"]),
            Example(Query("q2", "sea"), ["c"]),
        ]
        with write_artifact(tmp_path / "examples", kind="examples", config={}) as writer:
            write_examples(writer.path, made, passages)
        examples = ExampleSet.open(tmp_path / "examples")
        groups = [Group(row, (int(examples.positives(row)[0]),)) for row in range(3)]
        tokenizer = build_method(Component(import_path="raydr.methods.mw:MwLoss")).tokenizer()
        batch = to_batch(tokenized(groups, tokenizer, examples.artifact.path), tokenizer.pad_id).labels
        assert batch.positives.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
        scores = torch.tensor([[0.9, 0.9, 0.1], [0.8, 0.8, 0.2], [0.3, 0.3, 0.7]])
        _, computed = gradient(lambda s: MannWhitney(temperature=0.1).loss(s, torch.eye(3), batch).loss, scores)
        assert ((computed > 0) == ~batch.positives).all()

    def test_a_repeated_positive_adds_no_pair_and_no_weight(self):
        scores, positives = random_batch(3, 2)
        columns = [*range(6), 0]  # the first query's positive once more, which is a negative of the others
        clusters = torch.arange(3)
        loss = mann_whitney(scores[:1], positives[:1], temperature=0.1)
        repeated = mann_whitney(scores[:1, columns], positives[:1, columns], temperature=0.1)
        torch.testing.assert_close(repeated, loss)
        within = mann_whitney(scores[:, columns], positives[:, columns], temperature=0.1, clusters=clusters)
        alone = [
            mann_whitney(scores[row : row + 1, columns], positives[row : row + 1, columns], temperature=0.1)
            for row in range(3)
        ]
        torch.testing.assert_close(within, sum(alone) / 3)

    def test_several_positives_share_the_weight_of_their_query(self):
        scores = torch.tensor([[0.5, 0.3, 0.1]])
        both = mann_whitney(scores, torch.tensor([[True, True, False]]), temperature=0.1)
        each = [
            mann_whitney(scores[:, columns], torch.tensor([[True, False]]), temperature=0.1)
            for columns in ([0, 2], [1, 2])
        ]
        torch.testing.assert_close(both, sum(each) / 2)

    def test_nothing_to_compare_costs_nothing(self):
        for mask in (True, False):
            loss, computed = gradient(lambda s, m=mask: mann_whitney(s, torch.full((2, 2), m)), SCORES)
            assert loss == 0
            assert (computed == 0).all()

    def test_negatives_of_a_query_without_positive_stay_in_the_pool(self):
        positives = torch.tensor([[True, False], [False, False]])
        assert mann_whitney(SCORES, positives, temperature=1.0).item() == pytest.approx(
            functional.softplus(torch.tensor([0.2, 0.6, 0.5]) - 0.9).mean().item()
        )


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 40))
@settings(max_examples=40)
def test_area_of_a_batch_is_that_of_the_evaluation(seed, num_positives, num_negatives):
    rng = np.random.default_rng(seed)
    positives, negatives = (rng.integers(-3, 4, size=size).astype(float) for size in (num_positives, num_negatives))
    area = pooled_area(torch.tensor(positives), torch.tensor(negatives)).item()
    assert area == pytest.approx(roc_curve(positives, negatives).area, abs=1e-6)


def test_the_method_has_the_papers_settings():
    method = build_method(Component(import_path="raydr.methods.mw:MwLoss"))
    assert (method.config.temperature, method.config.num_negatives, method.config.normalize) == (0.01, 5, True)
    objective = method.build_objective()
    assert isinstance(objective, EmbeddingObjective)
    assert objective.gather


def trained(loss_of, *, seed, num_steps=300, num_topics=40):
    """Scores of 20 queries for each topic with one passage for each, after training on batches of 32.

    Topics lie dense in some regions and far apart in others, so that a score means something else in each.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 1.2, num_topics // 8).repeat_interleave(8)[:, None]
    regions = torch.randn(num_topics // 8, 16, generator=generator).repeat_interleave(8, dim=0)
    centres = regions + spread * torch.randn(num_topics, 16, generator=generator)

    def texts(topics):
        return centres[topics] + 0.5 * torch.randn(len(topics), 16, generator=generator)

    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    def score(queries, passages):
        return functional.normalize(network(queries), dim=1) @ functional.normalize(network(passages), dim=1).T

    for _ in range(num_steps):
        topics = torch.randint(num_topics, (32,), generator=generator)
        optimizer.zero_grad()
        loss_of(score(texts(topics), texts(topics)), topics[:, None] == topics, temperature=0.05).backward()
        optimizer.step()
    topics = torch.arange(num_topics)
    with torch.no_grad():
        return score(texts(topics.repeat(20)), texts(topics))


def figures(scores):
    """Pooled area and MRR where passage i is the right one for every query of topic i."""
    own = torch.arange(len(scores)) % scores.shape[1]
    positives = functional.one_hot(own, scores.shape[1]).bool()
    ranks = (scores >= scores[positives][:, None]).sum(dim=1)
    return pooled_area(scores[positives], scores[~positives]).item(), (1 / ranks).mean().item()


def test_learns_scores_that_one_threshold_fits():
    """The paper's claim: pooled AUC above InfoNCE's, ranking about as good."""
    for seed in range(3):
        (area, rank), (baseline_area, baseline_rank) = (
            figures(trained(loss, seed=seed)) for loss in (mann_whitney, contrastive)
        )
        assert area > baseline_area + 0.005
        assert rank == pytest.approx(baseline_rank, abs=0.03)


def test_shifting_queries_ruins_the_pooled_area_and_no_rank():
    scores = trained(contrastive, seed=0, num_steps=100)
    area, rank = figures(scores)
    offsets = 20 * torch.randn(len(scores), 1, generator=torch.Generator().manual_seed(0))
    shifted_area, shifted_rank = figures(scores + offsets)
    assert shifted_rank == pytest.approx(rank, abs=1e-3)
    assert area > 0.9
    assert shifted_area == pytest.approx(0.5, abs=0.05)
