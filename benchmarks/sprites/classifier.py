"""A small network that tells what a sprite is and how it moves: the judge of clips whose factors nobody knows.

It reads generated clips of `vidgen.data.sprites`: the class of motion, the shape, its texture, its colors, and where
the shape is in each frame; and its features serve a Fréchet distance that sees motion and shape. It is trained on
sprites drawn for it, three in four of them blurred, noisy or both so that it judges what a clip shows and not how
sharp it is, and its own accuracy on sprites it has not seen is to be told with every number that rests on it.

    scorer = train_scorer(Accelerator(), steps=1500)
    scorer.read(clips)["motion"]
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipelines.finite import NonFiniteError
from vidgen.common.progress import progress
from vidgen.data.sprites import MOTIONS, render_sprite, sample_factors
from vidgen.data.transforms import frames_to_clip

from .latent_swap import CLASSES, motion_parts, sprite_targets

Reading = dict[str, torch.Tensor]
COLORS = 6  # numbers: two colors
SOFTEST, NOISIEST = (0.4, 1.6), 0.1  # share of the pixels that soft clips keep, units of the [-1, 1] range


class SpriteScorer(ModelMixin, ConfigMixin):
    """Convolutions in each frame, a map of where the shape is, and convolutions over time of what is seen there.

    Args:
        width: channels of the first convolution.
        dim: length of the features.
    """

    @register_to_config
    def __init__(self, width: int = 24, dim: int = 96) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation)
            return nn.Sequential(layer, nn.GroupNorm(4, outputs), nn.GELU())

        inner = 2 * width
        self.frames = nn.Sequential(  # a place sees 39 pixels, more than a shape
            conv(3, width, 2), conv(width, inner, 2), conv(inner, inner, dilation=2), conv(inner, inner, dilation=2)
        )
        self.where = nn.Conv2d(inner, 1, 1)
        seen = 2 * inner + 3  # at the shape, over the frame, and place and spread of the map
        self.time = nn.Sequential(
            nn.Conv1d(seen, dim, 3, padding=1), nn.GELU(), nn.Conv1d(dim, dim, 3, padding=1), nn.GELU()
        )
        self.motion = nn.Linear(2 * dim, dim)
        self.look = nn.Sequential(nn.Linear(2 * inner, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU())
        heads = {name: len(values) for name, values in CLASSES.items()} | {"colors": COLORS}
        self.heads = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in heads.items()})

    @property
    def dim(self) -> int:
        """Length of the features: those of motion, then those of looks."""
        return 2 * self.config.dim

    def forward(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a loss or a reading needs, of clips (B, 3, T, H, W) in [-1, 1].

        Returns:
            Logits of each of `CLASSES`, (B, classes); `colors` (B, 6) in [0, 1]; `position` (B, T, 2), x and y as
            shares of the frame; and the `features` (B, dim).
        """
        maps = self.frames(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (clips.shape[0], clips.shape[2]))
        weights = self.where(maps.flatten(0, 1)).flatten(1).softmax(dim=1).view_as(maps[:, :, 0])
        height, width = weights.shape[-2:]
        y, x = ((torch.arange(size, device=maps.device, dtype=maps.dtype) + 0.5) / size for size in (height, width))
        position = torch.stack([weights.sum(dim=2) @ x, weights.sum(dim=3) @ y], dim=-1)
        away = (x - position[..., None, 0])[..., None, :] ** 2 + (y - position[..., None, 1])[..., None] ** 2
        spread = (weights * away).sum(dim=(2, 3)).sqrt()
        at_shape = (maps * weights[:, :, None]).sum(dim=(3, 4))
        over_frame = maps.mean(dim=(3, 4))

        seen = torch.cat([at_shape, over_frame, 4 * (position - 0.5), 4 * spread[..., None]], dim=2)
        times = self.time(seen.transpose(1, 2))
        motion = F.gelu(self.motion(torch.cat([times.mean(dim=2), times.amax(dim=2)], dim=1)))
        look = self.look(torch.cat([at_shape, over_frame], dim=2)).mean(dim=1)
        found = {name: head(motion if name == "motion" else look) for name, head in self.heads.items()}
        return found | {"position": position, "features": torch.cat([motion, look], dim=1)}

    @torch.no_grad()
    def read(self, clips: torch.Tensor, batch_size: int = 32) -> Reading:
        """What clips (N, 3, T, H, W) in [-1, 1] show, on the CPU: as `sprite_targets`, without the background.

        Beside that their `features` (N, dim), and `probability` (N,), how sure the scorer is of the class of motion.
        Raises `NonFiniteError`, a ValueError, for clips that are not finite.
        """
        if not clips.isfinite().all():
            raise NonFiniteError(f"clips of shape {tuple(clips.shape)} contain NaN or infinite values.")
        self.eval()
        size = torch.tensor([clips.shape[-1], clips.shape[-2]], dtype=torch.float64)
        found = [self(batch.to(self.device, self.dtype)) for batch in clips.split(batch_size)]
        shown = {name: torch.cat([part[name].float().cpu() for part in found]) for name in found[0]}
        probability = shown["motion"].softmax(dim=1).amax(dim=1)
        classes = {name: shown[name].argmax(dim=1) for name in CLASSES}
        colors = 255 * shown["colors"].double().unflatten(1, (2, 3))
        places = motion_parts(shown["position"].double() * size)
        return {**classes, "colors": colors, **places, "features": shown["features"], "probability": probability}


