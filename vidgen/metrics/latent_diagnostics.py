"""Diagnostics of an autoencoder's latent: which one will be hard to diffuse, before a DiT is trained.

A DiT learns a latent well whose channels all carry information, with about the same deviation and without heavy
tails, whose power falls with frequency as that of images does (Skorokhodov et al. 2025, arXiv 2502.14831), which
follows a shift and a scaling of the clip (Kouzelis et al. 2025, arXiv 2502.09509), which has few nats, and between
whose values the decoder changes evenly. All of it is measured here on the means of the posteriors of real clips, and
beside it, where it has a meaning, on the same clips averaged over the pixels of each latent position.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from autoencoder.adapters import DETERMINISTIC_LOGVAR
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines.finite import non_finite_message

from ..common.errors import UserError
from ..common.progress import progress
from ..data.dataset import ClipDataset, collate_clips
from ..data.listing import list_videos
from ..data.types import VideoFile
from .latent_grids import AXES, Distance, LatentGrid, list_grids, power_spectrum
from .stats import mean_interval

if TYPE_CHECKING:
    from ..losses.lpips import LPIPS

MIN_CLIPS = 2
DEAD_STD = 0.01  # a channel whose deviation is below this fraction of its stream's is dead
DEAD_NATS = 0.01  # ... or that has fewer nats per value
HISTOGRAM_LIMIT, HISTOGRAM_BINS = 6.0, 60  # in deviations
MAX_PAIRS = 8
STEPS = 8  # of an interpolation


@dataclass(frozen=True)
class LatentDiagnostics:
    """Diagnostics of a latent.

    Attributes:
        record: all figures in JSON types: `streams`, `grids`, `interpolation`, `num_clips`, `clip_shape`,
            `latent_size`, `compression_rate` and `skipped`. See `docs/evaluation.md`.
        interpolations: decoded interpolations from one clip (first) to another (last), (P, K + 1, 3, T, H, W) in
            [-1, 1].
    """

    record: dict[str, Any]
    interpolations: torch.Tensor


@torch.no_grad()
def diagnose_latents(
    vae: VideoAutoencoder,
    root: str | os.PathLike,
    *,
    num_clips: int = 64,
    fps: float = 8.0,
    batch_size: int = 4,
    num_workers: int = 0,
    lpips: LPIPS | None = None,
    report: Callable[[str], object] | None = None,
) -> LatentDiagnostics:
    """Measure the latent of an autoencoder on real clips; deterministic.

    Args:
        vae: in evaluation mode, on the device of the computation, set to the size of the clips.
        root: as `list_videos` takes it. One clip is cut from the middle of each video.
        num_clips: at most this number of videos, evenly spaced in the list.
        fps: frame rate of the clips.
        batch_size: clips that are encoded at a time.
        num_workers: reading processes.
        lpips: for perceptual lengths, on the same device.
        report: called with a summary of the data.

    Raises:
        UserError: if an argument is invalid, fewer than 2 clips can be read, or latents are not finite.
    """
    for name, value, minimum in (("num_clips", num_clips, MIN_CLIPS), ("batch_size", batch_size, 1)):
        if value < minimum:
            raise UserError(f"{name} must be {minimum} or more, not {value}.")
    if fps <= 0:
        raise UserError(f"fps must be positive, not {fps:g}.")
    grids = list_grids(vae)
    files, _ = list_videos(root, report)
    places = np.linspace(0, len(files) - 1, min(num_clips, len(files))).round().astype(int)
    chosen = [files[place] for place in places]
    if lpips is not None:
        lpips.check_size(*vae.clip_shape[2:])

    # Encode every clip, and its shifted and enlarged versions.
    means, logvars, pixels, skipped = [], [], defaultdict(list), []
    distances: dict[tuple[str, ...], Distance] = defaultdict(Distance)
    for clips in _read_batches(vae, chosen, fps, _margins(grids, "height", "width"), batch_size, num_workers, skipped):
        base = _cut(clips, vae)
        posterior = vae.encode(base.to(vae.device, vae.dtype)).latent_dist
        means.append(_check_finite(posterior.mean.float().cpu(), vae))
        logvars.append(posterior.logvar.float().cpu())
        for grid in grids:
            pixels[grid.name].append(grid.average(base))
        _compare_shifts(vae, grids, clips, means[-1], ("height", "width"), distances)
        _compare_scales(vae, grids, base, means[-1], distances)
    if sum(map(len, means)) < MIN_CLIPS:
        reason = f" ({': '.join(skipped[0])})" if skipped else ""
        raise UserError(f"latents are measured on {MIN_CLIPS} clips or more, but {root} has fewer{reason}.")
    mean, logvar = torch.cat(means), torch.cat(logvars)

    # Encode the clips of longer videos shifted in time.
    if any("time" in grid.axes for grid in grids):
        for clips in _read_batches(vae, chosen, fps, _margins(grids, "time"), batch_size, num_workers):
            _compare_shifts(vae, grids, clips, _encode(vae, _cut(clips, vae)), ("time",), distances)

    # Measure the streams, then their grids, and interpolate.
    streams = _measure_streams(vae, mean, logvar)
    grid_records = {}
    for grid in grids:
        pooled = torch.cat(pixels[grid.name])
        grid_records[grid.name] = _measure_grid(vae, grid, mean, pooled, streams[grid.stream], distances)
    interpolation, interpolations = _measure_interpolation(vae, mean, batch_size, lpips)
    record = {
        "class": type(vae.backbone).__name__,
        "num_clips": len(mean),
        "clip_shape": list(vae.clip_shape),
        "fps": fps,
        "latent_size": vae.latent_size,
        "compression_rate": vae.compression_rate,
        "normalizes_channels": vae.normalizes_channels,
        "streams": streams,
        "grids": grid_records,
        "interpolation": interpolation,
        "skipped": skipped,
    }
    return LatentDiagnostics(record, interpolations)


# --- clips -----------------------------------------------------------------------------------------------------------


def _margins(grids: Sequence[LatentGrid], *axes: str) -> tuple[int, ...]:
    """For each of `AXES` the frames or pixels beyond a clip that shifts along `axes` by one position need."""
    strides = ([grid.stride(axis) or 1 for grid in grids if axis in grid.axes and axis in axes] for axis in AXES)
    return tuple(max(of_axis, default=0) for of_axis in strides)


def _read_batches(
    vae: VideoAutoencoder,
    files: Sequence[VideoFile],
    fps: float,
    margins: tuple[int, ...],
    batch_size: int,
    num_workers: int,
    skipped: list[tuple[str, str]] | None = None,
) -> Iterator[torch.Tensor]:
    """Batches of clips of the model's size plus margins, without the videos that are unreadable or too short.

    With `skipped`, (path, reason) of these are added to it, and a `UserError` is raised if none is left.
    """
    frames, *sides = (size + margin for size, margin in zip(vae.clip_shape[1:], margins, strict=True))
    try:
        dataset = ClipDataset(files, frames, fps, sides, train=False)
    except UserError:
        if skipped is None:
            return
        raise
    loader = DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=collate_clips, generator=torch.Generator()
    )
    for batch in progress(loader, "encoding" if skipped is not None else "encoding clips shifted in time"):
        if skipped is not None:
            skipped += [entry for entry in batch["skipped"] if entry not in skipped]
        if batch["own"].any():
            yield batch["video"][batch["own"]]


def _cut(clips: torch.Tensor, vae: VideoAutoencoder, **shift: int) -> torch.Tensor:
    """The part of clips with a margin that has the model's size, `shift` frames or pixels from the beginning."""
    starts = [shift.get(axis, 0) for axis in AXES]
    t, y, x = (slice(start, start + size) for start, size in zip(starts, vae.clip_shape[1:], strict=True))
    return clips[:, :, t, y, x]


