"""Pictures and texts as weights over the words of a vocabulary: cross-modal VDR.

The text half is VDR's own (`raydr.models.vocabulary`). A picture's patches go through a vision tower and a layer norm
of their own; each is multiplied with a table of words that is learned for pictures, every word keeps its highest value
over the patches, and elu1p makes it positive. So a picture can be read: its highest dimensions are words. Both halves
are added where a text has both, and the sum has length 1. Source: Zhou et al. 2024 (arXiv 2212.07699), whose released
code (github.com/jzhoubu/vsearch, `vdr_crossmodal_image.py`) reads pictures and does not train; its tower has no CLS.

    network = VocabularyFusion(VocabularyTower(text_model, shift=999), PictureTower(vision_model, ...))
    network(input_ids, attention_mask, pooled, pixels, rows)                              # Float[Tensor, "text vocab"]
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raydr.models.multimodal import Fusion, Normalize, Preprocessing
from raydr.models.vocabulary import VocabularyTower, elu1p, highest_over_positions


class PictureTower(nn.Module):
    """A vision transformer whose embeddings are weights of words, all of them positive.

    Args:
        tower: a transformers vision model whose output has `last_hidden_state`.
        preprocessing: how it wants its pictures.
        num_dims: of the text half.
        num_patches: of a picture; what stands before them, as CLIP's CLS, is left out.
    """

    def __init__(self, tower: nn.Module, preprocessing: Preprocessing, num_dims: int, *, num_patches: int) -> None:
        super().__init__()
        self.tower: Any = tower
        self.normalize = Normalize(preprocessing)
        self.size = preprocessing.size
        self.num_patches = num_patches
        config: Any = tower.config
        width: int = config.hidden_size
        self.norm = nn.LayerNorm(width)
        # The same in every process, so that a start that is not trained yet embeds alike everywhere.
        drawn = torch.randn(num_dims, width, generator=torch.Generator().manual_seed(0))
        self.words = nn.Parameter(drawn * width**-0.5)
        """A row for each word."""

    def forward(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image vocab"]:
        values = self.normalize(pixels).to(self.words.dtype)
        hidden = self.tower(values).last_hidden_state[:, -self.num_patches :]
        hidden = self.norm(hidden.to(self.norm.weight.dtype)).to(self.words.dtype)
        return elu1p(highest_over_positions(hidden, self.words, None).float())


class VocabularyFusion(Fusion):
    """One vector over the vocabulary for a text, a picture, or both.

    Args:
        text: the text half, not normalised.
        vision: the picture half.
        normalize: whether embeddings have length 1, as across modalities they have.
    """

    def __init__(self, text: VocabularyTower, vision: PictureTower, *, normalize: bool = True) -> None:
        super().__init__(normalize=normalize)
        self.text, self.vision, self.size = text, vision, vision.size

    @property
    def vision_tower(self) -> nn.Module:
        """What turns pictures into features, before the layer norm."""
        return self.vision.tower

    def words(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "text vocab"]:
        return self.text(input_ids, attention_mask)

    def pictures(self, pixels: Tensor) -> Float[Tensor, "image vocab"]:
        return self.vision(pixels)
