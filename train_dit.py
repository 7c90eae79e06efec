"""Train the DiT on the latents of a trained VidTwin autoencoder.

    accelerate launch train_dit.py --config configs/dit/ucf101.yaml vae=FOLDER data.root=FOLDER [key=value ...]

Keys are those of `vidgen.training.config.DiTTrainingConfig`.
"""

import sys

from vidgen.common.config import load_config
from vidgen.common.errors import run_program
from vidgen.training.config import DiTTrainingConfig


def main() -> None:
    config = load_config(DiTTrainingConfig, sys.argv[1:])
    from vidgen.training.dit_trainer import train_dit  # after the config: a wrong key is reported at once

    train_dit(config)


if __name__ == "__main__":
    run_program(main)
