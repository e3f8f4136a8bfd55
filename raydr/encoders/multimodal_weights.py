"""The weights of multimodal encoders: from transformers' folders into raydr's networks, and back into such folders.

Notable: what is written opens with transformers' `AutoModel` as well; pooling, direction and size, which its files have
no place for, stand in `raydr.json`, and NV-Embed's pooling head in a safetensors file of its own.

    network = load(MultimodalCheckpoint(config), "float32")
    save(network, MultimodalCheckpoint(config), Path("model"))
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from raydr.encoders.checkpoint import load_transformer
from raydr.encoders.multimodal import LATENT, SETTINGS, MultimodalCheckpoint
from raydr.errors import ConfigError
from raydr.models.multimodal import LatentAttention, LlavaVision, MultimodalEmbedder, QwenVision, ScoreFusion

if TYPE_CHECKING:
    from raydr.encoders.precision import Precision

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "added_tokens.json")


def load(checkpoint: MultimodalCheckpoint, precision: Precision) -> MultimodalEmbedder | ScoreFusion:
    """The network of a checkpoint. Raises `ConfigError` when transformers cannot load it, or lacks weights."""
    from transformers import AutoModel

    dtype = getattr(torch, precision)
    try:
        model = load_transformer(AutoModel, checkpoint.path, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot load this model: {error}") from error
    return assemble(model, checkpoint).eval()


def assemble(model: Any, checkpoint: MultimodalCheckpoint) -> MultimodalEmbedder | ScoreFusion:
    """Raydr's network of the parts of a transformers model."""
    if checkpoint.is_dual:
        pooling = "mean" if checkpoint.pooling == "mean" else "own"
        _reshape_temperature(model, (1,))  # DeepSpeed sends no weight without dimensions in bfloat16
        return ScoreFusion(model, checkpoint.preprocessing, pooling=pooling)
    if checkpoint.image_token_id is None or checkpoint.pooling == "own":
        raise ConfigError(f"{checkpoint.path}/config.json: names no image_token_id, the placeholder of pictures")
    vision = (LlavaVision if checkpoint.kind == "llava_next" else QwenVision)(model, checkpoint.preprocessing)
    return MultimodalEmbedder(
        model.language_model,
        vision,
        image_token_id=checkpoint.image_token_id,
        pooling=checkpoint.pooling,
        latent=_latent(checkpoint, model.dtype) if checkpoint.pooling == "latent" else None,
        bidirectional=checkpoint.bidirectional,
    )


def _latent(checkpoint: MultimodalCheckpoint, dtype: torch.dtype) -> LatentAttention:
    """The pooling head of the folder, or a new one; it pools in float32 what any network gives."""
    del dtype
    dim = checkpoint.dim
    head = LatentAttention(
        dim, num_latents=checkpoint.latents, num_heads=checkpoint.latent_heads, head_dim=dim, hidden=4 * dim
    )
    file = checkpoint.path / LATENT
    if file.is_file():
        head.load_state_dict(load_file(file))
    return head


def save(network: nn.Module, checkpoint: MultimodalCheckpoint, folder: Path) -> None:
    """Weights, tokenizer and what is said of pictures; `folder` exists and is empty."""
    if isinstance(network, ScoreFusion):
        model = network.transformer
        _reshape_temperature(model, ())
    elif isinstance(network, MultimodalEmbedder):
        model = _shell(network, checkpoint)
        if network.latent is not None:
            save_file(network.latent.state_dict(), folder / LATENT)
    else:
        raise TypeError(f"a {type(network).__name__} is no network that reads pictures")
    model.save_pretrained(folder, safe_serialization=True)
    for pattern in (*_TOKENIZER, "*processor_config.json", "chat_template*"):
        for file in checkpoint.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    (folder / SETTINGS).write_text(json.dumps(checkpoint.described(), indent=2), encoding="utf-8")


def _reshape_temperature(model: Any, shape: tuple[int, ...]) -> None:
    """CLIP's learned temperature, which is not used here and kept to be saved again; SigLIP's has a dimension."""
    scale = getattr(model, "logit_scale", None)
    if scale is not None and not hasattr(model, "logit_bias"):
        model.logit_scale = nn.Parameter(scale.detach().reshape(shape), requires_grad=False)


def _shell(network: MultimodalEmbedder, checkpoint: MultimodalCheckpoint) -> Any:
    """The transformers model that the parts were taken from, with the parts as they are now."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    model.language_model = network.transformer
    if isinstance(network.vision, LlavaVision):
        model.vision_tower = network.vision.tower
        model.multi_modal_projector = network.vision.projector
        model.image_newline = network.vision.newline
    else:
        model.visual = network.vision.tower
    return model
