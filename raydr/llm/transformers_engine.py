"""The reference engine: one prompt after another through transformers, on the CPU or one GPU.

EngineConfig(model=FOLDER, backend="transformers", dtype="float32")
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from raydr.encoders.checkpoint import load_transformer, locate
from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, count_answer, load_llm_tokenizer, without_end


class TransformersEngine:
    """An `Engine` that runs one prompt at a time in a thread."""

    def __init__(self, config: EngineConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.tokenizer: Any = load_llm_tokenizer(config.model)
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        path = locate(config.model)
        try:
            self._network = load_transformer(AutoModelForCausalLM, path, dtype=dtype).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{path}: transformers cannot load this as a causal language model: {error}") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network.to(self._device)
        own = int(getattr(self._network.config, "max_position_embeddings", 2048))
        self.max_model_tokens = min(own, config.max_model_tokens or own)
        self._turn = asyncio.Lock()

    async def next_token_logprobs(self, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        async with self._turn:
            return await asyncio.to_thread(self._logprobs, prompt, candidates)

    def _logprobs(self, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        import torch

        with torch.inference_mode():
            ids = torch.tensor([list(prompt)], device=self._device)
            logits = self._network(ids, logits_to_keep=1).logits[0, -1].float()
            count_answer(prompt=len(prompt), generated=1)
            return logits.log_softmax(0)[torch.tensor(list(candidates), device=self._device)].tolist()

    async def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        async with self._turn:
            return await asyncio.to_thread(self._generate, prompt, max_tokens, stop)

    def _generate(self, prompt: Sequence[int], max_tokens: int, stop: Sequence[int]) -> list[int]:
        import torch

        ends = {*stop, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])}
        with torch.inference_mode():
            ids = torch.tensor([list(prompt)], device=self._device)
            made = self._network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=0,
            )
        answer = made[0, ids.shape[1] :].tolist()
        count_answer(prompt=len(prompt), generated=len(answer))
        return without_end(answer, ends)

    async def check(self) -> None:
        """Nothing can be gone."""

    def close(self) -> None:
        """Nothing was started."""
