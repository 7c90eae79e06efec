"""Reconstruction metrics: PSNR, SSIM and LPIPS, and the two baselines mean color and rate-matched downsampling.

Values are compared as the pixels of a file (clamped, rounded to 0..255), unless `quantize=False`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..common.errors import UserError
from ..common.images import to_uint8

if TYPE_CHECKING:
    from ..losses.lpips import LPIPS

PIXEL_RANGE = 255.0
MAX_PSNR = 100.0  # dB; the value of identical clips, so that a mean over clips stays finite


def psnr(
    reconstruction: torch.Tensor, target: torch.Tensor, *, per: str = "clip", quantize: bool = True
) -> torch.Tensor:
    """Return the PSNR in dB of each clip, 10 log10(255^2 / MSE): (B,) in float64, at most `MAX_PSNR`.

    Args:
        reconstruction, target: clips (B, C, T, H, W) in [-1, 1]; values outside are clamped.
        per: "clip" takes one MSE over the whole clip, "frame" the mean over frames of each frame's PSNR, which is
            never lower. Papers report both under the same name.
        quantize: round both to uint8 first.

    Raises:
        UserError: if a value is not finite.
        ValueError: if the shapes differ or are not clips, or `per` is unknown.
    """
    if per not in ("clip", "frame"):
        raise ValueError(f"per must be 'clip' or 'frame', not {per!r}.")
    reconstruction, target = _pixels(reconstruction, target, quantize)
    squared = (reconstruction - target).square()
    mse = squared.mean(dim=(1, 2, 3, 4)) if per == "clip" else squared.mean(dim=(1, 3, 4))
    values = psnr_of(mse)
    return values if per == "clip" else values.mean(dim=1)


def psnr_of(mse: torch.Tensor) -> torch.Tensor:
    """Convert mean squared errors of pixels 0..255 to PSNR in dB, at most `MAX_PSNR`."""
    return (20 * math.log10(PIXEL_RANGE) - 10 * mse.log10()).clamp(max=MAX_PSNR)


def ssim(reconstruction: torch.Tensor, target: torch.Tensor, *, quantize: bool = True) -> torch.Tensor:
    """Return the SSIM of each clip, the mean over its frames: (B,) in float64, 1 for identical clips.

    SSIM (Wang et al. 2004: 11x11 Gaussian window of sigma 1.5, reflected at the borders, k = 0.01 and 0.03) of RGB
    frames with data range 255, equal to torchmetrics' in float64. In float32 the variances of flat areas, which are
    differences of squares, lose their digits; torchmetrics' float64 convolutions take 30 times as long on a CPU.

    Args:
        reconstruction, target: clips (B, C, T, H, W) in [-1, 1], at least 6 x 6 pixels.
        quantize: round both to uint8 first.

    Raises:
        UserError: for frames smaller than 6 x 6, and the errors of `psnr`.
    """
    if min(target.shape[-2:]) < 6:
        raise UserError(f"SSIM's window needs frames of 6 x 6 pixels or more, not {tuple(target.shape[-2:])}.")
    pairs = zip(*_pixels(reconstruction, target, quantize), strict=True)
    return torch.stack([_frame_ssim(a, b).mean() for a, b in pairs])


SSIM_CHUNK = 2**22  # pixel values at a time, which bounds the memory


def _frame_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the SSIM of each frame of two clips (C, T, H, W) of pixel values in float64: (T,)."""
    channels, _, height, width = a.shape
    frames = max(SSIM_CHUNK // (channels * height * width), 1)
    c1, c2 = (0.01 * PIXEL_RANGE) ** 2, (0.03 * PIXEL_RANGE) ** 2
    values = []
    for x, y in zip(a.split(frames, dim=1), b.split(frames, dim=1), strict=True):
        mean_x, mean_y, xx, yy, xy = (_gaussian_mean(z) for z in (x, y, x * x, y * y, x * y))
        squares, product = mean_x.square() + mean_y.square(), mean_x * mean_y
        variances, covariance = xx + yy - squares, xy - product
        maps = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
        values.append(maps.mean(dim=(0, 2, 3)))
    return torch.cat(values)


def _gaussian_mean(images: torch.Tensor, sigma: float = 1.5, radius: int = 5) -> torch.Tensor:
    """Average images (N, M, H, W) under a Gaussian window around each pixel, reflected at the borders."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = (-0.5 * (offsets / sigma).square()).exp()
    weights = (weights / weights.sum()).tolist()
    images = F.pad(images, (radius,) * 4, mode="reflect")
    for dim in (-2, -1):
        size = images.shape[dim] - 2 * radius
        # Add shifted images: on a CPU this is many times faster than a convolution in float64.
        summed = images.narrow(dim, radius, size) * weights[radius]
        for i in range(radius):
            summed.add_(images.narrow(dim, i, size), alpha=weights[i])
            summed.add_(images.narrow(dim, 2 * radius - i, size), alpha=weights[i])
        images = summed
    return images


@torch.no_grad()
def lpips(
    reconstruction: torch.Tensor, target: torch.Tensor, network: LPIPS, *, quantize: bool = True
) -> torch.Tensor:
    """Return the LPIPS of each clip, the mean over its frames: (B,), 0 for identical clips.

    Args:
        reconstruction, target: clips (B, 3, T, H, W) in [-1, 1], on the network's device.
        network: papers use the `"alex"` backbone; values of different backbones are not comparable.
        quantize: round both to uint8 first.

    Raises:
        UserError: for frames too small for the network, and the errors of `psnr`.
    """
    device, pixels = target.device, _pixels(reconstruction, target, quantize)
    reconstruction, target = (x.to(device, torch.float32) / 127.5 - 1 for x in pixels)
    frames = zip(reconstruction.transpose(1, 2), target.transpose(1, 2), strict=True)  # clip by clip: memory
    with torch.autocast(target.device.type, enabled=False):
        return torch.stack([network(a, b).mean() for a, b in frames])


def clip_metrics(
    reconstruction: torch.Tensor, target: torch.Tensor, networks: Sequence[LPIPS] = (), *, quantize: bool = True
) -> dict[str, torch.Tensor]:
    """Return the metrics of each clip by name, (B,) each: `psnr`, `psnr_frame`, `ssim` and `lpips_BACKBONE`.

    `psnr` takes one MSE per clip, `psnr_frame` the mean over frames of each frame's PSNR, both in dB. Arguments and
    errors are those of `psnr`, `ssim` and `lpips`.
    """
    figures = {
        "psnr": psnr(reconstruction, target, quantize=quantize),
        "psnr_frame": psnr(reconstruction, target, per="frame", quantize=quantize),
        "ssim": ssim(reconstruction, target, quantize=quantize),
    }
    for network in networks:
        figures[f"lpips_{network.backbone}"] = lpips(reconstruction, target, network, quantize=quantize)
    return figures


class ReconstructionMetrics:
    """Means of `clip_metrics` over many clips, independent of batching.

    `totals` holds the sums and the number of clips in float64. They are on the CPU. Several processes add theirs:
    `metrics.totals = reduce_sum(metrics.totals)`, of `vidgen.metrics.frechet`.

    Args:
        lpips: LPIPS network, or several, on the clips' device.
        quantize: round to uint8 first.
    """

    def __init__(self, lpips: LPIPS | Sequence[LPIPS] | None = None, *, quantize: bool = True) -> None:
        self.networks = list(lpips) if isinstance(lpips, Sequence) else [lpips] if lpips else []
        self.quantize = quantize
        self.names = ["psnr", "psnr_frame", "ssim", *(f"lpips_{network.backbone}" for network in self.networks)]
        self.totals = torch.zeros(len(self.names) + 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, reconstruction: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch of clips (B, C, T, H, W) in [-1, 1]; raises the errors of `clip_metrics`."""
        values = clip_metrics(reconstruction, target, self.networks, quantize=self.quantize)
        sums = torch.stack([values[name].double().sum() for name in self.names]).cpu()
        self.totals += torch.cat([sums, torch.tensor([float(len(target))], dtype=torch.float64)])

    def compute(self) -> dict[str, float | int]:
        """Return the mean over clips of each metric of `clip_metrics`, and `num_clips`.

        Raises:
            ValueError: before any clip.
        """
        *sums, count = self.totals.tolist()
        if not count:
            raise ValueError("no clips to measure: call update(reconstruction, target) first.")
        means = {name: total / count for name, total in zip(self.names, sums, strict=True)}
        return {**means, "num_clips": int(count)}


def mean_color_baseline(clip: torch.Tensor) -> torch.Tensor:
    """Return clips that have the clip's mean color in every pixel: (B, C, T, H, W)."""
    return clip.mean(dim=(2, 3, 4), keepdim=True).expand_as(clip)


def downsample_baseline(clip: torch.Tensor, num_values: int) -> torch.Tensor:
    """Downsample clips to at least `num_values` values and upsample them: the baseline at the rate of a latent.

    Downsamples with antialiasing (a triangle filter in time, height and width) to each of `downsample_grids`, and
    upsamples trilinearly. Each clip keeps the grid with the best PSNR: static ones few frames, moving ones many.

    Args:
        clip: (B, C, T, H, W) in [-1, 1].
        num_values: number of latent values to compare with.

    Returns:
        (B, C, T, H, W).

    Raises:
        UserError: if `num_values` is not between 1 and the values in a clip.
    """
    best, best_mse = clip, torch.full((len(clip),), torch.inf, device=clip.device)
    for grid in downsample_grids(tuple(clip.shape[1:]), num_values):
        candidate = F.interpolate(_downsample(clip, grid), size=clip.shape[2:], mode="trilinear", align_corners=False)
        mse = (candidate - clip).square().mean(dim=(1, 2, 3, 4))
        better = mse < best_mse
        best = torch.where(better[:, None, None, None, None], candidate, best)
        best_mse = torch.where(better, mse, best_mse)
    return best


def downsample_grids(shape: tuple[int, int, int, int], num_values: int) -> list[tuple[int, int, int]]:
    """Return for each t the smallest grid (t, h, w) with C * t * h * w >= num_values and the clip's aspect ratio.

    `shape` is (C, T, H, W); grids are no larger than the clip, and a t too small for the values is left out.
    Raises `UserError` if `num_values` is not between 1 and C * T * H * W.
    """
    channels, frames, height, width = shape
    if not 1 <= num_values <= math.prod(shape):
        raise UserError(f"num_values must be in 1..{math.prod(shape)} for a clip of shape {shape}, not {num_values}.")
    grids = []
    for t in range(1, frames + 1):
        area = math.ceil(num_values / (channels * t))
        if area > height * width:
            continue
        ideal = math.sqrt(area * height / width)
        rows = {min(max(h, math.ceil(area / width)), height) for h in (math.floor(ideal), math.ceil(ideal))}
        sizes = [(h, math.ceil(area / h)) for h in rows if h > 0]
        aspect = height / width
        h, w = min(sizes, key=lambda s: (s[0] * s[1], abs(math.log(s[0] / s[1] / aspect)), s))
        grids.append((t, h, w))
    return grids


def _downsample(clip: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Resize (B, C, T, H, W) to (B, C, t, h, w): space first, then time, as PyTorch antialiases two dimensions."""
    t, h, w = grid
    batch, channels, frames, height, width = clip.shape
    small = F.interpolate(
        clip.reshape(batch, channels * frames, height, width), size=(h, w), mode="bilinear", antialias=True
    )
    small = small.reshape(batch, channels, frames, h * w)
    small = F.interpolate(small, size=(t, h * w), mode="bilinear", antialias=True)
    return small.reshape(batch, channels, t, h, w)


def _pixels(reconstruction: torch.Tensor, target: torch.Tensor, quantize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both clips as float64 pixel values 0..255, on the CPU if their device has no float64."""
    if reconstruction.shape != target.shape or target.ndim != 5:
        raise ValueError(
            "reconstruction and target must be clips (B, C, T, H, W) of one shape, "
            f"but have shapes {tuple(reconstruction.shape)} and {tuple(target.shape)}."
        )
    for name, clip in (("reconstruction", reconstruction), ("target", target)):
        if not torch.isfinite(clip).all():
            raise UserError(f"the {name} of shape {tuple(clip.shape)} holds NaN or infinite values.")
    if target.device.type == "mps":
        reconstruction, target = reconstruction.cpu(), target.cpu()
    if quantize:
        return to_uint8(reconstruction).double(), to_uint8(target).double()
    return tuple(((clip.double() + 1) * 127.5).clamp(0, PIXEL_RANGE) for clip in (reconstruction, target))
