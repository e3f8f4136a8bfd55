"""Cross-modal VDR: what it reads and writes, which pairs a bag teaches, and that pictures come to say their words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from raydr.encoders.checkpoint import locate
from raydr.encoders.vocabulary_pictures import PictureVocabularyConfig, PictureVocabularyEncoder
from raydr.errors import ConfigError
from raydr.methods.base import build_method
from raydr.methods.vdr import VdrLossConfig, VdrPictures, VdrPicturesConfig, VocabularyContrastive, symmetric
from raydr.models.tokens import Tokens
from raydr.train import grad_cache
from raydr.train.objective import Labels, TrainBatch
from raydr.types import Passage, Query
from tests.methods.test_vdr import Plain
from tests.multimodal import dual_model, llava_model

SHIFT = 999


def picture(seed: int) -> bytes:
    """Noise that no two seeds have in common."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module", params=["vision-text-dual-encoder", "clip"])
def start(request, tmp_path_factory) -> str:
    """A dual encoder as transformers writes it, with MiniLM's tokenizer."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    dual_model(request.param, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def minilms(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("dual")
    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    dual_model("vision-text-dual-encoder", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def encoder(model: str, **settings: Any) -> PictureVocabularyEncoder:
    small = {"device": "cpu", "num_threads": 1, "precision": "float32", "query_topk": 16, "passage_topk": 16}
    return PictureVocabularyEncoder(PictureVocabularyConfig(model=model, **{**small, **settings}))


def test_texts_and_pictures_share_the_vocabulary(start):
    made = encoder(start)
    both = [Passage("a", "a cat", image=picture(0)), Passage("b", "a cat"), Passage("c", "", image=picture(0))]
    found = made.encode_passages(both)
    assert found.shape == (3, made.dim) == (3, 30522 - SHIFT)
    assert np.diff(found.indptr)[2] == 16  # a picture has no tokens that would be kept beside the highest
    own = AutoTokenizer.from_pretrained(locate("minilm"))("a cat", add_special_tokens=False)["input_ids"]
    assert set(np.array(own) - SHIFT) <= set(found[[1]].indices)
    assert made.tokens_of([own[1] - SHIFT]) == ["cat"]
    whole = encoder(start, passage_topk=None).encode_passages(both).toarray()
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    assert (whole > 0).all()
    together = encoder(start, passage_topk=None).encode_passages(both[:1]).toarray()  # not of its batch
    np.testing.assert_allclose(together[0], whole[0], atol=1e-5)
    assert made.encode_queries([]).shape == (0, made.dim)


def test_what_is_saved_is_what_was_trained(start, tmp_path):
    method = VdrPictures(VdrPicturesConfig(model=start, precision="float32", device="cpu"))
    network = method.build_model()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    method.save_model(network, tmp_path)
    trained = build_method(method.trained(str(tmp_path)))
    asked = [Passage("p", "two words", image=picture(3))]
    tokens = trained.build_tokenizer().tokenize([], [asked])["passages"].padded(0)
    with torch.inference_mode():
        expected = network.eval()(*tokens.inputs).numpy()
    whole = encoder(str(tmp_path), passage_topk=None).encode_passages(asked).toarray()
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    assert trained.encoder().version != method.encoder().version


def test_it_takes_dual_encoders_alone(tmp_path):
    llava_model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="VDR takes a dual encoder"):
        encoder(str(tmp_path))


def batch_of(tokenizer: Any, queries: list[Query], passages: list[Passage]) -> TrainBatch:
    read = tokenizer.tokenize(queries, [[passage] for passage in passages])
    asked, sought = (read[name].padded(0) for name in ("queries", "passages"))
    rows = torch.arange(len(queries))
    return TrainBatch(Labels(rows, rows[:, None].clone()), asked, sought)


def test_a_pair_without_words_takes_no_part_in_what_bags_teach():
    """The term of two queries with tokens is that of a batch of these two, and the pictures' passages beside them."""
    generator = torch.Generator().manual_seed(0)
    queries, passages = (torch.rand(3, 20, generator=generator) for _ in range(2))
    bags = torch.zeros(3, 20)
    bags[0, [1, 5]] = bags[2, [4]] = 1
    ids = torch.tensor([[1, 5], [0, 0], [4, 0]])
    asked = Tokens(ids, (ids > 0).long())
    labels = Labels(torch.arange(3), torch.arange(3)[:, None], query_tokens=asked, passage_tokens=asked)
    objective = VocabularyContrastive(VdrLossConfig(train_topk=20), shift=0, normalize=False, special=[0])
    found = objective.loss(queries, passages, labels).loss
    positives = torch.eye(3, dtype=torch.bool)
    learned = symmetric(queries, passages, positives)
    kept = torch.tensor([0, 2])
    forth = -torch.log_softmax(bags[kept] @ passages.T, dim=1)[[0, 1], kept].mean()
    back = -torch.log_softmax(passages[kept] @ bags[kept].T, dim=1).diagonal().mean()
    torch.testing.assert_close(found, (learned + forth + back) / 2)


def test_pictures_alone_teach_what_vectors_can(minilms):
    method = VdrPictures(VdrPicturesConfig(model=minilms))
    made = batch_of(method.build_tokenizer(), [Query("q", "", image=picture(1))], [Passage("p", "", image=picture(2))])
    network = method.build_model()
    grad_cache.backward(Plain(network), method.build_objective(), made, chunk_tokens=None)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in network.parameters())


def test_pictures_come_to_say_the_words_they_are_asked_for_with(minilms, tmp_path):
    """Eight pictures by heart: each is found by its name, by the name's tokens alone, and names itself."""
    names = ["cat", "house", "river", "moon", "bread", "clock", "horse", "flag"]
    settings = {"model": minilms, "train_topk": 16, "max_query_tokens": 8, "max_passage_tokens": 8}
    method = VdrPictures(VdrPicturesConfig(**settings, precision="float32", device="cpu", query_topk=16))
    made = batch_of(
        method.build_tokenizer(),
        [Query(name, name) for name in names],
        [Passage(name, "", image=picture(seed)) for seed, name in enumerate(names)],
    )
    torch.manual_seed(0)
    network, objective = method.build_model().train(), method.build_objective()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        grad_cache.backward(Plain(network), objective, made, chunk_tokens=None)
        optimizer.step()
    method.save_model(network, tmp_path)
    trained = encoder(str(tmp_path))
    pictures = trained.encode_passages([Passage(n, "", image=picture(seed)) for seed, n in enumerate(names)])
    for topk in (16, 0):  # 0: the name's own token alone
        asked = encoder(str(tmp_path), query_topk=topk).encode_queries([Query(name, name) for name in names])
        assert list((asked @ pictures.T).toarray().argmax(axis=1)) == list(range(8))
    highest = [trained.tokens_of([int(row.indices[row.data.argmax()])])[0] for row in (pictures[[i]] for i in range(8))]
    assert highest == names
