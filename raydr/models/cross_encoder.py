"""A cross-encoder: one transformer that reads query and passage together and gives one score.

Notable: built on transformers' sequence classification with a single label, so the cross-encoders of the hub load as
they are and what is trained here opens in sentence-transformers. Segment ids (BERT's sentence A and B) are derived from
the first separator, so a pair travels as plain token ids.

    model = CrossEncoder(AutoModelForSequenceClassification.from_pretrained(path, num_labels=1), separator=102)
    model(pair_ids, mask)      # one score per pair
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class CrossEncoder(nn.Module):
    """Scores pairs.

    Args:
        transformer: a sequence classifier of one label.
        separator: id of the token between query and passage; None: the network knows no segments.
    """

    def __init__(self, transformer: nn.Module, *, separator: int | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.separator = separator

    def forward(
        self, input_ids: Int[Tensor, "pair token"], attention_mask: Int[Tensor, "pair token"] | None = None
    ) -> Float[Tensor, " pair"]:
        further: dict[str, Any] = {}
        if self.separator is not None:
            further["token_type_ids"] = segments(input_ids, self.separator)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.transformer(input_ids=input_ids, attention_mask=mask, **further).logits[:, 0].float()


def segments(input_ids: Int[Tensor, "pair token"], separator: int) -> Int[Tensor, "pair token"]:
    """0 up to and including the first separator, 1 behind it."""
    is_separator = (input_ids == separator).long()
    return ((is_separator.cumsum(dim=1) - is_separator) > 0).long()
