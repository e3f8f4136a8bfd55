"""ColBERT checkpoints: what is saved is what is read, in each of the layouts that the hub has."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydr.encoders.colbert import load_colbert, save_colbert
from raydr.errors import ConfigError
from raydr.models.colbert import group_interaction, late_interaction
from tests.train.tiny import tiny_checkpoint

IDS = torch.tensor([[101, 2003, 2009, 102], [101, 4937, 102, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture
def plain(tmp_path):
    return tiny_checkpoint(tmp_path / "plain")


@torch.no_grad()
def embedded(network):
    return network.eval()(IDS, MASK)[MASK.bool()]


def test_a_plain_encoder_gets_a_new_projection(plain):
    assert load_colbert(str(plain)).linear.weight.shape == (48, 48)
    network = load_colbert(str(plain), dimensions=16)
    assert embedded(network).shape == (7, 16)
    assert not network.normalize


def test_what_is_saved_is_what_is_read(plain, tmp_path):
    network = load_colbert(str(plain), dimensions=16)
    (tmp_path / "saved").mkdir()
    save_colbert(network, str(plain), tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert "linear.weight" in names and "bert.embeddings.word_embeddings.weight" in names  # ColBERT's own names
    again = load_colbert(str(tmp_path / "saved"))
    torch.testing.assert_close(embedded(again), embedded(network))
    assert not again.normalize
    with pytest.raises(ConfigError, match="dimensions: .* 16 dimensions, not 8"):
        load_colbert(str(tmp_path / "saved"), dimensions=8)


def test_colberts_own_checkpoints_have_token_embeddings_of_length_one(plain, tmp_path):
    (tmp_path / "saved").mkdir()
    save_colbert(load_colbert(str(plain), dimensions=16), str(plain), tmp_path / "saved")
    (tmp_path / "saved" / "colbert.json").unlink()  # which only raydr writes
    network = load_colbert(str(tmp_path / "saved"))
    torch.testing.assert_close(embedded(network).norm(dim=1), torch.ones(7))


def test_a_checkpoint_that_lacks_weights_is_refused(plain):
    weights = load_file(plain / "model.safetensors")
    missing = next(name for name in weights if "layer.1" in name)
    del weights[missing]
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lacks 1 weights of its network, such as .*layer.1"):
        load_colbert(str(plain))


def test_matchmakers_layout(plain, tmp_path):
    folder = tmp_path / "matchmaker"
    shutil.copytree(plain, folder)
    weights = load_file(plain / "model.safetensors")
    named = {f"bert_model.{name}": weight for name, weight in weights.items()}
    compressor = {"compressor.weight": torch.randn(12, 48), "compressor.bias": torch.randn(12)}
    save_file({**named, **compressor}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "compression_dim": 12}))
    network = load_colbert(str(folder))
    assert not network.normalize
    reference = load_colbert(str(plain), dimensions=12)
    hidden = reference.transformer(input_ids=IDS, attention_mask=MASK).last_hidden_state
    expected = hidden @ compressor["compressor.weight"].T + compressor["compressor.bias"]
    torch.testing.assert_close(embedded(network), expected.detach()[MASK.bool()])


def test_scores_of_the_own_group_are_those_of_the_matrix():
    torch.manual_seed(0)
    queries, passages = torch.randn(2, 3, 4), torch.randn(6, 5, 4)
    query_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    passage_mask = (torch.arange(5) < torch.tensor([5, 2, 4, 1, 3, 5])[:, None]).long()
    matrix = late_interaction(queries, passages, query_mask, passage_mask)
    groups = group_interaction(queries, passages, query_mask, passage_mask)
    torch.testing.assert_close(groups, torch.stack([matrix[0, :3], matrix[1, 3:]]))
