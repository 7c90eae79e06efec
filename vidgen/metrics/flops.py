"""Floating-point operations of a VidTwin on one clip, counted from its sizes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin


def encode_flops(vae: AutoencoderKLVidTwin) -> float:
    """FLOPs of encoding one clip of the model's own size: multiply-adds, twice."""
    structure, dynamics = _heads(vae)[:2]
    return _transformer_flops(vae) + structure + dynamics


def decode_flops(vae: AutoencoderKLVidTwin) -> float:
    """FLOPs of decoding one clip of the model's own size: multiply-adds, twice."""
    structure, dynamics = _heads(vae)[2:]
    return _transformer_flops(vae) + structure + dynamics


def _transformer_flops(vae: AutoencoderKLVidTwin) -> float:
    """The blocks, attention included, and the linear layer between pixels and tokens; the same on both sides.

    By formula: PyTorch's counter misses the CPU's fused attention.
    """
    c = vae.config
    tokens = c.num_frames * (c.sample_size // c.patch_size) ** 2
    dim, space = c.hidden_size, tokens // c.num_frames
    linears = 2 * (2 * 4 * dim**2 + 2 * c.mlp_ratio * dim**2)
    attention = 2 * 2 * dim * (space + c.num_frames)
    return tokens * (c.num_layers * (linears + attention) + 2 * dim * c.in_channels * c.patch_size**2)


def _heads(vae: AutoencoderKLVidTwin) -> list[float]:
    """Structure and dynamics encoder, structure and dynamics decoder: convolutions and products, which it counts."""
    with torch.device("meta"):
        meta = AutoencoderKLVidTwin.from_config(vae.config).eval()
        grid = vae.config.sample_size // vae.config.patch_size
        features = torch.empty(1, vae.config.hidden_size, vae.config.num_frames, grid, grid)
        structure, dynamics = torch.empty(1, *vae.structure_shape), torch.empty(1, *vae.dynamics_shape)
    counted = []
    for head, latent in (
        (meta.structure_encoder, features),
        (meta.dynamics_encoder, features),
        (meta.structure_decoder, structure),
        (meta.dynamics_decoder, dynamics),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            head(latent)
        counted.append(counter.get_total_flops())
    return counted
