"""Small causal language models with a real tokenizer: the architectures that rerankers are made of."""

from __future__ import annotations

from pathlib import Path

from raydr.encoders.checkpoint import locate

SMALL = {
    "vocab_size": 30522,  # of MiniLM's tokenizer
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM's attention takes on a CPU
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,  # large, so that letters have clearly different scores
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 102,
    "pad_token_id": 0,
}
KINDS = ("Llama", "Mistral", "Qwen3")


def write_causal_lm(kind: str, folder: Path, **settings: object) -> Path:
    """A random network of a kind (`Llama`, `Mistral`, `Qwen3`) with MiniLM's tokenizer; fixed by its settings."""
    import torch
    import transformers

    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForCausalLM")
    network(network.config_class(**{**SMALL, **settings})).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(locate("minilm"))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder
