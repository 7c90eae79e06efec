"""Layer 2: video generation with the two-latent diffusion transformer, its schedulers and `VidTwinPipeline`.

from pipelines import VidTwinPipeline
frames = VidTwinPipeline.from_pretrained("runs/dit/final")(class_labels="Biking").frames
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .motion_classifier import MotionClassifier
    from .pipeline_output import VidTwinPipelineOutput
    from .pipeline_vidtwin import VidTwinPipeline
    from .schedulers import default_scheduler
    from .transformer_vidtwin import VidTwinTransformer3DModel

_EXPORTS = {
    "MotionClassifier": "motion_classifier",
    "VidTwinPipeline": "pipeline_vidtwin",
    "VidTwinPipelineOutput": "pipeline_output",
    "VidTwinTransformer3DModel": "transformer_vidtwin",
    "default_scheduler": "schedulers",
}

__all__ = [
    "MotionClassifier",
    "VidTwinPipeline",
    "VidTwinPipelineOutput",
    "VidTwinTransformer3DModel",
    "default_scheduler",
]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
