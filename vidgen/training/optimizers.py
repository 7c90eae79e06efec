"""The optimizer and its schedule."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..config import OptimConfig
from ..errors import UserError


def build_optimizer(groups: dict[str, tuple[list[nn.Parameter], float]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of parameters.

    Args:
        groups: by name, the parameters and the factor on the learning rate.
        config: what they share.

    Raises:
        UserError: if a value is out of range.
    """
    try:
        return torch.optim.AdamW(
            [
                {"name": name, "params": parameters, "lr": factor * config.learning_rate}
                for name, (parameters, factor) in groups.items()
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,  # one kernel, and one that skips an update on the device's own word
        )
    except ValueError as error:
        raise UserError(f"optim or gan.lr_scale does not fit: {error}.") from error


def start_state(optimizer: torch.optim.AdamW) -> None:
    """Give every parameter the state that its first update would: a sharded checkpoint must name all there will be."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, max_train_steps: int, after: int = 0
) -> LRScheduler:
    """Diffusers' schedule of that name over optimizer steps, as it stands after so many.

    Raises:
        UserError: if the name is unknown, or of a schedule that needs more than a recipe says.
    """
    if config.lr_scheduler == "piecewise_constant":
        raise UserError("optim.lr_scheduler: piecewise_constant needs rules that a recipe has no key for.")
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=max_train_steps,
            last_epoch=after - 1,
        )
    except ValueError as error:
        raise UserError(f"optim.lr_scheduler: {error}.") from error
