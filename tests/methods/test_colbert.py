"""ColBERT as a method: its objective is the margin loss of each query's own group; it is no retriever."""

import pytest
import torch

from raydr.errors import ConfigError
from raydr.losses import margin_mse
from raydr.methods.colbert import ColBertConfig, ColBertTeacher, LateInteraction
from raydr.models.colbert import late_interaction
from raydr.train.objective import Labels, TrainBatch
from tests.train.tiny import random_batch, tiny_checkpoint, tiny_colbert


def with_scores(batch: TrainBatch, scores: torch.Tensor | None) -> TrainBatch:
    labels = Labels(batch.labels.passage_rows, batch.labels.positive_rows, scores)
    return TrainBatch(labels=labels, queries=batch.queries, passages=batch.passages)


def test_the_loss_is_that_of_the_own_groups_margins():
    network = tiny_colbert().eval()
    batch = with_scores(random_batch(4, 2, seed=1), torch.randn(4, 2))
    output = LateInteraction()(network, batch)
    (queries, query_mask), (passages, passage_mask) = batch.sides
    matrix = late_interaction(network(queries, query_mask), network(passages, passage_mask), query_mask, passage_mask)
    own = torch.stack([matrix[row, 2 * row : 2 * row + 2] for row in range(4)])
    torch.testing.assert_close(output.loss, margin_mse(own, batch.labels.teacher_scores))
    assert output.metrics["accuracy"] == (own[:, 0] > own[:, 1]).float().mean()


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ConfigError, match="scores: ColBERT learns from a ranker's scores"):
        LateInteraction()(tiny_colbert(), random_batch(2, 2, seed=0))
    method = ColBertTeacher(ColBertConfig(model=str(tiny_checkpoint(tmp_path / "m"))))
    with pytest.raises(ConfigError, match="scores: "):
        method.build_batches(None, batch_size=2, seed=0)
    with pytest.raises(ConfigError, match="name a retriever"):
        method.build_encoder()
