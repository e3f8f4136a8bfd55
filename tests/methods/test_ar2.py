"""AR2: the card's reference vectors, the properties of its losses, and what its steps do to either player."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from raydr.config import Component
from raydr.encoders.colbert import load_colbert
from raydr.encoders.cross_encoder import PairConfig, load_cross_encoder, save_cross_encoder
from raydr.encoders.factory import build_ranker
from raydr.errors import ConfigError
from raydr.methods.ar2 import Adversarial, Ar2Config, _warn_of_guessing, adversarial, distillation, rewards
from raydr.methods.base import build_method
from raydr.stages.config import ScoreConfig
from raydr.stages.score import open_scores, score_examples
from raydr.train import grad_cache
from raydr.train.batches import to_batch, tokenized
from raydr.train.objective import EmbeddingObjective, Labels, TrainBatch
from raydr.train.sampling import ScoredBatches
from tests.train.test_grad_cache import Plain
from tests.train.tiny import tiny_checkpoint, write_topic_examples

S = torch.tensor([[2.0, 1.0, 3.0]])


def test_reference_vector():
    g = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    torch.testing.assert_close(rewards(S), torch.tensor([[-0.693147, -0.313262, -1.313262]]), atol=1e-4, rtol=0)
    adv, dist = adversarial(g, S), distillation(g, S)
    assert adv.item() == pytest.approx(2.905693, abs=1e-4)
    assert dist.item() == pytest.approx(1.306717, abs=1e-4)
    (adv_gradient,) = torch.autograd.grad(adv, g, retain_graph=True)
    (dist_gradient,) = torch.autograd.grad(dist, g, retain_graph=True)
    torch.testing.assert_close(adv_gradient, torch.tensor([[0.643254, 0.178373, -0.821627]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(dist_gradient, torch.tensor([[0.331388, 0.121911, -0.453299]]), atol=1e-4, rtol=0)
    total = 0.5 * adv + 0.5 * dist
    assert total.item() == pytest.approx(2.106205, abs=1e-4)
    (gradient,) = torch.autograd.grad(total, g)
    torch.testing.assert_close(gradient, torch.tensor([[0.487321, 0.150142, -0.637463]]), atol=1e-4, rtol=0)
    assert adversarial(g, S, form="paper").item() == pytest.approx(-0.813262, abs=1e-4)


def test_every_pair_bounds_the_whole_group():
    torch.manual_seed(0)
    s = torch.randn(200, 16) * 4
    whole = functional.log_softmax(s, dim=1)[:, :1]
    assert (whole <= functional.logsigmoid(s[:, :1] - s[:, 1:]) + 1e-6).all()


def test_the_adversarial_step_raises_what_the_ranker_takes_for_gold():
    g = torch.zeros(1, 6, requires_grad=True)
    s = torch.tensor([[0.0, 6.0, -6.0, -6.0, -6.0, -6.0]])
    (gradient,) = torch.autograd.grad(adversarial(g, s), g)
    assert gradient[0, 1] < gradient[0, 2:].min() - 0.1


@pytest.mark.parametrize("seed", range(6))
def test_stationary_points(seed):
    """Of moderate scores, because the epsilon inside the logarithms moves the point by itself times the sum of |r|."""
    torch.manual_seed(seed)
    s = torch.randn(4, 8) / 2
    g = rewards(s).abs().log().requires_grad_()
    (gradient,) = torch.autograd.grad(adversarial(g, s, reduction="sum"), g)
    assert gradient.abs().max() < 1e-6
    g = (s / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(distillation(g, s, temperature=2.0), g)
    assert gradient.abs().max() < 1e-6


def test_nothing_of_the_loss_reaches_the_ranker():
    g, s = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    (adversarial(g, s) + distillation(g, s)).backward()
    assert s.grad is None
    assert g.grad is not None


def test_mean_does_not_depend_on_the_batch_and_sum_does():
    torch.manual_seed(1)
    g, s = torch.randn(3, 5), torch.randn(3, 5)
    twice = (torch.cat([g, g]), torch.cat([s, s]))
    torch.testing.assert_close(adversarial(*twice), adversarial(g, s))
    torch.testing.assert_close(adversarial(*twice, reduction="sum"), 2 * adversarial(g, s, reduction="sum"))
    torch.testing.assert_close(distillation(*twice), distillation(g, s))


def test_the_objective_scores_each_querys_own_group():
    torch.manual_seed(2)
    queries, passages, teacher = torch.randn(3, 4), torch.randn(12, 4), torch.randn(3, 4)
    labels = Labels(torch.arange(12), torch.arange(0, 12, 4)[:, None], teacher_scores=teacher)
    config = Ar2Config(adv_lambda=0.25, score_scale=2.0)
    output = Adversarial(config).loss(queries, passages, labels)
    g = 2 * labels.groups(queries @ passages.T)
    torch.testing.assert_close(output.loss, 0.25 * adversarial(g, teacher) + 0.75 * distillation(g, teacher))
    only_distilled = Adversarial(Ar2Config(adv_lambda=0.0, score_scale=2.0)).loss(queries, passages, labels)
    torch.testing.assert_close(only_distilled.loss, distillation(g, teacher))
    as_printed = Ar2Config(adv_form="paper", adv_reduction="sum", ranker_temperature=3.0)
    output = Adversarial(as_printed).loss(queries, passages, labels)
    adv = adversarial(g / 2, teacher, form="paper", reduction="sum")
    torch.testing.assert_close(output.loss, (adv + distillation(g / 2, teacher, temperature=3.0)) / 2)
    scaled = Adversarial(Ar2Config(score_scale=2.0, ranker_scale=3.0)).loss(queries, passages, labels)
    torch.testing.assert_close(scaled.loss, (adversarial(g, 3 * teacher) + distillation(g, 3 * teacher)) / 2)
    shares = {"retriever_share": g, "ranker_share": 3 * teacher}
    for name, scores in shares.items():
        torch.testing.assert_close(scaled.metrics[name], functional.softmax(scores, dim=1)[:, 0].mean())
    assert scaled.metrics.keys() == {"adversarial", "distillation", *shares}
    with pytest.raises(ConfigError, match="ranker's scores"):
        Adversarial(config).loss(queries, passages, Labels(torch.arange(12), torch.arange(0, 12, 4)[:, None]))


# --- candidates and their scores


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("ar2") / "examples", negatives=6)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory) -> Component:
    """Its head is new, and larger than a new one, so that scores differ by more than rounding."""
    start, folder = (tmp_path_factory.mktemp("ranker") / name for name in ("start", "model"))
    network = load_cross_encoder(PairConfig(model=str(tiny_checkpoint(start, seed=4))))
    network.transformer.classifier.weight.data *= 100
    folder.mkdir()
    save_cross_encoder(network, str(start), folder)
    args = {"model": str(folder), "max_pair_tokens": 48, "precision": "float32", "num_threads": 1}
    return Component(import_path="raydr.encoders.cross_encoder:CrossEncoderReranker", args=args)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, examples, ranker):
    return score_examples(examples, ranker, ScoreConfig(), tmp_path_factory.mktemp("ar2") / "scores", use_ray=False)


def test_scores_made_ahead_are_those_of_the_moment(examples, ranker, scored):
    """And the retriever's loss with them is the same."""
    scorer = ranker.build()
    stored = open_scores(scored.path, examples)
    assert len(stored) == len(examples)
    for row in (0, 5, len(examples) - 1):
        rows = np.concatenate([examples.positives(row), examples.negatives(row)])
        expected = scorer.score([(examples.query(row), passage) for passage in examples.passages(rows)])
        np.testing.assert_allclose(stored[row], expected, atol=1e-5)
    groups = next(iter(ScoredBatches(examples, scores=scored.path, batch_size=8, num_negatives=3, seed=0)))
    of_the_moment = [
        scorer.score([(examples.query(group.query), passage) for passage in examples.passages(group.passages)])
        for group in groups
    ]
    queries, passages = torch.randn(8, 16), torch.randn(32, 16)
    ahead, now = (
        Adversarial(Ar2Config()).loss(
            queries, passages, Labels(torch.arange(32), torch.arange(0, 32, 4)[:, None], torch.tensor(np.array(scores)))
        )
        for scores in ([group.teacher_scores for group in groups], of_the_moment)
    )
    assert np.ptp(of_the_moment) > 0.01
    torch.testing.assert_close(ahead.loss.float(), now.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "limit", "load"),
    [
        (
            "cross_encoder:CrossEncoderRanker",
            "max_pair_tokens",
            lambda folder: load_cross_encoder(PairConfig(model=folder)),
        ),
        ("colbert:ColBertRanker", "max_passage_tokens", load_colbert),
    ],
)
def test_the_ranker_scores_without_dropout(examples, ranker, name, limit, load):
    folder = ranker.args["model"]
    assert json.loads((Path(folder) / "config.json").read_text())["hidden_dropout_prob"] > 0
    pairs = [(examples.query(row), passage) for row in range(4) for passage in examples.passages(range(5))]
    scorer = build_ranker(Component(import_path=f"raydr.methods.{name}", args={"model": folder, limit: 48}))
    assert (scorer.score(pairs) == scorer.score(pairs)).all()
    training, ids = load(folder).train(), torch.arange(1, 9)[None]
    assert not torch.equal(training(ids), training(ids))  # there is dropout to be without


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def one_step(component: Component, examples, into: Path) -> dict[str, str]:
    """Trains a method's network for one step of plain gradient descent and saves it; the digests of its files."""
    method = build_method(component)
    groups = next(iter(method.build_batches(examples, batch_size=4, seed=0)))
    tokenizer, objective = method.tokenizer(), method.build_objective()
    batch: TrainBatch = to_batch(tokenized(groups, tokenizer, examples.artifact.path), tokenizer.pad_id)
    network = method.build_model().train()
    engine = Plain(network)
    if isinstance(objective, EmbeddingObjective):
        grad_cache.backward(engine, objective, batch, chunk_tokens=None)
    else:
        engine.backward(objective(engine, batch).loss)
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    into.mkdir()
    method.save_model(network, into)
    return digests(into)


