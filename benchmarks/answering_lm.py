"""A causal language model for timing rerankers that rely on what a model writes: it answers `[C] > [A] > [B]`.

rank_llm's FIRST path lets the model write the opening bracket and reads the letters behind it, in upper case. MiniLM's
tokenizer knows no case and an untrained model writes no bracket, so this one has a byte-pair tokenizer made from the
collection, a chat template, and learns for some steps to answer windows, with orders at random: what it ranks means
nothing, what it costs is that of any model of its size.

    answering_lm(texts, Path("small"), template="rank_zephyr_alpha_template.yaml")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydr.methods.first import First
from raydr.train.objective import Labels, TrainBatch
from raydr.types import Passage, Query

_SPECIALS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_STEPS = [(60, 8, 12), (60, 1, 85)]
"""Steps, windows in one, most words of a passage: what it answers to the long windows of a benchmark is learned at that
length, or it writes no bracket there."""


def answering_lm(texts: Sequence[str], folder: Path, *, template: str | None = None) -> Path:
    """Six layers of 384, as MiniLM; reads 4,096 tokens. Raises `RuntimeError` where it has not learned to answer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = _tokenizer(texts)
    network: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    method = First(
        First.Config(
            engine={"model": str(folder)},
            prompt={"template": template} if template else {},
            window_size=20,
            objective="generation",
            neftune_alpha=0,
            max_prompt_tokens=4096,
        )
    )
    model, objective, tokens = method.build_model().train(), method.build_objective(), method.build_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    words = " ".join(texts).split()
    loss = torch.tensor(0.0)
    for batch, longest in [stage[1:] for stage in _STEPS for _ in range(stage[0])]:
        size, length = int(rng.integers(2, 21)), int(rng.integers(longest // 2, longest + 1))
        starts = rng.integers(len(words) - length, size=(batch, size))
        groups = [[Passage("", " ".join(words[start : start + length])) for start in row] for row in starts]
        queries = [Query("", " ".join(words[row[0] : row[0] + 5])) for row in starts]
        orders = torch.from_numpy(rng.permuted(np.tile(np.arange(size), (batch, 1)), axis=1)).float()
        labels = Labels(torch.arange(batch * size), torch.zeros(batch, 1, dtype=torch.int64), teacher_scores=orders)
        output = objective(model, TrainBatch(labels, pairs=tokens.tokenize(queries, groups)["pairs"].padded(0)))
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = output.loss.detach()
    if loss > 2.5:  # letters at random cost 0.75 nats a token of an answer of 20, and all else is always the same
        raise RuntimeError(f"the model has not learned to answer: loss {loss:.2f}")
    method.save_model(model, folder)
    return folder


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=_SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    own.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    made.chat_template = _CHAT
    return made