class DrawnSprites(Dataset):
    """Sprites drawn at once and kept as bytes, motions in turn: `clip` (3, T, H, W) in [-1, 1] with `sprite_targets`.

    Args:
        count: of them.
        seed: of their factors, as in `write_sprites`.
        num_frames, resolution: of a clip.
    """

    def __init__(self, count: int, seed: int, num_frames: int = 16, resolution: int = 64) -> None:
        sizes = dict(num_frames=num_frames, resolution=resolution)
        numbered = [divmod(index, len(MOTIONS)) for index in range(count)]
        self.factors = [
            sample_factors(np.random.default_rng([seed, label, i]), MOTIONS[label], **sizes) for i, label in numbered
        ]
        self.targets = sprite_targets(self.factors)
        drawn = progress(self.factors, "drawing sprites")
        self.frames = torch.from_numpy(np.stack([render_sprite(factors) for factors in drawn]))

    def __len__(self) -> int:
        return len(self.factors)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        clip = frames_to_clip(self.frames[index])
        return {"clip": clip, **{name: values[index] for name, values in self.targets.items()}}

    def clips(self) -> torch.Tensor:
        """All of them, (N, 3, T, H, W)."""
        return frames_to_clip(self.frames)


def scorer_loss(found: dict[str, torch.Tensor], targets: dict[str, torch.Tensor], resolution: int) -> torch.Tensor:
    """Cross entropies of the classes, and how far colors and, of clips with one shape, places are off.

    Args:
        found: from `SpriteScorer.forward`.
        targets: `sprite_targets`.
        resolution: of a frame, in pixels, as `targets` have places.
    """
    classes = sum(F.cross_entropy(found[name], targets[name]) for name in CLASSES)
    colors = F.l1_loss(found["colors"], targets["colors"].flatten(1).float() / 255)
    one_shape = (targets["motion"] != MOTIONS.index("swap"))[:, None, None]
    off = (found["position"] - targets["position"].float() / resolution).abs() * one_shape
    return classes + 2 * colors + 10 * off.mean()


def weathered(clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, 3, T, H, W) of which every other batch is soft, and half of the clips are noisy."""
    height, width = clips.shape[-2:]
    if (share := random.uniform(*SOFTEST)) < 1:
        frames = clips.transpose(1, 2).flatten(0, 1)
        small = F.interpolate(frames, size=(round(share * height), round(share * width)), mode="area")
        soft = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
        clips = soft.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)
    noise = NOISIEST * (2 * torch.rand(len(clips), 1, 1, 1, 1, device=clips.device) - 1).clamp(min=0)
    return clips + noise * torch.randn_like(clips)


def train_scorer(
    accelerator: Accelerator,
    *,
    steps: int,
    batch_size: int = 32,
    sprites: int = 3072,
    seed: int = 1000,
    num_frames: int = 16,
    resolution: int = 64,
    learning_rate: float = 3e-3,
    **model: Any,
) -> SpriteScorer:
    """Train a scorer on sprites drawn for it.

    Args:
        accelerator: of this process.
        steps: of the optimizer.
        batch_size: of each process.
        sprites: how many are drawn, once, before the first step.
        seed: of them; no seed that a model to be judged was trained on.
        num_frames, resolution: of a clip.
        learning_rate: at its highest.
        model: arguments of `SpriteScorer`.
    """
    set_seed(seed)
    scorer = SpriteScorer(**model)
    drawn = DrawnSprites(sprites, seed, num_frames, resolution)
    loader = DataLoader(drawn, batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, weight_decay=0.01)
    scorer, optimizer, loader = accelerator.prepare(scorer, optimizer, loader)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    scorer.train()
    for batch in progress(itertools.islice(_again_and_again(loader), steps), "training the scorer", total=steps):
        clips = batch.pop("clip")
        accelerator.backward(scorer_loss(scorer(weathered(clips)), batch, clips.shape[-1]))
        accelerator.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return accelerator.unwrap_model(scorer).eval()


def _again_and_again(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader
