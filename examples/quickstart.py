"""Generate videos of two classes with the bundled pretrained model and save them as GIFs.

python examples/quickstart.py --output-dir runs/examples
"""

import argparse
from pathlib import Path

import torch

from vidgen import VidTwinPipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="pretrained/sprites", help="pipeline folder or Hub repository")
parser.add_argument("--output-dir", type=Path, default=Path("runs/examples"))
parser.add_argument("--steps", type=int, default=50, help="denoising steps")
arguments = parser.parse_args()

pipeline = VidTwinPipeline.from_pretrained(arguments.model)
videos = pipeline(
    class_labels=["orbit/star", "bounce"],
    guidance_scale=3.0,
    num_inference_steps=arguments.steps,
    generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
).frames  # one list of PIL images per video

arguments.output_dir.mkdir(parents=True, exist_ok=True)
for name, frames in zip(("orbit-star", "bounce"), videos, strict=True):
    path = arguments.output_dir / f"{name}.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)
    print(path)
