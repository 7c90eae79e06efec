"""One prompt for what a video shows, and several for how it moves.

    python examples/prompts.py --model FOLDER --structure "a blue star on a maroon background" --output prompts.gif

The model must be trained on captions (docs/text.md). All videos start from the same noise.
"""

import argparse

import torch

from vidgen import VidTwinPipeline
from vidgen.common.images import save_clip_grid_video

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="pretrained/sprites", help="pipeline folder or Hub repository")
parser.add_argument("--structure", default="a blue star on a maroon background", help="what the videos show")
parser.add_argument("--dynamics", nargs="+", default=["it orbits", "it bounces", "it spins", "it stays still"])
parser.add_argument("--guidance", type=float, default=3.0)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", default="runs/examples/prompts.gif")
arguments = parser.parse_args()

pipeline = VidTwinPipeline.from_pretrained(arguments.model)
frames = pipeline(
    structure_prompt=arguments.structure,
    dynamics_prompt=arguments.dynamics,
    guidance_scale=arguments.guidance,
    num_inference_steps=arguments.steps,
    generator=[torch.Generator().manual_seed(arguments.seed) for _ in arguments.dynamics],
    output_type="pt",
).frames
clips = 2 * frames.transpose(1, 2) - 1
print(save_clip_grid_video(arguments.output, clips, 8, columns=len(clips), labels=arguments.dynamics))
