"""Checks for NaN and infinite values, which conversion to pixels would silently turn into black or white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import ModelMixin

FLOAT16_MAX = 65504


class NonFiniteError(ValueError):
    """A model produced NaN or infinite values."""


def check_finite_number(name: str, value: float | Sequence[float]) -> None:
    """Raise a `ValueError` if an argument, a number or a sequence of numbers, is NaN or infinite."""
    values = value if isinstance(value, Sequence) else [value]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must be finite, not {value}.")


def check_finite_tensor(name: str, values: torch.Tensor) -> None:
    """Raise a `ValueError` if a tensor of the caller contains NaN or infinite values."""
    if not values.isfinite().all():
        raise ValueError(f"{name} contains NaN or infinite values.")


def check_finite_output(source: str, values: torch.Tensor, model: ModelMixin) -> None:
    """Raise a `NonFiniteError` if a model's output contains NaN or infinite values; waits for the device.

    Args:
        source: name of the model: "the transformer".
        values: its output, of any shape.
        model: the model, whose dtype the message names.
    """
    if not values.isfinite().all():
        raise NonFiniteError(non_finite_message(source, model))


def non_finite_message(source: str, model: ModelMixin) -> str:
    """Return two sentences: which model is not finite in which dtype, and which dtype to use instead."""
    dtype = compute_dtype(model)
    message = f"{source[0].upper()}{source[1:]} produced NaN or infinite values in {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float16:
        return f"{message}, whose largest value is {FLOAT16_MAX}. Use bfloat16 or float32 instead."
    remedy = "Check that its weights and inputs are finite"
    return f"{message}. {remedy}." if dtype == torch.float32 else f"{message}. {remedy}, or use float32 instead."


def compute_dtype(model: ModelMixin) -> torch.dtype:
    """Return the dtype of a model's matrix products: that of autocast if enabled, else that of the weights."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
