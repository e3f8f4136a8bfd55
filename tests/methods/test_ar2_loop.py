"""AR2: its schedule, and which of its steps are made again when something changes or a run was killed.

The whole loop on Ray Train, killed and compared, is in `tests/verbs/test_train.py`.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydr import artifacts
from raydr.artifacts import MANIFEST, open_artifact, write_artifact
from raydr.config import validate
from raydr.errors import ConfigError
from raydr.methods.ar2 import Ar2, Ar2Config
from raydr.stages.config import MineConfig
from raydr.train.config import TrainConfig
from raydr.verbs.config import RunConfig
from raydr.verbs.train import train
from tests.methods.test_ar2 import digests
from tests.train.tiny import tiny_checkpoint


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
