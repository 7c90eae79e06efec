"""Scores of reconstructions: of autoencoders, of downsampling and of block PCA, on the same clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.common import environment
from vidgen.common.loading import load_vae
from vidgen.common.precision import place_model
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.metrics.block_pca import BlockPCA
from vidgen.metrics.detectors import Detector
from vidgen.metrics.evaluation import evaluate_codec, evaluate_reconstruction
from vidgen.metrics.flops import decode_flops, encode_flops
from vidgen.metrics.frechet import FeatureStatistics, choose_num_groups
from vidgen.metrics.fvd import measure_distance
from vidgen.metrics.reconstruction import downsample_baseline, psnr

from ..speed.timing import in_own_process, median_seconds, peak_gib
from .clips import FPS, NUM_FRAMES, SIDE

BLOCK = {"smoke": (4, 8, 8), "cpu": (16, 16, 16)}  # frames and pixels of a block of the PCA
PCA_CLIPS_PER_VIDEO = 2  # to fit it to
CURVE_POINTS = 5
TIMED_CLIPS = {"smoke": 1, "cpu": 8, "paper": 1}  # in one batch
Networks = dict[str, Any]  # LPIPS networks and detectors, as arguments of `evaluate_reconstruction`


def score_vae(vae: VideoAutoencoder, clips: ClipDataset, networks: Networks, dtype: str) -> dict[str, Any]:
    """Scores of an autoencoder on clips; see `summarize`."""
    vae = place_model(vae, PartialState().device, dtype)
    sizes = {"parameters": vae.num_parameters(), "flops": [encode_flops(vae), decode_flops(vae)]}
    return summarize(evaluate_reconstruction(vae, clips, **networks)) | sizes


def score_downsampling(values: int, clips: ClipDataset, networks: Networks) -> dict[str, Any]:
    """Scores of rate-matched downsampling on clips; see `summarize`."""
    device = PartialState().device
    figures = evaluate_codec(
        lambda video: downsample_baseline(video, values), lambda _: values, clips, device=device, **networks
    )
    return summarize(figures)


def score_block_pca(pca: BlockPCA, values: int, clips: ClipDataset, networks: Networks, scale: str) -> dict[str, Any]:
    """Scores of block PCA with about this number of values on clips; see `summarize`."""
    components = count_components(values, scale)
    figures = evaluate_codec(
        lambda video: pca.reconstruct(video, components),
        lambda clip: pca.count_values(clip.shape[1:], components),
        clips,
        device=PartialState().device,
        **networks,
    )
    return summarize(figures) | {"components": components}


def summarize(figures: dict[str, Any]) -> dict[str, Any]:
    """The part of the result of `evaluate_pairs` that is kept, of 8-bit pixels.

    Returns:
        `figures`: mean and interval of each metric; `downsample_psnr` of rate-matched downsampling; `rfvd` by
        detector; `num_clips`, `num_videos`, `latent_size` and `compression_rate`; `clips`: path, start and metrics of
        each clip.
    """
    metrics = figures["figures"]["reconstruction"]["uint8"]
    return {
        "figures": metrics,
        "downsample_psnr": figures["figures"]["downsample"]["uint8"]["psnr"],
        "rfvd": {name: {k: d[k] for k in ("value", "low", "high", "vectors")} for name, d in figures["rfvd"].items()},
        "num_clips": figures["num_clips"],
        "num_videos": figures["num_videos"],
        "latent_size": figures["num_values"],
        "compression_rate": figures["compression_rate"],
        "clips": [{"path": c["path"], "start": c["start"], **c["uint8"]} for c in figures["clips"]],
    }


def fit_block_pca(training_list: Path, values: int, path: Path, scale: str) -> BlockPCA:
    """Fit block PCA to the training clips, with components for latents of `values`, unless the file exists."""
    with PartialState().main_process_first():
        if not path.exists():
            shape = dict(num_frames=NUM_FRAMES[scale], fps=FPS[scale], resolution=SIDE[scale], train=False)
            clips = ClipDataset(training_list, clips_per_video=PCA_CLIPS_PER_VIDEO, **shape)
            components = count_components(values, scale)
            BlockPCA.fit(read_videos(clips), BLOCK[scale], components).save(path)
    return BlockPCA.load(path)


def count_components(values: int, scale: str) -> int:
    """Principal components per block whose number of values in a clip is the given one, or the next lower."""
    blocks = NUM_FRAMES[scale] * SIDE[scale] ** 2 // math.prod(BLOCK[scale])
    return max(1, values // blocks)


def read_videos(clips: ClipDataset, batch_size: int = 8) -> Iterator[torch.Tensor]:
    """Batches (B, 3, T, H, W) of all clips."""
    loader = DataLoader(clips, batch_size=batch_size, collate_fn=collate_clips, generator=torch.Generator())
    return (batch["video"] for batch in loader)


@torch.no_grad()
def real_vs_real(clips: ClipDataset, detectors: list[Detector]) -> dict[str, dict[str, Any]]:
    """Distance between two halves of the scored clips, by detector: the noise level of rFVD between sets."""
    result = {}
    numbers = {str(file.path): number for number, file in enumerate(clips.files)}
    loader = DataLoader(clips, batch_size=8, collate_fn=collate_clips, generator=torch.Generator())
    statistics = {d.name: FeatureStatistics(d.dim, choose_num_groups(d.dim)) for d in detectors}
    for batch in loader:
        videos = [numbers[path] for path in batch["path"]]
        for detector in detectors:
            features = detector(batch["video"].to(PartialState().device)).float().cpu()
            statistics[detector.name].update(features, videos)
    for name, feature_statistics in statistics.items():
        even, odd = feature_statistics.halves()
        distance = measure_distance(even, odd, even.count, odd.count)
        low, high = (distance and distance.interval) or (None, None)
        result[name] = {"value": distance and distance.value, "low": low, "high": high, "vectors": even.count}
    return result


def measure_cost(folder: str, frames: int, side: int, scale: str) -> dict[str, Any]:
    """Measure an autoencoder in float32, in a separate process.

    Returns:
        `encode_seconds` and `decode_seconds` of a clip, `memory_mib`: the peak for `timed_clips` at once; `frames` of
        a clip, and the `device`.
    """
    return in_own_process(_measure_cost, scale, folder, frames, side)


@torch.no_grad()
def _measure_cost(scale: str, folder: str, frames: int, side: int) -> dict[str, Any]:
    device = PartialState().device
    vae = place_model(load_vae(folder, frames, side, side), device, "float32")
    count = TIMED_CLIPS[scale]
    clips = torch.rand(count, *vae.clip_shape, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
    before = peak_gib(device)
    latents = vae.encode(clips).latent_dist.mode()
    seconds = {
        "encode_seconds": median_seconds(lambda: vae.encode(clips), device, repeats=3) / count,
        "decode_seconds": median_seconds(lambda: vae.decode(latents), device, repeats=3) / count,
    }
    memory = {"memory_mib": 1024 * (peak_gib(device) - before), "timed_clips": count}
    return {**seconds, **memory, "frames": vae.clip_shape[1], "device": environment.device()}


def score_curves(pca: BlockPCA, values: int, clips: ClipDataset, scale: str) -> dict[str, list[list[float]]]:
    """Mean PSNR in dB of the two references over the rate in %: up to a latent of `values`, each half the next.

    Returns:
        By reference, pairs of rate and PSNR, from the lowest rate.
    """
    device, size = PartialState().device, 3 * NUM_FRAMES[scale] * SIDE[scale] ** 2
    curves: dict[str, list[list[float]]] = {"downsample": [], "block_pca": []}
    for halvings in reversed(range(CURVE_POINTS)):
        count = max(values // 2**halvings, 1)
        components = count_components(count, scale)
        totals = dict.fromkeys(curves, 0.0)
        for video in read_videos(clips):
            video = video.to(device)
            totals["downsample"] += psnr(downsample_baseline(video, count), video).sum().item()
            totals["block_pca"] += psnr(pca.reconstruct(video, components), video).sum().item()
        for name, total in totals.items():
            curves[name].append([100 * count / size, total / len(clips)])
    return curves
