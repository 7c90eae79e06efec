"""Drift of long videos: motion, identity, color and Fréchet distance by window, of roll-outs with and without history.

    python -m benchmarks.drift --scale cpu --pipeline FORCING --baseline pretrained/sprites

The pipeline is trained with `diffusion.frame_timesteps` on windows of longer sprites, as in
configs/dit/sprites_forcing.yaml. Parts of the roll-outs and the scores of every method are kept, so an interrupted
run resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure

from pipelines import VidTwinPipeline
from vidgen.common.errors import UserError
from vidgen.common.loading import weights_hash
from vidgen.data.sprites import MOTIONS, PERIOD
from vidgen.metrics.detector_options import parse_detectors
from vidgen.metrics.fvd import Sampling

from ..common import generation
from ..common.figures import BLUE, DARK_BLUE, GRAY, LIGHT_BLUE, ORANGE, TEAL, new_figure
from ..common.harness import Benchmark, Results, compute_once, digest
from ..common.tables import distance_cell, markdown_table, score_cell
from ..real.generation import compute_statistics
from ..sprites.classifier import DrawnSprites, load_classifier
from .scores import MEASURES, predict, score_videos
from .videos import BASELINE, METHODS, REAL, TODAY, Method, draw_real, roll_out, video_labels

SEEDS = {"tested": 2000, "real": 3000, "reference": 4000}  # of sprites; trainings use small seeds
VIDEOS = {"smoke": 8, "cpu": 128}
WINDOWS = {"smoke": 2, "cpu": 16}  # of a video, without overlap: 256 frames of 16-frame windows
STEPS = {"smoke": 1, "cpu": 25}
DETECTOR = "pooled_pixels"
COLORS = (GRAY, LIGHT_BLUE, BLUE, TEAL, ORANGE, DARK_BLUE, "#7c3aed", "#dc2626")  # of at most eight methods


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pipeline", metavar="FOLDER", help="model of sprites, trained with diffusion.frame_timesteps"
    )
    parser.add_argument("--baseline", metavar="FOLDER", help="another model, rolled out without history only")
    parser.add_argument("--videos", type=int, metavar="N", help="videos of each method (default: 128)")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 25)")


def run(options: argparse.Namespace) -> Results:
    check_options(options)
    scale = options.scale
    pipeline = load_sprite_pipeline(options.pipeline, options)
    if not pipeline.transformer.config.frame_timesteps:
        raise UserError(
            f"--pipeline {options.pipeline} cannot roll out with history: train it with diffusion.frame_timesteps."
        )
    baseline = None if options.baseline is None else load_sprite_pipeline(options.baseline, options)
    length, resolution = pipeline.autoencoder.clip_shape[1:3]
    if baseline is not None and baseline.autoencoder.clip_shape != pipeline.autoencoder.clip_shape:
        raise UserError(f"--baseline {options.baseline} has clips of another size than --pipeline {options.pipeline}.")
    sizes, num_frames = {"num_frames": length, "resolution": resolution}, WINDOWS[scale] * length
    # Of windows that begin anywhere in a motion.
    classifier = load_classifier(options.work_dir / "drift" / "classifier", scale, **sizes, period=PERIOD)
    detector = parse_detectors([DETECTOR], DETECTOR, None)[0].to(PartialState().device)
    sampling = Sampling(guidance_scale=options.guidance, num_inference_steps=options.steps)

    # The references: windows of other sprites, and long real videos, which bound every score.
    count = options.videos
    labels = video_labels(count)
    reference = compute_statistics(detector, draw_real(count, SEEDS["reference"], length, resolution))

    def score(folder: Path, get_videos: Callable[[], torch.Tensor]) -> dict[str, Any]:
        judges = {"classifier": weights_hash(classifier), "detector": detector.name}
        return compute_once(
            folder / f"scores-{digest(judges)}.json",
            judges,
            lambda: score_videos(get_videos(), labels, reference, classifier, detector, length),
        )

    drawn = {**sizes, "frames": num_frames, "videos": count}
    real = partial(draw_real, count, SEEDS["real"], num_frames, resolution)
    methods = {REAL: score(options.work_dir / "drift" / f"real-{digest(drawn)}", real)}

    # Roll-outs.
    rolled = [(pipeline, method) for method in METHODS]
    if baseline is not None:
        rolled.insert(0, (baseline, Method(BASELINE, {})))
    for model, method in rolled:
        folder = rollout_folder(model, method, num_frames, options)
        methods[method.name] = score(folder, partial(roll_out, model, method, count, num_frames, sampling, folder))

    tested = DrawnSprites(count, SEEDS["tested"], **sizes, period=PERIOD)
    predicted = predict(tested.frames.permute(0, 4, 1, 2, 3), classifier)
    return {
        "pipeline": str(options.pipeline),
        "baseline": options.baseline and str(options.baseline),
        "videos": count,
        "frames": num_frames,
        "window": length,
        "detector": detector.name,
        "sampling": {"steps": options.steps, "guidance": options.guidance},
        "classifier": {
            name: (predicted[name] == tested.targets[name]).double().mean().item() for name in ("motion", "shape")
        },
        "options": {method.name: method.options for method in METHODS},
        "methods": methods,
    }


def check_options(options: argparse.Namespace) -> None:
    """Fill in defaults and the smoke scale's model; raise `UserError` for missing or wrong options."""
    scale = options.scale
    if scale == "paper":
        raise UserError("the paper has no long videos, so there is no --scale paper: take --scale cpu.")
    if options.pipeline is None and scale == "smoke":
        options.pipeline = generation.train_tiny_pipeline(options.work_dir / "ucf101_fvd")
    if options.pipeline is None:
        raise UserError(
            "name a pipeline that was trained on sprites with diffusion.frame_timesteps: --pipeline FOLDER."
        )
    options.steps = STEPS[scale] if options.steps is None else options.steps
    options.videos = VIDEOS[scale] if options.videos is None else options.videos
    if options.videos < 2:
        raise UserError(f"--videos must be 2 or more, not {options.videos}.")


