"""Swap the dynamics latents of two videos, and show what each latent of the first one contains.

    python examples/latent_swap.py a.mp4 b.mp4 --output swap.mp4

The output shows side by side: A, A from structure alone, A from dynamics alone, and A with the dynamics of B.
"""

import argparse

import torch

from vidgen import TwinLatents
from vidgen.common.loading import load_vae
from vidgen.common.video_writing import write_video
from vidgen.data.transforms import clip_to_frames, crop, frames_to_clip, resize_to_cover
from vidgen.data.video import read_clip

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("video_a")
parser.add_argument("video_b")
parser.add_argument("--model", default="pretrained/sprites", help="VAE or pipeline folder, or Hub repository")
parser.add_argument("--output", default="runs/examples/swap.mp4")
arguments = parser.parse_args()

vae = load_vae(arguments.model)
_, num_frames, *size = vae.clip_shape


def load_clip(path: str) -> torch.Tensor:
    """The first clip of a video at 8 fps, resized and center-cropped; (1, 3, T, H, W) in [-1, 1]."""
    clip = frames_to_clip(read_clip(path, fps=8, num_frames=num_frames))
    return crop(resize_to_cover(clip, size), size, 0.5, 0.5)[None]


with torch.no_grad():
    clip_a, clip_b = load_clip(arguments.video_a), load_clip(arguments.video_b)
    latents_a, latents_b = (vae.unpack(vae.encode(clip).latent_dist.mode()) for clip in (clip_a, clip_b))
    structure_only = vae.decode(latents_a, components="structure").sample
    dynamics_only = vae.decode(latents_a, components="dynamics").sample
    swapped = vae.decode(TwinLatents(latents_a.structure, latents_b.dynamics)).sample

side_by_side = torch.cat([clip_a, structure_only, dynamics_only, swapped], dim=-1)[0]
print(write_video(arguments.output, clip_to_frames(side_by_side), fps=8))
