"""Training on Ray Train with DeepSpeed: it learns, it leaves a checkpoint others open, it survives a dead worker."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from raydr.config import Component
from raydr.encoders.factory import EncoderFactory
from raydr.errors import RaydrError
from raydr.train.config import LoraConfig, TrainConfig
from raydr.train.trainer import read_metrics, train_model
from raydr.types import Passage, Query
from tests.train.tiny import tiny_checkpoint, write_topic_examples

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "num_workers": 2,
    "worker_cpus": 0.5,
    "batch_size": 8,
    "max_steps": 12,
    "learning_rate": 2.0e-3,
    "checkpoint_every": 4,
    "log_every": 1,
    "zero_stage": 2,
    "chunk_tokens": 200,
    "seed": 3,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("examples") / "train")


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("examples") / "dev", per_topic=3, seed=9)


@pytest.fixture(scope="module")
def method(tmp_path_factory) -> Component:
    model = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")
    args = {"model": str(model), "num_negatives": 2, "precision": "float32", "backend": "torch", "num_threads": 1}
    return Component(import_path="raydr.methods.contrastive:Contrastive", args=args)


@pytest.fixture(scope="module")
def trained(ray_cluster, method, examples, dev, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, out, dev=dev)


def losses(folder: Path) -> dict[int, float]:
    return {int(r["step"]): r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_it_learns_and_says_what_it_did(trained):
    found = losses(trained.path)
    assert sorted(found) == list(range(1, 13))
    assert np.mean([found[step] for step in (10, 11, 12)]) < 0.8 * np.mean([found[step] for step in (1, 2, 3)])
    measured = [r for r in read_metrics(trained.path / "metrics.jsonl") if "dev_nDCG@10" in r]
    assert [int(r["step"]) for r in measured] == [6, 12]
    assert trained.manifest.details["steps"] == 12
    assert (trained.path / "curves.png").stat().st_size > 5000
    assert list((trained.path / "tensorboard").iterdir())
    assert not list(trained.path.glob(".ray_train"))


def test_what_it_leaves_opens_in_sentence_transformers(trained, method):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = trained.path / "model"
    mine = EncoderFactory(Component(import_path=method.import_path, args={**method.args, "model": str(folder)}))()
    before = EncoderFactory(method)()
    texts = ["ocean wave tide", "flour yeast dough oven"]
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
    ours = mine.encode_passages([Passage("", text) for text in texts])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert mine.version != before.version
    assert np.abs(ours - before.encode_queries([Query("", text) for text in texts])).max() > 0.01


def test_a_finished_run_is_not_made_again(trained, method, examples, dev, capsys):
    again = train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, trained.path, dev=dev)
    assert again.fingerprint == trained.fingerprint
    assert "has this model already" in capsys.readouterr().err


def test_a_killed_worker_is_replaced_and_nothing_changes(trained, method, examples, dev, tmp_path):
    """Kills one worker's process after the first checkpoint; the curve is that of the uninterrupted run."""
    out = tmp_path / "killed"
    killed: list[int] = []

    def kill_a_worker() -> None:
        while not any(step >= 5 for step in losses(out)):
            time.sleep(0.02)
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"ray::" in title and b"RayTrainWorker" in title:
                killed.append(int(folder.name))
                os.kill(killed[0], signal.SIGKILL)
                return

    thread = threading.Thread(target=kill_a_worker, daemon=True)
    thread.start()
    train_model(method, TrainConfig(**SETTINGS, evaluate_every=6), examples, out, dev=dev)
    assert killed
    found, expected = losses(out), losses(trained.path)
    assert sorted(found) == sorted(expected)
    assert [found[step] for step in sorted(found)] == pytest.approx([expected[s] for s in sorted(expected)], abs=1e-6)
    from safetensors.numpy import load_file

    mine, theirs = (load_file(folder / "model/model.safetensors") for folder in (out, trained.path))
    assert all(np.allclose(mine[name], theirs[name], atol=1e-6) for name in theirs)


def test_a_run_in_two_parts_is_the_run_in_one(trained, method, examples, tmp_path):
    """Optimiser, schedule and batches go on where the first part stopped."""
    settings = {**SETTINGS, "schedule_steps": 12, "keep": "last"}
    first = train_model(
        method, TrainConfig(**{**settings, "max_steps": 6}), examples, tmp_path / "first", keep_state=True
    )
    second = train_model(method, TrainConfig(**settings), examples, tmp_path / "second", start=first.path / "state")
    found = {**losses(first.path), **losses(second.path)}
    expected = losses(trained.path)
    assert [found[step] for step in sorted(found)] == pytest.approx([expected[s] for s in sorted(expected)], abs=1e-6)


def test_workers_that_hold_every_cpu_do_not_starve_what_tokenises_for_them(method, examples, tmp_path):
    config = TrainConfig(**{**SETTINGS, "worker_cpus": 1.0, "max_steps": 2})
    assert train_model(method, config, examples, tmp_path / "all").manifest.details["steps"] == 2


def test_adapters_are_merged_into_what_is_saved(method, examples, tmp_path):
    lora = LoraConfig(rank=4, alpha=8, target_modules=["query", "value"])
    config = TrainConfig(**{**SETTINGS, "num_workers": 1, "max_steps": 4}, lora=lora)
    model = train_model(method, config, examples, tmp_path / "lora").path / "model"
    from safetensors.numpy import load_file

    mine, start = load_file(model / "model.safetensors"), load_file(Path(method.args["model"]) / "model.safetensors")
    changed = {name for name in start if not np.allclose(mine[name], start[name], atol=1e-7)}
    assert mine.keys() == start.keys()
    assert changed
    assert all(".query." in name or ".value." in name for name in changed)


def test_a_loss_that_is_no_number_stops_and_leaves_the_batch(method, examples, tmp_path):
    """A query text that makes the network overflow: here, weights that are not numbers."""
    from safetensors.numpy import load_file, save_file
    from safetensors.torch import load_file as load_tensors

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(method.args["model"]).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if n.endswith("word_embeddings.weight"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    component = Component(import_path=method.import_path, args={**method.args, "model": str(broken)})
    config = TrainConfig(**{**SETTINGS, "max_failures": 0})
    with pytest.raises(RaydrError, match="not a number"):
        train_model(component, config, examples, tmp_path / "nan")
    (file, *_) = sorted((tmp_path / "nan").glob("nan-step-0-worker-*.safetensors"))
    batch = load_tensors(file)
    assert {"queries.ids", "passages.ids", "passage_rows", "positive_rows"} <= set(batch)
    assert not (tmp_path / "nan" / "manifest.json").exists()


def test_metrics_are_lines_of_json(trained):
    for line in (trained.path / "metrics.jsonl").read_text().splitlines():
        assert {"step"} <= json.loads(line).keys()
