"""ColBERT: one transformer that embeds every token; a query meets a passage token by token (late interaction).

Notable: the token embeddings are not normalised by default and no [MASK] tokens are added to queries, as in the ColBERT
that teaches TAS-Balanced; every token takes part, [CLS] and [SEP] too; they leave in float32 whatever the precision of
the weights. Source: Khattab and Zaharia 2020 (arXiv 2004.12832).

    network = ColBert(AutoModel.from_pretrained(path), hidden_size=768, dimensions=128)
    late_interaction(network(query_ids), network(passage_ids, mask), query_mask, mask)      # (query, passage)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_PADDING_SCORE = -1000.0


class ColBert(nn.Module):
    """A transformer with a linear layer on every token.

    Args:
        transformer: a module whose output has `last_hidden_state`.
        dimensions: of a token's embedding.
        bias: whether the linear layer has one (ColBERT: no, matchmaker's: yes).
        normalize: whether token embeddings have length 1 (ColBERT: yes, matchmaker's: no).
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        hidden_size: int,
        dimensions: int,
        bias: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.linear = nn.Linear(hidden_size, dimensions, bias=bias)
        self.normalize = normalize

    def forward(
        self, input_ids: Int[Tensor, "text token"], attention_mask: Int[Tensor, "text token"] | None = None
    ) -> Float[Tensor, "text token dim"]:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embeddings = self.linear(hidden).float()
        return nn.functional.normalize(embeddings, dim=-1) if self.normalize else embeddings


def late_interaction(
    queries: Float[Tensor, "query query_token dim"],
    passages: Float[Tensor, "passage passage_token dim"],
    query_mask: Int[Tensor, "query query_token"],
    passage_mask: Int[Tensor, "passage passage_token"],
) -> Float[Tensor, "query passage"]:
    """Sum over a query's tokens of the largest inner product with a token of the passage; masks are 1 at tokens."""
    is_padding = passage_mask == 0
    rows = []
    for query, mask in zip(queries, query_mask, strict=True):  # one at a time: all of them at once fill gigabytes
        pairs = torch.einsum("td,psd->tps", query, passages).float()
        best = pairs.masked_fill(is_padding, _PADDING_SCORE).amax(dim=2)
        rows.append((best * mask[:, None]).sum(dim=0))
    return torch.stack(rows) if rows else passages.new_empty(0, len(passages)).float()


def group_interaction(
    queries: Float[Tensor, "query query_token dim"],
    passages: Float[Tensor, "passage passage_token dim"],
    query_mask: Int[Tensor, "query query_token"],
    passage_mask: Int[Tensor, "passage passage_token"],
) -> Float[Tensor, "query group"]:
    """`late_interaction` of each query with the passages of its own group only; passages are query-major."""
    groups = passages.unflatten(0, (len(queries), -1))
    is_padding = (passage_mask == 0).unflatten(0, (len(queries), -1))
    pairs = torch.einsum("qtd,qgsd->qgts", queries, groups).float()
    best = pairs.masked_fill(is_padding[:, :, None], _PADDING_SCORE).amax(dim=3)
    return (best * query_mask[:, None]).sum(dim=2)
