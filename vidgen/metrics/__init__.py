"""What a reconstruction, or a set of generated clips, is worth in numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detectors import Detector, PooledPixels, get_detector
    from .evaluation import evaluate_pairs, evaluate_reconstruction
    from .frechet import (
        ClassScore,
        FeatureStatistics,
        GroupedStatistics,
        RankDeficientWarning,
        bootstrap_interval,
        frechet_distance,
        frechet_infinity,
    )
    from .fvd import FVDResult, Sampling, evaluate_pipeline
    from .protocols import PROTOCOLS, Protocol, detector_input, get_protocol, protocol_clips
    from .reconstruction import ReconstructionMetrics, clip_metrics, lpips, mean_colour, psnr, shrunk, ssim

_HOMES = {
    "ClassScore": "frechet",
    "Detector": "detectors",
    "FVDResult": "fvd",
    "FeatureStatistics": "frechet",
    "GroupedStatistics": "frechet",
    "PROTOCOLS": "protocols",
    "PooledPixels": "detectors",
    "Protocol": "protocols",
    "RankDeficientWarning": "frechet",
    "ReconstructionMetrics": "reconstruction",
    "Sampling": "fvd",
    "bootstrap_interval": "frechet",
    "clip_metrics": "reconstruction",
    "detector_input": "protocols",
    "evaluate_pairs": "evaluation",
    "evaluate_pipeline": "fvd",
    "evaluate_reconstruction": "evaluation",
    "frechet_distance": "frechet",
    "frechet_infinity": "frechet",
    "get_detector": "detectors",
    "get_protocol": "protocols",
    "lpips": "reconstruction",
    "mean_colour": "reconstruction",
    "protocol_clips": "protocols",
    "psnr": "reconstruction",
    "shrunk": "reconstruction",
    "ssim": "reconstruction",
}

__all__ = [
    "PROTOCOLS",
    "ClassScore",
    "Detector",
    "FVDResult",
    "FeatureStatistics",
    "GroupedStatistics",
    "PooledPixels",
    "Protocol",
    "RankDeficientWarning",
    "ReconstructionMetrics",
    "Sampling",
    "bootstrap_interval",
    "clip_metrics",
    "detector_input",
    "evaluate_pairs",
    "evaluate_pipeline",
    "evaluate_reconstruction",
    "frechet_distance",
    "frechet_infinity",
    "get_detector",
    "get_protocol",
    "lpips",
    "mean_colour",
    "protocol_clips",
    "psnr",
    "shrunk",
    "ssim",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
