"""A tiny BERT, a tiny example set, and batches of random tokens: what the tests of the trainer share."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from raydr.artifacts import write_artifact
from raydr.data.examples import Example, ExampleSet, write_examples
from raydr.models.colbert import ColBert
from raydr.models.cross_encoder import CrossEncoder
from raydr.models.dual_encoder import DualEncoder
from raydr.models.towers import Towers
from raydr.models.vocabulary import VocabularyTower
from raydr.train.metrics import METRICS, read_metrics
from raydr.train.objective import Labels, Tokens, TrainBatch
from raydr.types import Passage, Query

SETTINGS = {
    "num_workers": 2,
    "worker_cpus": 0.5,
    "batch_size": 8,
    "max_steps": 12,
    "learning_rate": 2.0e-3,
    "checkpoint_every": 4,
    "log_every": 1,
    "zero_stage": 2,
    "seed": 3,
}
"""Of a run that learns in seconds."""
TOPICS = {
    "sea": "ocean wave tide fish salt ship coral whale sand harbour",
    "bread": "flour yeast dough oven crust knead loaf butter baker wheat",
    "stars": "sun moon planet orbit comet galaxy light telescope night dwarf",
    "music": "piano violin drum chord melody rhythm song choir harp flute",
}


def tiny_network(*, dropout: float = 0.0, seed: int = 0, normalize: bool = True) -> DualEncoder:
    """Two layers of 32; the same weights for the same seed."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return DualEncoder(BertModel(config, add_pooling_layer=False), pooling="mean", normalize=normalize)


def tiny_towers() -> Towers:
    """Two towers over a vocabulary of 100, of which the first five are no words; one layer each."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(9)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=100, max_position_embeddings=64, initializer_range=0.2, **sizes, **no_dropout)
    queries, passages = (VocabularyTower(BertModel(config, add_pooling_layer=False), shift=5) for _ in range(2))
    return Towers(queries=queries, passages=passages)


def tiny_colbert() -> ColBert:
    """One layer, 8 dimensions a token."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=100, max_position_embeddings=64, **sizes)
    return ColBert(BertModel(config, add_pooling_layer=False), hidden_size=32, dimensions=8)


def tiny_cross_encoder() -> CrossEncoder:
    """One layer, without segments."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=100, max_position_embeddings=64, num_labels=1, **sizes, **no_dropout)
    return CrossEncoder(BertForSequenceClassification(config), separator=None)


def random_batch(num_queries: int, group: int, *, seed: int, first_row: int = 0) -> TrainBatch:
    """Queries of 3 to 9 tokens, passages of 4 to 20; the first passage of a group is its positive."""
    rng = torch.Generator().manual_seed(seed)

    def texts(count: int, low: int, high: int) -> Tokens:
        lengths = torch.randint(low, high, (count,), generator=rng)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(1, 100, mask.shape, generator=rng) * mask
        return Tokens(ids, mask)

    rows = torch.arange(num_queries * group) + first_row
    labels = Labels(passage_rows=rows, positive_rows=rows[::group, None].clone())
    return TrainBatch(
        labels=labels, queries=texts(num_queries, 3, 9), passages=texts(num_queries * group, 4, 20), names=[]
    )


def as_pairs(batch: TrainBatch) -> TrainBatch:
    """The batch as a cross-encoder's: the texts of its passages are the pairs."""
    return dataclasses.replace(batch, queries=None, passages=None, pairs=batch.passages)


def part_of(batch: TrainBatch, start: int, end: int) -> TrainBatch:
    """The groups `start` to `end` of a batch: one worker's share."""
    group = batch.labels.group_size
    passages = slice(start * group, end * group)

    def cut(tokens: Tokens | None, rows: slice) -> Tokens:
        assert tokens is not None and tokens.mask is not None
        return Tokens(tokens.ids[rows], tokens.mask[rows], side=tokens.side)

    labels = Labels(batch.labels.passage_rows[passages], batch.labels.positive_rows[start:end])
    return TrainBatch(
        labels=labels, queries=cut(batch.queries, slice(start, end)), passages=cut(batch.passages, passages)
    )


def write_topic_examples(folder: Path, *, per_topic: int = 6, negatives: int = 4, seed: int = 0) -> ExampleSet:
    """Queries that name three words of a topic; passages of the same topic are relevant, others are negatives."""
    import random

    rng = random.Random(seed)
    passages: dict[str, Passage] = {}
    topic_of: dict[str, str] = {}
    for topic, words in TOPICS.items():
        for number in range(per_topic):
            text = " ".join(rng.choices(words.split(), k=12))
            passages[f"{topic}{number}"] = Passage(f"{topic}{number}", text, topic.title() if number % 2 else "")
            topic_of[f"{topic}{number}"] = topic
    examples = []
    for passage_id, topic in topic_of.items():
        query = Query(f"q-{passage_id}", " ".join(rng.sample(TOPICS[topic].split(), 3)))
        others = [other for other in passages if topic_of[other] != topic]
        same = [other for other in passages if topic_of[other] == topic]
        found = rng.sample(others, negatives)
        examples.append(Example(query, same, found, [float(-i) for i in range(negatives)]))
    with write_artifact(folder, kind="examples", config={"seed": seed}) as writer:
        writer.counts.update(write_examples(folder, examples, passages))
    return ExampleSet.open(folder)


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step that a run has logged."""
    return {int(record["step"]): record["loss"] for record in read_metrics(folder / METRICS) if "loss" in record}


def tiny_checkpoint(folder: Path, *, layers: int = 2, hidden: int = 48, seed: int = 0, dropout: float = 0.1) -> Path:
    """A small untrained BERT with the tokenizer of the packaged MiniLM, saved as a checkpoint folder."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    from raydr.encoders.checkpoint import locate

    tokenizer: Any = AutoTokenizer.from_pretrained(locate("minilm"))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def moved_towers(folder: Path, **settings: Any) -> str:
    """The folder of two towers of VDR's that differ, as trained ones do, with norms that are not new; `settings` are
    those of the tiny checkpoint that both start from.
    """
    import torch

    from raydr.encoders.vocabulary_weights import load_towers, save_towers

    start = str(tiny_checkpoint(folder / "start", **settings))
    network = load_towers(start, towers="two")
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    (folder / "model").mkdir()
    save_towers(network, start, folder / "model")
    return str(folder / "model")
