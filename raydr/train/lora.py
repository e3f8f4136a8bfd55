"""Low-rank adapters through peft: put onto a network's transformers before training, merged into them afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydr.errors import ConfigError
from raydr.models.towers import towers_of

if TYPE_CHECKING:
    from torch import nn

    from raydr.train.config import LoraConfig


def with_adapters(model: nn.Module, config: LoraConfig) -> nn.Module:
    """`model` with adapters on its `transformer`, whose own weights no longer change; other parts are trained whole."""
    import peft

    settings: Any = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.target_modules
    )
    for tower in towers_of(model):
        parts: Any = tower
        try:
            parts.transformer = peft.get_peft_model(parts.transformer, settings)
        except ValueError as error:
            raise ConfigError(f"train.lora: {error}; name the linear layers in train.lora.target_modules") from error
    return model


def without_adapters(model: nn.Module) -> nn.Module:
    """`model` with its adapters added into the weights."""
    for tower in towers_of(model):
        parts: Any = tower
        parts.transformer = parts.transformer.merge_and_unload()
    return model
