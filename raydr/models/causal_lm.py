"""A causal language model as a reranker is trained: the logits of the tokens of an answer, nothing of the prompt.

Notable: prompts of different lengths are moved to end at the same place, so all answers of a batch stand at the end and
transformers computes the vocabulary's logits for them alone. NEFTune's noise is added to the embeddings in training.

    model = CausalLm(AutoModelForCausalLM.from_pretrained(path))
    model(prompt_ids, prompt_mask, answer_ids)       # logits that predict each token of the answer
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class CausalLm(nn.Module):
    """Predicts answers.

    Args:
        transformer: a transformers causal language model.
        neftune_alpha: scale of uniform noise on token embeddings in training (arXiv 2310.05914); 0: none.
    """

    def __init__(self, transformer: nn.Module, *, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.neftune_alpha = neftune_alpha
        transformer.get_input_embeddings().register_forward_hook(self._add_noise)  # type: ignore[operator]

    def forward(
        self,
        prompt_ids: Int[Tensor, "text token"],
        prompt_mask: Int[Tensor, "text token"] | None,
        answer_ids: Int[Tensor, "text answer"],
    ) -> Float[Tensor, "text answer vocab"]:
        """Logits in float32; entry `i` is the prediction of `answer_ids[:, i]` from everything before it."""
        prompt_ids, mask = left_padded(prompt_ids, prompt_mask)
        ids = torch.cat([prompt_ids, answer_ids[:, :-1]], dim=1)
        mask = torch.cat([mask, torch.ones_like(answer_ids[:, :-1])], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.transformer(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=answer_ids.shape[1],
            use_cache=False,
        )
        return output.logits.float()

    def _add_noise(self, module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
        if not self.training or not self.neftune_alpha:
            return embedded
        scale = self.neftune_alpha / (embedded.shape[1] * embedded.shape[2]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-scale, scale)


def left_padded(
    ids: Int[Tensor, "text token"], mask: Int[Tensor, "text token"] | None
) -> tuple[Int[Tensor, "text token"], Int[Tensor, "text token"]]:
    """Texts padded on the right, moved so that all end in the last column."""
    if mask is None:
        return ids, torch.ones_like(ids)
    width = ids.shape[1]
    columns = torch.arange(width, device=ids.device) - (width - mask.sum(dim=1, keepdim=True))
    is_text = columns >= 0
    return ids.gather(1, columns.clamp(min=0)) * is_text, is_text.to(mask.dtype)
