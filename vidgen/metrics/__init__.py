"""What a reconstruction, or a set of generated clips, is worth in numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detectors import PooledPixels, get_detector
    from .evaluation import bootstrap_interval, evaluate_pairs, evaluate_reconstruction
    from .frechet import FeatureStatistics, RankDeficientWarning, frechet_distance, real_vs_real
    from .reconstruction import ReconstructionMetrics, clip_metrics, lpips, mean_colour, psnr, shrunk, ssim

_HOMES = {
    "FeatureStatistics": "frechet",
    "PooledPixels": "detectors",
    "RankDeficientWarning": "frechet",
    "ReconstructionMetrics": "reconstruction",
    "bootstrap_interval": "evaluation",
    "clip_metrics": "reconstruction",
    "evaluate_pairs": "evaluation",
    "evaluate_reconstruction": "evaluation",
    "frechet_distance": "frechet",
    "get_detector": "detectors",
    "lpips": "reconstruction",
    "mean_colour": "reconstruction",
    "psnr": "reconstruction",
    "real_vs_real": "frechet",
    "shrunk": "reconstruction",
    "ssim": "reconstruction",
}

__all__ = [
    "FeatureStatistics",
    "PooledPixels",
    "RankDeficientWarning",
    "ReconstructionMetrics",
    "bootstrap_interval",
    "clip_metrics",
    "evaluate_pairs",
    "evaluate_reconstruction",
    "frechet_distance",
    "get_detector",
    "lpips",
    "mean_colour",
    "psnr",
    "real_vs_real",
    "shrunk",
    "ssim",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
