"""CLIP with score fusion (UniIR's CLIP-SF): the baseline of multimodal retrieval.

Radford et al., 2021 (arXiv 2103.00020); Wei et al., "UniIR", ECCV 2024 (arXiv 2311.17136). A text tower and a vision
tower give one embedding each, in the same space:

1. the embedding of a query or passage is that of its text plus that of its picture, whichever it has, normalised
2. an instruction is the beginning of the query's text
3. scores = queries . passages / temperature
4. loss = -log softmax at the positive, over all passages of the batch; symmetric: the same from positives to queries

| equation | function |
| --- | --- |
| UniIR, section 4.1, score-level fusion | `raydr.models.multimodal.ScoreFusion` |
| InfoNCE of queries and passages, CLIP figure 3 | `raydr.losses.contrastive` |

Deviations: the temperature is fixed (CLIP learns it); pictures are squeezed into the square, not cropped, as for the
multimodal language models that are compared with it.

    method: {import_path: "raydr.methods.clip:Clip", args: {model: openai/clip-vit-large-patch14}}
"""

from __future__ import annotations

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from raydr.llm.small_multimodal import DualStartConfig
from raydr.losses import contrastive
from raydr.methods.base import DualStart, MultimodalConfig
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput


class FusedContrastive(EmbeddingObjective):
    """The loss over all queries and passages of a batch."""

    def __init__(self, temperature: float, *, symmetric: bool) -> None:
        self._temperature, self._symmetric = temperature, symmetric

    def loss(
        self, queries: Float[Tensor, "query dim"], passages: Float[Tensor, "passage dim"], batch: Labels
    ) -> LossOutput:
        scores, positives = queries @ passages.T, batch.positives
        loss = contrastive(scores, positives, temperature=self._temperature)
        if self._symmetric:
            own = batch.own_positive
            back = contrastive(scores[:, own].T, positives[:, own].T, temperature=self._temperature)
            loss = (loss + back) / 2
        return LossOutput(loss, {})


class Clip(DualStart):
    """A dual encoder of texts and pictures."""

    class Config(MultimodalConfig, DualStartConfig):
        query_template: str = "{instruction} "
        """What stands before a query that has an instruction (UniIR's)."""
        train_vision: bool = True
        """Whether the vision tower is trained."""
        temperature: float = Field(default=0.05, gt=0)
        """Scores are divided by it."""
        symmetric: bool = True
        """Whether positives have to find their queries as well, as in CLIP; UniIR trains queries alone."""

    config: Config

    def build_objective(self) -> EmbeddingObjective:
        return FusedContrastive(self.config.temperature, symmetric=self.config.symmetric)