def test_a_players_step_leaves_the_other_as_it_is(examples, ranker, scored, tmp_path):
    """Freezing: the retriever learns from scores alone, so nothing of the ranker can move, and the other way round."""
    folders = {"ranker": Path(ranker.args["model"]), "retriever": tiny_checkpoint(tmp_path / "retriever", seed=1)}
    before = {name: digests(folder) for name, folder in folders.items()}
    pairs = [(examples.query(0), passage) for passage in examples.passages(range(6))]
    scorer = ranker.build()
    scores = scorer.score(pairs)

    args = {"model": str(folders["retriever"]), "precision": "float32", "num_negatives": 3}
    ar2 = Component(import_path="raydr.methods.ar2:Ar2", args={**args, "scores": str(scored.path)})
    trained = one_step(ar2, examples, tmp_path / "trained-retriever")
    assert trained["model.safetensors"] != before["retriever"]["model.safetensors"]
    assert {name: digests(folder) for name, folder in folders.items()} == before
    assert (scorer.score(pairs) == scores).all()

    player = {"model": str(folders["ranker"]), "num_negatives": 3, "max_pair_tokens": 48}
    cross_encoder = Component(import_path="raydr.methods.cross_encoder:CrossEncoderRanker", args=player)
    trained = one_step(cross_encoder, examples, tmp_path / "trained-ranker")
    assert trained["model.safetensors"] != before["ranker"]["model.safetensors"]
    assert {name: digests(folder) for name, folder in folders.items()} == before


