"""MM-Embed on Ray Train: two workers, one of which may have no picture before it, learn what one worker learns."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from raydr.artifacts import write_artifact
from raydr.config import Component
from raydr.data.examples import Example, ExampleSet, QueryLabels, write_examples
from raydr.train.config import TrainConfig
from raydr.train.trainer import train_model
from raydr.types import Passage, Query
from tests.encoders.test_multimodal import checkpoint, picture
from tests.train.tiny import SETTINGS, losses

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COLORS = {"red": (220, 20, 30), "blue": (10, 30, 200), "green": (20, 160, 60), "yellow": (240, 210, 30)}
# So large an epsilon has Adam forgive no factor, and blow up no rounding error.
STEPS = {**SETTINGS, "max_steps": 3, "batch_size": 4, "learning_rate": 5.0e-4, "clip_norm": 0.0, "adam_eps": 0.1}
LORA = {"rank": 4, "alpha": 16, "target_modules": ["q_proj", "up_proj"]}


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> ExampleSet:
    """Of each colour: its name looks for its picture, its picture for its name, and three texts for a text."""
    passages, made = {}, []
    for number, (name, color) in enumerate(COLORS.items()):
        shown = picture(color)
        other = (number + 1) % len(COLORS)
        passages |= {f"p{number}": Passage(f"p{number}", "", image=shown), f"n{number}": Passage(f"n{number}", name)}
        made += [
            Example(Query(f"t{number}", name), [f"p{number}"], [f"n{number}"], negative_sources=["wrong_modality"]),
            Example(Query(f"i{number}", "", shown), [f"n{number}"], [f"p{other}"], negative_sources=["wrong_modality"]),
        ]
        for word in ("say", "paint", "wear"):
            asked = Query(f"{word}{number}", f"{word} {name}")
            made.append(Example(asked, [f"n{number}"], [f"n{other}"], negative_sources=["low_rank"]))
    labels = QueryLabels(has_pictures=True, instructions={one.query.query_id: ["Find it."] for one in made})
    with write_artifact(tmp_path_factory.mktemp("pictures") / "examples", kind="examples", config={}) as writer:
        writer.counts.update(write_examples(writer.path, made, passages, labels=labels))
    return ExampleSet.open(writer.path)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize(
    ("own", "zero_stage"), [({"train_vision": True}, 2), ({"pooling": "latent", "latents": 8, "latent_heads": 2}, 3)]
)
def test_two_workers_learn_what_one_learns(ray_cluster, examples, start, tmp_path, monkeypatch, own, zero_stage):
    """All weights; or, the tower standing still, the pooling head, the projector and the language model's adapters."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    args = {"model": str(start), "image_size": 32, "precision": "float32", "device": "cpu", "stage": "hard", **own}
    method = Component(import_path="raydr.methods.mm_embed:MMEmbed", args=args)
    settings = {**STEPS, "lora": None if own.get("train_vision") else LORA}
    one = train_model(method, TrainConfig(**{**settings, "num_workers": 1}), examples, tmp_path / "one")
    two = train_model(method, TrainConfig(**{**settings, "zero_stage": zero_stage}), examples, tmp_path / "two")
    assert any(len(set(sees)) == 2 for sees in _shares_with_pictures(method, examples))
    assert list(losses(two.path).values()) == pytest.approx(list(losses(one.path).values()), abs=1e-5)
    before, ours, theirs = (load_file(folder / "model.safetensors") for folder in (start, _model(two), _model(one)))
    assert ours.keys() == theirs.keys()
    assert all(np.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    moved = {name for name in before if not np.array_equal(ours[name], before[name])}
    assert any("projector" in name for name in moved) and any("q_proj" in name for name in moved)
    assert any("vision_tower" in name for name in moved) is own.get("train_vision", False)


def _model(artifact) -> Path:
    return artifact.path / "model"


def _shares_with_pictures(method: Component, examples: ExampleSet) -> list[list[bool]]:
    """Of each batch: whether the share of each of two workers has a picture, in a query or a passage."""
    batches = method.build().build_batches(examples, batch_size=STEPS["batch_size"], seed=STEPS["seed"])
    shows = [passage.image is not None for passage in examples.passages(range(examples.num_passages))]
    sees = [
        [examples.query(group.query).image is not None or any(shows[row] for row in group.passages) for group in batch]
        for batch in islice(batches, STEPS["max_steps"])
    ]
    return [[any(batch[:2]), any(batch[2:])] for batch in sees]
