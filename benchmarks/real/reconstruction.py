"""Reconstruction on held-out clips beside references without a network, with paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.common.progress import progress
from vidgen.losses.lpips import LPIPS
from vidgen.metrics.block_pca import BlockPCA
from vidgen.metrics.reconstruction import clip_metrics, downsample_baseline, mean_color_baseline
from vidgen.metrics.stats import mean_interval

from .clips import Clips, to_float

BATCH = 8
METHOD = "reconstruction"
METRICS = ("psnr", "ssim", "lpips_squeeze")
Codec = Callable[[torch.Tensor], torch.Tensor]
Scores = dict[str, list[float]]  # one value for each clip, by metric


def reconstruct_with(vae: VideoAutoencoder) -> Codec:
    """Reconstruction from the posterior's mean, clamped to [-1, 1], in float32 on the CPU."""
    return lambda video: vae(video.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1).cpu()


def fit_block_pca(clips: Clips, block: tuple[int, int, int], values: int, path: Path) -> BlockPCA:
    """Fit block PCA of a latent's number of values to clips, unless the file exists."""
    if not path.exists():
        batches = (to_float(pixels) for pixels in clips.pixels.split(BATCH))
        BlockPCA.fit(batches, block, count_components(tuple(clips.pixels.shape[1:]), block, values)).save(path)
    return BlockPCA.load(path)


def count_components(clip_shape: Sequence[int], block: tuple[int, int, int], values: int) -> int:
    """Principal components per block whose number of values in a clip is at most the given one; 1 at least."""
    return max(1, values // (math.prod(clip_shape[1:]) // math.prod(block)))


def reference_codecs(values: int, transforms: dict[str, BlockPCA]) -> dict[str, Codec]:
    """The references of a latent's number of values: downsampling, block PCA, and the per-clip mean color."""
    codecs: dict[str, Codec] = {"downsample": lambda video: downsample_baseline(video, values)}
    for name, pca in transforms.items():
        codecs[name] = lambda video, pca=pca: pca.reconstruct(video, pca.basis.shape[1])
    return codecs | {"mean_color": mean_color_baseline}


@torch.no_grad()
def score_codec(codec: Codec, clips: Clips, network: LPIPS) -> Scores:
    """PSNR, SSIM and LPIPS of every clip, of 8-bit pixels."""
    scores: Scores = {name: [] for name in METRICS}
    for pixels in progress(clips.pixels.split(BATCH), "reconstructing"):
        video = to_float(pixels)
        pair = [clip.to(network.shift.device) for clip in (codec(video), video)]
        measured = clip_metrics(*pair, [network])
        for name, values in scores.items():
            values += measured[name].double().tolist()
    return scores


def summarize(scores: dict[str, Scores], groups: Sequence[str], data: Sequence[str]) -> dict[str, Any]:
    """Means and paired differences by data set and together, with 95 % intervals over groups.

    Args:
        scores: of `METHOD` and of each reference, on the same clips.
        groups, data: of the clips.

    Returns:
        By data set (`all` for all): `clips`, `groups`; `figures`: by method and metric `mean`, `low` and `high`;
        `difference`: the same of `METHOD` minus each reference, clip by clip.
    """
    results = {}
    for name in dict.fromkeys(["all", *data]):
        kept = [i for i, other in enumerate(data) if name in ("all", other)]
        own_groups = [groups[i] for i in kept]
        columns = {
            method: {metric: [values[i] for i in kept] for metric, values in metrics.items()}
            for method, metrics in scores.items()
        }
        results[name] = {
            "clips": len(kept),
            "groups": len(set(own_groups)),
            "figures": {
                method: {metric: interval(values, own_groups) for metric, values in metrics.items()}
                for method, metrics in columns.items()
            },
            "difference": {
                method: {
                    metric: interval(paired(columns[METHOD][metric], values), own_groups)
                    for metric, values in metrics.items()
                }
                for method, metrics in columns.items()
                if method != METHOD
            },
        }
    return results


def paired(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences clip by clip."""
    return [value - other for value, other in zip(values, others, strict=True)]


def interval(values: Sequence[float], groups: Sequence[str]) -> dict[str, float | None]:
    """`mean` over clips, `low` and `high` of its 95 % interval from resampled groups; None of a single group."""
    low, high = mean_interval(values, groups)
    return {"mean": sum(values) / len(values), "low": low, "high": high}
