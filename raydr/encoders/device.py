"""Where a network runs: the device that was asked for, and batches on it one after another.

stream = OneStream(network, choose_device("auto"), num_threads=2)
stream.run(input_ids, attention_mask)                                   # what the network gives, on its device
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

if TYPE_CHECKING:
    from torch import Tensor, nn


def choose_device(asked: str) -> str:
    """`asked`, or for `auto` a GPU if there is one and else the CPU, as torch names them."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class OneStream:
    """A network on one device, a batch at a time; on a CPU `num_threads` of torch's share the work of each."""

    num_streams = 1

    def __init__(self, network: nn.Module, device: str, num_threads: int) -> None:
        import torch

        if device == "cpu":
            torch.set_num_threads(num_threads)
        self.network: Any = network.eval().to(device)
        self.device = device

    def run(
        self, input_ids: Int64[np.ndarray, "text token"], attention_mask: Int64[np.ndarray, "text token"] | None
    ) -> Tensor:
        """What the network gives for a batch, on its device."""
        import torch

        with torch.inference_mode():
            mask = None if attention_mask is None else torch.from_numpy(attention_mask).to(self.device)
            return self.network(torch.from_numpy(input_ids).to(self.device), mask)

    def free_memory(self) -> None:
        """Gives unused memory back after a batch did not fit."""
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