def _encode(vae: VideoAutoencoder, clips: torch.Tensor) -> torch.Tensor:
    """Means of the latents, (B, L), float32 on the CPU."""
    return _check_finite(vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mean.float().cpu(), vae)


def _check_finite(latents: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    if not latents.isfinite().all():
        raise UserError(f"{non_finite_message('the autoencoder', vae)} (--dtype)")
    return latents


# --- shifts and scales of the input ----------------------------------------------------------------------------------


def _compare_shifts(
    vae: VideoAutoencoder,
    grids: Sequence[LatentGrid],
    clips: torch.Tensor,
    means: torch.Tensor,
    axes: Sequence[str],
    distances: dict[tuple[str, ...], Distance],
) -> None:
    """Add the distances of latents of clips that are shifted by one position, and by one pixel or frame.

    Shifted clips show what lies beyond the border, so that position k of the shifted clip is position k + 1 of the
    clip. `(grid, axis, "moved")` compares these, `(grid, axis, "unmoved")` equal positions, and `(grid, axis, "one")`
    equal positions of clips one pixel or frame apart, with "pixels" last for averages of pixels.
    """
    base, original = _cut(clips, vae), vae.unpack(means)
    for axis in axes:
        strides = {grid.stride(axis) for grid in grids if axis in grid.axes} - {None}
        for shift in sorted({1, *strides}):
            moved_clips = _cut(clips, vae, **{axis: shift})
            moved = vae.unpack(_encode(vae, moved_clips))
            for grid in grids:
                if axis not in grid.axes:
                    continue
                a, b, dim = grid.select(original), grid.select(moved), 2 + grid.axes.index(axis)
                if shift == 1:
                    distances[grid.name, axis, "one"].add(a, b)
                    distances[grid.name, axis, "one", "pixels"].add(grid.average(base), grid.average(moved_clips))
                if shift == grid.stride(axis):
                    distances[grid.name, axis, "unmoved"].add(a, b)
                    first = int(grid.is_causal and axis == "time")  # the latent of a single frame
                    count = grid.size(axis) - 1 - first
                    if count > 0:
                        distances[grid.name, axis, "moved"].add(
                            a.narrow(dim, first + 1, count), b.narrow(dim, first, count)
                        )


def _compare_scales(
    vae: VideoAutoencoder,
    grids: Sequence[LatentGrid],
    base: torch.Tensor,
    means: torch.Tensor,
    distances: dict[tuple[str, ...], Distance],
) -> None:
    """Add the distances of the latents of clips whose upper left quarter is enlarged to the whole frame.

    Averaged over 2 x 2 positions, the latent of the quarter should be the quarter of the latent: `(grid, "scale")`.
    """
    _, _, frames, height, width = base.shape
    halved = [grid for grid in grids if {"height", "width"} <= set(grid.axes)]
    halved = [grid for grid in halved if grid.size("height") % 2 == 0 and grid.size("width") % 2 == 0]
    if not halved or height % 2 or width % 2:
        return
    quarter = base[..., : height // 2, : width // 2].transpose(1, 2).flatten(0, 1)
    enlarged = F.interpolate(quarter, size=(height, width), mode="bicubic", align_corners=False).clamp(-1, 1)
    latents = vae.unpack(_encode(vae, enlarged.unflatten(0, (-1, frames)).transpose(1, 2)))
    original = vae.unpack(means)
    for grid in halved:
        pooled = F.avg_pool2d(grid.select(latents).flatten(0, 2), 2)
        a = grid.select(original)[..., : grid.size("height") // 2, : grid.size("width") // 2]
        distances[grid.name, "scale"].add(a, pooled.view(a.shape))


# --- streams and grids -----------------------------------------------------------------------------------------------


def _measure_streams(vae: VideoAutoencoder, mean: torch.Tensor, logvar: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Moments, dead channels, rate and histogram of each stream, and of its channels."""
    means, logvars = vae.unpack(mean), vae.unpack(logvar)
    is_deterministic = bool((logvar <= DETERMINISTIC_LOGVAR).all())
    streams = {}
    for name in ("structure", "dynamics") if vae.has_dynamics else ("structure",):
        shape = getattr(vae, f"{name}_shape")
        values = getattr(means, name).transpose(0, 1).flatten(1).double()  # (C, N)
        logs = None if is_deterministic else getattr(logvars, name).transpose(0, 1).flatten(1).double()
        channels = [_measure_channel(v, None if logs is None else logs[c]) for c, v in enumerate(values)]
        typical = math.sqrt(np.mean([channel["std"] ** 2 for channel in channels]))
        for channel in channels:
            has_nats = channel["nats"] is None or channel["nats"] >= DEAD_NATS
            channel["dead"] = not (has_nats and channel["std"] > DEAD_STD * typical)
        size = math.prod(shape)
        streams[name] = {
            "shape": list(shape),
            **_moments(values.flatten()),
            "dead_channels": [c for c, channel in enumerate(channels) if channel["dead"]],
            "nats_per_value": None if logs is None else float(np.mean([channel["nats"] for channel in channels])),
            "nats_per_clip": None if logs is None else float(np.mean([c["nats"] for c in channels]) * size),
            "kl_per_value": None if logs is None else _kl(values, logs),
            "channels": channels,
            "histogram": _histogram(values, channels),
        }
    return streams


def _measure_channel(values: torch.Tensor, logvar: torch.Tensor | None) -> dict[str, Any]:
    """Moments of a channel, and its rate in nats per value.

    The rate is the mean KL divergence of the posteriors to the Gaussian with the channel's mean and variance, which
    does not depend on the channel's scale: (log(variance) - mean of log-variances) / 2.
    """
    moments = _moments(values)
    nats = None
    if logvar is not None:
        nats = 0.5 * (math.log(moments["std"] ** 2 + logvar.exp().mean().item()) - logvar.mean().item())
    return {**moments, "nats": nats}


def _moments(values: torch.Tensor) -> dict[str, float]:
    """Mean, standard deviation and excess kurtosis (0 for a Gaussian); 0 without deviation."""
    mean = values.mean()
    squares = (values - mean).square()
    variance = squares.mean()
    kurtosis = (squares.square().mean() / variance.square() - 3).item() if variance > 0 else 0.0
    return {"mean": mean.item(), "std": variance.sqrt().item(), "kurtosis": kurtosis}


def _kl(mean: torch.Tensor, logvar: torch.Tensor) -> float:
    """KL divergence to the standard normal in nats per value, which the KL loss of a VAE measures."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean().item()


def _histogram(values: torch.Tensor, channels: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Density of the values of live channels in deviations of their channel: bin centers and densities."""
    live = [c for c, channel in enumerate(channels) if not channel["dead"]]
    edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1)
    scaled = [((values[c] - channels[c]["mean"]) / channels[c]["std"]).numpy() for c in live]
    counts = sum((np.histogram(v, edges)[0] for v in scaled), np.zeros(HISTOGRAM_BINS))
    total = max(sum(map(len, scaled)), 1)
    return {
        "deviations": ((edges[:-1] + edges[1:]) / 2).round(6).tolist(),
        "density": (counts / total / (edges[1] - edges[0])).tolist(),
    }


def _measure_grid(
    vae: VideoAutoencoder,
    grid: LatentGrid,
    mean: torch.Tensor,
    pixels: torch.Tensor,
    stream: dict[str, Any],
    distances: dict[tuple[str, ...], Distance],
) -> dict[str, Any]:
    """Spectra, and responses to shifts and scales, of a grid and of the clips averaged to it.

    Dead channels do not count, except where all are dead.
    """
    values = grid.select(vae.unpack(mean))
    live = torch.tensor([not channel["dead"] for channel in stream["channels"]])
    live = live if live.any() else ~live
    all_colors = torch.ones(pixels.shape[1], dtype=torch.bool)
    spectrum, shift = {}, {}
    for axis in (axis for axis in grid.axes if axis in AXES):
        if grid.size(axis) > 1:
            spectrum[axis] = _measure_spectrum(grid, axis, _standardize(values[:, live]), _standardize(pixels))
        one = distances[grid.name, axis, "one"].compute(live)
        if one is not None:
            shift[axis] = {
                "stride": grid.stride(axis),
                "moved": distances[grid.name, axis, "moved"].compute(live),
                "unmoved": distances[grid.name, axis, "unmoved"].compute(live),
                "one": one,
                "one_pixels": distances[grid.name, axis, "one", "pixels"].compute(all_colors),
            }
    return {
        "stream": grid.stream,
        "axes": list(grid.axes),
        "shape": list(grid.shape),
        "spectrum": spectrum,
        "shift": shift,
        "scale": distances[grid.name, "scale"].compute(live),
    }


def _standardize(values: torch.Tensor) -> torch.Tensor:
    """Subtract the mean of each position of (B, C, ...), and divide each channel by its deviation."""
    values = values.double() - values.double().mean(dim=0)
    return values / values.square().mean(dim=[0, *range(2, values.ndim)], keepdim=True).sqrt().clamp(min=1e-30)


def _measure_spectrum(grid: LatentGrid, axis: str, latent: torch.Tensor, pixels: torch.Tensor) -> dict[str, Any]:
    """Mean power of live channels at each frequency, and the share of the upper half of the frequencies.

    A pattern that all clips share has no power, because a model learns it as a bias.
    """
    dim, size = 2 + grid.axes.index(axis), grid.size(axis)
    by_channel, of_pixels = (power_spectrum(x, dim) for x in (latent, pixels))
    shares = by_channel[:, size // 2 :].sum(dim=1) / by_channel.sum(dim=1)
    power, pixel_power = by_channel.mean(dim=0), of_pixels.mean(dim=0)
    return {
        "frequency": [k / (2 * size) for k in range(size)],  # cycles per position
        "power": power.tolist(),
        "pixel_power": pixel_power.tolist(),
        "high": (power[size // 2 :].sum() / power.sum()).item(),
        "pixel_high": (pixel_power[size // 2 :].sum() / pixel_power.sum()).item(),
        "high_by_channel": shares.tolist(),  # of the live channels, in their order
    }


# --- interpolation ---------------------------------------------------------------------------------------------------


def _measure_interpolation(
    vae: VideoAutoencoder, mean: torch.Tensor, batch_size: int, lpips: LPIPS | None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Lengths of the paths of decoded clips between the latents of two clips, in steps of equal size.

    Lengths are relative to the straight line between the ends, in pixels (root mean square) and in the features of
    LPIPS (its square root, which is a distance): 1 for a cross-fade in pixels, more for a path that leaves the line.
    """
    half = len(mean) // 2
    weights = torch.linspace(0, 1, STEPS + 1)[:, None]
    lengths = defaultdict(list)
    kept = []
    for first in progress(range(min(half, MAX_PAIRS)), "interpolating"):
        latents = (1 - weights) * mean[first] + weights * mean[first + half]
        parts = [vae.decode(part.to(vae.device, vae.dtype)).sample for part in latents.split(batch_size)]
        decoded = torch.cat([part.float() for part in parts]).clamp(-1, 1)
        if not decoded.isfinite().all():
            raise UserError(f"{non_finite_message('the autoencoder', vae)} (--dtype)")
        steps, straight = _path(decoded, lambda a, b: (a - b).square().mean().sqrt())
        if straight == 0:
            continue  # two equal clips
        lengths["pixel_length"].append(sum(steps) / straight)
        lengths["largest_step"].append(max(steps) / sum(steps) * STEPS)
        if lpips is not None:
            fade = torch.lerp(decoded[:1], decoded[-1:], weights.to(decoded).view(-1, 1, 1, 1, 1))
            for name, path in (("perceptual_length", decoded), ("crossfade_perceptual_length", fade)):
                steps, straight = _path(path, lambda a, b: _perceptual_distance(lpips, a, b))
                lengths[name].append(sum(steps) / straight if straight else 1.0)
        kept.append(decoded.cpu())
    record: dict[str, Any] = {"pairs": len(kept), "steps": STEPS, "backbone": lpips and lpips.backbone}
    for name in ("pixel_length", "largest_step", "perceptual_length", "crossfade_perceptual_length"):
        if values := lengths[name]:
            low, high = mean_interval(values)
            record[name] = {"mean": float(np.mean(values)), "low": low, "high": high}
    shape = (0, STEPS + 1, *vae.clip_shape)
    return record, torch.stack(kept) if kept else torch.zeros(shape)


def _path(
    clips: torch.Tensor, distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[list[float], float]:
    """The distances of successive clips (K + 1, 3, T, H, W), and that of the last from the first."""
    steps = [float(distance(a, b)) for a, b in zip(clips[:-1], clips[1:], strict=True)]
    return steps, float(distance(clips[0], clips[-1]))


def _perceptual_distance(lpips: LPIPS, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root of the mean LPIPS over frames of two clips (3, T, H, W)."""
    return lpips(a.transpose(0, 1), b.transpose(0, 1)).clamp(min=0).mean().sqrt()
