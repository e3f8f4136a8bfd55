"""What the tests that train on Ray share: examples of four topics, others to measure on, and a tiny dual encoder."""

import pytest

from raydr.config import Component
from tests.train.tiny import tiny_checkpoint, write_topic_examples


@pytest.fixture(scope="session")
def examples(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("examples") / "train")


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    return write_topic_examples(tmp_path_factory.mktemp("examples") / "dev", per_topic=3, seed=9)


@pytest.fixture(scope="session")
def method(tmp_path_factory) -> Component:
    return contrastive(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model"))


@pytest.fixture(scope="session")
def steady(tmp_path_factory) -> Component:
    """Without dropout, which each worker draws for itself: one worker and two learn the same."""
    return contrastive(tiny_checkpoint(tmp_path_factory.mktemp("steady") / "model", dropout=0.0))


def contrastive(model) -> Component:
    args = {"model": str(model), "num_negatives": 2, "precision": "float32", "backend": "torch", "num_threads": 1}
    return Component(import_path="raydr.methods.contrastive:Contrastive", args=args)
