"""AR2: the card's reference vectors, the properties of its losses, its schedule, and what its steps depend on.

The whole loop on Ray Train, killed and compared, is in `tests/verbs/test_train.py`.
"""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from raydr import artifacts
from raydr.artifacts import MANIFEST, open_artifact, write_artifact
from raydr.config import Component, validate
from raydr.encoders.colbert import load_colbert
from raydr.encoders.cross_encoder import PairConfig, load_cross_encoder, save_cross_encoder
from raydr.encoders.factory import build_ranker
from raydr.errors import ConfigError
from raydr.methods.ar2 import Adversarial, Ar2, Ar2Config, _warn_of_guessing, adversarial, distillation, rewards
from raydr.methods.base import build_method
from raydr.stages.config import MineConfig, ScoreConfig
from raydr.stages.score import open_scores, score_examples
from raydr.train import grad_cache
from raydr.train.batches import to_batch, tokenized
from raydr.train.config import TrainConfig
from raydr.train.objective import EmbeddingObjective, Labels, TrainBatch
from raydr.train.sampling import ScoredBatches
from raydr.verbs.config import RunConfig
from raydr.verbs.train import train
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


# --- the loop


class Recording:
    """Steps that do nothing but say what they were asked for."""

    def __init__(self, tmp_path: Path) -> None:
        self.train_config = TrainConfig(
            batch_size=4, max_steps=1, schedule_steps=3, learning_rate=1e-5, evaluate_every=1, patience=2
        )
        self.config = SimpleNamespace(mine=MineConfig())
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

    def evaluate(self, method, index, folder, *, baselines=None):
        self.calls.append(("evaluate", folder, str(index), method, list(baselines or {})))
        return {**(baselines or {}), folder: None}

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


def test_a_file_of_examples_is_refused(tmp_path):
    """It would be the candidates of every round."""
    steps = Recording(tmp_path)
    steps.config.mine = MineConfig(source_file="train.jsonl")
    with pytest.raises(ConfigError, match=r"mine\.source_file: AR2 mines new candidates in every round"):
        Ar2(Ar2Config()).fit(steps)
    assert not steps.calls


@pytest.mark.parametrize("first", ["ranker", "retriever"])
def test_schedule(tmp_path, first):
    steps = Recording(tmp_path)
    method = Ar2(Ar2Config(rounds=2, ranker_steps=5, retriever_steps=15, ranker_warmup_steps=7, first=first))
    trained = method.fit(steps)
    kinds = [call[0] for call in steps.calls]
    assert kinds.count("index") == kinds.count("mine") == 3  # the first index, and one refresh a round
    evaluations = [call for call in steps.calls if call[0] == "evaluate"]
    assert [call[1] for call in evaluations] == ["base", "round-01", "round-02"]
    assert [call[2] for call in evaluations] == [str(tmp_path / name) for name in ("base", "round-01", "round-02")]
    assert evaluations[-1][4] == ["base", "round-01"]  # beside which the last one stands
    assert evaluations[-1][3] == trained  # both players of the round
    turn = ["train", "index", "mine"] if first == "ranker" else ["index", "mine", "train"]
    assert kinds[-4:] == [*turn, "evaluate"]
    trainings = {call[1]: call for call in steps.calls if call[0] == "train"}
    warmup = trainings["ranker-warmup"][2]
    assert (warmup.max_steps, warmup.schedule_steps) == (7, None)  # the plan of the retriever is not the ranker's
    for player, each in (("ranker", 5), ("retriever", 15)):
        plans = [trainings[f"round-0{number}/{player}"][2] for number in (1, 2)]
        assert [plan.max_steps for plan in plans] == [each, 2 * each]
        assert {plan.schedule_steps for plan in plans} == {2 * each}
        assert {(plan.keep, plan.patience) for plan in plans} == {("last", 0)}
        # One schedule: the second round begins at the rate where the first ended.
        assert plans[0].learning_rate_at(each) == plans[1].learning_rate_at(each)
        starts = [trainings[f"round-0{number}/{player}"][4] for number in (1, 2)]
        assert starts == [None, tmp_path / f"round-01/{player}/state"]
    assert trainings["round-02/retriever"][3] == "round-01/examples"  # candidates of the round before
    # Algorithm 1 refreshes between the turns, so that the ranker learns from what the retriever now finds.
    refreshed = ["examples", "round-01/examples"] if first == "ranker" else ["round-01/examples", "round-02/examples"]
    assert [trainings[f"round-0{number}/ranker"][3] for number in (1, 2)] == refreshed
    names = [call[1] for call in steps.calls if call[1].startswith("round-01/")]
    order = [name for name in names if name in ("round-01/ranker", "round-01/retriever")]
    assert order == ([f"round-01/{player}" for player in ("ranker", "retriever")][:: 1 if first == "ranker" else -1])
    scorer = next(call for call in steps.calls if call[0] == "score")[2]
    assert ("round-01/ranker" if first == "ranker" else "ranker-warmup") in scorer
    assert "round-02/retriever" in trained.args["model"]
    assert "round-02/ranker" in trained.args["trained_ranker"]


