"""Exponential moving average (EMA) of the weights, also of a model that FSDP shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from autoencoder.adapters import empty_copy

EMA_WEIGHTS = "ema.safetensors"
OLD_EMA_WEIGHTS = "averaged.safetensors"  # its name in checkpoints of earlier versions


def build_ema(model: nn.Module, decay: float) -> EMAModel | None:
    """Create the average of a model's trainable parameters; None if `decay` is 0."""
    return EMAModel(list(averaged_parameters(model).values()), decay=decay, foreach=True) if decay > 0 else None


def averaged_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are averaged, by name: the trainable ones. Frozen ones equal their average."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def ema_scope(model: nn.Module, ema: EMAModel | None, device: torch.device) -> Iterator[nn.Module]:
    """Yield the model in evaluation mode with its averaged weights, complete on every process.

    Without an average it has its current weights. A sharded model is copied, any other is restored afterwards.
    """
    parameters = list(averaged_parameters(model).values())
    is_sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    training = [module for module in model.modules() if module.training]  # frozen modules are not
    if is_sharded:
        weights = dict(model.named_parameters())
        if ema:
            weights |= dict(zip(averaged_parameters(model), ema.shadow_params, strict=True))
        model = _empty_copy(model).to(device)
        with torch.no_grad():
            for name, target in model.named_parameters():
                target.copy_(gather_shards(weights[name]))
    elif ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True
        if ema and not is_sharded:
            ema.restore(parameters)


def _empty_copy(model: nn.Module) -> nn.Module:
    """A newly initialized model, or `ModuleDict` of models."""
    if isinstance(model, nn.ModuleDict):
        return nn.ModuleDict({name: empty_copy(part) for name, part in model.items()})
    return empty_copy(model)


def gather_ema_weights(model: nn.Module, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The averages by name, complete. Must be called on every process."""
    averages = zip(averaged_parameters(model), ema.shadow_params, strict=True)
    return {name: gather_shards(weight).contiguous() for name, weight in averages}


def load_ema_weights(model: nn.Module, ema: EMAModel, checkpoint: Path) -> None:
    """Load the averaged parameters that a checkpoint folder holds."""
    path = checkpoint / EMA_WEIGHTS
    weights = load_file(path if path.exists() else checkpoint / OLD_EMA_WEIGHTS)
    for name, target in zip(averaged_parameters(model), ema.shadow_params, strict=True):
        saved = weights[name].to(target.device)
        if isinstance(target, DTensor):
            saved = distribute_tensor(saved, target.device_mesh, target.placements)
        target.copy_(saved)


def gather_shards(tensor: torch.Tensor) -> torch.Tensor:
    """The complete tensor, if it is spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
