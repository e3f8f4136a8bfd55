"""The network in PyTorch, on a CPU or a GPU.

Notable: attention is torch's fused `scaled_dot_product_attention`, without a mask wherever a batch has no padding;
the whole network runs in the chosen precision, pooling and normalisation in float32.

    TorchBackend(load_network(checkpoint, ...), device="cuda", precision="bfloat16").forward(input_ids, None)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64

from raydr.encoders.checkpoint import Checkpoint, load_transformer, without_missing_pooler
from raydr.encoders.device import OneStream
from raydr.encoders.precision import Precision
from raydr.errors import ConfigError
from raydr.models.dual_encoder import DualEncoder
from raydr.models.pooling import Pooling


def load_network(
    checkpoint: Checkpoint,
    *,
    pooling: Pooling,
    normalize: bool,
    dimensions: int | None,
    precision: Precision,
    first_pooled: int = 0,
) -> DualEncoder:
    """The checkpoint's transformer, from safetensors and without code of its own, with the pooling on top."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding

    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        loader = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel
        config.use_cache = False  # of keys and values, which only generation needs
        layers = without_missing_pooler(checkpoint.path, config)
        transformer = load_transformer(
            loader,
            checkpoint.path,
            config=config,
            dtype=getattr(torch, precision),
            **layers,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot load this model: {error}") from error
    return DualEncoder(
        transformer, pooling=pooling, normalize=normalize, dimensions=dimensions, first_pooled=first_pooled
    ).eval()


class TorchBackend(OneStream):
    """A `Backend` of embeddings."""

    def forward(
        self, input_ids: Int64[np.ndarray, "text token"], attention_mask: Int64[np.ndarray, "text token"] | None
    ) -> Float32[np.ndarray, "text dim"]:
        return self.run(input_ids, attention_mask).cpu().numpy()
