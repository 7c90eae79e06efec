"""Generate a long video window by window, and a seamless loop.

python examples/long_video.py --frames 64 --output-dir runs/examples
"""

import argparse
from pathlib import Path

import torch

from pipelines.rollout import rollout
from vidgen import VidTwinPipeline
from vidgen.common.video_writing import write_video

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="pretrained/sprites", help="pipeline folder or Hub repository")
parser.add_argument("--output-dir", type=Path, default=Path("runs/examples"))
parser.add_argument("--frames", type=int, default=64)
parser.add_argument("--steps", type=int, default=50, help="denoising steps per window")
arguments = parser.parse_args()

pipeline = VidTwinPipeline.from_pretrained(arguments.model)
options = {"guidance_scale": 3.0, "num_inference_steps": arguments.steps}

long = rollout(pipeline, arguments.frames, "orbit", generator=torch.Generator().manual_seed(0), **options)
loop = rollout(pipeline, 28, "orbit", loop=True, generator=torch.Generator().manual_seed(0), **options)

for name, video in {"long": long, "loop": loop}.items():  # (1, T, 3, H, W) in [0, 1]
    frames = (255 * video[0].movedim(1, -1)).round().to(torch.uint8)
    print(write_video(arguments.output_dir / f"{name}.mp4", frames, fps=8))
