"""Small causal language models, each with a tokenizer of its kind: the architectures that rerankers are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QWEN = (  # of Qwen and, but for the digits, of GPT-4 and Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEEN = ["[A] > [B] > [T]", "[T]", "[A]", "[B]\n[A]", "passage query relevant to the first"]


def byte_pair_tokenizer(kind: str, *more: str) -> Any:
    """A small tokenizer with a chat template that tells upper case from lower: `Qwen3`'s kind works on bytes and merges
    a bracket with the letter behind it, `Mistral`'s (and Llama 2's) marks the beginnings of words. The words of `more`
    are tokens too.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    if kind == "Mistral":
        own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        own.decoder = decoders.Metaspace()
    else:
        split = pre_tokenizers.Split(Regex(QWEN), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        own.pre_tokenizer, own.decoder = pre_tokenizers.Sequence([split, in_bytes]), decoders.ByteLevel()
    specials = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet)
    own.train_from_iterator([f"\n{text}" for text in (*_SEEN, *more) for _ in range(50)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=own, name_or_path=kind, eos_token="<|end|>")
    made.chat_template = CHAT
    return made


def write_causal_lm(kind: str, folder: Path, **settings: object) -> Path:
    """A random network of a kind, fixed by its settings: `Llama` with MiniLM's tokenizer, `Mistral` and `Qwen3` with a
    `byte_pair_tokenizer`.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForCausalLM")
    network(network.config_class(**{**SMALL, **settings})).save_pretrained(folder)
    if kind == "Llama":
        tokenizer = transformers.AutoTokenizer.from_pretrained(locate("minilm"))
        tokenizer.eos_token = "[SEP]"
    else:
        tokenizer = byte_pair_tokenizer(kind)
    tokenizer.save_pretrained(folder)
    return folder
