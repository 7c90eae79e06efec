"""Outputs of `VidTwinPipeline` and of its transformer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput


@dataclass
class VidTwinPipelineOutput(BaseOutput):
    """Generated videos.

    Attributes:
        frames: depending on `output_type`,
            "pil": a list of B lists of T images;
            "np": a float array (B, T, H, W, 3) in [0, 1];
            "pt": a float tensor (B, T, 3, H, W) in [0, 1];
            "latent": packed latents (B, L), ready for `vae.decode`.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


@dataclass
class VidTwinTransformerOutput(Transformer2DModelOutput):
    """Prediction of a `VidTwinTransformer3DModel`.

    Attributes:
        sample: packed (B, L).
        hidden_states: tokens (B, S, D) of both streams after each requested block; None if none is requested.
    """

    hidden_states: tuple[torch.Tensor, ...] | None = None
