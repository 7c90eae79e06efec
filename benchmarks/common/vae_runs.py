"""VAE trainings scored on held-out clips, shared by the benchmarks.

A run is WORK_DIR/vae_runs/NAME. It is finished once `score.json` exists; an interrupted run resumes from its
checkpoint. Programs share runs by name, and several programs may train different runs at once (`--only`).
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from autoencoder import AutoencoderKLVidTwin
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.io import atomic_write
from vidgen.data.dataset import ClipDataset
from vidgen.data.listing import find_videos
from vidgen.data.splits import list_train_and_validation
from vidgen.losses.lpips import LPIPS
from vidgen.metrics.evaluation import evaluate_reconstruction
from vidgen.training.config import VAETrainingConfig
from vidgen.training.vae_trainer import train_vae

from .harness import REPOSITORY, compute_once, write_sprites_once

# Config in configs/vae, and settings on top of it.
CONFIGS = {
    "smoke": ("sprites", ["model.preset=tiny-test", "data.resolution=32", "data.num_frames=4", "data.fps=4"]),
    "cpu": ("sprites", []),
    "paper": ("paper", []),
}
STEPS = {"smoke": 2, "cpu": 600, "paper": None}
SEEDS = {"smoke": 1, "cpu": 2, "paper": 2}
SPRITES_PER_CLASS = {"smoke": (2, 1), "cpu": (80, 8)}  # training, test
CLIPS_PER_VIDEO = 8  # of real videos
FULL = "full"  # the variant with the config unchanged, shared by all programs


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that train VAEs."""
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="real videos; a third is held out (scale cpu)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="UCF-101 beside its split files (scale paper)")
    add_lpips_options(parser)
    parser.add_argument("--only", metavar="PATTERN", help="only train runs with matching names; write no results")


