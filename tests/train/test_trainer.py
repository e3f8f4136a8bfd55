"""What training refuses before it starts anything, and what it says of a full disk."""

from types import SimpleNamespace

import pytest

from raydr.config import Component
from raydr.errors import ConfigError, is_out_of_memory
from raydr.train import trainer
from raydr.train.config import TrainConfig
from raydr.train.trainer import settings_for, train_model

CROSS_ENCODER = Component(import_path="raydr.methods.cross_encoder:CrossEncoderRanker")
COLBERT = Component(import_path="raydr.methods.colbert:ColBertRanker", args={"loss": "listwise"})
EVERYTHING = TrainConfig(evaluate_every=5, patience=2, chunk_tokens=64)


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch):
    monkeypatch.setattr(trainer, "_fit", lambda *_: pytest.fail("Ray Train was asked to train"))


@pytest.mark.parametrize(
    ("ranker", "settings", "message"),
    [
        (CROSS_ENCODER, {"chunk_tokens": 64}, "train.chunk_tokens: the loss of CrossEncoderRanker .* leave it out"),
        (COLBERT, {"chunk_tokens": 64}, "train.chunk_tokens: the loss of ColBertRanker .* activation_checkpointing"),
        (COLBERT, {"evaluate_every": 5, "patience": 2}, "train.evaluate_every: ColBertRanker is not measured on dev"),
    ],
)
def test_what_a_ranker_would_ignore_is_refused(examples, dev, tmp_path, ranker, settings, message):
    with pytest.raises(ConfigError, match=message):
        train_model(ranker, TrainConfig(**settings), examples, tmp_path / "out", dev=dev)
    assert not (tmp_path / "out").exists()


def test_evaluations_of_nothing_are_refused(examples, method, tmp_path):
    with pytest.raises(ConfigError, match="train.evaluate_every: there are no dev examples; name their split"):
        train_model(method, TrainConfig(evaluate_every=5), examples, tmp_path / "out")


def test_a_ranker_within_another_training_does_without(method, capsys):
    """AR2 and TAS-Balanced train both under one config."""
    left = settings_for(COLBERT, EVERYTHING)
    assert left == TrainConfig()
    assert "train: evaluate_every left out: ColBertRanker is not measured" in capsys.readouterr().err
    left = settings_for(CROSS_ENCODER, EVERYTHING)
    assert left == TrainConfig(evaluate_every=5, patience=2)
    assert settings_for(method, EVERYTHING) == EVERYTHING


@pytest.mark.parametrize("free_mib", [{"train": 300}, {"tmp": 300}, {}])
def test_a_full_disk_is_named_where_training_failed(tmp_path, monkeypatch, free_mib):
    """tests/storage/test_full_disk.py trains on one."""
    folders = {name: tmp_path / name for name in ("train", "tmp")}
    free = {folder: free_mib.get(name, 3000) << 20 for name, folder in folders.items()}
    monkeypatch.setattr(trainer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    monkeypatch.setattr(trainer.tempfile, "gettempdir", lambda: str(folders["tmp"]))
    said = trainer._if_the_disk_is_full(folders["train"] / ".ray_train", "unexpected pos 64 vs 0")
    assert said.count(" MB left") == len(free_mib)
    assert all(f"the disk of {folders[name]} has 300 MB left: free some" in said for name in free_mib)
    if not free_mib:
        assert not said
        cleared = trainer._if_the_disk_is_full(folders["train"] / ".ray_train", "[Errno 28] No space left on device")
        assert f"the disk of {folders['train']}, or of {folders['tmp']} on a worker's node, has no room" in cleared


@pytest.mark.parametrize(
    ("message", "is_it"),
    [
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", True),
        # Of an actor, as Ray Train hands it on: the class says nothing.
        ("Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/", True),
        ("The actor died unexpectedly before finishing this task.", False),
    ],
)
def test_a_lack_of_memory_is_known_by_rays_words(message, is_it):
    error = RuntimeError("Training failed due to controller error")
    error.__cause__ = RuntimeError(message)
    assert is_out_of_memory(error) is is_it
