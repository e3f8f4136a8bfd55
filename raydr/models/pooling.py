"""From one vector per token to one embedding per text: mean, first (CLS) or last token.

Notable: sequences are padded on the right and `mask` is None where no text of the batch is padded, which spares the
masked attention and the masked mean. The functions trace to static graphs, so OpenVINO converts them as they are.

    pool(hidden, mask, "mean")
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Pooling: TypeAlias = Literal["mean", "cls", "last"]


def pool(
    hidden: Float[Tensor, "text token dim"], mask: Int[Tensor, "text token"] | None, pooling: Pooling
) -> Float[Tensor, "text dim"]:
    """One vector per text from the last hidden states; `mask` is 1 at tokens and 0 at padding (None: no padding)."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return last_token(hidden, mask)
    return mean_of_tokens(hidden, mask)


def mean_of_tokens(
    hidden: Float[Tensor, "text token dim"], mask: Int[Tensor, "text token"] | None
) -> Float[Tensor, "text dim"]:
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def last_token(
    hidden: Float[Tensor, "text token dim"], mask: Int[Tensor, "text token"] | None
) -> Float[Tensor, "text dim"]:
    """What decoders are pooled with: under causal attention only the last token has seen the whole text."""
    if mask is None:
        return hidden[:, -1]
    last = (mask.sum(dim=1) - 1).view(-1, 1, 1).expand(-1, 1, hidden.size(-1))
    return torch.gather(hidden, 1, last).squeeze(1)
