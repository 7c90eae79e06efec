"""Pictures of held-out clips: decoded from one latent or both, latent swaps, and animated from a first frame."""

from __future__ import annotations

from pathlib import Path

import torch

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from vidgen.common.images import (
    comparison_grid,
    component_grid,
    describe_contrast,
    raise_contrast,
    reenactment_grid,
    save_clip_grid_video,
)
from vidgen.metrics.reconstruction import downsample_baseline

from .clips import Clips, to_float
from .components import COMPONENTS

SHOWN = 3  # clips of each data set
ANIMATED = 6  # clips of the gestures


def spread(values: torch.Tensor, count: int) -> torch.Tensor:
    """Up to `count` evenly spaced rows."""
    return values[torch.linspace(0, len(values) - 1, min(count, len(values))).long()]


@torch.no_grad()
def save_component_pictures(vae: AutoencoderKLVidTwin, test: Clips, folder: Path, fps: float) -> None:
    """Write, for each data set, a few clips decoded from one latent and both, still and moving, and latent swaps."""
    for name in dict.fromkeys(test.data):
        video = to_float(spread(test.of(name).pixels, SHOWN))
        latents = vae.unpack(vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode())
        decoded = [vae.decode(latents, part).sample.float().cpu() for part in COMPONENTS]
        component_grid(folder / f"real-components-{name}.png", video, *decoded)
        decoded[-1], factor = raise_contrast(decoded[-1])
        rows = ("real", "both", "structure only", describe_contrast("dynamics only", factor))
        labels = [row for row in rows for _ in video]
        moving = torch.cat([video, *decoded])
        save_clip_grid_video(folder / f"real-components-{name}.gif", moving, fps, columns=len(video), labels=labels)

        count = len(video)
        swaps = [
            vae.decode(TwinLatents(latents.structure[[i] * count], latents.dynamics)).sample.float().cpu()
            for i in range(count)
        ]
        reenactment_grid(folder / f"real-swaps-{name}.png", video, video, torch.stack(swaps))


def save_reconstruction_pictures(
    test: Clips, reconstructed: torch.Tensor, values: int, folder: Path, fps: float
) -> None:
    """Write a few moving clips of each data set: real, reconstructed (uint8), and rate-matched downsampling."""
    names = dict.fromkeys(test.data)
    indices = (torch.tensor([i for i, data in enumerate(test.data) if data == name]) for name in names)
    rows = [i for found in indices for i in spread(found, SHOWN).tolist()]
    real, made = (to_float(pixels[rows]) for pixels in (test.pixels, reconstructed))
    labels = [text for text in ("real", "reconstruction", "downsampling") for _ in rows]
    clips = torch.cat([real, made, downsample_baseline(real, values)])
    save_clip_grid_video(folder / "real-reconstruction.gif", clips, fps, columns=len(rows), labels=labels)


def save_animated_pictures(gestures: Clips, animated: torch.Tensor, folder: Path, fps: float) -> None:
    """Write a few clips beside those animated from their first frame, uint8, still and moving."""
    rows = spread(torch.arange(len(gestures)), ANIMATED).tolist()
    real, made = (to_float(pixels[rows]) for pixels in (gestures.pixels, animated))
    comparison_grid(folder / "real-animated.png", {"real": real, "image-to-video": made})
    labels = [f"{kind}: {gestures.labels[i]}" for kind in ("real", "animated") for i in rows]
    save_clip_grid_video(folder / "real-animated.gif", torch.cat([real, made]), fps, columns=len(rows), labels=labels)
