"""A small classifier of motion in real clips, such as hand gestures, where the class is the motion.

It locates a few points in each frame with spatial attention, and classifies their tracks with convolutions over time.
It sees differences between frames and colors relative to the clip's mean, so it cannot recognize a class by the room.
Its accuracy on held-out real clips bounds every score and is reported with it.

    classifier = train_classifier(clips, labels, classes, steps=1500)
    classifier.predict(other_clips)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from torch import nn

from vidgen.common.errors import UserError
from vidgen.common.progress import progress

MAX_SHIFT = 0.15  # of the frame; of the augmentation
ZOOM_RANGE = (0.85, 1.25)
BLUR_RANGE = (0.3, 1.5)  # remaining resolution; 1 and above is no blur
FRAME_RATE_RANGE = (0.25, 1.5)  # remaining frame rate; 1 and above is no blur
MAX_NOISE = 0.1  # standard deviation, in the range [-1, 1]
CONTRAST_RANGE = (0.6, 1.5)
SMOOTHING = 0.1  # of the labels
AUGMENTATION = [MAX_SHIFT, ZOOM_RANGE, BLUR_RANGE, FRAME_RATE_RANGE, MAX_NOISE, CONTRAST_RANGE]


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
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
        return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


def augment(clips: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, zoom, blur, recolor and add noise to clips (B, 3, T, H, W) in [-1, 1], each in another way.

    Clips are never mirrored or reversed, which would change their class.
    """
    count, _, frames, height, width = clips.shape

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*(shape or (count,)), generator=generator)

    # Shift and zoom, the same for all frames of a clip.
    zoom = uniform(math.log(ZOOM_RANGE[0]), math.log(ZOOM_RANGE[1])).exp()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / zoom, 1 / zoom
    theta[:, :, 2] = uniform(-2 * MAX_SHIFT, 2 * MAX_SHIFT, count, 2)
    grid = F.affine_grid(theta, (count, 3, height, width), align_corners=False)
    planes = F.grid_sample(clips.flatten(1, 2), grid, padding_mode="reflection", align_corners=False)

    # Blur a batch at a time over space and time, as autoencoders do.
    scale = uniform(*BLUR_RANGE, 1).item()
    if scale < 1:
        size = (max(2, round(scale * height)), max(2, round(scale * width)))
        small = F.interpolate(planes, size=size, mode="area")
        planes = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
    clips = planes.unflatten(1, (3, frames))
    rate = uniform(*FRAME_RATE_RANGE, 1).item()
    if rate < 1:
        slow = F.interpolate(clips, size=(max(2, round(rate * frames)), height, width), mode="area")
        clips = F.interpolate(slow, size=clips.shape[2:], mode="trilinear", align_corners=False)

    # Change brightness and contrast, and add noise.
    contrast = uniform(*CONTRAST_RANGE)[:, None, None, None, None]
    tint = uniform(-0.1, 0.1, count, 3)[:, :, None, None, None]
    noise = uniform(-MAX_NOISE, MAX_NOISE).clamp(min=0)[:, None, None, None, None]
    return clips * contrast + tint + noise * torch.randn(clips.shape, generator=generator)


def train_classifier(
    clips: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[str],
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
    learning_rate: float = 3e-3,
    **model: Any,
) -> MotionClassifier:
    """Train a classifier on clips; rare classes are drawn more often, by the square root of their frequency.

    Args:
        clips: uint8 (N, 3, T, H, W), several windows of each training video.
        labels: (N,), indices into `classes`.
        steps: optimizer steps.
        seed: of the weights, the order and the augmentation.
        learning_rate: peak learning rate.
        model: arguments of `MotionClassifier`.

    Raises:
        UserError: if there is no clip.
    """
    if not len(clips):
        raise UserError("the classifier needs training clips.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = MotionClassifier(list(classes), **model).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.05)
        warmup = dict(num_warmup_steps=steps // 20, num_training_steps=steps)
        schedule = get_scheduler("cosine", optimizer, **warmup)
        weights = labels.bincount(minlength=len(classes)).double().sqrt().reciprocal()[labels]
        for _ in progress(range(steps), "training the classifier"):
            drawn = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
            logits = classifier(augment(clips[drawn].float() / 127.5 - 1, generator))
            F.cross_entropy(logits, labels[drawn], label_smoothing=SMOOTHING).backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return classifier.eval()
