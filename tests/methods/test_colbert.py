"""ColBERT as a method: its objective is the margin loss of each query's own group; it is no retriever."""

import pytest
import torch

from raydr.errors import ConfigError
from raydr.losses import margin_mse
from raydr.methods.colbert import ColBertConfig, ColBertRanker, LateInteraction
from raydr.models.colbert import group_interaction, late_interaction
from raydr.train.objective import Labels, TrainBatch
from raydr.types import Hit, Passage, Query
from tests.train.tiny import random_batch, tiny_checkpoint, tiny_colbert


def with_scores(batch: TrainBatch, scores: torch.Tensor | None) -> TrainBatch:
    labels = Labels(batch.labels.passage_rows, batch.labels.positive_rows, scores)
    return TrainBatch(labels=labels, queries=batch.queries, passages=batch.passages)


def test_the_loss_is_that_of_the_own_groups_margins():
    network = tiny_colbert().eval()
    batch = with_scores(random_batch(4, 2, seed=1), torch.randn(4, 2))
    output = LateInteraction()(network, batch)
    (queries, query_mask), (passages, passage_mask) = (side.inputs for side in batch.sides)
    matrix = late_interaction(network(queries, query_mask), network(passages, passage_mask), query_mask, passage_mask)
    own = torch.stack([matrix[row, 2 * row : 2 * row + 2] for row in range(4)])
    torch.testing.assert_close(output.loss, margin_mse(own, batch.labels.teacher_scores))
    assert output.metrics["accuracy"] == (own[:, 0] > own[:, 1]).float().mean()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="scores: margin_mse learns from a ranker's scores"):
        LateInteraction()(tiny_colbert(), random_batch(2, 2, seed=0))
    method = ColBertRanker(ColBertConfig(model=str(tiny_checkpoint(tmp_path / "m"))))
    with pytest.raises(ConfigError, match="scores: "):
        method.build_batches(None, batch_size=2, seed=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_reranker_scores_as_the_network_does(tmp_path, precision, tolerance):
    folder = str(tiny_checkpoint(tmp_path / "m"))
    config = ColBertConfig(model=folder, loss="listwise", normalize=True, max_passage_tokens=48, precision=precision)
    method = ColBertRanker(config)
    query, other = Query("q", "what purrs"), Query("r", "the sea")
    passages = [Passage("a", "a cat purrs at night", "Cat"), Passage("b", "waves"), Passage("c", "waves of the sea")]
    pairs = [(query, passage) for passage in passages] + [(other, passages[2])]
    reranker = method.build_reranker()
    scores = reranker.score(pairs)
    network, tokenizer = method.build_model().eval(), method.build_tokenizer()
    for (asked, passage), score in zip(pairs, scores, strict=True):
        ids = tokenizer.tokenize([asked], [[passage]])
        query_ids, passage_ids = (torch.tensor(ids[name].ids) for name in ("queries", "passages"))
        masks = torch.ones_like(query_ids), torch.ones_like(passage_ids)
        expected = late_interaction(network(query_ids), network(passage_ids), *masks)
        assert score == pytest.approx(expected.item(), abs=tolerance)
    hits = [Hit(passage.passage_id, 0.0) for passage in passages]
    ranked = reranker.rerank(query, hits, {passage.passage_id: passage for passage in passages})
    assert [hit.score for hit in ranked] == pytest.approx(sorted(scores[:3].tolist(), reverse=True), abs=tolerance)
    assert reranker.score([]).shape == (0,)


def test_without_training_its_tokens_are_those_of_the_encoder(tmp_path):
    network = ColBertRanker(ColBertConfig(model=str(tiny_checkpoint(tmp_path / "m")))).build_model().eval()
    ids = torch.tensor([[101, 2003, 102]])
    with torch.no_grad():
        torch.testing.assert_close(network(ids), network.transformer(input_ids=ids).last_hidden_state)


def test_listwise_is_softmax_over_the_own_group():
    network, batch = tiny_colbert().eval(), random_batch(3, 4, seed=2)
    (queries, query_mask), (passages, passage_mask) = (side.inputs for side in batch.sides)
    scores = group_interaction(network(queries, query_mask), network(passages, passage_mask), query_mask, passage_mask)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(LateInteraction("listwise")(network, batch).loss, expected)
