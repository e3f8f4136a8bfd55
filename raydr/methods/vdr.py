"""VDR: retrieval in the space of a language model's vocabulary, and its semi-parametric form (SiDR, formerly SVDR).

Zhou et al., "Retrieval-based Disentangled Representation Learning with Natural Language Supervision", ICLR 2024 (arXiv
2212.07699); Zhou et al., "Semi-Parametric Retrieval via Binary Bag-of-Tokens Index", ICLR 2025 (arXiv 2405.01924). A
text becomes positive weights over the vocabulary (`raydr.models.vocabulary`), so a score is a sum over words:

1. v = elu1p of the highest logit over positions, over the word embeddings; queries and passages have a tower each
2. b = the text's own tokens, 0 or 1; sparse v = v where it is among the 768 highest, or where b is 1
3. sym(Q, P) = cross-entropy of each query over all passages + of each positive over all queries, temperature 1
4. VDR: L = (sym(sparse v(q), v(p)) + sym(b(q), v(p))) / 2; the second term ties dimensions to their words
5. SiDR (`semi`): L = (sym(sparse v(q), v(p)) + sym(v(q), sparse v(p)) + sym(b(q), v(p)) + sym(v(q), b(p))) / 4;
   the last term teaches queries to search bags, which need no network
6. contrastive mask: row i takes the words j with j mod N = i that no bag has; they are added to bag i and taken from
   the other side's row i, so the positive's score stays and every other text is charged for words that nobody said

| equation | function |
| --- | --- |
| encoder, section 3.1 (`src/ir/encoder/vdr.py`) | `raydr.models.vocabulary.VocabularyTower` |
| losses (`src/ir/training/loss_utils.py`) | `symmetric`, `VocabularyContrastive.loss` |
| contrastive mask (`build_cts_mask`) | `contrastive_mask` |
| the four searches | `raydr.encoders.vocabulary` |
| image encoder (`vdr_crossmodal_image.py`) | `raydr.models.vocabulary_pictures.PictureTower` |

Across modalities (`VdrPictures`) pictures have weights over the same words: v(picture) is elu1p of the highest logit
over patches, over a table of words learned for pictures; vectors have length 1, so scores are divided by a temperature;
terms with bags are those of the pairs whose text has words. The training of these was not released: its temperature
(0.05), and that what has text and picture is the sum of both, are chosen here.

The paper's body was not at hand: losses, mask and defaults are those of the released code, github.com/jzhoubu/vsearch.
Deviations: padding takes no part in the maximum (`pools_padding`); passages known to be relevant to a query are none of
its negatives; the gradient over workers is that of the whole batch, not divided by their number; negatives are mined
once, before training; titles stand before the text as one string. Expected: BEIR-12 nDCG@10 45.3 for svdr-msmarco.

    method: {import_path: "raydr.methods.vdr:Vdr", args: {model: minilm, semi: true}}
    method: {import_path: "raydr.methods.vdr:VdrPictures", args: {model: minilm, start: encoder}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydr.config import Component, Config, ConfigClass, part_of
from raydr.encoders.multimodal import MultimodalCheckpoint
from raydr.encoders.vocabulary import VocabularyEncoder, VocabularyEncoderConfig, VocabularyReranker
from raydr.encoders.vocabulary_pictures import (
    PictureVocabularyConfig,
    PictureVocabularyEncoder,
    load_fusion,
    save_fusion,
)
from raydr.llm.small_multimodal import DualStartConfig
from raydr.losses import contrastive
from raydr.methods.base import DualEncoderMethod, DualStart, MultimodalConfig
from raydr.models.vocabulary import bag_of_tokens, top_mask
from raydr.train.batches import BatchTokenizer, GroupTokenizer
from raydr.train.objective import EmbeddingObjective, Labels, LossOutput
from raydr.train.trainer import MODEL

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from raydr.models.tokens import Tokens
    from raydr.protocols import Encoder
    from raydr.steps import Steps

Sides: TypeAlias = Literal["sum", "mean", "scaled"]


class VdrLossConfig(Config):
    """What the loss is made of."""

    semi: bool = False
    """Whether passages are sparse and binary in the loss as well (SiDR), which makes search in bags work."""
    train_topk: int = Field(default=768, ge=1)
    """Dimensions of a sparse vector in the loss, beside those of its own tokens."""
    contrastive_mask: bool = False
    """Whether words that no text of the batch has take part (off in the released configs)."""
    mask_weight: float = Field(default=1.0, gt=0)
    """Weight of these words in a bag."""
    normalize_mask: bool = False
    """Whether each row of them has length 1 before that."""
    sides: Sides = "sum"
    """How the two directions of a loss become one: `sum`: added (the released code since December 2024), `mean`: halved
    (before), `scaled`: added, with the second one brought to the size of the first."""
    temperature: float = Field(default=1.0, gt=0)
    """Scores are divided by it."""
    gather: bool = True
    """Whether the texts of all workers are in one loss."""


class VdrConfig(VocabularyEncoderConfig, VdrLossConfig):
    """The encoder's settings, and what it is trained with."""

    num_negatives: int = Field(default=1, ge=0)
    """Mined negatives of each query in a batch, beside the other queries' passages."""
    negative_depth: int | None = Field(default=None, ge=1)
    """Negatives are drawn from so many of the hardest candidates; null: from all."""


