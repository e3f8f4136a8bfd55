"""A decoder out of an encoder: the same layers, a causal mask, and a checkpoint that engines open; vLLM opens it in
`tests/serve/test_first_ray.py`.
"""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from raydr.encoders.checkpoint import locate
from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, build_engine
from raydr.llm.prompt import ListwisePrompt, PromptConfig
from raydr.llm.small import causal_from_encoder, small_causal_lm


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_causal_lm("minilm", tmp_path_factory.mktemp("small") / "start")


def test_its_layers_are_the_encoders(made):
    """Without the causal mask, what enters BERT's first layer leaves the decoder's sixth as it leaves BERT's sixth; the
    layers on top let it through.
    """
    encoder = AutoModel.from_pretrained(locate("minilm")).eval()
    decoder = AutoModelForCausalLM.from_pretrained(made).eval().model.decoder
    ids = torch.randint(1000, 30000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encoder(ids, output_hidden_states=True).hidden_states
        hidden = expected[0]
        everywhere = torch.zeros(2, 1, 40, 40)
        for number, layer in enumerate(decoder.layers, start=1):
            output = layer(hidden, attention_mask=everywhere)
            hidden = output[0] if isinstance(output, tuple) else output
            if number == 6:  # OPT's norms have another epsilon
                torch.testing.assert_close(hidden, expected[-1], atol=2e-3, rtol=0)
    assert number == 8
    assert torch.nn.functional.cosine_similarity(hidden, expected[-1], dim=-1).min() > 0.99


def test_its_embeddings_are_near_to_the_encoders(made):
    encoder = AutoModel.from_pretrained(locate("minilm")).eval()
    body = AutoModelForCausalLM.from_pretrained(made).eval().model.decoder
    ids = torch.tensor([[101, 3899, 5456, 2005, 102]])  # words of every day
    with torch.inference_mode():
        expected = encoder.embeddings(ids)
        positions = torch.arange(5)[None]
        found = body.embed_tokens(ids) + body.embed_positions(torch.ones_like(ids), 0, position_ids=positions)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.95
    weights = body.embed_positions.weight[2:]
    assert torch.equal(weights[512], weights[1])  # beyond what the encoder knows they repeat, without [CLS]'s
    assert torch.equal(weights[1023], weights[1])


def test_it_is_causal_and_its_tokenizer_tells_letters_apart(made):
    engine = build_engine(EngineConfig(model=str(made), backend="transformers", dtype="float32"))
    prompt = ListwisePrompt(engine.tokenizer, PromptConfig(), max_tokens=engine.max_model_tokens, num_identifiers=20)
    ids = prompt.encode("who hunts mice", ["a cat", "a dog"])
    assert ids[0] == engine.tokenizer.cls_token_id
    assert engine.max_model_tokens == 2048
    scores = asyncio.run(engine.next_token_logprobs(ids, prompt.letters[:2]))
    network = AutoModelForCausalLM.from_pretrained(made).eval()
    with torch.inference_mode():
        logits = network(torch.tensor([[*ids, 2003, 2003]])).logits[0, len(ids) - 1]
    assert logits.log_softmax(0)[prompt.letters[:2]].tolist() == pytest.approx(scores, abs=1e-3)


def test_a_finished_one_stays(made):
    stamp = (made / "config.json").stat().st_mtime_ns
    assert small_causal_lm("minilm", made.parent) == made
    assert (made / "config.json").stat().st_mtime_ns == stamp
    assert json.loads((made.parent / "manifest.json").read_text())["kind"] == "model"


def test_another_encoder_is_refused(tmp_path):
    tiny = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32, hidden_act="relu"
    )
    BertModel(tiny).save_pretrained(tmp_path / "relu")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="only BERT's layers"):
        causal_from_encoder(str(tmp_path / "relu"), tmp_path / "out")
