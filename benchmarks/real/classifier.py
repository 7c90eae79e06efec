"""Training of a `MotionClassifier` on real clips, such as hand gestures, where the class is the motion.

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
from diffusers.optimization import get_scheduler
from torch import nn

from pipelines.motion_classifier import MotionClassifier
from vidgen.common.errors import UserError
from vidgen.common.progress import progress

from .clips import Lists, read_clips

MAX_SHIFT = 0.15  # of the frame; of the augmentation
ZOOM_RANGE = (0.85, 1.25)
BLUR_RANGE = (0.3, 1.5)  # remaining resolution; 1 and above is no blur
FRAME_RATE_RANGE = (0.25, 1.5)  # remaining frame rate; 1 and above is no blur
MAX_NOISE = 0.1  # standard deviation, in the range [-1, 1]
CONTRAST_RANGE = (0.6, 1.5)
SMOOTHING = 0.1  # of the labels
AUGMENTATION = [MAX_SHIFT, ZOOM_RANGE, BLUR_RANGE, FRAME_RATE_RANGE, MAX_NOISE, CONTRAST_RANGE]


def train_on_videos(
    lists: Lists, clip_shape: tuple[int, int, int, int], fps: float, windows: int, **training: Any
) -> MotionClassifier:
    """Train a classifier of the labels of videos.

    Args:
        lists, clip_shape, fps: as in `read_clips`.
        windows: clips of each video, with random starts, speeds and crops.
        training: arguments of `train_classifier`.

    Raises:
        UserError: as `read_clips`.
    """
    clips = read_clips(lists, clip_shape, fps, windows, train=True, zoom=1.25, speed=1.5)
    classes = sorted(set(clips.labels))
    labels = torch.tensor([classes.index(label) for label in clips.labels])
    return train_classifier(clips.pixels, labels, classes, **training)


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
