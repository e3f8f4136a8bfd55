"""One dropout for a whole network, whatever its checkpoint was configured with.

Notable: on a CPU PyTorch draws the masks number by number, which takes about half of a small encoder's pass over
texts of 192 tokens and more of longer ones (W9 in benchmarks/results.md); `train.dropout: 0` saves that.
"""

from __future__ import annotations

from torch import nn


def set_dropout(model: nn.Module, share: float) -> None:
    """Sets every dropout of `model`, attention's too, to leave out `share` of the values while it trains."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = share
        for name in ("attention_dropout", "dropout"):  # where transformers keeps it as a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)
