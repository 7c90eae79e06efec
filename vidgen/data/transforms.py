"""Convert frames to clips and back, resize and crop them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ..common.images import to_uint8

CHANGE_RANGE = (0.08, 0.2)  # differences to the background, in [0, 2], from which a pixel begins to move, and moves


def frames_to_clip(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (..., T, H, W, 3) in [0, 255] to float32 (..., 3, T, H, W) in [-1, 1]."""
    return rearrange(frames.to(torch.float32, copy=True).div_(127.5).sub_(1), "... t h w c -> ... c t h w")


def clip_to_frames(clip: torch.Tensor) -> torch.Tensor:
    """Float (..., 3, T, H, W) in [-1, 1] to uint8 (..., T, H, W, 3) on the CPU, rounded and clamped.

    Raises `ValueError` if the clip is not finite: NaN would become black.
    """
    return rearrange(to_uint8(clip), "... c t h w -> ... t h w c").cpu()


def jitter_color(clip: torch.Tensor, strength: float, random: np.ndarray) -> torch.Tensor:
    """Change the contrast, the color balance and the brightness of a whole clip (3, T, H, W) in [-1, 1].

    Args:
        clip: float, in [-1, 1]; the result is clamped to that range.
        strength: contrast and the gain of each channel are within 1 - `strength` and its reciprocal, brightness moves
            by up to half of `strength`.
        random: five numbers in [0, 1): of contrast, of the three channels, and of brightness; 0.5 changes nothing.
    """
    contrast, *balance, brightness = 2 * torch.as_tensor(random, dtype=clip.dtype) - 1
    gain = (1 - strength) ** -torch.stack(balance).view(3, 1, 1, 1)
    return (((clip + 1) * gain - 1) * (1 - strength) ** -contrast + strength / 2 * brightness).clamp(-1, 1)


def swap_background(clip: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Put what moves in one clip before the background of another, both (3, T, H, W) in [-1, 1]; returns a new clip.

    The background of a clip is its median over time. What differs from it by more than a tenth of the range moves;
    the edges of that region are soft. It is meant for clips of a camera that hardly moves, as an augmentation.
    """
    background = clip.median(dim=1, keepdim=True).values
    change = (clip - background).abs().amax(dim=0)[:, None]  # (T, 1, H, W)
    size = max(1, min(clip.shape[-2:]) // 32)

    def average(mask: torch.Tensor, radius: int) -> torch.Tensor:
        return F.avg_pool2d(mask, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)

    low, high = CHANGE_RANGE
    moving = ((average(change, size) - low) / (high - low)).clamp(0, 1)
    moving = F.max_pool2d(moving, size + 1 + size % 2, stride=1, padding=(size + size % 2) // 2)
    moving = average(moving, max(1, size // 2)).transpose(0, 1)
    return torch.lerp(other.median(dim=1, keepdim=True).values.expand_as(clip), clip, moving)


def resize_to_cover(clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (C, T, H, W), float or uint8, with antialiasing, to the smallest size that covers `size` (height, width).

    The proportions are kept.
    """
    scale = max(target / side for target, side in zip(size, clip.shape[-2:], strict=True))
    covering = [max(target, round(side * scale)) for target, side in zip(size, clip.shape[-2:], strict=True)]
    if covering == list(clip.shape[-2:]):
        return clip
    frames = rearrange(clip, "c t h w -> t c h w")
    frames = F.interpolate(frames, size=covering, mode="bilinear", antialias=True, align_corners=False)
    return rearrange(frames, "t c h w -> c t h w")


def crop(clip: torch.Tensor, size: tuple[int, int], down: float, across: float) -> torch.Tensor:
    """Cut `size` (height, width) out of (C, T, H, W); `down` and `across` run from 0 (top, left) to 1."""
    (height, width), (full_height, full_width) = size, clip.shape[-2:]
    top, left = round(down * (full_height - height)), round(across * (full_width - width))
    return clip[..., top : top + height, left : left + width]
