"""MM-Embed's card: its reference vectors, what is frozen, adapters merged, and a training that learns from pictures."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional

from raydr.artifacts import write_artifact
from raydr.data.examples import Example, ExampleSet, ExampleWriter, QueryLabels, passage_table
from raydr.encoders.multimodal import MultimodalEncoder
from raydr.methods.clip import Clip
from raydr.methods.mm_embed import MMEmbed, QueryToCandidate
from raydr.train.config import LoraConfig
from raydr.train.lora import with_adapters, without_adapters
from raydr.train.objective import Labels
from raydr.types import Passage, Query
from tests.encoders.test_multimodal import BLUE, RED, checkpoint

QUERIES = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
POSITIVES = [[0.9, 0.1, 0.2], [0.2, 0.8, 0.1]]
NEGATIVES = [[0.7, 0.3, 0.6], [0.1, 0.6, 0.7]]


def unit(rows: list[list[float]]) -> torch.Tensor:
    return functional.normalize(torch.tensor(rows, dtype=torch.float64), dim=1)


@pytest.mark.parametrize(
    ("temperature", "hard", "expected"),
    [(1.0, True, 0.9855084575), (1.0, False, 0.3738579231), (0.05, True, 0.0043584266)],
)
def test_the_loss_of_the_card(temperature, hard, expected):
    """Every query sees all positives and all hard negatives of the batch."""
    queries, positives, negatives = unit(QUERIES), unit(POSITIVES), unit(NEGATIVES)
    if hard:  # query-major: each query's positive, then its negative
        passages = torch.stack([positives, negatives], dim=1).flatten(0, 1)
        labels = Labels(torch.arange(4), torch.tensor([[0], [2]]))
    else:
        passages, labels = positives, Labels(torch.arange(2), torch.tensor([[0], [1]]))
    loss = QueryToCandidate(temperature).loss(queries, passages, labels).loss
    assert loss.item() == pytest.approx(expected, rel=2e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint("llava", tmp_path_factory.mktemp("llava"))


def method(folder, **settings) -> MMEmbed:
    return MMEmbed(MMEmbed.Config(model=str(folder), image_size=32, precision="float32", device="cpu", **settings))


def loss_of(method, network, queries, groups) -> torch.Tensor:
    """The loss of a batch as the trainer computes it."""
    tokenizer = method.tokenizer()
    read = tokenizer.tokenize(queries, groups)
    embeddings = [network(*read[side].padded(tokenizer.pad_id).inputs) for side in ("queries", "passages")]
    width = len(groups[0])
    labels = Labels(torch.arange(len(embeddings[1])), torch.arange(0, len(embeddings[1]), width)[:, None])
    return method.build_objective().loss(*embeddings, labels).loss


ASKED = [Query("a", "red", instruction="Find a picture."), Query("b", "blue", instruction="Find a picture.")]
GROUPS = [[Passage("r", "", image=RED)], [Passage("u", "", image=BLUE)]]


@pytest.mark.parametrize("train_vision", [False, True])
def test_what_is_trained(folder, train_vision):
    """The vision tower stands still unless told otherwise; of the language model the adapters alone move."""
    own = method(folder, train_vision=train_vision)
    network = with_adapters(own.build_model(), LoraConfig(rank=8, alpha=64, target_modules=["q_proj", "up_proj"]))
    loss_of(own, network, ASKED, GROUPS).backward()
    moved = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert any(name.startswith("vision.tower.") for name in moved) is train_vision
    assert {name for name in moved if name.startswith("transformer.")} == {
        name for name, _ in network.named_parameters() if "lora_" in name
    }
    assert any(name.startswith("vision.projector.") for name in moved)


def test_merged_adapters_change_nothing(folder, tmp_path):
    own = method(folder, pooling="latent", latents=8, latent_heads=2, bidirectional=True)
    network = with_adapters(own.build_model(), LoraConfig(rank=4, alpha=64, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.05)
        tokenizer = own.tokenizer()
        read = tokenizer.tokenize(ASKED, GROUPS)
        expected = [network(*read[side].padded(tokenizer.pad_id).inputs) for side in ("queries", "passages")]
    own.save_model(without_adapters(network), tmp_path)
    again = MultimodalEncoder(method(tmp_path).encoder_config)
    np.testing.assert_allclose(again.encode_queries(ASKED), expected[0], atol=1e-4)
    np.testing.assert_allclose(again.encode_passages([own for (own,) in GROUPS]), expected[1], atol=1e-4)


@pytest.mark.parametrize("which", [MMEmbed, Clip])
def test_it_learns_which_picture_is_meant(tmp_path, which):
    kind = "llava" if which is MMEmbed else "vision-text-dual-encoder"
    settings = {"model": str(checkpoint(kind, tmp_path)), "image_size": 32, "train_vision": True}
    own = which(which.Config(**settings, precision="float32", device="cpu"))
    network = own.build_model().train()
    optimizer = torch.optim.AdamW([weight for weight in network.parameters() if weight.requires_grad], lr=2e-3)
    losses = []
    for _ in range(40):
        loss = loss_of(own, network, ASKED, GROUPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]


@pytest.mark.parametrize("batches", ["kind", "task"])
def test_the_last_stage_keeps_text_tasks_apart(folder, tmp_path, batches):
    """Other tasks share batches, so that passages of other modalities stay among the negatives; or do not."""
    names = [*["text"] * 40, *["find a picture"] * 40, *["name it"] * 40]
    examples = [Example(Query(f"q{n}", "x"), ["p0"], ["p1"], negative_sources=["model"]) for n in range(len(names))]
    tasks = {f"q{n}": name for n, name in enumerate(names)}
    with (
        write_artifact(tmp_path / "out", kind="examples", config={}),
        ExampleWriter(tmp_path / "out", labels=QueryLabels(tasks=tasks)) as writer,
    ):
        writer.add(examples, passage_table([Passage("p0", "x"), Passage("p1", "y")]))
    found = ExampleSet.open(tmp_path / "out")
    own = method(folder, stage="text", text_tasks=("text",), text_batches=batches)
    drawn = islice(own.build_batches(found, batch_size=16, seed=0), 60)
    seen = {frozenset(found.task(group.query) for group in batch) for batch in drawn}
    apart = {frozenset({"find a picture"}), frozenset({"name it"})}
    assert seen == {frozenset({"text"}), *(apart if batches == "task" else {frozenset({"find a picture", "name it"})})}
