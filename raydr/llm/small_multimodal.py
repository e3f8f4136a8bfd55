"""Small multimodal models for machines without GPUs, out of a pretrained text encoder and a vision tower that is new.

A dual encoder (transformers' `VisionTextDualEncoderModel`) pairs the text encoder with a CLIP vision tower; trained, it
gives its tower to a LLaVA-NeXT whose language model is the same text encoder as a decoder (`raydr/llm/small.py`), read
in both directions as NV-Embed's is. Notable: the two start from the same words and see with the same eyes, so what is
measured between them is how they join the two..

    small_dual_encoder("minilm", Path("dual"), VisionShape())      # then train it: raydr.methods.clip
    small_llava("minilm", Path("llava"), tower="dual/model")       # then: raydr.methods.mm_embed
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from raydr.artifacts import fingerprint, is_finished, open_artifact, write_artifact
from raydr.config import Config
from raydr.encoders.checkpoint import load_transformer, locate, open_checkpoint
from raydr.encoders.multimodal import SETTINGS
from raydr.errors import ConfigError
from raydr.llm.small import causal_from_encoder

KIND = "model"
MODEL = "model"
_PLACEHOLDER = "[unused0]"
_MEAN, _STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


class VisionShape(Config):
    """A vision tower's size."""

    image_size: int = Field(default=64, ge=8)
    """Side of the square in pixels."""
    patch_size: int = Field(default=16, ge=2)
    """Side of a patch in pixels."""
    hidden_size: int = Field(default=192, ge=8)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=6, ge=1)


class DualStartConfig(Config):
    """What a method that trains a dual encoder may start from."""

    start: Literal["checkpoint", "encoder"] = "checkpoint"
    """`encoder`: `model` is a text encoder, and a vision tower of the shape `vision`, whose weights are new, is put
    beside it before training."""
    vision: VisionShape = Field(default_factory=VisionShape)
    """`start: encoder`: the vision tower's size."""


def small_dual_encoder(text: str, out: Path, shape: VisionShape, *, seed: int = 0) -> Path:
    """The folder of an untrained dual encoder in the artifact `out` (kind "model"); a finished one stays."""
    settings = {"text": open_checkpoint(text).fingerprint(), "vision": shape.model_dump(), "seed": seed}
    if not is_finished(out, fingerprint(KIND, settings, {})):
        with write_artifact(out, kind=KIND, config=settings) as writer:
            folder = writer.path / MODEL
            folder.mkdir()
            _dual(text, shape, seed, folder)
    return open_artifact(out, kind=KIND).path / MODEL


def small_llava(text: str, out: Path, *, tower: str, seed: int = 0) -> Path:
    """The folder of a LLaVA-NeXT in the artifact `out` (kind "model"), which sees with the vision tower of the trained
    dual encoder `tower` and has a new projector; a finished one stays.

    Raises `ConfigError` where `tower` is no dual encoder of this module's.
    """
    source = locate(tower)
    from raydr.encoders.checkpoint import fingerprint as weights_of

    settings = {"text": open_checkpoint(text).fingerprint(), "tower": weights_of(source), "seed": seed}
    if not is_finished(out, fingerprint(KIND, settings, {})):
        with write_artifact(out, kind=KIND, config=settings) as writer:
            folder = writer.path / MODEL
            folder.mkdir()
            _llava(text, source, seed, folder)
    return open_artifact(out, kind=KIND).path / MODEL


def _vision_config(shape: VisionShape) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        projection_dim=shape.hidden_size,
    )


def _dual(text: str, shape: VisionShape, seed: int, folder: Path) -> None:
    from transformers import AutoModel, CLIPVisionModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    words: Any = load_transformer(AutoModel, locate(text), dtype=torch.float32)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        pictures = CLIPVisionModel(_vision_config(shape))
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            pictures.config, words.config, projection_dim=words.config.hidden_size
        )
        model = VisionTextDualEncoderModel(config, vision_model=pictures, text_model=words)
    with torch.no_grad():  # texts are compared as the text encoder compares them, until training says otherwise
        model.text_projection.weight.copy_(torch.eye(words.config.hidden_size))
    _write(model, text, folder, {"pooling": "mean", "image_size": shape.image_size})


def _llava(text: str, tower: Path, seed: int, folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer, LlavaNextConfig, LlavaNextModel

    dual: Any = load_transformer(AutoModel, tower, dtype=torch.float32)
    if dual.config.model_type != "vision-text-dual-encoder":
        raise ConfigError(f"{tower}: a {dual.config.model_type} model, not a pair of a text and a vision tower")
    words_folder = folder / "words"
    words_folder.mkdir()
    causal_from_encoder(text, words_folder, extra_layers=0)
    words: Any = load_transformer(AutoModel, words_folder, warnings=False, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(words_folder, local_files_only=True, trust_remote_code=False)
    image = tokenizer.convert_tokens_to_ids(_PLACEHOLDER)
    if image in (None, tokenizer.unk_token_id):
        raise ConfigError(f"{text}: its vocabulary has no {_PLACEHOLDER} to stand for pictures")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = LlavaNextConfig(
            vision_config=dual.vision_model.config,
            text_config=words.config,
            image_token_index=image,
            # The dual encoder's own last layer, which is trained: LLaVA reads the one before because CLIP's last one
            # serves CLIP's loss alone.
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=[[dual.vision_model.config.image_size] * 2],
        )
        model: Any = LlavaNextModel(config)
    model.language_model.load_state_dict(words.state_dict())
    model.vision_tower.load_state_dict(dual.vision_model.state_dict())
    for file in words_folder.iterdir():
        file.unlink()
    words_folder.rmdir()
    size = dual.vision_model.config.image_size
    _write(model, text, folder, {"pooling": "mean", "bidirectional": True, "image_size": size})


def _write(model: Any, text: str, folder: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(folder, safe_serialization=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(locate(text), local_files_only=True, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    pictures = {"image_mean": _MEAN, "image_std": _STD, "size": settings["image_size"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2), encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
