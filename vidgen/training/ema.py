"""Exponential moving average (EMA) of the weights, also of a model that FSDP shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

EMA_WEIGHTS = "ema.safetensors"
OLD_EMA_WEIGHTS = "averaged.safetensors"  # its name in checkpoints of earlier versions


def build_ema(model: ModelMixin, decay: float) -> EMAModel | None:
    """Create the average of a model's parameters; None if `decay` is 0."""
    return EMAModel(list(model.parameters()), decay=decay, foreach=True) if decay > 0 else None


@contextmanager
def ema_scope(model: ModelMixin, ema: EMAModel | None, device: torch.device) -> Iterator[ModelMixin]:
    """Yield the model in evaluation mode with its averaged weights, complete on every process.

    Without an average it has its current weights. A sharded model is copied, any other is restored afterwards.
    """
    parameters = list(model.parameters())
    is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    was_training = model.training
    if is_sharded:
        weights = ema.shadow_params if ema else parameters
        model = type(model).from_config(model.config).to(device)
        with torch.no_grad():
            for target, shard in zip(model.parameters(), weights, strict=True):
                target.copy_(gather_shards(shard))
    elif ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
        if ema and not is_sharded:
            ema.restore(parameters)


def gather_ema_weights(model: ModelMixin, ema: EMAModel) -> dict[str, torch.Tensor]:
    """The averaged parameters by name, complete. Must be called on every process."""
    names = [name for name, _ in model.named_parameters()]
    return {name: gather_shards(weight).contiguous() for name, weight in zip(names, ema.shadow_params, strict=True)}


def load_ema_weights(model: ModelMixin, ema: EMAModel, checkpoint: Path) -> None:
    """Load the averaged parameters that a checkpoint folder holds."""
    path = checkpoint / EMA_WEIGHTS
    weights = load_file(path if path.exists() else checkpoint / OLD_EMA_WEIGHTS)
    for (name, _), target in zip(model.named_parameters(), ema.shadow_params, strict=True):
        saved = weights[name].to(target.device)
        if isinstance(target, DTensor):
            saved = distribute_tensor(saved, target.device_mesh, target.placements)
        target.copy_(saved)


def gather_shards(tensor: torch.Tensor) -> torch.Tensor:
    """The complete tensor, if it is spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
