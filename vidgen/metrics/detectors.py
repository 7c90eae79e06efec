"""Detectors: what turns clips into the feature vectors that a Fréchet distance compares.

A detector is a module with a `name`, a feature length `dim`, and `detector(clips) -> (B, dim)` for clips
(B, C, T, H, W) in [-1, 1]. A distance means nothing without the name of its detector.
"""

from __future__ import annotations

import difflib

import torch
import torch.nn.functional as F
from torch import nn

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class PooledPixels(nn.Module):
    """A clip as 128 coarse measurements of colour, place, detail and motion. No weights: the same numbers everywhere.

    Each is one value per cell of a 4 x 4 grid over the frame, in units of the [-1, 1] pixel range:

    | features | length | what |
    |---|---|---|
    | 0..47 | 3 x 16 | mean of R, G, B over the whole clip |
    | 48..63 | 16 | mean luma over the first third of the frames (rounded up) |
    | 64..79 | 16 | mean luma over the last third |
    | 80..95 | 16 | detail: root mean square of luma differences between neighbouring pixels |
    | 96..111 | 16 | motion: root mean square of RGB differences between frames 1 apart |
    | 112..127 | 16 | the same between frames 4 apart (the longest possible lag in shorter clips) |

    It tells noise, blur, frozen or flickering clips, wrong colours and wrong places from real ones. It cannot see what
    is inside a cell: which shape, which texture, whether a face is a face; nor the direction of motion within a third.
    Distances depend on frame size, rate and length: compare clips of one kind. Only for quick checks: report I3D.
    """

    name = "pooled_pixels"
    dim = 128
    grid = 4
    lags = (1, 4)

    @torch.no_grad()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Features (B, 128), float32, of clips (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: if clips are not RGB, or have fewer than 2 frames or 4 x 4 pixels.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 2 or min(clips.shape[3:]) < self.grid:
            raise ValueError(
                f"{self.name} needs clips (B, 3, T, H, W) with T >= 2 and H, W >= {self.grid}, "
                f"not {tuple(clips.shape)}."
            )
        clips = clips.float()
        frames = clips.shape[2]
        third = -(-frames // 3)
        luma = torch.einsum("bcthw,c->bthw", clips, clips.new_tensor(LUMA))
        across = F.pad(luma.diff(dim=3).square(), (0, 1))
        down = F.pad(luma.diff(dim=2).square(), (0, 0, 0, 1))
        features = [
            self._pool(clips.mean(dim=2)),
            self._pool(luma[:, :third].mean(dim=1, keepdim=True)),
            self._pool(luma[:, -third:].mean(dim=1, keepdim=True)),
            self._pool((across + down).mean(dim=1, keepdim=True)).sqrt(),
        ]
        for lag in self.lags:
            lag = min(lag, frames - 1)
            change = (clips[:, :, lag:] - clips[:, :, :-lag]).square().mean(dim=(1, 2))
            features.append(self._pool(change[:, None]).sqrt())
        return torch.cat(features, dim=1)

    def _pool(self, images: torch.Tensor) -> torch.Tensor:
        """Means over the cells of a 4 x 4 grid: (B, C, H, W) -> (B, 16 C)."""
        return F.adaptive_avg_pool2d(images, self.grid).flatten(1)


DETECTORS: dict[str, type[nn.Module]] = {PooledPixels.name: PooledPixels}


def get_detector(name: str) -> nn.Module:
    """The detector of this name, in evaluation mode on the CPU. Raises `ValueError` for an unknown one."""
    if name not in DETECTORS:
        near = difflib.get_close_matches(name, DETECTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(DETECTORS))}."
        raise ValueError(f"unknown detector {name!r}: {hint}")
    return DETECTORS[name]().eval()
