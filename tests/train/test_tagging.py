"""Training a tagger: the loss by hand, tokens and their labels, and that it learns what it is told and no more."""

from __future__ import annotations

import json
import math

import pytest
import torch

from raydr.data.tagged import NoiseConfig, TaggedSource, read_tagged, tagged_examples
from raydr.encoders.tagger import EntityTagger, TaggerConfig
from raydr.errors import ConfigError
from raydr.train.batches import to_batch, tokenized
from raydr.train.config import TrainConfig
from raydr.train.objective import Labels, Tokens, TrainBatch
from raydr.train.tagging import (
    TaggerLearner,
    TaggerLearnerConfig,
    TaggerTraining,
    Tagging,
    TagTokenizer,
    measure_tagger,
    train_tagger,
)
from raydr.types import Annotation, Entity, Query
from tests.train.tiny import random_batch, tiny_checkpoint

PEOPLE = ["john smith", "mary jones", "george brown", "anna clark", "peter white"]
PLACES = ["london", "new york", "paris", "boston"]
PLOTS = ["{p} was seen in {q} .", "the house of {p} at {q} burnt down .", "news from {q} : {p} is dead ."]


def write_texts(folder, kinds=("PER", "LOC")):
    """Persons and places in plots; of kinds that are not asked for, every tag is O. One file."""
    rows = []
    for plot in PLOTS:
        for person in PEOPLE:
            for place in PLACES:
                tokens, tags = [], []
                for word in plot.split():
                    name, kind = {"{p}": (person, "PER"), "{q}": (place, "LOC")}.get(word, (word, ""))
                    for number, part in enumerate(name.split()):
                        tokens.append(part)
                        tags.append(f"{'I' if number else 'B'}-{kind}" if kind in kinds else "O")
                rows.append({"tokens": tokens, "tags": tags})
    file = folder / f"{'-'.join(kinds)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaggedSource(path=str(file))


def batch_of(told: list[list[int]], scores: list) -> tuple[TrainBatch, object]:
    labels = Labels(torch.zeros(0, dtype=torch.int64), torch.zeros(len(told), 0, dtype=torch.int64))
    labels = Labels(labels.passage_rows, labels.positive_rows, token_labels=torch.tensor(told))
    ids = torch.ones(len(told), len(told[0]), dtype=torch.int64)
    network = lambda ids, mask: torch.tensor(scores).log()  # noqa: E731
    return TrainBatch(labels=labels, queries=Tokens(ids, None)), network


def test_the_loss_is_the_share_of_all_that_is_allowed():
    shares = [[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]]
    batch, network = batch_of([[0b001, 0b011, 0]], shares)
    output = Tagging()(network, batch)
    assert output.loss.item() == pytest.approx((-math.log(0.5) - math.log(0.2)) / 2)
    assert output.metrics["accuracy"] == 0.5


def test_fully_marked_it_is_cross_entropy():
    torch.manual_seed(0)
    scores = torch.randn(4, 6, 9)
    told = torch.randint(0, 9, (4, 6))
    batch, _ = batch_of((1 << told).tolist(), [])
    loss = Tagging()(lambda *_: scores, batch).loss
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(scores.view(-1, 9), told.view(-1)).item())


def test_texts_without_annotation_are_refused():
    with pytest.raises(ConfigError, match="TagTokenizer"):
        Tagging()(None, random_batch(2, 2, seed=0))
    with pytest.raises(ConfigError, match="'q1' has no annotation"):
        TagTokenizer(TaggerLearnerConfig()).tokenize([Query("q1", "text")], [[]])


def test_every_token_of_a_word_has_the_words_label():
    text = "Nebuchadnezzar of Bath"
    entities = (Entity(0, 14, "PER"), Entity(18, 22, "LOC"))
    query = Query("q", text, annotation=Annotation(entities, ("PER", "LOC", "ORG")))
    texts = TagTokenizer(TaggerLearnerConfig()).tokenize([query], [[]])["queries"]
    outside = 1 | (1 << 7) | (1 << 8)  # MISC was not looked for
    assert texts.labels == [[0, *[1 << 1] * (len(texts.ids[0]) - 4), outside, 1 << 5, 0]]


def learnt(folder, sources, steps=150) -> str:
    """The folder of a tiny tagger trained on all texts of the sources at once."""
    examples = tagged_examples(sources, folder / "examples", noise=NoiseConfig(copies=0))
    start = tiny_checkpoint(folder / "start", layers=1, dropout=0.0)
    learner = TaggerLearner(TaggerLearnerConfig(model=str(start), max_tokens=32))
    tokenizer = learner.tokenizer()
    groups = next(iter(learner.build_batches(examples, batch_size=len(examples), seed=0)))
    whole = to_batch(tokenized(groups, tokenizer, examples.artifact.path), tokenizer.pad_id, multiple_of=8)
    torch.manual_seed(0)
    network = learner.build_model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        output = learner.build_objective()(network, whole)
        output.loss.backward()
        optimizer.step()
        if output.loss < 0.01:
            break
    (folder / "trained").mkdir()
    learner.save_model(network, folder / "trained")
    return str(folder / "trained")


def test_collections_that_mark_different_things_are_learnt_together(tmp_path, one_thread):
    """One marks persons alone, the other places: together they teach both, though each has the other's names as O."""
    sources = [write_texts(tmp_path, ("PER",)), write_texts(tmp_path, ("LOC",))]
    tagger = EntityTagger(TaggerConfig(model=learnt(tmp_path, sources), overlap_tokens=8, num_threads=1))
    both = read_tagged(write_texts(tmp_path))
    scores = measure_tagger(tagger, both)
    assert scores["PER"].f1 == scores["LOC"].f1 == scores["all"].f1 == 1.0
    assert scores["all"].num_entities == 120
    assert set(scores) == {"PER", "LOC", "all"}


@pytest.mark.ray
def test_it_goes_through_the_trainer(tmp_path, ray_cluster):
    """On Ray Train: an artifact whose model tags; the same again is not trained again."""
    start = tiny_checkpoint(tmp_path / "start", layers=1)
    training = TaggerTraining(
        model=str(start),
        max_tokens=32,
        sources=(write_texts(tmp_path),),
        train=TrainConfig(batch_size=8, max_steps=3, worker_cpus=0.5, log_every=1, learning_rate=1e-3),
    )
    model = train_tagger(training, tmp_path / "tagger")
    tagger = EntityTagger(TaggerConfig(model=str(model), overlap_tokens=8, num_threads=1))
    assert len(next(iter(tagger.words(["john smith was seen"])))) == 4
    made = (tmp_path / "tagger/train/manifest.json").stat().st_mtime_ns
    assert train_tagger(training, tmp_path / "tagger") == model
    assert (tmp_path / "tagger/train/manifest.json").stat().st_mtime_ns == made
