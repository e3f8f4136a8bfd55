"""The text encoder against sentence-transformers on the same checkpoints, and everything a config can ask for."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from raydr.encoders.checkpoint import locate
from raydr.encoders.text import TextEncoder
from raydr.errors import ConfigError
from raydr.types import Passage, Query
from tests.contracts import check_encoder

BACKENDS = ["torch", "openvino"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "barked", "at", "moon", "over", "wheat", "fields"]
TEXTS = [
    "A small furry animal that purrs and hunts mice at night.",
    "x",
    "",
    "   ",
    "naïve café — 東京都 🙂 \u200b مرحبا",
    "The natural satellite of the Earth; its pull causes the tides. " * 30,
    *(" ".join(WORDS[: 1 + i % 16] * (1 + i % 5)) for i in range(40)),
]


def encode(encoder, texts=TEXTS):
    return encoder.encode_passages([Passage(str(i), text) for i, text in enumerate(texts)])


def build(**settings):
    return TextEncoder(TextEncoder.Config(**settings))


def cosines(left, right):
    return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def sentence_transformer(path):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def reference():
    return sentence_transformer(locate("minilm")).encode(TEXTS)


@pytest.fixture(scope="module", autouse=True)
def _openvino_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A small WordPiece tokenizer with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 3, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)
    return folder


SMALL = {
    "vocab_size": 120,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # large, so that different texts have clearly different embeddings
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer_folder):
    """A random BERT, saved as a sentence-transformers folder with CLS pooling and prompts, without Normalize."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL, max_position_embeddings=64)).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "cat sat ", "document": "sun "}, "default_prompt_name": None})
    )
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, tokenizer_folder):
    """A random decoder of Qwen3's kind, as a plain transformers folder."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_equals_sentence_transformers(reference, backend, precision, least):
    encoder = build(backend=backend, precision=precision)
    embeddings = encode(encoder)
    assert cosines(embeddings, reference).min() > least
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    assert encoder.stats.texts == len(TEXTS)
    assert 0 < encoder.stats.padding_share < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(backend):
    check_encoder(build(backend=backend, precision="float32"))


@pytest.mark.parametrize("batch_tokens", [16, 300, 100_000])
def test_batch_size_and_order_do_not_matter(reference, batch_tokens):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    encoder = build(backend="torch", precision="float32", batch_tokens=batch_tokens)
    embeddings = encode(encoder, [TEXTS[i] for i in order])
    np.testing.assert_allclose(embeddings, reference[order], atol=1e-5)


def test_many_chunks_keep_their_order(monkeypatch, reference):
    monkeypatch.setattr("raydr.encoders.text._CHUNK_TEXTS", 7)
    np.testing.assert_allclose(encode(build(backend="torch", precision="float32")), reference, atol=1e-5)


def test_titles_prompts_and_lengths_are_what_they_say():
    encoder = build(
        backend="torch",
        precision="float32",
        query_prompt="query: ",
        passage_prompt="passage: ",
        title_separator=" | ",
        max_query_tokens=8,
    )
    plain = build(backend="torch", precision="float32")
    long = "how do I join two frames by the nearest key in time"
    expected = encode(plain, ["query: short one", "passage: Title | text", "passage: text"])
    np.testing.assert_allclose(encoder.encode_queries([Query("q", "short one")])[0], expected[0], atol=1e-5)
    passages = [Passage("a", "text", title="Title"), Passage("b", "text")]
    np.testing.assert_allclose(encoder.encode_passages(passages), expected[1:], atol=1e-5)
    cut = encoder.encode_queries([Query("q", long), Query("q", long + " and more")])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-5)


def test_matryoshka_keeps_the_leading_dimensions_and_normalises_again(reference):
    encoder = build(backend="torch", precision="float32", dimensions=64)
    assert encoder.dim == 64
    expected = reference[:, :64] / np.linalg.norm(reference[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(encode(encoder), expected, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_of_sentence_transformers_is_followed(bert, backend):
    """CLS pooling, no Normalize, prompts and a limit that only the tokenizer states."""
    encoder = build(model=str(bert), backend=backend, precision="float32")
    assert encoder.checkpoint.max_tokens == 32
    check_encoder(encoder)
    peer = sentence_transformer(bert)
    np.testing.assert_allclose(encode(encoder), peer.encode_document(TEXTS), atol=1e-4)
    queries = encoder.encode_queries([Query(str(i), text) for i, text in enumerate(TEXTS)])
    np.testing.assert_allclose(queries, peer.encode_query(TEXTS), atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_is_pooled_at_its_last_token(qwen, backend):
    encoder = build(model=str(qwen), pooling="last", backend=backend, precision="float32")
    check_encoder(encoder)
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(qwen).eval(), AutoTokenizer.from_pretrained(qwen)
    with torch.inference_mode():
        last = [model(**tokenizer(t, truncation=True, return_tensors="pt")).last_hidden_state[0, -1] for t in TEXTS]
    expected = torch.nn.functional.normalize(torch.stack(last), dim=1).numpy()
    np.testing.assert_allclose(encode(encoder), expected, atol=1e-4)


# Positions, padding and attention differ between these: from behind the padding id, relative, rotary, alternating.
ARCHITECTURES = {
    "XLMRobertaModel": {"max_position_embeddings": 66, "pad_token_id": 0},
    "MPNetModel": {"max_position_embeddings": 66, "pad_token_id": 0},
    "DistilBertModel": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    "ElectraModel": {"embedding_size": 16, "max_position_embeddings": 64},
    "ModernBertModel": {"max_position_embeddings": 64, "pad_token_id": 0, "global_attn_every_n_layers": 2},
    "MistralModel": {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
    "LlamaModel": {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_give_what_sentence_transformers_gives(name, tmp_path, tokenizer_folder):
    import transformers

    folder = tmp_path / name
    shutil.copytree(tokenizer_folder, folder)
    network = getattr(transformers, name)
    torch.manual_seed(0)
    network(network.config_class(**{**SMALL, **ARCHITECTURES[name]})).save_pretrained(folder)
    encoder = build(model=str(folder), normalize=False, backend="torch", precision="float32")
    np.testing.assert_allclose(encode(encoder), sentence_transformer(folder).encode(TEXTS), atol=1e-4)


def test_the_version_stamps_what_changes_vectors_and_nothing_else(tmp_path):
    base = build()
    moved = shutil.copytree(locate("minilm"), tmp_path / "elsewhere")
    for same in (
        {"precision": "float32"},
        {"backend": "torch"},
        {"batch_tokens": 7},
        {"model": str(moved)},
        {"max_query_tokens": 256},
        {"pooling": "mean"},
    ):
        assert build(**same).version == base.version, same
    for other in (
        {"pooling": "cls"},
        {"normalize": False},
        {"dimensions": 8},
        {"max_passage_tokens": 16},
        {"query_prompt": "q"},
        {"passage_prompt": "p"},
        {"title_separator": "\n"},
    ):
        assert build(**other).version != base.version, other
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    assert build(model=str(moved)).version != base.version


def test_asking_for_the_stamp_loads_no_weights(monkeypatch):
    monkeypatch.setattr("raydr.encoders.torch_backend.load_network", None)
    encoder = build()
    assert encoder.dim == 384
    assert len(encoder.version) == 64


def test_what_cannot_work_is_named(bert, tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        build(model="nobody/has-this-model")
    with pytest.raises(ConfigError, match="more than the model's 384"):
        build(dimensions=1000)
    with pytest.raises(ConfigError, match="max_passage_tokens: 1000 is more than the 512"):
        build(max_passage_tokens=1000)
    pickled = shutil.copytree(bert, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="loads no pickled weights"):
        build(model=str(pickled))
    dense = shutil.copytree(bert, tmp_path / "dense")
    modules = json.loads((dense / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (dense / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="Dense"):
        build(model=str(dense))


def test_auto_falls_back_to_torch_where_openvino_cannot_convert(monkeypatch, caplog, bert):
    def fails(network):
        raise RuntimeError("no conversion for this operation\nwith a long explanation")

    monkeypatch.setattr("raydr.encoders.openvino_backend.convert", fails)
    monkeypatch.setattr(TextEncoder, "backend_name", "openvino")
    auto = build(model=str(bert), precision="float32", dimensions=9)
    embeddings = encode(auto, ["the cat"])
    assert "torch does: no conversion for this operation" in caplog.text
    assert embeddings.shape == (1, 9)
    with pytest.raises(RuntimeError, match="no conversion"):
        encode(build(model=str(bert), precision="float32", dimensions=9, backend="openvino"), ["the cat"])
