"""Modules that are not trained (`train.freeze`)."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import ModelMixin
from torch import nn

from autoencoder.video_autoencoder import VideoAutoencoder

from ..common.errors import UserError


def freeze_modules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Train all parameters of a model except those of some modules; returns these modules.

    Args:
        model: whose parameters are changed.
        names: dotted names of modules, such as `encoder` or `decoder.transformer`.

    Raises:
        UserError: if there is no such module, or nothing is left to train.
    """
    model.requires_grad_(True)
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            raise UserError(
                f"train.freeze: the model has no module {name!r}; its modules are "
                f"{', '.join(child for child, _ in model.named_children())}, and those inside them by dotted names."
            )
    frozen = [modules[name].requires_grad_(False) for name in names]
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("train.freeze leaves no parameter to train; name fewer modules.")
    return frozen


def describe_parameters(model: ModelMixin) -> str:
    """The numbers of parameters: of the model, and the trainable and the frozen ones if some are frozen."""
    total, trainable = model.num_parameters(), model.num_parameters(only_trainable=True)
    if trainable == total:
        return f"{total:,} parameters"
    return f"{total:,} parameters, {trainable:,} trainable and {total - trainable:,} frozen"


def is_encoder_frozen(vae: VideoAutoencoder) -> bool:
    """Whether training an autoencoder leaves its latents unchanged: no module that `encode` uses is trained."""
    modules = [vae.backbone.get_submodule(name) for name in vae.encoder_modules]
    return not any(parameter.requires_grad for module in modules for parameter in module.parameters())
