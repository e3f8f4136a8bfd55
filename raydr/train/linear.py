"""Linear layers in float32 on AMD's processors, through oneDNN in the place of Intel's MKL.

PyTorch multiplies float32 matrices by MKL; on an AMD EPYC with AVX-512 oneDNN, which comes with PyTorch too, is 1.4
to 1.8 times as quick. Both sum in float32: results differ by rounding alone. Notable: only the class of a layer
changes, so weights, their names, hooks and adapters stay what they are; which library multiplies depends on the
machine alone, never on a measurement, so that a run that goes on gives what it would have given.
W9 in benchmarks/results.md has the speed with and without.

    through_onednn(model)       # every nn.Linear of it; nothing where MKL is as quick
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raydr.encoders.precision import processor_name


def through_onednn(model: nn.Module) -> None:
    """Makes the linear layers of `model` multiply by oneDNN where that is quicker."""
    if not _is_quicker():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """`nn.Linear` in float32 by oneDNN; any other type, and an empty batch, is left to PyTorch."""

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        if input.dtype != torch.float32 or self.weight.dtype != torch.float32 or not input.numel():
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """inputs W^T + bias, and its three gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _times_transposed(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = grad_outputs
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _times_transposed(gradient, weight.t()) if of_inputs else None,
            _times_transposed(rows.t(), inputs.reshape(-1, inputs.shape[-1]).t()) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


def _times_transposed(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    # The operator that PyTorch's own compiler puts in the place of a linear layer on a CPU.
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


@functools.cache
def _is_quicker() -> bool:
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_avx512 and torch.backends.mkldnn.is_available() and processor_name().startswith("AMD")
