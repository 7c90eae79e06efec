"""Better samples at equal compute: options of both trainings, alone and together, over seeds.

    python -m benchmarks.equal_compute --scale cpu
    python -m benchmarks.equal_compute --scale cpu --train TRAIN.csv --test TEST.csv --only "real-*" --seeds 2

Every variant trains a VAE and a DiT with the same FLOPs on the same clips in the same order. The Fréchet distance and
the class accuracy show which samples are better, the diagnostics of the latents why. Every run resumes, and every
score is kept: repeat the command to continue.
"""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import Any

from accelerate import PartialState

from vidgen.common.errors import UserError
from vidgen.metrics.detector_options import parse_detectors

from ..common import generation
from ..common.harness import Benchmark, Results
from . import page, runs
from .variants import list_variants

SEEDS = {"smoke": 1, "cpu": 3}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", type=Path, metavar="FOLDER|CSV", help="real videos to train on, besides sprites")
    parser.add_argument("--test", type=Path, metavar="FOLDER|CSV", help="real videos to score reconstruction on")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: 3; smoke 1)")
    parser.add_argument("--vae-steps", type=int, metavar="N", help="optimizer steps of a VAE (default: 1500)")
    parser.add_argument("--dit-steps", type=int, metavar="N", help="optimizer steps of a DiT (default: 3000)")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="only do runs DATA-VARIANT-seedN with matching names; no results"
    )
    parser.add_argument("--finished", action="store_true", help="write the results of the runs that are finished")
    generation.add_detector_options(parser, default="pooled_pixels")
    parser.set_defaults(dtype="float32")


def run(options: argparse.Namespace) -> Results | None:
    check_options(options)
    names = options.detector or ["pooled_pixels"]
    detectors = parse_detectors(names, "squeezenet", options.detector_sha256)
    detectors = [detector.to(PartialState().device) for detector in detectors]
    data: dict[str, Any] = {}
    vaes: dict[str, Any] = {}
    for seed in range(options.seeds):
        for data_set in runs.list_data_sets(options):
            for name, variant in list_variants(options.scale).items():
                if not is_selected(f"{data_set.name}-{name}-seed{seed}", options):
                    continue
                if options.finished and not runs.is_finished(data_set, name, variant, seed, options):
                    continue
                vae = runs.train_and_score_vae(data_set, variant.vae, seed, options)
                dit = runs.train_and_score_dit(data_set, name, variant, seed, detectors, options)
                data.setdefault(data_set.name, {}).setdefault(name, {})[str(seed)] = dit
                vaes.setdefault(data_set.name, {}).setdefault(variant.vae, {})[str(seed)] = vae
    if options.only:
        return None
    if not data:
        raise UserError("no run is finished yet: repeat the command without --finished.")
    return {"detectors": [detector.name for detector in detectors], "data": data, "vaes": vaes}


def check_options(options: argparse.Namespace) -> None:
    """Fill in the number of seeds; raise `UserError` for options that exclude each other or are missing."""
    if options.scale == "paper":
        raise UserError("the paper has no such table, so there is no --scale paper: take --scale cpu.")
    if (options.train is None) != (options.test is None):
        raise UserError("give both lists of real videos, --train and --test, or neither.")
    options.seeds = SEEDS[options.scale] if options.seeds is None else options.seeds
    for name in ("seeds", "vae_steps", "dit_steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}.")


def is_selected(name: str, options: argparse.Namespace) -> bool:
    """Whether `--only` does not skip a run."""
    return not options.only or any(fnmatch.fnmatch(name, pattern) for pattern in options.only)


BENCHMARK = Benchmark("equal_compute", "Better samples at equal compute", run, page.tables, page.plot, add_options)

if __name__ == "__main__":
    BENCHMARK.main()
