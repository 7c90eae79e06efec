"""Prompts for each stream: one structure prompt with several dynamics prompts, as one moving picture.

    python examples/prompts.py "a pink ring on dark green" "moves in a circle" "slides across"

Needs a model trained on captions, such as the bundled one.
"""

import argparse
from pathlib import Path

import torch

from vidgen import VidTwinPipeline
from vidgen.common.images import save_clip_grid_video

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("structure", nargs="?", default="a pink ring on dark green", help="what the videos show")
parser.add_argument("dynamics", nargs="*", help="how it moves, one video per prompt")
parser.add_argument("--model", default="pretrained/sprites", help="pipeline folder or Hub repository")
parser.add_argument("--output", type=Path, default=Path("runs/examples/prompts.gif"))
parser.add_argument("--steps", type=int, default=50, help="denoising steps")
parser.add_argument("--seed", type=int, default=2, help="of the noise, which all videos share")
arguments = parser.parse_args()
dynamics = arguments.dynamics or ["moves in a circle", "slides across", "grows and shrinks", "stays still"]

pipeline = VidTwinPipeline.from_pretrained(arguments.model)
videos = pipeline(
    structure_prompt=arguments.structure,
    dynamics_prompt=dynamics,
    guidance_scale=4.0,
    structure_delay=0.2,  # content is decided after the motion, so that it suits the dynamics prompt
    num_inference_steps=arguments.steps,
    generator=[torch.Generator().manual_seed(arguments.seed) for _ in dynamics],
    output_type="pt",
).frames

clips = 2 * videos.float().cpu().transpose(1, 2) - 1  # (N, 3, T, H, W) in [-1, 1]
arguments.output.parent.mkdir(parents=True, exist_ok=True)
print(save_clip_grid_video(arguments.output, clips, fps=8, columns=len(dynamics), labels=dynamics))
