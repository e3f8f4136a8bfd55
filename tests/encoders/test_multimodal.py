"""The encoder of texts and pictures: what it reads, what it leaves out, what it writes and opens again."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from raydr.encoders.checkpoint import locate
from raydr.encoders.multimodal import MultimodalCheckpoint, MultimodalEncoder, MultimodalEncoderConfig, MultimodalReader
from raydr.encoders.multimodal_weights import save
from raydr.errors import ConfigError
from raydr.types import Passage, Query
from tests.contracts import check_encoder
from tests.multimodal import dual_model, llava_model, qwen_model

PLACEHOLDER = 1  # [unused0]
KINDS = ["llava", "qwen2_vl", "qwen2_5_vl", "clip", "vision-text-dual-encoder"]


def picture(color: tuple[int, int, int], size: tuple[int, int] = (40, 32)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


RED, BLUE = picture((220, 20, 30)), picture((10, 30, 200))


def checkpoint(kind: str, folder: Path) -> Path:
    """A small model of a real class with MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(locate("minilm"))
    if kind == "llava":
        model = llava_model(len(tokenizer), image_token_index=PLACEHOLDER)
    elif kind.startswith("qwen"):
        model = qwen_model(kind, len(tokenizer), image_token_id=PLACEHOLDER)
    else:
        model = dual_model(kind, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    return checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return checkpoint("llava", tmp_path_factory.mktemp("llava"))


def encoder(folder: Path, **settings) -> MultimodalEncoder:
    size = {} if "image_size" in settings else {"image_size": 32}
    return MultimodalEncoder(
        MultimodalEncoderConfig(model=str(folder), precision="float32", device="cpu", **size, **settings)
    )


def test_it_is_an_encoder(folder):
    check_encoder(encoder(folder))


def test_a_mixed_batch_equals_one_by_one(folder):
    own = encoder(folder)
    passages = [
        Passage("a", "a red square", image=RED),
        Passage("b", "a blue square"),
        Passage("c", "", image=BLUE),
        Passage("d", "a red square that is described in many more words than the others are"),
        Passage("e", "", "Title", image=RED),
    ]
    together = own.encode_passages(passages)
    alone = np.concatenate([own.encode_passages([passage]) for passage in passages])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    assert len(np.unique(together.round(4), axis=0)) == len(passages)  # each counts: text, picture, title
    queries = [Query("a", "the same in blue", RED, "Find a picture."), Query("b", "", BLUE), Query("c", "blue")]
    asked = own.encode_queries(queries)
    np.testing.assert_allclose(asked, np.concatenate([own.encode_queries([query]) for query in queries]), atol=2e-6)


def test_what_a_query_is_read_as(llava):
    reader = encoder(llava).reader
    tokenizer = AutoTokenizer.from_pretrained(llava)
    seen = 16  # 32 / 8 squared
    (read,) = reader.queries([Query("q", "the same in blue", RED, "Find it.")])
    words = tokenizer("Instruct: Find it.\nQuery: ", add_special_tokens=False).input_ids
    rest = tokenizer("\nthe same in blue", add_special_tokens=False).input_ids
    assert read.ids == [tokenizer.cls_token_id, *words, *[PLACEHOLDER] * seen, *rest, tokenizer.sep_token_id]
    assert read.first_pooled == 1 + len(words)
    assert len(read.pixels) == 32 * 32 * 3
    (plain,) = reader.passages([Passage("p", "the same in blue")])
    assert plain.ids == tokenizer("the same in blue").input_ids
    assert (plain.first_pooled, plain.pixels) == (0, None)


def test_a_placeholder_in_a_text_is_no_picture(llava):
    own = encoder(llava)
    (read,) = own.reader.passages([Passage("p", "one [unused0] two")])
    assert PLACEHOLDER not in read.ids
    assert np.isfinite(own.encode_passages([Passage("p", "[unused0] [unused0]", image=RED)])).all()


def test_long_texts_are_cut_and_pictures_are_not(llava):
    own = encoder(llava, max_query_tokens=24, max_passage_tokens=12)
    (query,) = own.reader.queries([Query("q", "word " * 500, RED, "Find it.")])
    assert len(query.ids) == 24 + 16
    assert query.ids.count(PLACEHOLDER) == 16
    (passage,) = own.reader.passages([Passage("p", "word " * 500)])
    assert len(passage.ids) == 12
    (told,) = own.reader.queries([Query("q", "what is asked", RED, "Find it. " * 500)])  # nothing but an instruction
    assert told.first_pooled < len(told.ids)
    assert np.isfinite(own.encode_queries([Query("q", "what is asked", RED, "Find it. " * 500)])).all()


def test_the_stamp_says_what_changes_the_vectors(llava):
    first = encoder(llava)
    assert first.version == encoder(llava, batch_tokens=64, num_threads=1).version
    changes = [
        {"pooling": "last"},
        {"bidirectional": True},
        {"image_size": 16},
        {"instruction": "Find it."},
        {"query_template": "{instruction} "},
        {"max_query_tokens": 64},
        {"max_passage_tokens": 64},
        {"title_separator": ". "},
    ]
    assert len({first.version, *(encoder(llava, **change).version for change in changes)}) == len(changes) + 1


def test_saved_and_opened_again(folder, tmp_path):
    settings = {"pooling": "mean"} if MultimodalCheckpoint(encoder(folder).config).is_dual else {"bidirectional": True}
    own = encoder(folder, **settings)
    network = own.checkpoint.load("float32")
    assert all(weight.ndim for weight in network.parameters())  # which DeepSpeed wants in bfloat16
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.01)
    save(network, own.checkpoint, tmp_path)
    again = MultimodalEncoder(MultimodalEncoderConfig(model=str(tmp_path), precision="float32", device="cpu"))
    assert again.checkpoint.described() == own.checkpoint.described()
    query = Query("q", "the same in blue", RED, "Find it.")
    with torch.no_grad():
        read = own.reader.queries([query])
        expected = network(*own.reader.texts(read).padded(own.reader.pad_id).inputs)
    np.testing.assert_allclose(again.encode_queries([query]), expected.numpy(), atol=2e-6)
    assert not list(tmp_path.glob("*.bin"))
    reopened, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)  # as transformers does it
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reopened.config.model_type == own.checkpoint.kind


