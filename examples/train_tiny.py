"""Train a tiny VAE and a tiny DiT on a few sprites by calling the trainers from Python, then sample.

    python examples/train_tiny.py --output-dir runs/examples/tiny

The same trainings from the shell are `accelerate launch train_vae.py ...` and `train_dit.py` (docs/training.md).
"""

import argparse
from pathlib import Path

from vidgen import VidTwinPipeline
from vidgen.common.config import load_config
from vidgen.common.errors import run_program
from vidgen.data.sprites import write_sprites
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/examples/tiny"))
    parser.add_argument("--clips-per-class", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each training")
    arguments = parser.parse_args()
    root = arguments.output_dir
    write_sprites(root / "data", arguments.clips_per_class, seed=0)
    shared = [f"data.root={root / 'data'}", f"train.max_train_steps={arguments.steps}"]

    # Each call returns OUTPUT_DIR/final, a folder for from_pretrained.
    vae_config = ["--config", str(CONFIGS / "vae/sprites.yaml"), *shared, f"output_dir={root / 'vae'}"]
    vae_folder = train_vae(load_config(VAETrainingConfig, vae_config))
    dit_config = ["--config", str(CONFIGS / "dit/sprites.yaml"), *shared, f"output_dir={root / 'dit'}"]
    pipeline_folder = train_dit(load_config(DiTTrainingConfig, [*dit_config, f"vae={vae_folder}"]))

    pipeline = VidTwinPipeline.from_pretrained(pipeline_folder)
    frames = pipeline("orbit", guidance_scale=2.0, num_inference_steps=10).frames[0]
    frames[0].save(root / "orbit.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)
    print(root / "orbit.gif")


if __name__ == "__main__":
    run_program(main)
