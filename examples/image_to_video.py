"""Image-to-video and motion transfer: condition one latent, generate the other.

    python examples/image_to_video.py --output-dir runs/examples

Needs a model trained with per-stream timesteps (`diffusion.independent_timesteps`), such as the bundled one.
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
options = {"guidance_scale": 3.0, "num_inference_steps": arguments.steps}

# A clip to condition on; a still image or a clip of your own works as well.
source = pipeline("orbit/star", generator=torch.Generator().manual_seed(0), **options).frames[0]

# Image-to-video: the first frame gives the structure latent, the class gives the motion.
animated = pipeline("bounce", structure=source[0], generator=torch.Generator().manual_seed(1), **options).frames[0]

# Motion transfer: the clip gives the dynamics latent, the appearance is resampled.
transferred = pipeline("orbit", dynamics=source, generator=torch.Generator().manual_seed(2), **options).frames[0]

# Variation: half of the denoising steps are applied to both conditioning latents.
varied = pipeline("orbit", structure=source, dynamics=source, structure_strength=0.5, dynamics_strength=0.5, **options)

arguments.output_dir.mkdir(parents=True, exist_ok=True)
results = {"source": source, "animated": animated, "transferred": transferred, "varied": varied.frames[0]}
for name, frames in results.items():
    path = arguments.output_dir / f"{name}.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)
    print(path)
