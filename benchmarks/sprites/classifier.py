"""A small classifier of sprites: it predicts the factors of clips, such as generated ones, whose factors are unknown.

It predicts the class of motion, the shape, the texture, the colors and the position in each frame of clips of
`vidgen.data.sprites`. It is trained on separate sprites; three in four are blurred, noisy or both, so that sharpness
does not influence the predictions. Its accuracy on held-out real clips bounds every score and is reported with it.

    classifier = load_classifier(Path("classifier"), "cpu", num_frames=16, resolution=64)
    classifier.predict(clips)["motion"]
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines.finite import NonFiniteError
from vidgen.common.io import atomic_dir
from vidgen.common.progress import progress
from vidgen.data.sprites import MOTIONS, render_sprite, sample_factors
from vidgen.data.transforms import frames_to_clip

from .latent_swap import CLASSES, split_motion, sprite_targets

Prediction = dict[str, torch.Tensor]
TRAINING = {"smoke": dict(steps=2, batch_size=4, sprites=16, width=8, dim=8), "cpu": dict(steps=1500, batch_size=16)}
SEEDS = {"classifier": 1000, "tested": 2000, "others": 3000}  # of sprites; trainings use small seeds
COLOR_VALUES = 6  # two RGB colors
BLUR_RANGE = (0.4, 1.6)  # remaining resolution; 1 and above is no blur
MAX_NOISE = 0.1  # standard deviation, in the range [-1, 1]


class SpriteClassifier(ModelMixin, ConfigMixin):
    """Convolutions in each frame, spatial attention that locates the shape, and convolutions over time.

    Args:
        width: channels of the first convolution.
        dim: length of the features of motion, and of those of appearance.
    """

    @register_to_config
    def __init__(self, width: int = 24, dim: int = 96) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation)
            return nn.Sequential(layer, nn.GroupNorm(4, outputs), nn.GELU())

        inner = 2 * width
        self.frames = nn.Sequential(  # receptive field of 39 pixels, more than a shape
            conv(3, width, 2), conv(width, inner, 2), conv(inner, inner, dilation=2), conv(inner, inner, dilation=2)
        )
        self.where = nn.Conv2d(inner, 1, 1)
        inputs = 2 * inner + 3  # features at the shape and of the frame; position and spread of the attention
        self.time = nn.Sequential(
            nn.Conv1d(inputs, dim, 3, padding=1), nn.GELU(), nn.Conv1d(dim, dim, 3, padding=1), nn.GELU()
        )
        self.motion = nn.Linear(2 * dim, dim)
        self.look = nn.Sequential(nn.Linear(2 * inner, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU())
        heads = {name: len(values) for name, values in CLASSES.items()} | {"colors": COLOR_VALUES}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in heads.items()})

    def forward(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """The input of a loss or a prediction, for clips (B, 3, T, H, W) in [-1, 1].

        Returns:
            Logits of each of `CLASSES`, (B, classes); `colors` (B, 6) in [0, 1]; `position` (B, T, 2), x and y as
            fractions of the frame.
        """
        # Locate the shape in each frame.
        maps = self.frames(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (clips.shape[0], clips.shape[2]))
        weights = self.where(maps.flatten(0, 1)).flatten(1).softmax(dim=1).view_as(maps[:, :, 0])
        height, width = weights.shape[-2:]
        y, x = ((torch.arange(size, device=maps.device, dtype=maps.dtype) + 0.5) / size for size in (height, width))
        position = torch.stack([weights.sum(dim=2) @ x, weights.sum(dim=3) @ y], dim=-1)
        squares = (x - position[..., None, 0])[..., None, :] ** 2 + (y - position[..., None, 1])[..., None] ** 2
        spread = (weights * squares).sum(dim=(2, 3)).sqrt()
        at_shape = (maps * weights[:, :, None]).sum(dim=(3, 4))
        over_frame = maps.mean(dim=(3, 4))

        # Combine over time.
        inputs = torch.cat([at_shape, over_frame, 4 * (position - 0.5), 4 * spread[..., None]], dim=2)
        times = self.time(inputs.transpose(1, 2))
        motion = F.gelu(self.motion(torch.cat([times.mean(dim=2), times.amax(dim=2)], dim=1)))
        look = self.look(torch.cat([at_shape, over_frame], dim=2)).mean(dim=1)
        outputs = {name: head(motion if name == "motion" else look) for name, head in self.heads.items()}
        return outputs | {"position": position}

    @torch.no_grad()
    def predict(self, clips: torch.Tensor, batch_size: int = 32) -> Prediction:
        """Predict `sprite_targets`, without the background, of clips (N, 3, T, H, W) in [-1, 1]; on the CPU.

        Raises `NonFiniteError`, a ValueError, for clips that are not finite.
        """
        if not clips.isfinite().all():
            raise NonFiniteError(f"clips of shape {tuple(clips.shape)} contain NaN or infinite values.")
        self.eval()
        size = torch.tensor([clips.shape[-1], clips.shape[-2]], dtype=torch.float64)
        batches = [self(batch.to(self.device, self.dtype)) for batch in clips.split(batch_size)]
        outputs = {name: torch.cat([batch[name].float().cpu() for batch in batches]) for name in batches[0]}
        classes = {name: outputs[name].argmax(dim=1) for name in CLASSES}
        colors = 255 * outputs["colors"].double().unflatten(1, (2, 3))
        positions = split_motion(outputs["position"].double() * size)
        return {**classes, "colors": colors, **positions}


class DrawnSprites(Dataset):
    """Sprites rendered at once and kept as bytes, motions in turn: `clip` (3, T, H, W) in [-1, 1], `sprite_targets`.

    Args:
        count: number of sprites.
        seed: of their factors, as in `write_sprites`.
        num_frames, resolution: of a clip.
        period: frames of a motion, which then repeats and in which clips begin anywhere; None: one motion per clip.
    """

    def __init__(
        self, count: int, seed: int, num_frames: int = 16, resolution: int = 64, period: int | None = None
    ) -> None:
        sizes = dict(num_frames=num_frames, resolution=resolution)
        numbers = [divmod(index, len(MOTIONS)) for index in range(count)]
        rngs = [np.random.default_rng([seed, label, i]) for i, label in numbers]
        draw = sample_factors if period is None else partial(sample_window, period=period)
        self.factors = [draw(rng, MOTIONS[label], **sizes) for rng, (_, label) in zip(rngs, numbers, strict=True)]
        self.targets = sprite_targets(self.factors)
        self.frames = torch.from_numpy(np.stack([render_sprite(f) for f in progress(self.factors, "drawing sprites")]))

    def __len__(self) -> int:
        return len(self.factors)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        clip = frames_to_clip(self.frames[index])
        return {"clip": clip, **{name: values[index] for name, values in self.targets.items()}}

    def clips(self) -> torch.Tensor:
        """All clips, (N, 3, T, H, W)."""
        return frames_to_clip(self.frames)


def sample_window(
    rng: np.random.Generator, motion: str, *, period: int, num_frames: int, resolution: int
) -> dict[str, Any]:
    """Sample the factors of a clip that begins anywhere in a repeated motion; see `sample_factors`."""
    cycle = 2 * period  # after two periods every motion is where it began
    sizes = dict(num_frames=num_frames + cycle, resolution=resolution, period=period)
    factors = sample_factors(rng, motion, **sizes) | {"num_frames": num_frames}
    start = int(rng.integers(cycle))
    for shape in factors["shapes"]:
        shape |= {name: shape[name][start : start + num_frames] for name in ("centers", "angles", "scales")}
    return factors


def classifier_loss(
    outputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], resolution: int
) -> torch.Tensor:
    """Cross entropies of the classes, and L1 errors of colors and, for clips with one shape, of positions.

    Args:
        outputs: from `SpriteClassifier.forward`.
        targets: `sprite_targets`.
        resolution: of a frame, in pixels, the unit of the positions in `targets`.
    """
    classes = sum(F.cross_entropy(outputs[name], targets[name]) for name in CLASSES)
    colors = F.l1_loss(outputs["colors"], targets["colors"].flatten(1).float() / 255)
    one_shape = (targets["motion"] != MOTIONS.index("swap"))[:, None, None]
    error = (outputs["position"] - targets["position"].float() / resolution).abs() * one_shape
    return classes + 2 * colors + 10 * error.mean()


def degrade(clips: torch.Tensor) -> torch.Tensor:
    """Blur every other batch of clips (B, 3, T, H, W), and add noise to half of the clips."""
    height, width = clips.shape[-2:]
    if (scale := random.uniform(*BLUR_RANGE)) < 1:
        frames = clips.transpose(1, 2).flatten(0, 1)
        small = F.interpolate(frames, size=(round(scale * height), round(scale * width)), mode="area")
        blurred = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
        clips = blurred.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)
    noise = MAX_NOISE * (2 * torch.rand(len(clips), 1, 1, 1, 1, device=clips.device) - 1).clamp(min=0)
    return clips + noise * torch.randn_like(clips)


def train_classifier(
    accelerator: Accelerator,
    *,
    steps: int,
    batch_size: int = 32,
    sprites: int = 3072,
    seed: int = 1000,
    num_frames: int = 16,
    resolution: int = 64,
    period: int | None = None,
    learning_rate: float = 3e-3,
    **model: Any,
) -> SpriteClassifier:
    """Train a classifier on sprites that are drawn for it.

    Args:
        accelerator: of this process.
        steps: optimizer steps.
        batch_size: of each process.
        sprites: number of sprites, drawn once before the first step.
        seed: of the sprites; a seed that no evaluated model was trained on.
        num_frames, resolution, period: of the sprites, as in `DrawnSprites`.
        learning_rate: peak learning rate.
        model: arguments of `SpriteClassifier`.
    """
    set_seed(seed)
    classifier = SpriteClassifier(**model)
    drawn = DrawnSprites(sprites, seed, num_frames, resolution, period)
    loader = DataLoader(drawn, batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.01)
    classifier, optimizer, loader = accelerator.prepare(classifier, optimizer, loader)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    classifier.train()
    for batch in progress(itertools.islice(_repeat(loader), steps), "training the classifier", total=steps):
        clips = batch.pop("clip")
        accelerator.backward(classifier_loss(classifier(degrade(clips)), batch, clips.shape[-1]))
        accelerator.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return accelerator.unwrap_model(classifier).eval()


def sprite_sizes(vae: VideoAutoencoder) -> dict[str, int]:
    """`num_frames` and `resolution` of sprites for an autoencoder."""
    _, num_frames, resolution, _ = vae.clip_shape
    return {"num_frames": num_frames, "resolution": resolution}


def load_classifier(
    folder: Path, scale: str, *, num_frames: int, resolution: int, period: int | None = None
) -> SpriteClassifier:
    """Load the classifier of a folder on the process's device; trained and saved there if it is missing.

    Args:
        folder: the number of frames and the resolution are added to its name.
        scale: of the training.
        num_frames, resolution, period: of the sprites, as in `train_classifier`.
    """
    folder = folder.with_name(f"{folder.name}-{num_frames}x{resolution}")
    if not (folder / "config.json").exists():
        sprites = {"num_frames": num_frames, "resolution": resolution, "period": period}
        classifier = train_classifier(Accelerator(), seed=SEEDS["classifier"], **sprites, **TRAINING[scale])
        if PartialState().is_main_process:
            with atomic_dir(folder) as unfinished:
                classifier.save_pretrained(unfinished)
        PartialState().wait_for_everyone()
    return SpriteClassifier.from_pretrained(folder).to(PartialState().device).eval()


def _repeat(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader
