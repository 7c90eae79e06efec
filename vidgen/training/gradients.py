"""Clipping of gradients by parameter group."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import ModelMixin
from torch import nn

from ..losses import Losses
from .ema import gather_shards


def clip_gradients(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    model: ModelMixin,
    max_norm: float,
    frozen_groups: Set[str] = frozenset(),
) -> Losses:
    """Clip the gradient norm of every parameter group; returns the norms before clipping, by `group_key`.

    Args:
        optimizer: prepared; its groups have names.
        model: the trained model.
        max_norm: 0 disables clipping.
        frozen_groups: names of groups that are not trained in this step.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine has clipped them together
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return {"grad_norm": torch.as_tensor(norm or 0.0, device=accelerator.device)}
    accelerator.unscale_gradients()
    norms = {}
    for group in optimizer.param_groups:
        if group["name"] in frozen_groups:
            for parameter in group["params"]:
                parameter.grad = None  # the optimizer would count a gradient of zero as a step
            continue
        if not group["params"]:  # Muon may train all parameters of an adapter
            continue
        norm = nn.utils.clip_grad_norm_(group["params"], max_norm or math.inf)
        norms[group_key("grad_norm", group)] = gather_shards(norm)
    return norms


def group_key(name: str, group: dict[str, Any]) -> str:
    """The name under which a value of a parameter group is logged; the model's has no suffix."""
    return name if group["name"] == "model" else f"{name}/{group['name']}"
