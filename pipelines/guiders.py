"""Guiders of Diffusers (`diffusers.guiders`) in place of the pipeline's classifier-free guidance.

A guider requests one or more predictions per step, with or without the classes and prompts, some from a weakened
transformer, and combines them. It treats the packed latent (L,) of both streams as one vector.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import torch
from diffusers import guiders
from diffusers.guiders import BaseGuidance

from .transformer_vidtwin import VidTwinTransformer3DModel

UNSUPPORTED = {
    "FrequencyDecoupledGuidance": "separates frequencies of images, and packed latents of two streams are no image",
    "SmoothedEnergyGuidance": "blurs a square grid of tokens, and the tokens of two streams are no grid",
    "LTX2Guidance": "perturbs modules that only the transformer of LTX-2 has",
}


def list_guiders() -> list[str]:
    """Return the names of the classes in `diffusers.guiders` that the pipeline takes."""
    classes = {name: value for name, value in vars(guiders).items() if inspect.isclass(value)}
    return sorted(
        name
        for name, value in classes.items()
        if issubclass(value, BaseGuidance) and value is not BaseGuidance and name not in UNSUPPORTED
    )


def create_guider(name: str, options: dict[str, Any]) -> BaseGuidance:
    """Create a guider by the name of its class.

    Args:
        name: one of `list_guiders`.
        options: arguments of the class, such as `guidance_scale`, `start` and `stop`.

    Raises:
        ValueError: for an unknown name or option, or a value that the class does not take.
    """
    if name in UNSUPPORTED:
        raise ValueError(f"{name} {UNSUPPORTED[name]}.")
    if name not in list_guiders():
        raise ValueError(f"The guider must be one of {', '.join(list_guiders())}, not {name}.")
    guider_class = getattr(guiders, name)
    parameters = dict(inspect.signature(guider_class).parameters)
    for key, value in options.items():
        if key not in parameters:
            raise ValueError(f"{name} has no option {key}, only {', '.join(parameters)}.")
        if isinstance(parameters[key].default, numbers.Real) and not isinstance(value, numbers.Real):
            raise ValueError(f"{key} of {name} must be a number, not {value!r}.")
    try:
        return guider_class(**options)
    except TypeError as error:
        raise ValueError(f"{name} does not take these options: {error}.") from error


def check_guider(
    guider: BaseGuidance, transformer: VidTwinTransformer3DModel, device: torch.device | None = None
) -> None:
    """Raise a `ValueError` if this is no guider, or one that does not work with this transformer.

    Args:
        device: of the computation; None: not known yet.
    """
    name = type(guider).__name__
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider must be an instance of a class of diffusers.guiders, not {guider!r}.")
    for base in type(guider).__mro__:
        if base.__name__ in UNSUPPORTED:
            raise ValueError(f"{name} {UNSUPPORTED[base.__name__]}.")
    if transformer.is_cache_enabled:
        raise ValueError(
            f"{name} predicts several times per step, which a cache would mix up: call disable_cache() of the "
            "transformer, or use guidance_scale instead of the guider."
        )
    num_layers = len(transformer.transformer_blocks)
    for config in getattr(guider, "skip_layer_config", getattr(guider, "auto_guidance_config", [])):
        # Diffusers' guiders store the number of a single layer, but its hooks require a list.
        config.indices = [config.indices] if isinstance(config.indices, int) else config.indices
        if not config.indices or not all(index in range(num_layers) for index in config.indices):
            raise ValueError(f"The layers of {name} must be in 0 to {num_layers - 1}, not {config.indices}.")
        if config.skip_attention_scores and device is not None and not _calls_torch_attention(transformer, device):
            raise ValueError(
                f"{name} changes PyTorch's attention, which this transformer does not call in {transformer.dtype} on "
                f'{device.type}: call its set_attention_backend("native"), or use float32.'
            )


def check_no_guidance(guider: BaseGuidance, scale: Any, interval: Any, history_scale: Any = 1.0) -> None:
    """Raise a `ValueError` for a guidance scale, an interval or guidance by history beside a guider."""
    if history_scale != 1:
        raise ValueError("history_guidance_scale and a guider exclude each other: set the pipeline's guider to None.")
    is_limited = isinstance(interval, tuple | list) and tuple(interval) != (0, 1)
    for name, is_set in (("guidance_scale", scale is not None), ("guidance_interval", is_limited)):
        if is_set:
            raise ValueError(
                f"{name} and a guider exclude each other: set the pipeline's guider to None, or pass guidance_scale, "
                f"start and stop to {type(guider).__name__}."
            )


def predict_with_guider(
    guider: BaseGuidance, transformer: VidTwinTransformer3DModel, predict: Callable[[str], torch.Tensor]
) -> torch.Tensor:
    """Make the predictions that a guider requests for a step, and combine them.

    Args:
        guider: in the state of the step (`set_state`). Outside its interval it requests a single prediction.
        transformer: which the guider changes for some predictions, such as by skipping a layer.
        predict: maps "conditional" or "unconditional" to a prediction (B, L).

    Returns:
        (B, L).
    """
    requests = guider.prepare_inputs({"conditions": ("conditional", "unconditional")})
    for request in requests:
        conditions = request.conditions
        if getattr(request, guider._identifier_key) == "pred_cond_skip":
            # Diffusers skips layers only in a third prediction; without classifier-free guidance it is the second.
            conditions, guider._count_prepared = "conditional", 2
        guider.prepare_models(transformer)
        try:
            request.noise_pred = predict(conditions)
        finally:
            guider.cleanup_models(transformer)
    return guider(requests).pred


def _calls_torch_attention(transformer: VidTwinTransformer3DModel, device: torch.device) -> bool:
    """Whether self-attention is `scaled_dot_product_attention`, which Diffusers replaces to skip attention scores."""
    backend = transformer.transformer_blocks[0].attn1.processor._attention_backend
    if backend is None:  # see `autoencoder.attention`
        return device.type != "cpu" or transformer.dtype == torch.float32
    return "native" in backend
