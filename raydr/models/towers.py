"""Queries and passages by two networks in one: which of them embeds a batch is said with it (`Tokens.side`).

Notable: both towers are trained together, and a step of training costs what it costs with one: a batch of one side goes
through one tower only.

    network = Towers(queries=VocabularyTower(...), passages=VocabularyTower(...))
    network(input_ids, attention_mask, "query")
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from raydr.models.tokens import Side


class Towers(nn.Module):
    """A network for each side; both are called with a batch's (ids, mask)."""

    def __init__(self, *, queries: nn.Module, passages: nn.Module) -> None:
        super().__init__()
        self.queries = queries
        self.passages = passages

    def of(self, side: Side) -> nn.Module:
        """The tower that embeds this side."""
        return self.queries if side == "query" else self.passages

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, side: Side) -> Any:
        return self.of(side)(input_ids, attention_mask)


def towers_of(network: nn.Module) -> list[nn.Module]:
    """The networks that embed on their own: both towers, or the one that embeds everything."""
    return [network.queries, network.passages] if isinstance(network, Towers) else [network]
