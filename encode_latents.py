"""Encode the clips of a dataset for the DiT, once, on any number of processes.

    accelerate launch encode_latents.py --config configs/dit/ucf101.yaml vae=VAE data.root=DATA latent_cache=CACHE

Takes the same keys as train_dit.py, which reads the latents if it is given the same `latent_cache`. An interrupted
encoding continues when it is started again.
"""

import sys

from vidgen.common.config import load_config
from vidgen.common.errors import run_program
from vidgen.training.config import DiTTrainingConfig


def main() -> None:
    config = load_config(DiTTrainingConfig, sys.argv[1:])
    from vidgen.training.dit_trainer import encode_latents  # after the config: a wrong key is reported at once

    encode_latents(config)


if __name__ == "__main__":
    run_program(main)
