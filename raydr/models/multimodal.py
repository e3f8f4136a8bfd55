"""Multimodal embedders: a language model that reads visual tokens among its words, and a CLIP-style dual encoder.

Notable: a picture's patches become embeddings that take the places of its placeholder tokens, so everything after that
is a language model reading one sequence; text alone never enters the vision tower. The parts of a transformers model
(`LlavaNextModel`, `Qwen2VLModel`, `Qwen2_5_VLModel`) are held apart, the language model as `transformer`, so that
adapters, activation checkpointing and freezing name them, and are put together again to be saved.
Pooling leaves out the instruction, whose tokens act through attention alone. Latent attention: NV-Embed (arXiv
2405.17428); score fusion: UniIR (arXiv 2311.17136).

    vision = LlavaVision(llava, preprocessing)
    model = MultimodalEmbedder(llava.language_model, vision, image_token_id=32000, pooling="mean", bidirectional=True)
    model(input_ids, attention_mask, pooled, pixels, rows)                                  # Float[Tensor, "text dim"]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from raydr.models.pooling import last_token, mean_of_tokens

MultimodalPooling: TypeAlias = Literal["mean", "last", "latent"]


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint wants its pictures."""

    size: int
    """Side of the square they are brought to, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of each channel, as shares of 255."""


