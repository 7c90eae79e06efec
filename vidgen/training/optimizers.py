"""Optimizers by name, and their schedule."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..config import OptimConfig
from ..errors import UserError


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on the transformer blocks' matrices and AdamW on everything else, as one optimizer."""

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if "blocks." in name and name.endswith("weight") and p.ndim == 2]
        chosen = set(map(id, matrices))
        self.muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.adam_weight_decay)
        self.adamw = torch.optim.AdamW([p for _, p in trained if id(p) not in chosen], **_adam_arguments(config))
        # The groups and states are the two optimizers' own, shared: schedulers and clipping act on both.
        super().__init__([{"params": [p for _, p in trained]}], defaults={})
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW, over the model's trainable parameters.

    Raises:
        UserError: if the name is unknown.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **_adam_arguments(config))
    if config.optimizer == "muon":
        return MuonWithAdamW(model, config)
    raise UserError(f"optim.optimizer must be adamw or muon, not {config.optimizer!r}.")


def _adam_arguments(config: OptimConfig) -> dict:
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def build_lr_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, max_train_steps: int) -> LRScheduler:
    """Diffusers' schedule of that name over optimizer steps.

    Raises:
        UserError: if the name is unknown.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=max_train_steps,
        )
    except ValueError as error:
        raise UserError(f"optim.lr_scheduler: {error}.") from error
