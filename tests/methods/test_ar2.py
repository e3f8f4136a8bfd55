"""AR2: the card's reference vectors, the properties of its losses, its schedule, and a small run of the whole loop."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from raydr.artifacts import open_artifact, write_artifact
from raydr.config import Component
from raydr.errors import ConfigError
from raydr.methods.ar2 import Adversarial, Ar2, Ar2Config, _warn_of_guessing, adversarial, distillation, rewards
from raydr.stages.score import open_scores, score_examples
from raydr.train.config import TrainConfig
from raydr.train.objective import Labels
from raydr.train.sampling import ScoredBatches
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


@pytest.mark.parametrize("seed", range(3))
def test_stationary_points(seed):
    torch.manual_seed(seed)
    s = torch.randn(4, 8, dtype=torch.float64).float()
    g = rewards(s).abs().log().requires_grad_()
    (gradient,) = torch.autograd.grad(adversarial(g, s, reduction="sum"), g)
    assert gradient.abs().max() < 1e-5
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
    with pytest.raises(ConfigError, match="ranker's scores"):
        Adversarial(config).loss(queries, passages, Labels(torch.arange(12), torch.arange(0, 12, 4)[:, None]))


# --- candidates and their scores


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("ar2") / "examples", negatives=6)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory) -> Component:
    model = tiny_checkpoint(tmp_path_factory.mktemp("ranker") / "model", seed=4)
    args = {"model": str(model), "max_pair_tokens": 48, "precision": "float32", "num_threads": 1}
    return Component(import_path="raydr.encoders.cross_encoder:CrossEncoderReranker", args=args)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, examples, ranker):
    torch.manual_seed(0)  # the head of this checkpoint is new
    return score_examples(examples, ranker, tmp_path_factory.mktemp("ar2") / "scores", use_ray=False)


def test_scores_made_ahead_are_those_of_the_moment(examples, ranker, scored):
    torch.manual_seed(0)
    scorer = ranker.build()
    stored = open_scores(scored.path, examples)
    assert len(stored) == len(examples)
    for row in (0, 5, len(examples) - 1):
        rows = np.concatenate([examples.positives(row), examples.negatives(row)])
        expected = scorer.score([(examples.query(row), passage) for passage in examples.passages(rows)])
        np.testing.assert_allclose(stored[row], expected, atol=1e-5)


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


# --- the loop


class Recording:
    """Steps that do nothing but say what they were asked for."""

    def __init__(self, tmp_path: Path) -> None:
        self.train_config = TrainConfig(batch_size=4, max_steps=1, learning_rate=1e-5)
        self.calls: list[tuple] = []
        self._out = tmp_path

    def index(self, method, folder):
        self.calls.append(("index", folder, method.args.get("model")))
        return self._out / folder

    def base(self, method):
        return self.index(method, "base")

    def mine(self, method, index, folder):
        self.calls.append(("mine", folder, str(index)))
        return folder

    def dev(self, method, index):
        return None

    def score(self, ranker, examples, folder):
        self.calls.append(("score", folder, ranker.args["model"], examples))
        return self._made(folder)

    def train(self, method, config, examples, folder, *, dev=None, start=None, keep_state=False):
        self.calls.append(("train", folder, config, examples, start, method))
        return self._made(folder)

    def _made(self, folder):
        with write_artifact(self._out / folder, kind="nothing", config={}):
            pass
        return open_artifact(self._out / folder)


@pytest.mark.parametrize("first", ["ranker", "retriever"])
def test_schedule(tmp_path, first):
    steps = Recording(tmp_path)
    method = Ar2(Ar2Config(rounds=2, ranker_steps=5, retriever_steps=15, ranker_warmup_steps=7, first=first))
    trained = method.fit(steps)
    kinds = [call[0] for call in steps.calls]
    assert kinds.count("index") == kinds.count("mine") == 3  # the first index, and one refresh a round
    trainings = {call[1]: call for call in steps.calls if call[0] == "train"}
    assert trainings["ranker-warmup"][2].max_steps == 7
    for player, each in (("ranker", 5), ("retriever", 15)):
        plans = [trainings[f"round-0{number}/{player}"][2] for number in (1, 2)]
        assert [plan.max_steps for plan in plans] == [each, 2 * each]
        assert {plan.schedule_steps for plan in plans} == {2 * each}
        # One schedule: the second round begins at the rate where the first ended.
        assert plans[0].learning_rate_at(each) == plans[1].learning_rate_at(each)
        starts = [trainings[f"round-0{number}/{player}"][4] for number in (1, 2)]
        assert starts == [None, tmp_path / f"round-01/{player}/state"]
    assert trainings["round-02/retriever"][3] == "round-01/examples"  # candidates of the round before
    names = [call[1] for call in steps.calls if call[1].startswith("round-01/")]
    order = [name for name in names if name in ("round-01/ranker", "round-01/retriever")]
    assert order == ([f"round-01/{player}" for player in ("ranker", "retriever")][:: 1 if first == "ranker" else -1])
    scorer = next(call for call in steps.calls if call[0] == "score")[2]
    assert ("round-01/ranker" if first == "ranker" else "ranker-warmup") in scorer
    assert "round-02/retriever" in trained.args["model"]
    assert "round-02/ranker" in trained.args["trained_ranker"]


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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_loop_is_one_run_that_can_be_killed(ray_cluster, tmp_path, tiny_beir, monkeypatch):
    """Two rounds on the tiny corpus, stopped in the middle of the second; run again, it goes on and ends."""
    from raydr.config import validate
    from raydr.steps import Steps
    from raydr.verbs.config import RunConfig
    from raydr.verbs.train import train

    model = tiny_checkpoint(tmp_path / "model")
    (tiny_beir / "qrels/train.tsv").write_text((tiny_beir / "qrels/test.tsv").read_text())
    config = validate(
        RunConfig,
        {
            "out": str(tmp_path / "out"),
            "runtime": "local",
            "data": {"path": str(tiny_beir), "split": "test"},
            "method": {
                "import_path": "raydr.methods.ar2:Ar2",
                "args": {
                    "model": str(model),
                    "precision": "float32",
                    "backend": "torch",
                    "num_threads": 1,
                    "num_negatives": 3,
                    "rounds": 2,
                    "ranker_steps": 2,
                    "retriever_steps": 3,
                    "ranker_warmup_steps": 2,
                    "ranker": {
                        "import_path": "raydr.methods.cross_encoder:CrossEncoderRanker",
                        "args": {"model": str(model), "max_pair_tokens": 48},
                    },
                },
            },
            "index": {"factory": "Flat", "bm25": None},
            "mine": {"num_negatives": 6},
            "train": {
                "batch_size": 2,
                "worker_cpus": 0.5,
                "max_steps": 1,
                "learning_rate": 1e-3,
                "checkpoint_every": 2,
            },
        },
        where="test",
    )
    made: list[str] = []
    train_step = Steps.train

    def counting(self, method, plan, examples, folder, **options):
        made.append(folder)
        if folder == "round-02/retriever" and made.count(folder) == 1:
            raise KeyboardInterrupt
        return train_step(self, method, plan, examples, folder, **options)

    monkeypatch.setattr(Steps, "train", counting)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    before = open_artifact(config.out / "round-01/retriever").manifest.created_at
    method = Component.model_validate(train(config).manifest.details["method"])
    assert open_artifact(config.out / "round-01/retriever").manifest.created_at == before
    assert open_artifact(config.out / "round-02/retriever").manifest.details["steps"] == 6
    built = method.build()
    reranker = built.build_reranker()
    assert type(reranker).__name__ == "CrossEncoderReranker"
    assert built.encoder().dim == 48
    indexed = open_artifact(config.out / "round-02/index").manifest.details["encoder_version"]
    assert indexed == built.encoder().version
