"""A small classifier of motion, such as hand gestures, where the class is the motion.

It locates a few points in each frame with spatial attention, and classifies their tracks with convolutions over time.
It sees differences between frames and colors relative to the clip's mean, so it cannot recognize a class by the room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class MotionClassifier(ModelMixin, ConfigMixin):
    """Convolutions in each frame, attention that locates points, and convolutions over time on their tracks.

    Args:
        classes: names.
        frame_size: (height, width) in pixels that frames are resized to.
        width: channels of the first convolution.
        points: number of attention maps.
        dim: length of the features over time.
    """

    @register_to_config
    def __init__(
        self,
        classes: Sequence[str],
        frame_size: tuple[int, int] = (48, 72),
        width: int = 16,
        points: int = 6,
        dim: int = 96,
    ) -> None:
        super().__init__()
        inner = 2 * width

        def conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation)
            return nn.Sequential(layer, nn.GroupNorm(4, outputs), nn.GELU())

        self.frames = nn.Sequential(
            conv(9, width, 2), conv(width, inner, 2), conv(inner, inner, dilation=2), conv(inner, inner, dilation=2)
        )
        self.where = nn.Conv2d(inner, points, 1)
        self.what = nn.Conv2d(inner, 4, 1)
        inputs = points * (2 + 2 + 1 + 4)  # position, velocity, spread and features of each point
        self.time = nn.Sequential(
            nn.Dropout(0.1),
            nn.Conv1d(inputs, dim, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(dim, dim, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(dim, dim, 3, padding=2, dilation=2),
            nn.GELU(),
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * dim, len(classes)))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of clips (B, 3, T, H, W) in [-1, 1]."""
        clips = self._resize(clips)
        batch, _, frames, _, _ = clips.shape

        # Colors relative to the clip, and differences to the frames before and after.
        relative = clips - clips.mean(dim=(2, 3, 4), keepdim=True)
        relative = relative / relative.std(dim=(1, 2, 3, 4), keepdim=True).clamp(min=0.05)
        change = F.pad(relative.diff(dim=2), (0, 0, 0, 0, 1, 1))
        inputs = torch.cat([relative, 2 * change[:, :, :-1], 2 * change[:, :, 1:]], dim=1)

        # Locate points in each frame.
        maps = self.frames(inputs.transpose(1, 2).flatten(0, 1))
        weights = self.where(maps).flatten(2).softmax(dim=2).unflatten(2, maps.shape[2:])  # (B T, points, h, w)
        height, width = maps.shape[2:]
        y, x = (2 * (torch.arange(s, device=maps.device, dtype=maps.dtype) + 0.5) / s - 1 for s in (height, width))
        position = torch.stack([weights.sum(dim=2) @ x, weights.sum(dim=3) @ y], dim=2)
        squares = (x - position[..., :1])[..., None, :] ** 2 + (y - position[..., 1:])[..., None] ** 2
        spread = (weights * squares).sum(dim=(2, 3)).add(1e-6).sqrt()
        features = torch.einsum("nphw,nchw->npc", weights, self.what(maps))

        # Classify the tracks.
        position = position.unflatten(0, (batch, frames))
        centered = position - position.mean(dim=1, keepdim=True)
        velocity = F.pad(position.diff(dim=1), (0, 0, 0, 0, 1, 0))
        rest = torch.cat([spread[..., None], features], dim=2).unflatten(0, (batch, frames))
        tracks = torch.cat([2 * centered, 4 * velocity, rest], dim=3).flatten(2)
        times = self.time(tracks.transpose(1, 2))
        return self.head(torch.cat([times.mean(dim=2), times.amax(dim=2)], dim=1))

    @torch.no_grad()
    def predict(self, clips: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
        """Probabilities (N, classes) of clips (N, 3, T, H, W) in [-1, 1], on the CPU."""
        self.eval()
        batches = clips.split(batch_size)
        return torch.cat([self(batch.to(self.device, self.dtype)).float().softmax(dim=1).cpu() for batch in batches])

    def _resize(self, clips: torch.Tensor) -> torch.Tensor:
        size = tuple(self.config.frame_size)
        if tuple(clips.shape[-2:]) == size:
            return clips
        frames = clips.transpose(1, 2).flatten(0, 1)
        # In float32, since the CPU has no antialiasing in bfloat16.
        frames = F.interpolate(frames.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        return frames.to(clips).unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)
