"""Keeps the batch of a step that went wrong, to be looked at: tokens, pictures and labels in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydr.train.objective import TrainBatch


def save_batch(batch: TrainBatch, file: Path) -> Path:
    """Writes the batch; the ids of its queries are in the file's metadata."""
    from safetensors.torch import save_file

    from raydr.models.tokens import ReadyEmbeddings

    tensors = {name: value.contiguous() for name, value in vars(batch.labels).items() if value is not None}
    for name in ("queries", "passages", "pairs"):
        side = getattr(batch, name)
        if isinstance(side, ReadyEmbeddings):
            tensors[f"{name}.embeddings"] = side.embeddings.contiguous()
        elif side is not None:
            parts = {"ids": side.ids, "mask": side.mask, "pooled": side.pooled}
            if side.pictures is not None:
                parts |= side.pictures._asdict()
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items() if value is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"queries": json.dumps(batch.names)})
    return file
