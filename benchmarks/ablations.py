"""Table 3: what each part of the two latents is worth, by training without it.

    python benchmarks/ablations.py --scale cpu --clips FOLDER
    accelerate launch benchmarks/ablations.py --scale paper --data UCF-101

All variants train on the same clips in the same order for the same steps; each with two seeds, whose spread says which
differences mean something.
"""

from __future__ import annotations

import argparse
import json

from autoencoder.presets import ABLATIONS

import vae_runs
VARIANTS = {"full": {}, **ABLATIONS}


def run(options: argparse.Namespace) -> dict:
    results: dict = {}
    for seed in range(vae_runs.SEEDS[options.scale]):
        for data, settings in vae_runs.data_sets(options).items():
            for variant, overrides in VARIANTS.items():
                own = [f"seed={seed}", f"model.overrides={json.dumps(overrides)}"]
                score = vae_runs.train_and_score(f"{data}-{variant}-seed{seed}", [*settings, *own], options)
                results.setdefault(data, {}).setdefault(variant, []).append(score)
    return results


if __name__ == "__main__":
    p = argparse.ArgumentParser(); vae_runs.add_options(p); p.add_argument("--scale"); 
    from pathlib import Path
    p.add_argument("--work-dir", type=Path)
    run(p.parse_args())
