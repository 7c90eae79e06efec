"""Long videos of sprites: roll-outs by several methods, and real ones, in memory as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from vidgen.common.images import to_uint8
from vidgen.common.io import atomic_write
from vidgen.common.progress import progress
from vidgen.data.sprites import MOTIONS, PERIOD, render_sprite
from vidgen.metrics.fvd import Sampling

from ..sprites.classifier import sample_window

TODAY, REAL = "varied windows", "real"
BASELINE = "varied windows, baseline model"
VIDEOS_AT_ONCE = 16


@dataclass(frozen=True)
class Method:
    """A way to roll out.

    Args:
        name: in tables.
        options: arguments of `pipelines.rollout.rollout`.
    """

    name: str
    options: dict[str, Any]


METHODS = (
    Method(TODAY, {}),
    Method("varied windows, matched colors", {"match_colors": True}),
    Method("history", {"history_noise": 0.1}),
    Method("history, guidance 1.5", {"history_noise": 0.1, "history_guidance_scale": 1.5}),
    Method("history, anchor of 4 windows", {"history_noise": 0.1, "anchor_windows": 4}),
    Method("history, matched colors", {"history_noise": 0.1, "match_colors": True}),
)


def video_labels(count: int) -> torch.Tensor:
    """Motions of the videos in turn, so that every prefix is balanced: (count,)."""
    return torch.arange(count) % len(MOTIONS)


def roll_out(
    pipeline: VidTwinPipeline, method: Method, count: int, num_frames: int, sampling: Sampling, folder: Path
) -> torch.Tensor:
    """Roll-outs of all motions in turn, uint8 (N, 3, F, H, W); parts that are finished are read from the folder.

    The noise of each video depends on its number only.
    """
    parts = []
    labels = video_labels(count)
    for indices in progress(torch.arange(count).split(VIDEOS_AT_ONCE), method.name):
        path = folder / f"videos-{int(indices[0]):05d}.safetensors"
        if not path.exists():
            videos = rollout(
                pipeline,
                num_frames,
                [MOTIONS[label] for label in labels[indices].tolist()],
                guidance_scale=sampling.guidance_scale,
                num_inference_steps=sampling.num_inference_steps,
                generator=[torch.Generator().manual_seed(sampling.seed + i) for i in indices.tolist()],
                **method.options,
            )
            pixels = to_uint8(2 * videos.float().cpu().transpose(1, 2) - 1)
            with atomic_write(path) as unfinished:
                save_file({"videos": pixels.contiguous()}, unfinished)
        parts.append(load_file(path)["videos"])
    return torch.cat(parts)


def draw_real(count: int, seed: int, num_frames: int, resolution: int) -> torch.Tensor:
    """Sprites of all motions in turn that begin anywhere in a motion, uint8 (N, 3, F, H, W)."""
    videos = []
    for index, label in enumerate(progress(video_labels(count).tolist(), "drawing sprites")):
        rng = np.random.default_rng([seed, label, index])
        factors = sample_window(rng, MOTIONS[label], period=PERIOD, num_frames=num_frames, resolution=resolution)
        videos.append(torch.from_numpy(render_sprite(factors)).permute(3, 0, 1, 2))
    return torch.stack(videos)


def cut_windows(num_frames: int, length: int) -> Sequence[int]:
    """First frames of the whole windows that follow each other without overlap."""
    return range(0, num_frames - length + 1, length)
