"""The compared autoencoders: small configurations of five classes with matched parameters and latent values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.training.config import ModelConfig
from vidgen.training.vae_trainer import build_vae

VIDTWIN = "vidtwin"
VALUES = {"smoke": {"low": 24}, "cpu": {"low": 1280, "high": 3840}}  # of a latent, by rate
SEEDS = {"smoke": {"low": 1}, "cpu": {"low": 2, "high": 1}}


@dataclass(frozen=True, eq=False)
class Method:
    """An autoencoder of the comparison.

    Args:
        label: in tables.
        frames: number of frames of its clips; for classes of 4k + 1 frames one more than is scored.
        overrides: constructor arguments at every rate.
        rates: constructor arguments that set the size of the latent, by rate.
        class_name: class of the model.
        patches: patch sizes of the DiT on its latents.
        optimizer: name of the optimizer.
        learning_rates: the peak learning rates to choose from.
    """

    label: str
    frames: int
    overrides: dict[str, Any]
    rates: dict[str, dict[str, Any]]
    class_name: str = "AutoencoderKLVidTwin"
    patches: dict[str, Sequence[int]] = field(default_factory=dict)
    optimizer: str = "adamw"
    learning_rates: tuple[float, ...] = (7e-4, 2e-3, 5e-3)

    def arguments(self, rate: str) -> dict[str, Any]:
        """Constructor arguments at a rate."""
        return self.overrides | self.rates[rate]

    def build(self, rate: str, preset: str, side: int) -> VideoAutoencoder:
        """Create the untrained model for square clips of this side."""
        config = ModelConfig(preset=preset, class_name=self.class_name, overrides=self.arguments(rate))
        return build_vae(config, self.frames, side, side)


def ltx(channels: Sequence[int], patch_size: int) -> dict[str, Any]:
    """Arguments of `AutoencoderKLLTXVideo`; each block but the last halves frames, rows and columns."""
    blocks = len(channels)
    scaling = [True] * (blocks - 1) + [False]
    return {
        "block_out_channels": channels,
        "decoder_block_out_channels": channels,
        "down_block_types": ["LTXVideoDownBlock3D"] * blocks,
        "layers_per_block": [1] * (blocks + 1),
        "decoder_layers_per_block": [1] * (blocks + 1),
        "spatio_temporal_scaling": scaling,
        "decoder_spatio_temporal_scaling": scaling,
        "decoder_inject_noise": [False] * (blocks + 1),
        "downsample_type": ["conv"] * blocks,
        "upsample_residual": [False] * blocks,
        "upsample_factor": [1] * blocks,
        "patch_size": patch_size,
    }


def wan(base_dim: int, patch_size: int) -> dict[str, Any]:
    """Arguments of `AutoencoderKLWan`: 4 frames and 4 * patch_size pixels per position, patchified as in Wan 2.2."""
    return {
        "base_dim": base_dim,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "patch_size": patch_size,
        "in_channels": 3 * patch_size**2,
        "out_channels": 3 * patch_size**2,
    }


def magvit(channels: Sequence[int]) -> dict[str, Any]:
    """Arguments of `AutoencoderKLMagvit`; the first block halves only rows and columns."""
    more = len(channels) - 1
    return {
        "block_out_channels": channels,
        "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * more],
        "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * more],
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }


TWIN = {"num_layers": 3, "dynamics_downsamples": 1}
# One token for all queries of a location and one for all positions of a frame's axis: 64 + 16 tokens.
TWIN_PATCHES = {"structure_patch_size": (4, 1, 1), "dynamics_patch_size": (1, 8)}
TWIN_RATES = {
    "low": {"structure_channels": 3, "dynamics_channels": 4},
    "high": {"structure_channels": 12, "dynamics_channels": 6},
}
# As in `benchmarks.ablations`: on half the grid, with the number of values of the two latents.
SINGLE_RATES = {
    "low": {"structure_channels": 12, "dynamics_channels": 4},
    "high": {"structure_channels": 36, "dynamics_channels": 12},
}
# The preset `fast`: patches of two frames, with twice the channels of the dynamics latent.
FAST = {"hidden_size": 160, "temporal_patch_size": 2, **TWIN}
FAST_RATES = {
    "low": {"structure_channels": 3, "dynamics_channels": 8},
    "high": {"structure_channels": 12, "dynamics_channels": 12},
}
# As configs/vae/real.yaml: a linear path around the network, and most of the values in the structure latent.
LINEAR = {"hidden_size": 144, **TWIN, "structure_downsamples": 1, "linear_path": 6}
LINEAR_RATES = {
    "low": {"structure_channels": 18, "dynamics_channels": 1, "linear_path_experts": 2},
    "high": {"structure_channels": 54, "dynamics_channels": 3},
}
LINEAR_PATCHES = {"structure_patch_size": (2, 1, 1), "dynamics_patch_size": (1, 8)}
EMU_PATCHES = {"structure_patch_size": (1, 2, 2)}  # as the transformers of Wan and CogVideoX

METHODS: dict[str, dict[str, Method]] = {
    "smoke": {
        VIDTWIN: Method(
            "VidTwin",
            4,
            {"bottleneck": "residual"},
            {"low": {"structure_channels": 1, "dynamics_channels": 1}},
            patches={"structure_patch_size": (3, 1, 1), "dynamics_patch_size": (1, 4)},
            learning_rates=(2e-3,),
        ),
        "ltx": Method(
            "LTX",
            5,
            ltx([8, 8, 8], patch_size=2),
            {"low": {"latent_channels": 1}},
            "AutoencoderKLLTXVideo",
            learning_rates=(2e-3,),
        ),
    },
    "cpu": {
        VIDTWIN: Method("VidTwin", 16, {"hidden_size": 160, **TWIN}, TWIN_RATES, patches=TWIN_PATCHES),
        "single": Method(
            "single latent (ablation)",
            16,
            {"hidden_size": 144, **TWIN, "structure_downsamples": 1, "single_latent": True},
            SINGLE_RATES,
            patches={"structure_patch_size": (4, 1, 1)},
        ),
        "ltx": Method(
            "LTX",
            17,
            ltx([24, 48, 56, 56], patch_size=2),
            {"low": {"latent_channels": 27}, "high": {"latent_channels": 80}},
            "AutoencoderKLLTXVideo",
            learning_rates=(7e-5, 2e-4, 7e-4, 2e-3),
        ),
        "wan": Method(
            "Wan (EMU-3, CV-VAE)",
            17,
            wan(20, patch_size=2),
            {"low": {"z_dim": 4}, "high": {"z_dim": 12}},
            "AutoencoderKLWan",
            EMU_PATCHES,
        ),
        "magvit": Method(
            "Magvit",
            17,
            magvit([16, 32, 64, 72]),
            {"low": {"latent_channels": 4}, "high": {"latent_channels": 12}},
            "AutoencoderKLMagvit",
            EMU_PATCHES,
        ),
        "vidtwin_muon": Method(
            "VidTwin with Muon",
            16,
            {"hidden_size": 160, **TWIN},
            TWIN_RATES,
            patches=TWIN_PATCHES,
            optimizer="muon",
            learning_rates=(2e-3, 5e-3, 1e-2),
        ),
        "vidtwin_fast": Method("VidTwin, patches of two frames", 16, FAST, FAST_RATES, patches=TWIN_PATCHES),
        "vidtwin_linear": Method(
            "VidTwin with Muon and a linear path",
            16,
            LINEAR,
            LINEAR_RATES,
            patches=LINEAR_PATCHES,
            optimizer="muon",
            learning_rates=(2e-3, 5e-3, 1e-2),
        ),
    },
}
PRESET = {"smoke": "tiny-test", "cpu": "tiny"}  # of VidTwin, under the overrides
