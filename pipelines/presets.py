"""Presets of the diffusion transformer: constructor arguments by name."""

from __future__ import annotations

import difflib
from typing import Any

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # For tests (seconds) and small trainings (minutes on two cores).
    "tiny-test": dict(num_layers=2, num_attention_heads=2, attention_head_dim=24),
    "tiny": dict(num_layers=6, num_attention_heads=3, attention_head_dim=64),
    # DiT (Peebles and Xie 2023, Table 1).
    "S": dict(num_layers=12, num_attention_heads=6, attention_head_dim=64),
    "B": dict(num_layers=12, num_attention_heads=12, attention_head_dim=64),
    "L": dict(num_layers=24, num_attention_heads=16, attention_head_dim=64),
    "XL": dict(num_layers=28, num_attention_heads=16, attention_head_dim=72),
    # VidTwin (arXiv 2412.17726): hidden size 1152, the class through cross-attention.
    "paper": dict(
        num_layers=18, num_attention_heads=16, attention_head_dim=72,
        class_conditioning="cross_attention", class_embed_dim=256,
    ),
}
# fmt: on


def preset_config(name: str) -> dict[str, Any]:
    """Return the constructor arguments of `VidTwinTransformer3DModel` for a size.

    Raises:
        ValueError: if the size is unknown; the message has the nearest one.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"Unknown DiT preset {name!r}; did you mean {nearest!r}? Known: {', '.join(PRESETS)}.")
    return dict(PRESETS[name])