def test_negatives_are_drawn_uniformly_and_carry_their_scores(examples, scored):
    batches = iter(ScoredBatches(examples, scores=scored.path, batch_size=len(examples), num_negatives=2, seed=0))
    stored = open_scores(scored.path, examples)
    drawn: Counter[int] = Counter()
    for _ in range(400):
        for group in next(batches):
            positives, negatives = examples.positives(group.query), examples.negatives(group.query)
            own = dict(zip([*positives, *negatives], stored[group.query], strict=True))
            assert group.passages[0] in positives
            assert len(set(group.passages[1:])) == 2
            assert set(group.passages[1:]) <= set(negatives.tolist())
            assert group.teacher_scores == tuple(pytest.approx(own[passage]) for passage in group.passages)
            if group.query == 0:
                drawn.update(group.passages[1:])
    counts = np.array([drawn[row] for row in examples.negatives(0).tolist()])
    assert np.abs(counts - 400 * 2 / 6).max() < 3 * np.sqrt(400 * (1 / 3) * (2 / 3))


def test_scores_of_other_examples_are_refused(tmp_path, scored):
    from raydr.errors import ArtifactError

    others = write_topic_examples(tmp_path / "others", seed=5)
    with pytest.raises(ArtifactError, match="other examples"):
        open_scores(scored.path, others)


def test_a_ranker_that_guesses_is_told(scored, examples, capsys):
    right = total = 0
    for row, own in enumerate(open_scores(scored.path, examples)):
        positives, negatives = own[: len(examples.positives(row))], own[len(examples.positives(row)) :]
        right += sum(positive > negative for positive in positives for negative in negatives)
        total += len(positives) * len(negatives)
    assert scored.manifest.details["ordered_share"] == pytest.approx(right / total, abs=1e-4)
    _warn_of_guessing(0.95)
    assert not capsys.readouterr().err
    _warn_of_guessing(0.52)
    assert "only 52% of the training pairs" in capsys.readouterr().err
