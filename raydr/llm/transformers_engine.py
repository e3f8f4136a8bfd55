"""The reference engine: one prompt after another through transformers, on the CPU or one GPU.

Notable: a model that reads pictures is given the pixels as its own processor prepares them, tiles and all.

EngineConfig(model=FOLDER, backend="transformers", dtype="float32")
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raydr.encoders.checkpoint import load_transformer, locate
from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, count_answer, load_llm_tokenizer, without_end
from raydr.llm.pictures import check_placeholders, picture_reader

if TYPE_CHECKING:
    from PIL.Image import Image


class TransformersEngine:
    """An `Engine` that runs one prompt at a time in a thread."""

    def __init__(self, config: EngineConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        self.tokenizer: Any = load_llm_tokenizer(config.model)
        self.pictures = picture_reader(config.model, self.tokenizer)
        loader = AutoModelForCausalLM if self.pictures is None else AutoModelForImageTextToText
        dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
        path = locate(config.model)
        try:
            self._network = load_transformer(loader, path, dtype=dtype).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{path}: transformers cannot load this as a causal language model: {error}") from error
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network.to(self._device)
        own = int(getattr(self._network.config.get_text_config(), "max_position_embeddings", 2048))
        self.max_model_tokens = min(own, config.max_model_tokens or own)
        self._turn = asyncio.Lock()

    async def next_token_logprobs(
        self, prompt: Sequence[int], candidates: Sequence[int], pictures: Sequence[Image] = ()
    ) -> list[float]:
        check_placeholders(self.pictures, prompt, pictures)
        async with self._turn:
            return await asyncio.to_thread(self._logprobs, prompt, candidates, pictures)

    def _logprobs(self, prompt: Sequence[int], candidates: Sequence[int], pictures: Sequence[Image]) -> list[float]:
        import torch

        with torch.inference_mode():
            inputs = self._inputs(prompt, pictures)
            logits = self._network(**inputs, logits_to_keep=1).logits[0, -1].float()
            count_answer(prompt=inputs["input_ids"].shape[1], generated=1)
            return logits.log_softmax(0)[torch.tensor(list(candidates), device=self._device)].tolist()

    def _inputs(self, prompt: Sequence[int], pictures: Sequence[Image]) -> dict[str, Any]:
        import torch

        if self.pictures is None or not pictures:
            return {"input_ids": torch.tensor([list(prompt)], device=self._device)}
        ids = torch.tensor([self.pictures.expanded(prompt, pictures)], device=self._device)
        inputs: dict[str, Any] = {"input_ids": ids}
        for name, value in self.pictures.inputs(pictures).items():
            value = value.to(self._device)
            inputs[name] = value.to(self._network.dtype) if value.is_floating_point() else value
        if "mm_token_type_ids" in inspect.signature(self._network.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == self.pictures.token_id).int()  # 1: of a picture
        return inputs

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