def test_the_latent_head_is_saved(llava, tmp_path):
    own = encoder(llava, pooling="latent", latents=8, latent_heads=2)
    network = own.checkpoint.load("float32")
    save(network, own.checkpoint, tmp_path)
    again = MultimodalCheckpoint(MultimodalEncoderConfig(model=str(tmp_path))).load("float32")
    assert again.latent is not None
    for name, value in network.latent.state_dict().items():
        torch.testing.assert_close(again.latent.state_dict()[name], value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 33}, "no multiple of 8"),
        ({"pooling": "own"}, "mean, last, latent"),
    ],
)
def test_what_cannot_be(llava, settings, said):
    with pytest.raises(ConfigError, match=said):
        encoder(llava, **settings)


def test_a_text_model_reads_no_pictures():
    with pytest.raises(ConfigError, match="a bert model; raydr reads pictures with"):
        MultimodalReader(MultimodalCheckpoint(MultimodalEncoderConfig(model="minilm")))


def test_tokens_are_counted_without_looking(folder):
    own = encoder(folder)
    passages = [Passage("a", "a red square", image=RED), Passage("b", "a blue square"), Passage("c", "", image=BLUE)]
    own.encode_passages(passages)
    assert own.reader.count(passages, "passage") == own.stats.tokens
    before = own.stats.tokens
    queries = [Query("q", "a square", RED, "Find the picture."), Query("r", "blue")]
    own.encode_queries(queries)
    assert own.reader.count([q._replace(image=q.image and b"not looked at") for q in queries], "query") == (
        own.stats.tokens - before
    )
