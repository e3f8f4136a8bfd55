"""Texts as token ids, some with a picture: what tokenising gives and networks are given, padded where it is used.

Where a side is frozen, its embeddings stand in the place of its texts (`Vectors`), and no network reads it.

Texts([[101, 7, 102], [101, 102]]).padded(pad_id=0).inputs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from raydr.encoders.token_batches import collate

if TYPE_CHECKING:
    from raydr.models.tokens import ReadyEmbeddings, Side, Tokens


@dataclass(frozen=True)
class Texts:
    """Texts as a network reads them, not padded yet, some with a picture."""

    ids: list[list[int]]
    first_pooled: list[int] | None = None
    """Of each, how many tokens at its start are left out of its embedding; None: of networks that leave out none."""
    pixels: list[bytes | None] | None = None
    """The picture of each: rows of RGB, of a square; None: of networks that see none."""
    labels: list[list[int]] | None = None
    """A label of each token, of networks that are trained to tell it (raydr/train/tagging.py says what it is)."""
    side: Side | None = None
    """Whose texts they are, of networks that embed queries and passages differently; None: of those that do not."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int]) -> Texts:
        """The texts `rows`, in that order."""
        return Texts(
            [self.ids[row] for row in rows],
            None if self.first_pooled is None else [self.first_pooled[row] for row in rows],
            None if self.pixels is None else [self.pixels[row] for row in rows],
            None if self.labels is None else [self.labels[row] for row in rows],
            self.side,
        )

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "ids": self.ids,
            "first_pooled": self.first_pooled,
            "pixels": self.pixels,
            "labels": self.labels,
            "side": self.side,
        }

    def padded(self, pad_id: int, *, multiple_of: int = 1) -> Tokens:
        """As tensors, on the CPU, padded on the right to the longest and on to a multiple of `multiple_of` tokens."""
        import torch

        from raydr.models.tokens import Pictures, Tokens

        ids, mask = collate(self.ids, pad_id, multiple_of=multiple_of)
        tokens = Tokens(torch.from_numpy(ids), None if mask is None else torch.from_numpy(mask), side=self.side)
        if self.first_pooled is not None:
            counted = torch.arange(ids.shape[1]) >= torch.tensor(self.first_pooled)[:, None]
            tokens = tokens._replace(pooled=tokens.full_mask * counted)
        rows = [row for row, pixels in enumerate(self.pixels or ()) if pixels is not None]
        if rows and self.pixels is not None:
            raw = np.frombuffer(b"".join(self.pixels[row] or b"" for row in rows), dtype=np.uint8).copy()
            side = math.isqrt(len(raw) // len(rows) // 3)
            pixels = torch.from_numpy(raw).view(len(rows), side, side, 3).permute(0, 3, 1, 2)
            tokens = tokens._replace(pictures=Pictures(pixels.contiguous(), torch.tensor(rows)))
        return tokens


@dataclass(frozen=True)
class Vectors:
    """Texts whose embeddings are there already."""

    rows: Float32[np.ndarray, "text dim"]

    @classmethod
    def of(cls, rows: Sequence[bytes]) -> Vectors:
        """From the bytes of `parts`."""
        return cls(np.frombuffer(b"".join(rows), dtype=np.float32).reshape(len(rows), -1))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parts(self) -> dict[str, list | None]:
        return {"vectors": [row.tobytes() for row in self.rows]}

    def padded(self, pad_id: int, *, multiple_of: int = 1) -> ReadyEmbeddings:
        """As a tensor, on the CPU; there is nothing to pad."""
        import torch

        from raydr.models.tokens import ReadyEmbeddings

        del pad_id, multiple_of
        return ReadyEmbeddings(torch.from_numpy(self.rows.copy()))
