"""Encode a data set's clips for the DiT, once, on any number of processes.

    accelerate launch -m vidgen.encode_latents --config configs/dit/ucf101.yaml vae=FOLDER data.root=FOLDER \\
        latent_cache=FOLDER [key=value ...]

Takes what train_dit.py takes (`vidgen.config.DiTTrainingConfig`), which with the same `latent_cache` then reads it.
Started again after an interruption it goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .config import DiTTrainingConfig, load_config
from .errors import UserError, run_program


def main() -> None:
    config = load_config(DiTTrainingConfig, sys.argv[1:])
    from accelerate import Accelerator  # after the config: a wrong key is told within a second

    from .environment import set_cpu_threads
    from .latent_cache import prepare_cache
    from .models import load_vae
    from .precision import agree_on_mixed_precision

    set_cpu_threads()
    try:
        accelerator = Accelerator(mixed_precision=agree_on_mixed_precision(config.train.mixed_precision).precision)
    except ValueError as error:
        raise UserError(f"train.mixed_precision does not fit: {error}") from error
    cache = prepare_cache(config, load_vae(config.vae).to(accelerator.device), accelerator)
    accelerator.print(
        f"{len(cache)} clips in {len(cache.classes)} classes; {len(cache.bad_videos)} videos skipped; the latents lie "
        f"in {Path(cache.folder)}."
    )


if __name__ == "__main__":
    run_program(main)
