"""One dropout for a whole network: nothing is left out where it is 0, whatever the architecture keeps its own as."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, BertConfig, CLIPTextConfig, LlamaConfig, ModernBertConfig

from raydr.train.dropout import set_dropout

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "bert": BertConfig(**SHAPE),
    "modernbert": ModernBertConfig(**SHAPE, **TOKENS, attention_dropout=0.1, mlp_dropout=0.1, embedding_dropout=0.1),
    "llama": LlamaConfig(**SHAPE, attention_dropout=0.1),
    "clip": CLIPTextConfig(**SHAPE, **TOKENS, attention_dropout=0.1),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_dropout_is_set(name, attention):
    torch.manual_seed(0)
    network = AutoModel.from_config(CONFIGS[name], attn_implementation=attention).train()
    ids = torch.randint(3, 64, (4, 24))
    ids[:, -1] = 2  # CLIP's text tower looks for the end

    def differs() -> bool:
        with torch.no_grad():
            first, second = (network(input_ids=ids).last_hidden_state for _ in range(2))
        return not torch.equal(first, second)

    assert differs()
    set_dropout(network, 0.0)
    assert not differs()
    set_dropout(network, 0.5)
    assert differs()
