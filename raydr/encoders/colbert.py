"""A ColBERT checkpoint: read in the layouts of the hub, written in ColBERT's own.

Notable: three layouts are read, all from safetensors and without code of their own: ColBERT's (`linear.weight` beside
the transformer; normalised), matchmaker's (`compressor.*` beside `bert_model.*`;
not normalised), and a plain encoder, whose linear layer is then new and has to be trained.

    network = load_colbert("runs/tas/colbert/model")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raydr.encoders.checkpoint import open_checkpoint, weight_names, without_missing_pooler
from raydr.errors import ConfigError
from raydr.models.colbert import ColBert

_WEIGHTS = "model.safetensors"
_SETTINGS = "colbert.json"
"""Written by `save_colbert`: what the weights do not say."""
_PROJECTIONS = ("linear", "compressor")


def load_colbert(model: str, *, dimensions: int | None = None) -> ColBert:
    """The ColBERT in a folder or of a hub name, in float32.

    `dimensions` is that of the linear layer where the checkpoint has none (None: the transformer's own). Raises
    `ConfigError` where the weights cannot be read, or have another dimension than the one asked for.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    checkpoint = open_checkpoint(model)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        transformer: Any = AutoModel.from_pretrained(
            checkpoint.path,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            key_mapping={r"^bert_model\.": ""},
            **without_missing_pooler(checkpoint.path, config),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot load this model: {error}") from error
    names = weight_names(checkpoint.path)
    projection = next((name for name in _PROJECTIONS if f"{name}.weight" in names), None)
    if projection is None:
        return ColBert(transformer, hidden_size=checkpoint.hidden_size, dimensions=dimensions or checkpoint.hidden_size)
    weights = load_file(checkpoint.path / names[f"{projection}.weight"])
    linear = {name.rpartition(".")[2]: w for name, w in weights.items() if name.startswith(f"{projection}.")}
    if dimensions not in (None, len(linear["weight"])):
        raise ConfigError(
            f"dimensions: {checkpoint.path} has token embeddings of {len(linear['weight'])} dimensions, not "
            f"{dimensions}; leave the setting out"
        )
    network = ColBert(
        transformer,
        hidden_size=checkpoint.hidden_size,
        dimensions=len(linear["weight"]),
        bias="bias" in linear,
        normalize=_is_normalized(checkpoint.path, projection),
    )
    network.linear.load_state_dict(linear)
    return network


def save_colbert(network: ColBert, source: str, folder: Path) -> None:
    """Weights (safetensors), configuration and tokenizer; `load_colbert` opens the folder."""
    from safetensors.torch import load_file, save_file

    from raydr.encoders.export import save_transformer

    save_transformer(network.transformer, open_checkpoint(source).path, folder)
    weights = load_file(folder / _WEIGHTS)
    prefix = getattr(network.transformer, "base_model_prefix", "")
    named = {f"{prefix}.{name}" if prefix else name: weight for name, weight in weights.items()}
    named |= {f"linear.{name}": weight.contiguous() for name, weight in network.linear.state_dict().items()}
    save_file(named, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _SETTINGS).write_text(json.dumps({"normalize": network.normalize}), encoding="utf-8")


def _is_normalized(folder: Path, projection: str) -> bool:
    file = folder / _SETTINGS
    return bool(json.loads(file.read_text(encoding="utf-8"))["normalize"]) if file.is_file() else projection == "linear"