def symmetric(
    queries: Float[Tensor, "query vocab"],
    passages: Float[Tensor, "passage vocab"],
    positives: Bool[Tensor, "query passage"],
    *,
    sides: Sides = "sum",
    temperature: float = 1.0,
    rows: Bool[Tensor, " query"] | None = None,
) -> Float[Tensor, ""]:
    """Every query has to find its positive among all passages, and passage i, i < queries, its query among them all.

    `rows`: the queries, with their positives, that take part; None: all.
    """
    own = torch.arange(len(queries), device=queries.device)
    if rows is not None:
        own = own[rows]
        queries, positives = queries[rows], positives[rows]
    scores = queries @ passages.T
    forth = contrastive(scores, positives, temperature=temperature)
    back = contrastive(scores[:, own].T, positives[:, own].T, temperature=temperature)
    if sides == "scaled":
        return forth + (forth / back.clamp(min=torch.finfo(back.dtype).tiny)).detach() * back
    return forth + back if sides == "sum" else (forth + back) / 2


def contrastive_mask(bags: Bool[Tensor, "text vocab"]) -> Bool[Tensor, "text vocab"]:
    """The words that no bag has, dealt out: word j to row j mod the number of rows."""
    num, num_dims = bags.shape
    words = torch.arange(num_dims, device=bags.device)
    dealt = words[None, :] % num == torch.arange(num, device=bags.device)[:, None]
    return dealt & ~bags.any(dim=0)


class VocabularyContrastive(EmbeddingObjective):
    """VDR's loss over all queries and passages of a batch; `semi`: SiDR's."""

    reads_tokens = True

    def __init__(self, config: VdrLossConfig, *, shift: int, normalize: bool, special: list[int]) -> None:
        self._config, self._shift, self._normalize, self._special = config, shift, normalize, special
        self.gather = config.gather

    def loss(
        self, queries: Float[Tensor, "query vocab"], passages: Float[Tensor, "passage vocab"], batch: Labels
    ) -> LossOutput:
        if batch.query_tokens is None or batch.passage_tokens is None:
            raise TypeError("VocabularyContrastive reads the texts of the batch, which its labels lack")
        # All positives first, in the order of their queries, then all first negatives, ...
        order = (batch.own_positive[None, :] + torch.arange(batch.group_size, device=queries.device)[:, None]).flatten()
        passages, positives = passages[order], batch.positives[:, order]
        query_bags = self._bags(batch.query_tokens, queries.shape[1])
        passage_bags = self._bags(batch.passage_tokens, queries.shape[1])[order]
        sparse_queries = self._sparse(queries, query_bags)
        terms = [self._symmetric(sparse_queries, passages, positives)]
        if self._config.semi:
            terms.append(self._symmetric(queries, self._sparse(passages, passage_bags), positives))
        # A picture has no tokens: where it is asked for or with, the bag it lacks teaches nothing.
        bags, charged = self._charged(query_bags, passages)
        terms.append(self._symmetric(bags, charged, positives, rows=query_bags.any(dim=1)))
        if self._config.semi:
            bags, charged = self._charged(passage_bags, queries)
            rows = passage_bags[: len(queries)].any(dim=1)
            terms.append(self._symmetric(charged, bags, positives, rows=rows))
        return LossOutput(torch.stack(terms).mean(), {"accuracy": _accuracy(sparse_queries, passages, positives)})

    def _symmetric(
        self, queries: Tensor, passages: Tensor, positives: Tensor, *, rows: Bool[Tensor, " query"] | None = None
    ) -> Tensor:
        if rows is not None and not rows.any():
            return 0 * (queries.sum() + passages.sum())
        how = {"sides": self._config.sides, "temperature": self._config.temperature}
        return symmetric(queries, passages, positives, rows=None if rows is None or rows.all() else rows, **how)

    def _bags(self, tokens: Tokens, num_dims: int) -> Bool[Tensor, "text vocab"]:
        how = {"shift": self._shift, "num_dims": num_dims, "special": self._special}
        return bag_of_tokens(tokens.ids, tokens.mask, **how)

    def _sparse(self, weights: Tensor, bags: Tensor) -> Tensor:
        return weights * (top_mask(weights.detach(), self._config.train_topk) | bags)

    def _charged(
        self, bags: Bool[Tensor, "text vocab"], others: Float[Tensor, "other vocab"]
    ) -> tuple[Float[Tensor, "text vocab"], Float[Tensor, "other vocab"]]:
        """The bags as embeddings and the other side's, with the contrastive mask where it is on: row i of either side
        belongs to pair i, as far as both sides have one.
        """
        own = functional.normalize(bags.float(), dim=1) if self._normalize else bags.float()
        if not self._config.contrastive_mask:
            return own, others
        mask = contrastive_mask(bags)
        added = functional.normalize(mask.float(), dim=1) if self._config.normalize_mask else mask.float()
        num = min(len(mask), len(others))
        kept = torch.ones_like(others, dtype=torch.bool)
        kept[:num] = ~mask[:num]
        return own + self._config.mask_weight * added, others * kept


