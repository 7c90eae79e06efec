"""Train the DiT on the latents of a trained VidTwin autoencoder.

    accelerate launch train_dit.py --config configs/dit/ucf101.yaml vae=FOLDER data.root=FOLDER [key=value ...]

Keys are those of `vidgen.config.DiTTrainingConfig`.
"""

import sys

from vidgen.config import DiTTrainingConfig, load_config
from vidgen.errors import run_program


def main() -> None:
    config = load_config(DiTTrainingConfig, sys.argv[1:])
    from vidgen.training.train_dit import train_dit  # after the config: a wrong key is told within a second

    train_dit(config)


if __name__ == "__main__":
    run_program(main)
