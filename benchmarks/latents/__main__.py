"""Tables 1 and 2 measured at one scale: autoencoders at equal data, rate, size and training FLOPs, and DiTs on them.

    python -m benchmarks.latents --scale cpu --train LIST ... --clips LIST ... --lpips-weights FILE
    python -m benchmarks.latents --vae Lightricks/LTX-Video FOLDER ... --clips MCL-JCV --resolution 256 --num-frames 17

Trains small configurations of VidTwin, its single-latent ablation and the LTX, Wan and Magvit classes of Diffusers,
and scores them on other videos beside downsampling and block PCA, which learn nothing or a linear map. With `--vae`,
scores trained weights. Every run resumes, and every score is kept: repeat the command to continue.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import PartialState

from vidgen.common.errors import UserError

from ..common import vae_runs
from ..common.detectors import parse_detectors
from ..common.generation import add_detector_options
from ..common.harness import Benchmark, Results
from . import clips, scores, training
from .methods import METHODS, VALUES

DETECTORS = {"smoke": ["pooled_pixels"], "cpu": ["pooled_pixels", "squeezenet"], "paper": ["pooled_pixels"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", nargs="+", type=Path, metavar="FOLDER|CSV", help="videos to train on (scale cpu)")
    parser.add_argument("--clips", nargs="+", type=Path, metavar="FOLDER|CSV", help="videos to score on")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="only do runs with matching names; no results")
    vae_runs.add_lpips_options(parser)
    add_detector_options(parser, default="pooled_pixels; scale cpu also squeezenet")
    parser.set_defaults(dtype="float32")


def run(options: argparse.Namespace) -> Results | None:
    lists = prepare_lists(options)
    lpips, detectors = load_networks(options)
    networks = scores.networks_of(lpips, detectors)
    test = clips.scored_clips(lists["test"], options.scale)

    # Train and score.
    rates = training.choose_learning_rates(options, lists)
    for name, method_name, rate, seed in training.list_runs(options.scale):
        if method_name not in rates or not training.is_selected(name, options):
            continue
        method = METHODS[options.scale][method_name]
        steps = training.count_steps(method, rate, options.scale)
        learning_rate = rates[method_name]["chosen"]
        training.train_and_measure(name, method, rate, seed, learning_rate, steps, options, lists)
        training.run_once(
            options,
            f"scores/{name}",
            lambda n=name, m=method: scores.score_vae(training.load_run(n, m, options), test, networks, options.dtype),
        )
    return None


def prepare_lists(options: argparse.Namespace) -> dict[str, Path]:
    """The lists of videos of a scale; scale smoke writes sprites if no videos are given.

    Raises:
        UserError: if videos are missing, or the scale trains nothing.
    """
    if options.scale not in METHODS:
        raise UserError("--scale paper trains nothing here; score trained weights with --vae.")
    folder = options.work_dir / "latents" / "data"
    if options.scale == "smoke" and not (options.train or options.clips):
        options.train, options.clips = clips.write_smoke_videos(folder)
    if not (options.train and options.clips):
        raise UserError("give the videos to train on as --train FOLDER|CSV and those to score on as --clips.")
    frames = max(method.frames for method in METHODS[options.scale].values())
    return clips.write_lists(options.train, options.clips, folder, clips.FPS[options.scale], frames)


def load_networks(options: argparse.Namespace) -> tuple:
    """LPIPS and the detectors of the options, on this process's device."""
    lpips = vae_runs.load_lpips(options)
    detectors = parse_detectors(options.detector or DETECTORS[options.scale], "squeezenet", options.detector_sha256)
    return lpips, [detector.to(PartialState().device) for detector in detectors]


BENCHMARK = Benchmark(
    "latents", "Tables 1 and 2: autoencoders and latents", run, lambda results: "", add_options=add_options
)

if __name__ == "__main__":
    BENCHMARK.main()
