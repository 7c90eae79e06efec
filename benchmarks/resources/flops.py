"""FLOPs of a training step, counted without running it."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from .memory import Build


def training_flops(build: Build) -> tuple[int, int]:
    """Return the FLOPs of a forward pass, and of a training step: forward and backward pass, without the optimizer.

    PyTorch counts every matrix product and convolution on meta tensors, attention as plain products; nothing is
    computed. Fused attention, which recomputes its scores in the backward pass, counts the same here.

    Args:
        build: creates model, loss function and the inputs of that on the default device.
    """
    with torch.device("meta"):
        _, loss_function, inputs = build()
        with FlopCounterMode(display=False) as counter:
            loss = loss_function(*inputs)
            forward = counter.get_total_flops()
            loss.backward()
            return forward, counter.get_total_flops()
