"""The bundled models: the two latents of real video, a photo animated, gestures, and sprites by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoencoder import TwinLatents
from pipelines import VidTwinPipeline

from ..common.images import (
    class_grid,
    component_grid,
    describe_contrast,
    raise_contrast,
    read_image,
    reenactment_grid,
    save_clip_grid_video,
)
from ..common.loading import PRETRAINED, REAL_MODEL, SPRITES_MODEL
from ..common.precision import place_model
from ..data.dataset import ClipDataset

FPS = 8
CLIPS = PRETRAINED.parent / "examples" / "clips"  # of videos that the model was not trained on
PHOTO = REAL_MODEL / "photo.jpg"  # a first frame of a held-out clip
PHOTO_PROMPTS = (
    "Pick up the mug, in a kitchen",
    "Move the mug left, in a kitchen",
    "Take out the marker, in a kitchen",
)
SETTINGS = {"guidance_scale": 3.0, "num_inference_steps": 25}
REAL_SETTINGS = {"guidance_scale": 4.0, "temperature": 0.4, "num_inference_steps": 25}
GESTURES = ("circlecc", "del", "down", "left", "right", "square", "star", "up")


def load_for_sampling(folder: Path) -> VidTwinPipeline:
    """Load a pipeline on the accelerator, or the CPU without one, in the dtype that is fast there."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pipeline = place_model(VidTwinPipeline.from_pretrained(folder), device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_clips(
    pipeline: VidTwinPipeline, labels: int | list[str] | None, seed: int = 0, **options: Any
) -> torch.Tensor:
    """Sample clips (N, 3, T, H, W) in [-1, 1], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    frames = pipeline(class_labels=labels, generator=generator, output_type="pt", **options).frames
    return 2 * frames.float().cpu().transpose(1, 2) - 1


def sample_sprites(root: Path) -> Path:
    """Write samples of every class of sprites: a video, and a picture of eight frames of each class."""
    pipeline = load_for_sampling(SPRITES_MODEL)
    names = sorted(pipeline.labels, key=pipeline.labels.get)
    clips = sample_clips(pipeline, names, num_videos_per_prompt=4, **SETTINGS)
    labels = [name for name in names for _ in range(4)]
    save_clip_grid_video(root / "pretrained.mp4", clips, FPS, columns=8, labels=labels)
    return class_grid(root / "pretrained.png", clips[::4], names)


@torch.no_grad()
def decompose_real_video(root: Path) -> Path:
    """Write what each latent of held-out clips holds: a moving grid and two pictures, of which the first is returned.

    Rows of the grid: the clips, decoded from both latents, from one, with the dynamics of the next clip, and sampled
    from the first frame.
    """
    pipeline = load_for_sampling(REAL_MODEL)
    vae = pipeline.vae
    _, num_frames, *size = vae.clip_shape
    dataset = ClipDataset(CLIPS, num_frames=num_frames, fps=FPS, resolution=tuple(size), train=False)
    clips = torch.stack([dataset[index]["video"] for index in range(len(dataset))])
    latents = vae.unpack(vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode())

    def decode(structure: torch.Tensor, dynamics: torch.Tensor, components: str = "both") -> torch.Tensor:
        return vae.decode(TwinLatents(structure, dynamics), components).sample.float().cpu()

    streams = latents.structure, latents.dynamics
    both, structure, dynamics = (decode(*streams, part) for part in ("both", "structure", "dynamics"))
    swapped = torch.stack([decode(latents.structure[[i] * len(clips)], latents.dynamics) for i in range(len(clips))])
    first_frames = clips[:, :, :1].transpose(1, 2) / 2 + 0.5
    visible, factor = raise_contrast(dynamics)
    rows = {
        "real": clips,
        "both latents": both,
        "structure only": structure,
        describe_contrast("dynamics only", factor): visible,
        "dynamics of the next clip": decode(latents.structure, latents.dynamics.roll(-1, 0)),
        "first frame, animated": sample_clips(pipeline, None, image=first_frames, **REAL_SETTINGS),
    }
    labels = [label for label in rows for _ in clips]
    save_clip_grid_video(root / "real.mp4", torch.cat([*rows.values()]), FPS, columns=len(clips), labels=labels)
    reenactment_grid(root / "real_swaps.png", clips, clips, swapped, num_frames=3)
    return component_grid(root / "real.png", clips, both, structure, dynamics)


def sample_real_video(root: Path) -> Path:
    """Write videos of the photo animated by prompts and of gestures by class, and a picture of the first, returned."""
    pipeline = load_for_sampling(REAL_MODEL)
    image = read_image(PHOTO)
    animated = sample_clips(pipeline, None, prompt=list(PHOTO_PROMPTS), image=image, **REAL_SETTINGS)
    save_clip_grid_video(root / "photo.mp4", animated, FPS, columns=len(animated), labels=PHOTO_PROMPTS)
    gestures = sample_clips(pipeline, list(GESTURES), **REAL_SETTINGS)
    save_clip_grid_video(root / "gestures.mp4", gestures, FPS, columns=4, labels=GESTURES)
    return class_grid(root / "photo.png", animated, PHOTO_PROMPTS)
