"""Train the VidTwin autoencoder.

    accelerate launch train_vae.py --config configs/vae/paper.yaml data.root=FOLDER [key=value ...]

Keys are those of `vidgen.training.config.VAETrainingConfig`.
"""

import sys

from vidgen.common.config import load_config
from vidgen.common.errors import run_program
from vidgen.training.config import VAETrainingConfig


def main() -> None:
    config = load_config(VAETrainingConfig, sys.argv[1:])
    from vidgen.training.vae_trainer import train_vae  # after the config: a wrong key is reported at once

    train_vae(config)


if __name__ == "__main__":
    run_program(main)
