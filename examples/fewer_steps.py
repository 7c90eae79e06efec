"""Compare samplers on the same noise: DDIM, UniPC, and a cache between denoising steps.

python examples/fewer_steps.py
"""

import argparse
import time

import torch
from diffusers import FirstBlockCacheConfig, UniPCMultistepScheduler

from pipelines.schedulers import other_solver
from vidgen import VidTwinPipeline

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="pretrained/sprites", help="pipeline folder or Hub repository")
parser.add_argument(
    "--steps", type=int, default=50, help="denoising steps of the reference; the others use half or the same number"
)
arguments = parser.parse_args()

pipeline = VidTwinPipeline.from_pretrained(arguments.model)
ddim = pipeline.scheduler
unipc = other_solver(ddim, UniPCMultistepScheduler)  # keeps the noise schedule and the prediction type


def sample(steps: int) -> tuple[torch.Tensor, float]:
    """Four videos, (4, T, 3, H, W) in [0, 1], and the seconds they took."""
    started = time.perf_counter()
    videos = pipeline(
        class_labels=["orbit", "bounce", "spin", "zoom"],
        guidance_scale=3.0,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        output_type="pt",
    ).frames
    return videos, time.perf_counter() - started


sample(1)  # warm up
reference, seconds = sample(arguments.steps)
print(f"DDIM, {arguments.steps} steps: {seconds:.2f} s")

pipeline.scheduler = unipc
videos, faster = sample(max(1, arguments.steps // 2))
print(f"UniPC, half the steps: {faster / seconds:.2f} of the time, {(videos - reference).abs().mean():.4f} from DDIM")

pipeline.scheduler = ddim
pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
videos, faster = sample(arguments.steps)
print(f"DDIM with a cache: {faster / seconds:.2f} of the time, {(videos - reference).abs().mean():.4f} from DDIM")
