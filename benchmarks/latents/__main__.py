"""Tables 1 and 2 measured at one scale: autoencoders at equal data, rate, size and training FLOPs, and DiTs on them.

    python -m benchmarks.latents --scale cpu --train LIST ... --clips LIST ... --lpips-weights FILE
    python -m benchmarks.latents --scale paper --vae Lightricks/LTX-Video FOLDER ... --clips MCL-JCV --resolution 256

Trains small configurations of VidTwin, its single-latent ablation and the LTX, Wan and Magvit classes of Diffusers,
scores them on other videos beside rate-matched downsampling and block PCA, and trains the same DiT on each latent.
With `--vae`, scores and times given weights instead. Every run resumes, and every score is kept in WORK_DIR/latents:
repeat the command to continue.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.common.errors import UserError
from vidgen.common.loading import load_vae, weights_hash
from vidgen.common.weights import file_sha256
from vidgen.losses.lpips import LPIPS
from vidgen.metrics.detector_options import parse_detectors
from vidgen.metrics.detectors import Detector

from ..common import vae_runs
from ..common.generation import add_detector_options
from ..common.harness import Benchmark, Results, compute_once, digest, main
from . import clips, generation, page, scores, training
from .methods import METHODS, VALUES
from .results import build_results

DETECTORS = {"smoke": ["pooled_pixels"], "cpu": ["pooled_pixels", "squeezenet"], "paper": ["pooled_pixels"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", nargs="+", type=Path, metavar="FOLDER|CSV", help="videos to train on (scale cpu)")
    parser.add_argument("--clips", nargs="+", type=Path, metavar="FOLDER|CSV", help="videos to score on")
    parser.add_argument("--vae", nargs="+", metavar="NAME", help="folders or Hub names; score these, train nothing")
    parser.add_argument("--resolution", type=int, help="with --vae: side of the clips in pixels (default: by scale)")
    parser.add_argument("--num-frames", type=int, help="with --vae: frames of the clips (default: by scale)")
    parser.add_argument("--fps", type=float, help="with --vae: frame rate of the clips (default: by scale)")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="only do runs with matching names; no results")
    parser.add_argument("--finished", action="store_true", help="write the results of finished runs, train nothing")
    vae_runs.add_lpips_options(parser)
    add_detector_options(parser, default="pooled_pixels; scale cpu also squeezenet")
    parser.set_defaults(dtype="float32")


def run(options: argparse.Namespace) -> Results | None:
    lists = prepare_lists(options)
    if not options.finished:
        train_and_score(lists, options)
    return None if options.only else build_results(lists, options)


def train_and_score(lists: dict[str, Path], options: argparse.Namespace) -> None:
    """Do every run of a scale and its scores, unless they have been done.

    Raises:
        UserError: if they have been done with other videos, detectors, LPIPS weights or another precision.
    """
    scale, once = options.scale, partial(training.run_once, options)
    lpips, detectors = load_networks(options)
    networks = {"networks": [lpips], "detectors": detectors}
    options.settings = describe_settings(options, detectors, lists)
    test = clips.scored_clips(lists["test"], scale)

    # Train and score the autoencoders.
    rates = training.choose_learning_rates(options, lists)
    runs = [entry for entry in training.list_runs(options) if entry.method in rates]
    for entry in runs:
        method = METHODS[scale][entry.method]
        steps = training.count_steps(method, entry.rate, scale)
        arguments = (entry.rate, entry.seed, rates[entry.method]["chosen"], steps, options, lists)
        training.train_and_measure(entry.name, method, *arguments)
        load = partial(training.load_run, entry.name, method, options)
        once(f"scores/{entry.name}", lambda load=load: scores.score_vae(load(), test, networks, options.dtype))
        folder = str(options.work_dir / "latents" / "runs" / entry.name / "final")
        cost = partial(scores.measure_cost, folder, method.frames, clips.SIDE[scale], scale)
        once(f"costs/{entry.name}", cost)

    # Score the references.
    if training.is_selected("references", options):
        once("scores/real_vs_real", lambda: scores.real_vs_real(test, detectors))
        path = options.work_dir / "latents" / "block_pca.safetensors"
        pca = scores.fit_block_pca(lists["train"], max(VALUES[scale].values()), path, scale)
        for rate, values in VALUES[scale].items():
            downsample = partial(scores.score_downsampling, values, test, networks)
            once(f"scores/downsample-{rate}", downsample)
            once(f"scores/block_pca-{rate}", partial(scores.score_block_pca, pca, values, test, networks, scale))
        once("scores/curves", partial(scores.score_curves, pca, max(VALUES[scale].values()), test, scale))

    # Train and score the DiTs.
    for entry in runs:
        method = METHODS[scale][entry.method]
        once(
            f"dits/{entry.name}",
            partial(generation.train_and_evaluate, entry.name, method, lists, detectors, options),
        )


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


def load_networks(options: argparse.Namespace) -> tuple[LPIPS, list[Detector]]:
    """LPIPS and the detectors of the options, on this process's device."""
    names = options.detector or DETECTORS[options.scale]
    detectors = parse_detectors(names, "squeezenet", options.detector_sha256)
    return vae_runs.load_lpips(options), [detector.to(PartialState().device) for detector in detectors]


