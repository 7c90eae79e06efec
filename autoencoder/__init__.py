"""Layer 1: the VidTwin autoencoder as a Diffusers model, its latents and the converter of official checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .autoencoder_kl_vidtwin import AutoencoderKLVidTwin
    from .latents import TwinLatents, TwinPosterior

_EXPORTS = {
    "AutoencoderKLVidTwin": "autoencoder_kl_vidtwin",
    "TwinLatents": "latents",
    "TwinPosterior": "latents",
}
__all__ = ["AutoencoderKLVidTwin", "TwinLatents", "TwinPosterior"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_EXPORTS]
