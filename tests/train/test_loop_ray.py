"""What else a run may do: stop early, accumulate, train on pairs, train adapters; on one worker and on two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from raydr.config import Component
from raydr.train.config import LoraConfig, TrainConfig
from raydr.train.evaluate import evaluate
from raydr.train.trainer import read_metrics, train_model
from tests.train.tiny import SETTINGS, losses, tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _reports_do_not_wait(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")


def weights(artifact):
    return load_file(artifact.path / "model/model.safetensors")


class Network:
    """What is asked of an engine to evaluate it."""

    device = torch.device("cpu")

    def __init__(self, network: torch.nn.Module) -> None:
        self.eval, self.train, self._network = network.eval, network.train, network

    def __call__(self, ids, mask):
        return self._network(ids, mask)


def test_it_stops_without_a_gain_and_hands_on_the_best(method, examples, dev, tmp_path):
    """At a learning rate that is far too high; another part that goes on from there starts to count again."""
    settings = {**SETTINGS, "num_workers": 1, "learning_rate": 5.0e-2, "schedule": "constant", "warmup_share": 0.0}
    stopping = {**settings, "max_steps": 60, "evaluate_every": 1, "patience": 3}
    stopped = train_model(method, TrainConfig(**stopping), examples, tmp_path / "a", dev=dev, keep_state=True)
    found = [r["dev_nDCG@10"] for r in read_metrics(stopped.path / "metrics.jsonl") if "dev_nDCG@10" in r]
    best = found.index(max(found))
    assert len(found) == stopped.manifest.details["steps"] == best + 1 + 3 < 60
    assert stopped.manifest.details["best"]["step"] == best + 1
    trained = Component(
        import_path=method.import_path, args={**method.args, "model": str(stopped.path / "model")}
    ).build()
    network = trained.build_model()
    network.transformer.set_attn_implementation("eager")  # as in training: what is ruined so has scores close to ties
    handed_on = evaluate(Network(network), dev, trained.tokenizer())["nDCG@10"]
    assert handed_on == pytest.approx(found[best], abs=1e-4)
    assert found[-1] < found[best] - 1e-3

    one_more = TrainConfig(**{**stopping, "max_steps": len(found) + 1})
    second = train_model(method, one_more, examples, tmp_path / "b", dev=dev, start=stopped.path / "state")
    assert list(losses(second.path)) == [len(found) + 1]


def test_batches_add_up_to_a_step_and_workers_to_a_batch(examples, tmp_path):
    """Pairs have no negatives in common, so two batches of four by two workers are one of eight by one."""
    model = tiny_checkpoint(tmp_path / "ranker", dropout=0.0)
    ranker = Component(
        import_path="raydr.methods.cross_encoder:CrossEncoderRanker",
        args={"model": str(model), "num_negatives": 2, "max_pair_tokens": 40},
    )
    # Adam would forgive a factor, and blow up rounding errors, were it not for the epsilon.
    settings = {**SETTINGS, "max_steps": 4, "adam_eps": 0.1, "clip_norm": 0.0}
    whole = train_model(ranker, TrainConfig(**{**settings, "num_workers": 1}), examples, tmp_path / "whole")
    parts = {**settings, "batch_size": 4, "accumulation_steps": 2}
    added = train_model(ranker, TrainConfig(**parts), examples, tmp_path / "added")
    assert list(losses(added.path).values()) == pytest.approx(list(losses(whole.path).values()), abs=1e-5)
    mine, theirs = weights(added), weights(whole)
    assert all(np.allclose(mine[name], theirs[name], atol=1e-5) for name in theirs)


def test_adapters_are_merged_and_the_same_on_two_workers_that_split_and_resume(steady, examples, tmp_path):
    lora = LoraConfig(rank=4, alpha=8, target_modules=["query", "value"])
    settings = {**SETTINGS, "max_steps": 4, "adam_eps": 1e-4, "lora": lora}
    model = train_model(steady, TrainConfig(**{**settings, "num_workers": 1}), examples, tmp_path / "one")
    whole, start = weights(model), load_file(Path(steady.args["model"]) / "model.safetensors")
    changed = {name for name in start if not np.allclose(whole[name], start[name], atol=1e-7)}
    assert whole.keys() == start.keys()
    assert changed
    assert all(".query." in name or ".value." in name for name in changed)

    split = {**settings, "zero_stage": 3, "schedule_steps": 4, "chunk_tokens": 200}
    half = TrainConfig(**{**split, "max_steps": 2})
    first = train_model(steady, half, examples, tmp_path / "first", keep_state=True)
    second = train_model(steady, TrainConfig(**split), examples, tmp_path / "second", start=first.path / "state")
    found = {**losses(first.path), **losses(second.path)}
    assert found == pytest.approx(losses(model.path), abs=1e-5)
    mine = weights(second)
    assert all(np.allclose(mine[name], whole[name], atol=1e-5) for name in whole)