def run_config(tmp_path: Path, tiny_beir: Path) -> dict:
    """Two rounds on the tiny corpus, with the dev queries of its only split."""
    for split in ("train", "dev"):
        (tiny_beir / f"qrels/{split}.tsv").write_text((tiny_beir / "qrels/test.tsv").read_text())
    model = str(tiny_checkpoint(tmp_path / "model"))
    ranker = {"model": model, "max_pair_tokens": 48}
    return {
        "out": str(tmp_path / "out"),
        "runtime": "local",
        "data": {"path": str(tiny_beir), "split": "test"},
        "method": {
            "import_path": "raydr.methods.ar2:Ar2",
            "args": {
                "model": model,
                "precision": "float32",
                "backend": "torch",
                "num_threads": 1,
                "num_negatives": 3,
                "rounds": 2,
                "ranker_steps": 2,
                "retriever_steps": 3,
                "ranker_warmup_steps": 2,
                "ranker": {"import_path": "raydr.methods.cross_encoder:CrossEncoderRanker", "args": ranker},
            },
        },
        "index": {"factory": "Flat", "bm25": None},
        "mine": {"num_negatives": 6, "dev_split": "dev"},
        "search": {"k": 5},
        "evaluate": {"num_resamples": 100, "num_permutations": 100},
        "train": {"batch_size": 2, "max_steps": 1, "learning_rate": 1e-3},
    }


def fitted(settings: dict) -> RunConfig:
    config = validate(RunConfig, settings, where="test")
    train(config)
    return config


START = {"corpus", "queries_train", "queries_dev", "examples", "examples_dev"}
START |= {f"base/{step}" for step in ("embed", "index", "search", "evaluate")}
WARMUP = {"ranker-warmup"}
ROUND = {"ranker", "scores", "retriever", "embed", "index", "examples", "search", "evaluate"}
ROUNDS = {f"round-{number:02d}/{step}" for number in (1, 2) for step in ROUND}
RANKED = {"round-01/ranker", "round-01/scores"}


SEARCHED = {name for name in START | ROUNDS if name.endswith(("/search", "/evaluate"))}


def test_what_a_setting_changes_is_made_again_and_nothing_else(tmp_path, tiny_beir, instant_training, made):
    settings = run_config(tmp_path, tiny_beir)
    out = fitted(settings).out
    assert made(out) == START | WARMUP | ROUNDS | {"method"}
    fitted(settings)
    assert made(out) == set()
    args = settings["method"]["args"]
    for section, change, remade in (
        (args, {"ranker_warmup_steps": 4}, WARMUP | ROUNDS | {"method"}),
        (args, {"ranker_learning_rate": 2e-6}, ROUNDS | {"method"}),
        (args, {"adv_lambda": 0.25}, (ROUNDS - RANKED) | {"method"}),
        (settings["train"], {"weight_decay": 0.1}, WARMUP | ROUNDS | {"method"}),
        (settings["search"], {"k": 4}, SEARCHED),
    ):
        section.update(change)
        fitted(settings)
        assert made(out) == remade, change


def test_a_run_killed_at_every_step_ends_as_one_that_was_not(tmp_path, tiny_beir, instant_training, monkeypatch):
    """Every artifact is interrupted once, when it lacks nothing but its manifest."""

    class Killed(BaseException):
        pass

    settings, killed = run_config(tmp_path, tiny_beir), set()
    settings["method"]["args"]["rounds"] = 1
    out = fitted(settings).out
    models = [out / folder / "model" for folder in ("ranker-warmup", "round-01/ranker", "round-01/retriever")]
    whole = [digests(folder) for folder in models]
    shutil.rmtree(out)

    def write(path: Path, content: bytes) -> None:
        if path.name == MANIFEST and path not in killed:
            killed.add(path)
            raise Killed
        written(path, content)

    written = artifacts.write_durably
    monkeypatch.setattr(artifacts, "write_durably", write)
    for _ in range(100):
        try:
            fitted(settings)
            break
        except Killed:
            pass
    first = {name for name in ROUNDS if name.startswith("round-01")}
    assert {str(path.parent.relative_to(out)) for path in killed} == START | WARMUP | first | {"method"}
    assert [digests(folder) for folder in models] == whole


def test_what_was_made_from_a_model_is_made_again_when_the_model_is(tmp_path, tiny_beir, instant_training, made):
    """The ranker starts from the model of another run, which is trained again and has the same name."""
    settings = run_config(tmp_path, tiny_beir)
    settings["method"]["args"]["rounds"], settings["mine"]["dev_split"] = 1, None
    contrastive = {"model": str(tmp_path / "model"), "num_threads": 1}
    other = {**settings, "out": str(tmp_path / "other")}
    other["method"] = {"import_path": "raydr.methods.contrastive:Contrastive", "args": contrastive}
    settings["method"]["args"]["ranker"]["args"]["model"] = str(fitted(other).out / "train/model")
    out = fitted(settings).out
    made(out)
    fitted({**other, "train": {**other["train"], "max_steps": 2}})
    fitted(settings)
    assert made(out) == WARMUP | {"method"} | {name for name in ROUNDS - SEARCHED if name.startswith("round-01")}


def test_every_round_is_measured_beside_those_before(tmp_path, tiny_beir, instant_training, capsys):
    settings = run_config(tmp_path, tiny_beir)
    out = fitted(settings).out
    table = (out / "round-02/evaluate/summary.txt").read_text()
    assert [name in table for name in ("base", "round-01", "round-02")] == [True] * 3
    assert capsys.readouterr().err.count(table) == 1
    summary = json.loads((out / "round-02/evaluate/summary.json").read_text())
    assert [run["name"] for run in summary["runs"]] == ["base", "round-01", "round-02"]
    for run, folder in zip(summary["runs"], ("base", "round-01", "round-02"), strict=True):
        own = json.loads((out / folder / "evaluate/metrics.json").read_text())
        assert own == {measure: figures["value"] for measure, figures in run["measures"].items()}
    found = [open_artifact(out / f"{name}/search").manifest.details["encoder_version"] for name in ("base", "round-01")]
    assert found[1] == open_artifact(out / "round-01/index").manifest.details["encoder_version"] != found[0]


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