def add_lpips_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lpips-weights", metavar="FILE", help="backbone weights (default: torch hub's cache)")
    parser.add_argument("--lpips-sha256", metavar="HASH", help="hash of that file, if it is not the published one")


def load_lpips(options: argparse.Namespace, backbone: str = "squeeze") -> LPIPS:
    """LPIPS from the options of `add_lpips_options`, on this process's device.

    Raises:
        UserError: if the file does not exist.
    """
    names = ("--lpips-weights ", "--lpips-sha256 ")
    lpips = LPIPS.from_pretrained(backbone, options.lpips_weights, options.lpips_sha256, names)
    return lpips.to(PartialState().device)


def data_sets(options: argparse.Namespace) -> dict[str, list[str]]:
    """Config settings of the data sets of a scale, by name; missing sprites are written.

    Raises:
        UserError: if the scale requires a folder that is not given.
    """
    if options.scale == "paper":
        if options.data is None:
            raise UserError("--scale paper trains on UCF-101: give its folder as --data FOLDER.")
        return {"ucf101": [f"data.root={options.data}", "data.ucf101_split=1", "data.num_validation_videos=500"]}
    settings = {"sprites": _train_and_test(*sprite_folders(options))}
    if options.clips is not None:
        with PartialState().main_process_first():
            test = held_out_videos(options.clips)
            train = [video for video in find_videos(options.clips) if video not in test]
            tables = [
                _write_list(options.work_dir / "data" / f"clips-{part}.csv", videos)
                for part, videos in (("train", train), ("test", test))
            ]
        settings["clips"] = _train_and_test(*tables)
        settings["clips"] += [f"data.clips_per_video={CLIPS_PER_VIDEO}", "data.flip=true"]
    return settings


def sprite_folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of training and of test sprites of a scale, which are written if they are missing."""
    train, test = (options.work_dir / "data" / "sprites" / part for part in ("train", "test"))
    small = dict(resolution=32) if options.scale == "smoke" else {}
    for seed, (folder, count) in enumerate(zip((train, test), SPRITES_PER_CLASS[options.scale], strict=True)):
        write_sprites_once(folder, count, seed=seed, **small)
    return train, test


def held_out_videos(clips: Path) -> list[Path]:
    """Every third video of a folder: these are scored on and not trained on."""
    return find_videos(clips)[1::3]


def _write_list(table: Path, videos: Sequence[Path]) -> Path:
    with atomic_write(table) as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([["path"], *([video.resolve()] for video in videos)])
    return table


def _train_and_test(train: Path, test: Path) -> list[str]:
    return [f"data.root={train}", f"data.validation_root={test}"]


def train_variants(variants: dict[str, Sequence[str]], options: argparse.Namespace) -> dict[str, Any] | None:
    """Train and score every variant on each data set of the scale, with each seed.

    All variants see the same clips in the same order for the same number of steps. Runs are named DATA-VARIANT-seedN,
    so programs share the variants that have the same name, `FULL` above all.

    Args:
        variants: config settings by name.

    Returns:
        `{"data": {DATA: {VARIANT: [score of each seed]}}}` with the total training `seconds`; None if `--only` skips
        a run.
    """
    data: dict[str, dict[str, list]] = {}
    for seed in range(SEEDS[options.scale]):
        for name, settings in data_sets(options).items():
            for variant, changes in variants.items():
                run = f"{name}-{variant}-seed{seed}"
                score = train_and_score(run, [*settings, f"seed={seed}", *changes], options)
                data.setdefault(name, {}).setdefault(variant, []).append(score)
    if options.only:
        return None
    return {"data": data, "seconds": sum(s["seconds"] for runs in data.values() for ss in runs.values() for s in ss)}


def train_full(data: str, seed: int, options: argparse.Namespace) -> tuple[Path, float]:
    """Train the unchanged config on a data set unless it has been; returns the run's folder and training seconds."""
    name = f"{data}-{FULL}-seed{seed}"
    score = train_and_score(name, [*data_sets(options)[data], f"seed={seed}", *overrides()], options)
    return options.work_dir / "vae_runs" / name, score["seconds"] if score else 0.0


def overrides(**arguments: Any) -> list[str]:
    """Config settings that override arguments of the model."""
    return [f"model.overrides={json.dumps(arguments)}"]


def compare(
    better: Sequence[dict], worse: Sequence[dict], paper_gain: float, key: str = "psnr", digits: int = 2
) -> str:
    """State whether a difference of the paper is reproduced: all seeds of one variant above all of the other.

    Args:
        better, worse: scores of two variants, seed by seed; the paper finds the first one better.
        paper_gain: the paper's difference, first minus second.
        key: name of the score.

    Returns:
        "paper +1.30, ours +0.20, +0.40 by seed: reproduced".
    """
    sign = math.copysign(1.0, paper_gain)
    high, low = ([sign * score[key] for score in scores] for scores in (better, worse))
    if len(high) == 1:
        verdict = "one seed, variance unknown"
    elif min(high) > max(low):
        verdict = "reproduced"
    else:
        verdict = "reversed" if max(high) < min(low) else "within seed variance"
    by_seed = ", ".join(f"{b[key] - w[key]:+.{digits}f}" for b, w in zip(better, worse, strict=True))
    return f"paper {paper_gain:+.{digits}f}, ours {by_seed} by seed: {verdict}"


def train_and_score(name: str, settings: Sequence[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """Train a VAE with the scale's config and these settings, unless it has been, and score it.

    Args:
        name: of the run; the same name must mean the same settings.

    Returns:
        Means over the held-out clips, of 8-bit pixels: `psnr` (dB, one MSE per clip), `psnr_frame`, `ssim`,
        `lpips_squeeze`, and the baselines `psnr_mean_color` and `psnr_downsample`; `num_clips`, `parameters`,
        `latent_size`, `compression_rate`, and the `seconds` of training since its last start. None for a run that
        `--only` skips.

    Raises:
        UserError: if an earlier run of this name had other settings; and everything that training raises.
    """
    if options.only and not fnmatch.fnmatch(name, options.only):
        return None
    folder = options.work_dir / "vae_runs" / name
    config_name, more = CONFIGS[options.scale]
    if STEPS[options.scale]:
        more = [*more, f"train.max_train_steps={STEPS[options.scale]}"]
    logging = ["train.checkpointing_steps=100", "train.validation_steps=100000", "train.report_to=none"]
    arguments = ["--config", str(REPOSITORY / "configs" / "vae" / f"{config_name}.yaml"), *more, *logging, *settings]
    config = load_config(VAETrainingConfig, [*arguments, f"output_dir={folder}", "resume=latest"])

    def train() -> dict[str, Any]:
        lpips = load_lpips(options)  # first, so that a missing file is noticed before the training
        started = time.monotonic()
        final = train_vae(config)
        seconds = round(time.monotonic() - started, 1)
        return score_vae(final, config, lpips) | {"seconds": seconds}

    return compute_once(folder / "score.json", [*more, *settings], train)


def score_vae(folder: Path, config: VAETrainingConfig, lpips: LPIPS) -> dict[str, Any]:
    """The scores of `train_and_score` of a trained VAE on the validation clips of its config, on all processes."""
    vae = AutoencoderKLVidTwin.from_pretrained(folder).to(PartialState().device).eval()
    measured = evaluate_reconstruction(vae, held_out_clips(vae, config), networks=[lpips])
    figures = {row: precisions["uint8"] for row, precisions in measured["figures"].items()}
    score = {name: figure["mean"] for name, figure in figures["reconstruction"].items()}
    score |= {f"psnr_{row}": figures[row]["psnr"]["mean"] for row in ("mean_color", "downsample")}
    sizes = {"parameters": vae.num_parameters(), "latent_size": vae.latent_size}
    return score | sizes | {"num_clips": measured["num_clips"], "compression_rate": vae.compression_rate}


def held_out_clips(vae: AutoencoderKLVidTwin, config: VAETrainingConfig) -> ClipDataset:
    """The clips that a run is scored on: those of its validation videos, the same number per video as in training."""
    _, files, classes = list_train_and_validation(config.data, seed=0)  # the same videos for runs of all seeds
    return ClipDataset(
        files,
        vae.clip_shape[1],
        config.data.fps,
        vae.clip_shape[2:],
        train=False,
        clips_per_video=config.data.clips_per_video,
        classes=classes,
    )


def config_of(run: Path) -> VAETrainingConfig:
    """The config that a run was trained with."""
    return load_config(VAETrainingConfig, ["--config", str(run / "config.yaml")])