class Normalize(nn.Module):
    """Pixels as the tower wants them; in float32, whatever it computes in."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        # No buffers: training in bfloat16 would round them.
        self._mean = [255 * value for value in preprocessing.mean]
        self._std = [255 * value for value in preprocessing.std]

    def forward(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image 3 size size"]:
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self._mean, self._std))
        return (pixels.float() - mean) / std


class LlavaVision(nn.Module):
    """LLaVA-NeXT's vision tower and projector, for the whole picture without tiles."""

    def __init__(self, model: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.tower = model.vision_tower
        self.projector = model.multi_modal_projector
        self.newline = model.image_newline  # stands between tiles; kept to be saved again
        self.normalize = Normalize(preprocessing)
        self._layer: int = model.config.vision_feature_layer
        self._skips_cls = model.config.vision_feature_select_strategy == "default"
        self.size = preprocessing.size
        patches = (preprocessing.size // model.config.vision_config.patch_size) ** 2
        self.num_tokens = patches if self._skips_cls else patches + 1
        """Visual tokens of a picture."""

    def forward(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image visual dim"]:
        values = self.normalize(pixels).to(self.tower.dtype)
        features = self.tower(values, output_hidden_states=True).hidden_states[self._layer]
        return self.projector(features[:, 1:] if self._skips_cls else features)


class QwenVision(nn.Module):
    """The vision tower of Qwen2-VL and Qwen2.5-VL, whose last part merges patches to the language model's width."""

    def __init__(self, model: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.tower = model.visual
        self.normalize = Normalize(preprocessing)
        self._vision: Any = model.config.vision_config
        self.size = preprocessing.size
        self._grid = preprocessing.size // self._vision.patch_size
        self.merged = self._grid // self._vision.spatial_merge_size
        """Visual tokens along one side."""
        self.num_tokens = self.merged**2
        """Visual tokens of a picture."""

    def forward(self, pixels: UInt8[Tensor, "image 3 size size"]) -> Float[Tensor, "image visual dim"]:
        patches = self._patches(self.normalize(pixels)).to(self.tower.dtype)
        grid = torch.tensor([[1, self._grid, self._grid]], device=pixels.device).repeat(len(pixels), 1)
        return self.tower(patches, grid_thw=grid).pooler_output.view(len(pixels), self.num_tokens, -1)

    def _patches(self, values: Float[Tensor, "image 3 size size"]) -> Float[Tensor, "patch value"]:
        """Patches in the order in which they are merged, each as often as the tower looks along time."""
        vision, side = self._vision, self._vision.patch_size
        merge = vision.spatial_merge_size
        cut = values.view(len(values), 3, self.merged, merge, side, self.merged, merge, side)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        return cut.expand(*cut.shape[:6], vision.temporal_patch_size, side, side).flatten(5).flatten(0, 4)

    def positions(self, is_visual: Bool[Tensor, "text token"]) -> Int[Tensor, "3 text token"]:
        """Places of tokens along time, height and width: words count on, a picture's patches stand in their grid and
        take as many places as the grid is wide.
        """
        device, merged = is_visual.device, self.merged
        within = (is_visual.long().cumsum(dim=1) - 1) % self.num_tokens  # a text has at most one picture
        first_of_picture = is_visual & (within == 0)
        step = torch.where(is_visual, torch.zeros_like(within), 1)
        ends = torch.cumsum(step + first_of_picture * merged, dim=1)
        start = ends - torch.where(is_visual, merged, 1)
        places = torch.stack([torch.zeros_like(within), within // merged, within % merged])
        return start + places * is_visual.to(device)


class LatentAttention(nn.Module):
    """NV-Embed's pooling: every token asks a table of trained latents, and the answers are averaged.

    Args:
        dim: width of the tokens.
        num_latents, num_heads: of the table, and of the attention over it.
        head_dim: width of a head; NV-Embed has that of the whole token (4096).
        hidden: width of the feed-forward part before its gate.
    """

    def __init__(self, dim: int, *, num_latents: int = 512, num_heads: int = 8, head_dim: int, hidden: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.token_norm, self.latent_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, inner, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, hidden: Float[Tensor, "text token dim"]) -> Float[Tensor, "text token dim"]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

        query = heads(self.to_query(self.token_norm(hidden)))
        key, value = (heads(x) for x in self.to_key_value(self.latent_norm(self.latents)).chunk(2, dim=-1))
        # The same latents for every text.
        key, value = (x.expand(len(query), *x.shape) for x in (key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        hidden = self.to_out(attended.transpose(1, 2).flatten(2)) + hidden
        values, gate = self.up(self.norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(values * nn.functional.gelu(gate))


class MultimodalEmbedder(nn.Module):
    """One embedding for a sequence of words and visual tokens.

    Args:
        transformer: the language model: inputs_embeds in, `last_hidden_state` out.
        vision: pictures to visual tokens.
        image_token_id: the placeholder, as many of them as the picture has visual tokens.
        pooling: the mean of all tokens but the instruction's; the last token (EOS); latent attention, then the mean.
        bidirectional: whether tokens see those behind them.
    """

    def __init__(
        self,
        transformer: nn.Module,
        vision: LlavaVision | QwenVision,
        *,
        image_token_id: int,
        pooling: MultimodalPooling,
        latent: LatentAttention | None = None,
        bidirectional: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.transformer: Any = transformer  # the first part, which is the one whose attention training chooses
        self.vision = vision
        self.latent = latent
        self.image_token_id, self.pooling, self.bidirectional = image_token_id, pooling, bidirectional
        self.normalize = normalize
        self.always_looks = False
        """Whether a batch without pictures runs the vision tower all the same, on an empty one: where several workers
        train together, all have to use the same weights in each pass."""

    def forward(
        self,
        input_ids: Int[Tensor, "text token"],
        attention_mask: Int[Tensor, "text token"] | None = None,
        pooled: Int[Tensor, "text token"] | None = None,
        pixels: UInt8[Tensor, "image 3 size size"] | None = None,
        rows: Int[Tensor, " image"] | None = None,
    ) -> Float[Tensor, "text dim"]:
        """Embeddings of texts padded on the right.

        `pooled` is 1 at the tokens that are averaged (None: all that are no padding), `pixels` has the pictures in the
        order of their texts, `rows`. Raises `ValueError` where pictures and placeholders disagree.
        """
        del rows  # the placeholders say it
        is_visual = input_ids == self.image_token_id
        embedded = self._embedded(input_ids, is_visual, pixels)
        hidden = self.transformer(
            inputs_embeds=embedded,
            attention_mask=self._mask(embedded, attention_mask),
            position_ids=self._positions(is_visual, attention_mask),
            use_cache=False,
        ).last_hidden_state.float()
        if self.pooling == "last":
            embeddings = last_token(hidden, attention_mask)
        else:
            if self.latent is not None:
                hidden = self.latent(hidden.to(self.latent.latents.dtype)).float()
            embeddings = mean_of_tokens(hidden, attention_mask if pooled is None else pooled)
        return nn.functional.normalize(embeddings, dim=-1) if self.normalize else embeddings

    @property
    def vision_tower(self) -> nn.Module:
        """What turns pictures into features, before the projector."""
        return self.vision.tower

    def _embedded(
        self, input_ids: Tensor, is_visual: Bool[Tensor, "text token"], pixels: Tensor | None
    ) -> Float[Tensor, "text token dim"]:
        words = self.transformer.get_input_embeddings()(input_ids)
        expected = 0 if pixels is None else len(pixels) * self.vision.num_tokens
        if int(is_visual.sum()) != expected:
            raise ValueError(
                f"{int(is_visual.sum())} placeholders of visual tokens for {expected}: each picture takes "
                f"{self.vision.num_tokens}"
            )
        if pixels is not None:
            return words.masked_scatter(is_visual.unsqueeze(-1), self.vision(pixels).to(words.dtype))
        if self.always_looks:
            nothing = input_ids.new_zeros((1, 3, self.vision.size, self.vision.size), dtype=torch.uint8)
            return words + 0 * self.vision(nothing).sum().to(words.dtype)
        return words

    def _mask(self, embedded: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        if not self.bidirectional:
            return attention_mask
        # A mask of four dimensions is taken as it is, in the place of the causal one: what is added to the scores.
        text, token = embedded.shape[:2]
        added = embedded.new_zeros((text, token))
        if attention_mask is not None:
            added = added.masked_fill(attention_mask == 0, torch.finfo(embedded.dtype).min)
        return added[:, None, None, :].expand(text, 1, token, token)

    def _positions(self, is_visual: Tensor, attention_mask: Tensor | None) -> Tensor:
        if isinstance(self.vision, QwenVision):
            return self.vision.positions(is_visual)
        del attention_mask  # padding is on the right, where positions no longer matter
        return torch.arange(is_visual.shape[1], device=is_visual.device).expand_as(is_visual)


class Fusion(nn.Module):
    """Two towers whose outputs are added: what has a text and a picture is the sum of both.

    A subclass says what each gives (`words`, `pictures`).
    """

    size: int
    """Side of the pictures, in pixels."""

    def __init__(self, *, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.always_looks = False
        """As in `MultimodalEmbedder`."""

    def words(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "text dim"]:
        """The text tower's."""
        raise NotImplementedError

    def pictures(self, pixels: Tensor) -> Float[Tensor, "image dim"]:
        """The vision tower's."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Int[Tensor, "text token"],
        attention_mask: Int[Tensor, "text token"] | None = None,
        pooled: Int[Tensor, "text token"] | None = None,
        pixels: UInt8[Tensor, "image 3 size size"] | None = None,
        rows: Int[Tensor, " image"] | None = None,
    ) -> Float[Tensor, "text dim"]:
        """Embeddings of texts padded on the right. `rows` says which text each picture belongs to; a text of which
        nothing is `pooled` counts for nothing beside its picture.
        """
        fused = self.words(input_ids, attention_mask).float()
        if pooled is not None:
            fused = fused * pooled.any(dim=1, keepdim=True)
        if pixels is not None and rows is not None:
            fused = fused.index_add(0, rows, self.pictures(pixels).float())
        elif self.always_looks:
            nothing = input_ids.new_zeros((1, 3, self.size, self.size), dtype=torch.uint8)
            fused = fused + 0 * self.pictures(nothing).sum().float()
        return nn.functional.normalize(fused, dim=-1) if self.normalize else fused


class ScoreFusion(Fusion):
    """A CLIP-style dual encoder: the embeddings of picture and text are added.

    Args:
        transformer: a model with a text tower, a vision tower and their projections (`CLIPModel`, `SiglipModel`,
            `VisionTextDualEncoderModel`).
        pooling: `own`: as the model's `get_text_features` does; `mean`: of the text tower's tokens.
    """

    def __init__(
        self,
        transformer: nn.Module,
        preprocessing: Preprocessing,
        *,
        pooling: Literal["own", "mean"] = "own",
        normalize: bool = True,
    ) -> None:
        super().__init__(normalize=normalize)
        self.transformer: Any = transformer
        self.pixels = Normalize(preprocessing)
        self.size = preprocessing.size
        self.pooling = pooling

    @property
    def vision_tower(self) -> nn.Module:
        """What turns pictures into features, before the projection."""
        return self.transformer.vision_model

    def words(self, input_ids: Tensor, attention_mask: Tensor | None) -> Float[Tensor, "text dim"]:
        model = self.transformer
        if self.pooling == "own":
            return model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        hidden = model.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return model.text_projection(mean_of_tokens(hidden, attention_mask))

    def pictures(self, pixels: Tensor) -> Float[Tensor, "image dim"]:
        model = self.transformer
        values = self.pixels(pixels).to(model.dtype)
        return model.get_image_features(pixel_values=values).pooler_output
