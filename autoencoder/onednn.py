"""Linear layers by oneDNN on CPUs where PyTorch's default is slow, which is MKL on x86.

MKL has no AVX-512 kernels for AMD's processors; oneDNN multiplies float32 matrices there at twice its rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import mm_flop, register_flop_formula

from .matmul_speed import is_onednn_faster, onednn_linear

MIN_WEIGHTS = 2**14  # of a layer; in smaller ones oneDNN's call costs more than it saves
Inputs, Output = ParamSpec("Inputs"), TypeVar("Output")


def use_onednn(function: Callable[Inputs, Output]) -> Callable[Inputs, Output]:
    """Decorate a function of a model so that its float32 linear layers run on oneDNN where that is faster.

    The results differ by rounding. Compiled functions keep PyTorch's layers, as do those that compute gradients.
    """

    @wraps(function)
    def wrapper(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return function(*args, **kwargs)
        with _OneDNN():
            return function(*args, **kwargs)

    return wrapper


class _OneDNN(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _is_faster(*args):
            return onednn_linear(*args)
        return func(*args, **(kwargs or {}))


def _is_faster(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= MIN_WEIGHTS
        and {type(x), type(weight)} <= {torch.Tensor, nn.Parameter}  # neither quantized nor distributed nor fake
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and is_onednn_faster()
    )


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
        """FLOPs of the operator, which PyTorch's counter does not know."""
        return mm_flop((x[:-1].numel(), x[-1]), (weight[1], weight[0]))
