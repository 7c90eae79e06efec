"""Tiny configs of the video autoencoders of Diffusers and transformers that have an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoencoder.adapters import RULES, build_model, find_class

# fmt: off
TINY: dict[str, dict[str, Any]] = {
    "AutoencoderKLLTXVideo": dict(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=2,
    ),
    "AutoencoderKLLTX2Video": dict(
        latent_channels=8, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), patch_size=1,
    ),
    "AutoencoderKLWan": dict(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
    ),
    "AutoencoderKLQwenImage": dict(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
    ),
    "AutoencoderKLCogVideoX": dict(
        block_out_channels=(8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    ),
    "AutoencoderKLHunyuanVideo": dict(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, block_out_channels=(8, 8, 8), layers_per_block=1,
        norm_num_groups=2, spatial_compression_ratio=4, temporal_compression_ratio=4,
    ),
    "AutoencoderKLHunyuanVideo15": dict(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ),
    "AutoencoderKLCosmos": dict(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(4,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=8,
        temporal_compression_ratio=8,
    ),
    "AutoencoderKLMagvit": dict(
        latent_channels=4, block_out_channels=[8, 8, 8],
        down_block_types=["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 2],
        up_block_types=["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 2], layers_per_block=1, norm_num_groups=2,
    ),
    "AutoencoderKLMochi": dict(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1),
    ),
    "AutoencoderVidTok": dict(ch=32, ch_mult=[1, 1, 1, 1], z_channels=4, num_res_blocks=1),
    "AutoencoderKLKVAEVideo": dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4),
    "Emu3VQVAE": dict(
        base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1, codebook_size=16, hidden_size=32,
        attn_resolutions=[2],
    ),
}
# fmt: on
assert TINY.keys() == RULES.keys()


def tiny_peer(name: str) -> torch.nn.Module:
    """A tiny model with random weights; skips the test where the installed libraries do not have the class."""
    try:
        find_class(name)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    return build_model(name, **TINY[name]).eval()