def describe_settings(
    options: argparse.Namespace, detectors: Sequence[Detector], lists: dict[str, Path]
) -> dict[str, Any]:
    """What all trainings and scores depend on, besides their names."""
    return {
        **{f"the videos of {name}": file_sha256(path) for name, path in lists.items()},
        "lpips": options.lpips_weights and file_sha256(Path(options.lpips_weights)),
        "detectors": {detector.name: detector.sha256 for detector in detectors},
        "dtype": options.dtype,
    }


def run_given(options: argparse.Namespace) -> Results:
    """Score the weights of `--vae` on the same clips."""
    if not options.clips:
        raise UserError("give the videos to score on as --clips FOLDER|CSV.")
    scale = options.scale
    side, frames = options.resolution or clips.SIDE[scale], options.num_frames or clips.NUM_FRAMES[scale]
    fps = options.fps or clips.FPS[scale]
    lpips, detectors = load_networks(options)
    folder = options.work_dir / "latents" / "given"
    table = folder / "clips.csv"
    clips.write_list(table, clips.list_long_videos(options.clips, fps, frames))
    videos = clips.scored_clips(table, scale, side, frames, fps)
    networks = {"networks": [lpips], "detectors": detectors}
    settings = describe_settings(options, detectors, {"clips": table}) | {"shape": [frames, side, side], "fps": fps}

    def measure(name: str, vae: VideoAutoencoder) -> dict[str, Any]:
        row = scores.score_vae(vae, videos, networks, options.dtype) | {"clip_shape": list(vae.clip_shape)}
        del row["clips"]
        return row | {"cost": scores.measure_cost(name, *vae.clip_shape[1:3], scale)}

    rows = {}
    for name in options.vae:
        vae = load_vae(name)
        vae.fit_clip_size(frames, side, side)
        own = settings | {"weights": weights_hash(vae)}
        rows[name] = compute_once(folder / f"{digest(own)}.json", own, partial(measure, name, vae))
    return {"clips": [frames, side, side], "fps": fps, "vaes": rows}


SHARED: dict[str, Any] = dict(add_options=add_options, program="latents")
BENCHMARK = Benchmark(
    "latents", "Tables 1 and 2: autoencoders and their latents", run, page.tables, page.plot, **SHARED
)
GIVEN = Benchmark("latents_given", "Table 1: given autoencoders", run_given, page.given_tables, **SHARED)

if __name__ == "__main__":
    words = sys.argv[1:]
    if GIVEN.name not in words and any(word.startswith("--vae") for word in words):
        words.insert(0, GIVEN.name)  # given weights have a separate record and page
    main(BENCHMARK, GIVEN, arguments=words)
