"""What a network is called with: token ids, which of them are padding or left out, pictures, and whose side it is.

Notable: a batch is cut and reordered here, pictures and all, so gradient caching and evaluation need not know what a
network reads.

    network(*Tokens(ids, mask).inputs)
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Side: TypeAlias = Literal["query", "passage"]
"""Whose texts a batch has."""


class Pictures(NamedTuple):
    """The pictures of some texts, at most one of each."""

    pixels: UInt8[Tensor, "image 3 size size"]
    rows: Int[Tensor, " image"]
    """The text that each belongs to, ascending."""

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.pixels.to(device), self.rows.to(device))

    def of(self, order: Int[Tensor, " text"]) -> Pictures | None:
        """Those of the texts `order`, numbered by their places in it; None where they have none."""
        owners, places = (order[:, None] == self.rows[None, :]).nonzero(as_tuple=True)
        return Pictures(self.pixels[places], owners) if len(places) else None


class Tokens(NamedTuple):
    """Texts as a network reads them: padded on the right; `mask` is None where nothing is padded."""

    ids: Int[Tensor, "text token"]
    mask: Int[Tensor, "text token"] | None
    pooled: Int[Tensor, "text token"] | None = None
    """1 at the tokens that make the embedding, of networks that leave some out; None: all that are no padding."""
    pictures: Pictures | None = None
    side: Side | None = None
    """Of networks that embed queries and passages differently; None: of those that embed all texts alike."""

    def to(self, device: torch.device) -> Tokens:
        mask, pooled = (None if part is None else part.to(device) for part in (self.mask, self.pooled))
        pictures = None if self.pictures is None else self.pictures.to(device)
        return Tokens(self.ids.to(device), mask, pooled, pictures, self.side)

    @property
    def inputs(self) -> tuple[Tensor | Side | None, ...]:
        """What the network is called with: (ids, mask), and (pooled, pixels, rows), and (side), where it reads them."""
        side = () if self.side is None else (self.side,)
        if self.pooled is None and self.pictures is None:
            return self.ids, self.mask, *side
        return self.ids, self.mask, self.pooled, *(self.pictures or (None, None)), *side

    @property
    def full_mask(self) -> Int[Tensor, "text token"]:
        """1 at tokens, 0 at padding."""
        return torch.ones_like(self.ids) if self.mask is None else self.mask

    @property
    def lengths(self) -> Int[Tensor, " text"]:
        """Tokens of each text, without padding."""
        return self.full_mask.sum(dim=1)

    def take(self, order: Int[Tensor, " text"]) -> Tokens:
        """The texts `order`, in that order."""
        mask, pooled = (None if part is None else part[order] for part in (self.mask, self.pooled))
        pictures = None if self.pictures is None else self.pictures.of(order)
        return Tokens(self.ids[order], mask, pooled, pictures, self.side)

    def part(self, start: int, end: int) -> Tokens:
        """The texts from `start` to `end`, padded to the longest of them only."""
        part = self
        if self.pictures is not None:
            part = self._replace(pictures=self.pictures.of(torch.arange(start, end, device=self.ids.device)))
        longest, is_padded = self.ids.shape[1], False
        if self.mask is not None:
            mask = self.mask[start:end]
            longest = int(mask.sum(dim=1).max())
            is_padded = bool((mask[:, :longest] == 0).any())
        cut = (slice(start, end), slice(longest))
        return part._replace(
            ids=self.ids[cut],
            mask=self.mask[cut] if self.mask is not None and is_padded else None,
            pooled=None if self.pooled is None else self.pooled[cut],
        )


class ReadyEmbeddings(NamedTuple):
    """Texts that are embedded already and that no network reads: a side that is frozen in a training."""

    embeddings: Float[Tensor, "text dim"]

    def to(self, device: torch.device) -> ReadyEmbeddings:
        return ReadyEmbeddings(self.embeddings.to(device))

    @property
    def lengths(self) -> Int[Tensor, " text"]:
        """Tokens of each text: none."""
        return torch.zeros(len(self.embeddings), dtype=torch.int64, device=self.embeddings.device)
