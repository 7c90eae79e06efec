"""vidgen: the VidTwin video autoencoder, a DiT on its two latents, and tools to train, evaluate and use them.

from vidgen import VidTwinPipeline
frames = VidTwinPipeline.from_pretrained("runs/dit/final")(class_labels="orbit").frames[0]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoencoder import AutoencoderKLVidTwin, TwinLatents
    from pipelines import VidTwinPipeline, VidTwinPipelineOutput, VidTwinTransformer3DModel

__all__ = [
    "AutoencoderKLVidTwin",
    "TwinLatents",
    "VidTwinPipeline",
    "VidTwinPipelineOutput",
    "VidTwinTransformer3DModel",
]
__version__ = "0.1.0"
_PACKAGES = {name: "pipelines" if name.startswith("VidTwin") else "autoencoder" for name in __all__}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:  # imported on first use, which keeps `import vidgen` light
        return getattr(importlib.import_module(_PACKAGES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
