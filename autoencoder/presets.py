"""Presets of the autoencoder: the paper's sizes (Tables 4 and 8), the released checkpoint's, and tiny ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# fmt: off
SIZES: dict[str, dict[str, Any]] = {
    "small": dict(num_layers=12, num_attention_heads=8, hidden_size=512),
    "base": dict(num_layers=16, num_attention_heads=12, hidden_size=768),
    "large": dict(num_layers=16, num_attention_heads=12, hidden_size=1536),
    # The authors' published weights: base, with twice the structure channels.
    "released": dict(num_layers=16, num_attention_heads=12, hidden_size=768, structure_channels=8),
    # base with patches of two frames: half the tokens, and a latent of the paper's size.
    "fast": dict(
        num_layers=16, num_attention_heads=12, hidden_size=768, temporal_patch_size=2, dynamics_channels=16
    ),
    # For tests: seconds on two cores.
    "tiny-test": dict(
        sample_size=32, num_frames=4, patch_size=8, num_layers=2, num_attention_heads=4, hidden_size=32,
        num_queries=3, query_dim=16, qformer_layers=2, qformer_heads=4, qformer_ffn_dim=32, structure_width=16,
    ),
    # For the demo and small ablations: minutes of training on two cores.
    "tiny": dict(
        sample_size=64, num_frames=16, patch_size=8, num_layers=2, num_attention_heads=4, hidden_size=128,
        num_queries=4, query_dim=64, qformer_layers=2, qformer_heads=4, qformer_ffn_dim=256, qformer_dropout=0.0,
        structure_width=64, structure_channels=12, structure_downsamples=0,
        dynamics_channels=8, dynamics_downsamples=0, bottleneck="residual",
    ),
}

# Latent settings by their numbers in the paper's Table 8.
LATENT_SETTINGS: dict[int, dict[str, int]] = {
    1: dict(num_queries=16, structure_channels=4, dynamics_channels=8, dynamics_downsamples=1),
    2: dict(num_queries=16, structure_channels=4, dynamics_channels=16, dynamics_downsamples=2),
    3: dict(num_queries=12, structure_channels=4, dynamics_channels=8, dynamics_downsamples=1),
}

# The ablations of the paper's Table 3, as constructor arguments.
ABLATIONS: dict[str, dict[str, Any]] = {
    "single": dict(single_latent=True),
    "dynamics_qformer": dict(dynamics_pool="qformer"),
    "structure_conv": dict(structure_pool="conv"),
    "structure_hidden": dict(structure_fold="hidden"),
}
# fmt: on


def preset_config(name: str, latent_setting: int | None = None) -> dict[str, Any]:
    """Return the constructor arguments of `AutoencoderKLVidTwin` for a size and, optionally, a latent setting.

    Raises:
        ValueError: if either is unknown.
    """
    if name not in SIZES:
        raise ValueError(f"Unknown VidTwin preset {name!r}; known: {', '.join(SIZES)}.")
    if latent_setting is not None and latent_setting not in LATENT_SETTINGS:
        raise ValueError(f"Unknown latent setting {latent_setting!r}; the paper has 1, 2 and 3.")
    return {**SIZES[name], **LATENT_SETTINGS.get(latent_setting, {})}


def rename_old_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Translate constructor arguments of older versions: `heads="official"` is now `bottleneck="plain"`."""
    renamed = {name: value for name, value in arguments.items() if name != "heads"}
    if "heads" in arguments:
        renamed.setdefault("bottleneck", {"official": "plain"}.get(arguments["heads"], arguments["heads"]))
    return renamed
