"""An image shown where the video that was animated from it does not move."""

from __future__ import annotations

import torch
from torch.nn import functional as F

STILL, MOVED = 0.03, 0.13  # differences from the first frame where only the image and only the video is shown


def apply_overlay(video: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Replace what does not move in a video by the image that it begins with, which is sharper than a decoded frame.

    Every frame is a weighted mean of image and video. The weight of the video is 0 where its mean difference from the
    first frame, over channels and 3 x 3 pixels, is at most `STILL`, and 1 from `MOVED` on. So the first frame is
    the image.

    Args:
        video: (B, C, T, H, W) in [-1, 1].
        image: (B, C, H, W) in [-1, 1].
    """
    change = (video - video[:, :, :1]).abs().mean(dim=1)
    change = F.avg_pool2d(change, 3, stride=1, padding=1, count_include_pad=False)
    weight = ((change - STILL) / (MOVED - STILL)).clamp(0, 1)[:, None]
    return torch.lerp(image[:, :, None].to(video), video, weight)
