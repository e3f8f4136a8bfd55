"""A network that says of every token what it is part of: transformers' token classification, as it is.

TokenClassifier(AutoModelForTokenClassification.from_pretrained(path))(ids, mask)      # [text, token, label]
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


class TokenClassifier(nn.Module):
    """Scores of every label for every token, in float32."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Int[Tensor, "text token"] | None = None
    ) -> Float[Tensor, "text token label"]:
        return self.transformer(input_ids=input_ids, attention_mask=attention_mask).logits.float()