def load_sprite_pipeline(folder: str | Path, options: argparse.Namespace) -> VidTwinPipeline:
    """Load a pipeline on the process's device; raise `UserError` unless it knows the motions of sprites."""
    pipeline = generation.load_placed_pipeline(folder, PartialState(), options.dtype)
    if missing := [motion for motion in MOTIONS if motion not in pipeline.labels]:
        raise UserError(f"{folder} must know the motions of sprites as classes; it has no {missing[0]!r}.")
    return pipeline


def rollout_folder(pipeline: VidTwinPipeline, method: Method, num_frames: int, options: argparse.Namespace) -> Path:
    """The folder of a method's roll-outs, which differs for other weights or settings."""
    settings = {
        "weights": [weights_hash(pipeline.transformer), weights_hash(pipeline.vae)],
        "scheduler": dict(pipeline.scheduler.config),
        "options": method.options,
        "frames": num_frames,
        "videos": options.videos,
        "steps": options.steps,
        "guidance": options.guidance,
    }
    return options.work_dir / "drift" / f"rollouts-{digest(settings)}"


# --- tables and plot -------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    sampling, accuracy = results["sampling"], results["classifier"]
    text = (
        f"{results['videos']} videos of {results['frames']} frames by each method, scored in windows of "
        f"{results['window']} frames without overlap; {sampling['steps']} steps, guidance {sampling['guidance']:g}. "
        f"Accuracy of the classifier on other drawn sprites: motion {accuracy['motion']:.1%}, shape "
        f"{accuracy['shape']:.1%}. In the tables: 95 % bootstrap intervals over videos in brackets. `{REAL}`: drawn "
        "sprites, which bound every score."
    )
    parts = [
        text,
        "Drift, the mean of the last quarter of the windows minus the first window, so that more is worse; the ratio "
        f"to that of `{TODAY}` after the bar:",
        drift_table(results),
    ]
    for key, heading in {**MEASURES, "fvd": f"Fréchet distance ({results['detector']}) to real windows"}.items():
        parts += [f"By window: {heading}.", window_table(results, key)]
    return "\n\n".join(parts)


def drift_table(results: Results) -> str:
    headings = {**MEASURES, "fvd": "Fréchet distance"}
    today = results["methods"][TODAY]["drift"]
    rows = []
    for name, scores in results["methods"].items():
        row = [name]
        for key in headings:
            drift, reference = scores["drift"][key], today[key]
            if key != "fvd":
                drift_value, reference = drift["value"], reference["value"]
                cell = score_cell(drift)
            else:
                drift_value, cell = drift, f"{drift:.3g}"
            has_ratio = name not in (TODAY, REAL) and reference > 0
            row.append(f"{cell} \\| {drift_value / reference:.2f}" if has_ratio else cell)
        rows.append(row)
    return markdown_table(["method", *headings.values()], rows)


def window_table(results: Results, key: str) -> str:
    methods = results["methods"]
    cell = distance_cell if key == "fvd" else score_cell
    rows = [
        [first[0]["first_frame"], *(cell(window[key]) for window in first)]
        for first in zip(*(scores["windows"] for scores in methods.values()), strict=True)
    ]
    return markdown_table(["first frame", *methods], rows)


def plot(results: Results) -> Figure:
    headings = {**MEASURES, "fvd": "Fréchet distance"}
    methods = results["methods"].items()
    figure, panels = new_figure(3.1 * len(headings), 3.4, columns=len(headings))
    for axes, (key, heading) in zip(panels[0], headings.items(), strict=True):
        for (name, scores), color in zip(methods, COLORS[: len(methods)], strict=True):
            frames = [window["first_frame"] for window in scores["windows"]]
            found = [window[key] for window in scores["windows"]]
            style = "--" if name == REAL else "-"
            axes.plot(frames, [score["value"] for score in found], style, color=color, label=name)
            bounds = [score["interval"] if key == "fvd" else (score["low"], score["high"]) for score in found]
            if all(bounds):
                axes.fill_between(frames, *zip(*bounds, strict=True), color=color, alpha=0.12, lw=0)
        axes.set_title(heading, fontsize=9)
        axes.set_xlabel("first frame of the window", fontsize=8)
        axes.grid(alpha=0.25)
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


BENCHMARK = Benchmark("drift", "Drift of long videos of sprites", run, tables, plot, add_options)

if __name__ == "__main__":
    BENCHMARK.main()
