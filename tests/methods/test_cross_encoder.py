"""The cross-encoder ranker: its losses against numbers worked by hand, and that it learns to rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raydr.config import Component
from raydr.encoders.cross_encoder import CrossEncoderReranker
from raydr.errors import ConfigError
from raydr.methods.base import build_method
from raydr.methods.cross_encoder import Ranking
from raydr.train.batches import to_batch, tokenized
from raydr.train.objective import Labels, Tokens, TrainBatch
from raydr.types import Hit
from tests.train.test_grad_cache import Plain
from tests.train.tiny import random_batch, tiny_checkpoint, write_topic_examples

# e^score of two queries' own groups: the first is ranked rightly, the second not.
SHARES = [[3, 2, 1], [1, 2, 5]]


class FirstToken:
    """A network whose score of a pair is the logarithm of its first token, so that a batch says what is scored."""

    device = torch.device("cpu")

    def __call__(self, ids, mask):
        return ids[:, 0].float().log()

    def backward(self, loss):
        raise AssertionError("an objective computes the loss, and nothing else")


def batch(positives: list[list[int]]) -> TrainBatch:
    """The pairs of `SHARES`, of lengths that the network does not get them in."""
    lengths = torch.tensor([4, 2, 5, 1, 3, 2])
    mask = (torch.arange(5) < lengths[:, None]).long()
    ids = torch.full((6, 5), 7) * mask
    ids[:, 0] = torch.tensor(SHARES).flatten()
    return TrainBatch(labels=Labels(torch.arange(6), torch.tensor(positives)), pairs=Tokens(ids, mask))


def of_sigmoid(share: int, *, is_positive: bool) -> float:
    """Binary cross-entropy at the score log(share), whose sigmoid is share / (share + 1)."""
    return math.log((share + 1) / share) if is_positive else math.log(share + 1)


class TestByHand:
    def test_listwise_is_softmax_over_the_own_group(self):
        output = Ranking("listwise")(FirstToken(), batch([[0], [3]]))
        assert output.loss.item() == pytest.approx((math.log(6 / 3) + math.log(8 / 1)) / 2)
        assert output.metrics["accuracy"] == 0.5

    def test_listwise_shares_out_among_several_positives(self):
        """A candidate that was mined as a negative and is known as relevant after all."""
        output = Ranking("listwise")(FirstToken(), batch([[0, -1], [3, 5]]))
        second = (math.log(8 / 1) + math.log(8 / 5)) / 2
        assert output.loss.item() == pytest.approx((math.log(6 / 3) + second) / 2)

    def test_pointwise_is_every_pair_against_its_label(self):
        output = Ranking("pointwise")(FirstToken(), batch([[0], [3]]))
        expected = [of_sigmoid(share, is_positive=n == 0) for group in SHARES for n, share in enumerate(group)]
        assert output.loss.item() == pytest.approx(np.mean(expected))
        known = Ranking("pointwise")(FirstToken(), batch([[0, -1], [3, 5]]))
        expected[5] = of_sigmoid(5, is_positive=True)
        assert known.loss.item() == pytest.approx(np.mean(expected))


def test_texts_that_are_no_pairs_are_refused():
    with pytest.raises(ConfigError, match="trained on pairs"):
        Ranking("listwise")(FirstToken(), random_batch(2, 2, seed=0))


@pytest.mark.parametrize("loss", ["listwise", "pointwise"])
def test_learns_a_small_set_and_hands_on_what_it_learned(tmp_path, one_thread, loss):
    """From nothing to every positive first in its group; the reranker that is served gives the same order."""
    examples = write_topic_examples(tmp_path / "examples", per_topic=2, negatives=3)
    args = {"model": str(tiny_checkpoint(tmp_path / "start")), "loss": loss, "num_negatives": 3, "max_pair_tokens": 48}
    method = build_method(Component(import_path="raydr.methods.cross_encoder:CrossEncoderRanker", args=args))
    tokenizer, objective = method.tokenizer(), method.build_objective()
    groups = next(iter(method.build_batches(examples, batch_size=len(examples), seed=0)))
    whole = to_batch(tokenized(groups, tokenizer, examples.artifact.path), tokenizer.pad_id)
    torch.manual_seed(0)
    network = method.build_model().eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)  # with three times that it depends on the processor
    for _ in range(400):
        optimizer.zero_grad()
        output = objective(Plain(network), whole)
        output.loss.backward()
        optimizer.step()
        if output.loss < 0.05:
            break
    assert output.loss < 0.05
    assert output.metrics["accuracy"] == 1.0

    (tmp_path / "trained").mkdir()
    method.save_model(network, tmp_path / "trained")
    trained = build_method(method.trained(str(tmp_path / "trained")))
    reranker = trained.build_reranker()
    assert isinstance(reranker, CrossEncoderReranker)
    for row, group in ((group.query, group.passages) for group in groups):
        passages = {passage.passage_id: passage for passage in examples.passages(group)}
        hits = [Hit(passage_id, 0.0) for passage_id in reversed(passages)]
        best = reranker.rerank(examples.query(row), hits, passages)[0]
        assert best.passage_id == examples.passage_ids[group[0]]
