"""Linear layers by oneDNN on CPUs where PyTorch's default is slow, which is MKL on x86.

MKL has no AVX-512 kernels for AMD's processors; oneDNN multiplies float32 matrices there at twice its rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import mm_flop, register_flop_formula

from .matmul_speed import is_onednn_faster, onednn_linear

MIN_WEIGHTS = 2**14  # of a layer; in smaller ones oneDNN's call costs more than it saves


class Linear(nn.Linear):
    """A linear layer that runs on oneDNN without gradients, in float32, where that is faster on this CPU.

    The results differ by rounding. In all other cases, also where it is compiled, it is PyTorch's layer.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._is_faster(input):
            return super().forward(input)
        return onednn_linear(input, self.weight, self.bias)

    def _is_faster(self, x: torch.Tensor) -> bool:
        weight = self.weight
        return (
            x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and weight.numel() >= MIN_WEIGHTS
            and {type(x), type(weight)} <= {torch.Tensor, nn.Parameter}  # neither quantized nor distributed nor fake
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and is_onednn_faster()
        )


def use_onednn(model: nn.Module) -> None:
    """Turn the linear layers of a model, also those within layers of Diffusers, into `Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # PyTorch is built with oneDNN

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
        """FLOPs of the operator, which PyTorch's counter does not know."""
        return mm_flop((x[:-1].numel(), x[-1]), (weight[1], weight[0]))
