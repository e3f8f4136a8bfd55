"""A dual encoder (bi-encoder): one transformer that embeds queries and passages apart, compared by inner product.

Notable: pooling, Matryoshka truncation and normalisation are part of the network and computed in float32 whatever
the precision of the transformer, so every backend that runs this module yields the same embeddings.

    model = DualEncoder(AutoModel.from_pretrained(path), pooling="mean")
    model(input_ids)                      # no padding
    model(input_ids, attention_mask)      # padded on the right
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from raydr.models.pooling import Pooling, pool


class DualEncoder(nn.Module):
    """A transformer with a pooling on top.

    Args:
        transformer: a module whose output has `last_hidden_state`.
        pooling: which tokens make the embedding.
        normalize: whether embeddings have length 1 (inner product is then the cosine).
        dimensions: number of leading dimensions to keep, for models trained with Matryoshka losses; None keeps all.
        first_pooled: tokens at the start that the pooling does not see.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        pooling: Pooling,
        normalize: bool = True,
        dimensions: int | None = None,
        first_pooled: int = 0,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.dimensions = dimensions
        self.first_pooled = first_pooled

    def forward(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Int[Tensor, "text token"] | None = None
    ) -> Float[Tensor, "text dim"]:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.first_pooled:
            hidden = hidden[:, self.first_pooled :]
            attention_mask = None if attention_mask is None else attention_mask[:, self.first_pooled :]
        embeddings = pool(hidden.float(), attention_mask, self.pooling)
        if self.dimensions is not None:
            embeddings = embeddings[:, : self.dimensions]
        return nn.functional.normalize(embeddings, dim=-1) if self.normalize else embeddings