def _accuracy(queries: Tensor, passages: Tensor, positives: Tensor) -> Tensor:
    """The share of queries whose positive is first."""
    scores = (queries @ passages.T).detach()
    wrong = scores.masked_fill(positives, float("-inf")).amax(dim=1)
    return (scores[:, : len(queries)].diagonal() > wrong).float().mean()


class Vdr(DualEncoderMethod):
    """A dual encoder of sparse embeddings over the vocabulary."""

    Config: ClassVar[ConfigClass] = VdrConfig

    config: VdrConfig

    @property
    def encoder_config(self) -> VocabularyEncoderConfig:
        return part_of(VocabularyEncoderConfig, self.config)

    @property
    def bags(self) -> Component:
        """The same with the tokens alone on both sides: a search by words for which no weights are loaded."""
        return self._with({"query_view": "bag", "passage_view": "bag"})

    def fit(self, steps: Steps) -> Component:
        """Trained once. What is mined is found by the words of bags: the network cannot rank before it is trained."""
        examples, dev = steps.examples(self.bags)
        model = steps.train(self.component, steps.train_config, examples, "train", dev=dev)
        return self.trained(str((model.path / MODEL).resolve()))

    def build_encoder(self) -> Encoder:
        return VocabularyEncoder(self.encoder_config)

    def build_reranker(self) -> VocabularyReranker:
        """Late parametric search: what was found in bags, by the vectors."""
        return VocabularyReranker(VocabularyEncoder(self.encoder_config))

    def build_model(self) -> nn.Module:
        from raydr.encoders.vocabulary_weights import load_towers

        config = self.config
        return load_towers(
            config.model,
            towers=config.towers,
            shift=config.shift,
            normalize=config.normalize,
            pools_padding=config.pools_padding,
        )

    def save_model(self, model: nn.Module, folder: Path) -> None:
        from raydr.encoders.vocabulary_weights import save_towers

        save_towers(model, self.config.model, folder)

    def build_tokenizer(self) -> GroupTokenizer:
        encoder = VocabularyEncoder(self.encoder_config)
        return BatchTokenizer(self.encoder_config, names_sides=encoder.num_towers == 2)

    def build_objective(self) -> EmbeddingObjective:
        encoder = VocabularyEncoder(self.encoder_config)
        return VocabularyContrastive(
            self.config, shift=encoder.shift, normalize=encoder.normalize, special=encoder.special_ids
        )


class VdrPicturesConfig(PictureVocabularyConfig, MultimodalConfig, DualStartConfig, VdrLossConfig):
    """The encoder's settings, and what it is trained with."""

    train_vision: bool = True
    """Whether the vision tower is trained; its layer norm and its table of words always are."""
    temperature: float = Field(default=0.05, gt=0)
    """Scores, which are cosines, are divided by it."""


class VdrPictures(DualStart):
    """A dual encoder of texts and pictures whose embeddings are sparse, over the vocabulary."""

    Config: ClassVar[ConfigClass] = VdrPicturesConfig

    config: VdrPicturesConfig

    @property
    def encoder_config(self) -> PictureVocabularyConfig:
        return part_of(PictureVocabularyConfig, self.config)

    def build_encoder(self) -> Encoder:
        return PictureVocabularyEncoder(self.encoder_config)

    def build_model(self) -> nn.Module:
        encoder = PictureVocabularyEncoder(self.encoder_config)
        network = load_fusion(encoder.checkpoint, "float32", shift=encoder.shift)
        network.vision_tower.requires_grad_(self.config.train_vision)
        return network

    def save_model(self, model: nn.Module, folder: Path) -> None:
        save_fusion(model, MultimodalCheckpoint(self.encoder_config), folder)

    def build_objective(self) -> EmbeddingObjective:
        encoder = PictureVocabularyEncoder(self.encoder_config)
        return VocabularyContrastive(self.config, shift=encoder.shift, normalize=True, special=encoder.special_ids)
