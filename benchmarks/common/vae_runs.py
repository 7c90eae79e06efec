"""VAEs trained by a recipe and scored on held-out clips, each once: what ablations, sizes and rates are compared by.

A run lies in WORK_DIR/vae_runs/NAME. It is finished once it has its `score.json`; an interrupted one goes on from its
checkpoint. So programs share runs, a program that was cut off goes on, and several may work beside each other at
different runs (`--only`).
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
from vidgen.data.sprites import write_sprites
from vidgen.losses.lpips import LPIPS
from vidgen.metrics.evaluation import evaluate_reconstruction
from vidgen.training.config import VAETrainingConfig
from vidgen.training.vae_trainer import train_vae

from .harness import REPOSITORY

NEEDS = "UCF-101, vgg16-397923af.pth for LPIPS and 4 GPUs of 80 GB"  # what the paper's recipe takes
# What a scale trains with: a recipe, and settings on top of it.
RECIPES = {
    "smoke": ("sprites", ["model.preset=tiny-test", "data.resolution=32", "data.num_frames=4", "data.fps=4"]),
    "cpu": ("sprites", []),
    "paper": ("base", []),
}
STEPS = {"smoke": 4, "cpu": 600, "paper": None}
SEEDS = {"smoke": 1, "cpu": 2, "paper": 2}
SPRITES_PER_CLASS = {"smoke": (2, 1), "cpu": (80, 8)}  # to train on, to score on
CLIPS_PER_VIDEO = 8  # of the real videos, which are few
FULL = "full"  # the variant that is the recipe itself, which programs share


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every program that trains VAEs takes."""
    parser.add_argument(
        "--clips", type=Path, metavar="FOLDER", help="real videos; every third is scored on (scale cpu)"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="UCF-101, its split files beside it (scale paper)")
    add_lpips_options(parser)
    parser.add_argument("--only", metavar="PATTERN", help="train the runs whose names match, and make no table")


def add_lpips_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lpips-weights", metavar="FILE", help="of its backbone; torch hub's cache where not given")
    parser.add_argument("--lpips-sha256", metavar="HASH", help="of that file, where it is not the published one")


def load_lpips(options: argparse.Namespace, backbone: str = "squeeze") -> LPIPS:
    """LPIPS by the options of `add_lpips_options`, on this process's device.

    Raises:
        UserError: if there is no such file.
    """
    names = ("--lpips-weights ", "--lpips-sha256 ")
    lpips = LPIPS.from_pretrained(backbone, options.lpips_weights, options.lpips_sha256, names)
    return lpips.to(PartialState().device)


def data_sets(options: argparse.Namespace) -> dict[str, list[str]]:
    """The data that a scale trains and scores on, by name, as settings of a recipe; sprites are written where missing.

    Raises:
        UserError: if the scale needs a folder that is not given.
    """
    if options.scale == "paper":
        if options.data is None:
            raise UserError("--scale paper trains on UCF-101: give its folder as --data FOLDER.")
        return {"ucf101": [f"data.root={options.data}", "data.ucf101_split=1", "data.num_validation_videos=500"]}
    folder = options.work_dir / "data"
    with PartialState().main_process_first():
        small = dict(resolution=32) if options.scale == "smoke" else {}
        for part, count, seed in zip(("train", "test"), SPRITES_PER_CLASS[options.scale], (0, 1), strict=True):
            if not (folder / "sprites" / part).exists():
                write_sprites(folder / "sprites" / part, count, seed=seed, **small)
        sets = {"sprites": _train_and_test(folder / "sprites" / "train", folder / "sprites" / "test")}
        if options.clips is not None:
            videos = find_videos(options.clips)
            held_out = held_out_videos(options.clips)
            parts = {"train": [v for v in videos if v not in held_out], "test": held_out}
            tables = {part: folder / f"clips-{part}.csv" for part in parts}
            for part, table in tables.items():
                with atomic_write(table) as path, path.open("w", newline="") as file:
                    csv.writer(file).writerows([["path"], *([video.resolve()] for video in parts[part])])
            more = [f"data.clips_per_video={CLIPS_PER_VIDEO}", "data.flip=true"]
            sets["clips"] = _train_and_test(tables["train"], tables["test"]) + more
    return sets


def held_out_videos(clips: Path) -> list[Path]:
    """Every third of the real videos in a folder, which are scored on and not trained on."""
    return find_videos(clips)[1::3]


def _train_and_test(train: Path, test: Path) -> list[str]:
    return [f"data.root={train}", f"data.validation_root={test}"]


def train_variants(variants: dict[str, Sequence[str]], options: argparse.Namespace) -> dict[str, Any] | None:
    """Train and score every variant of a scale's recipe on each of its data sets, with each of its seeds.

    All see the same clips in the same order for the same number of steps. A variant's run is DATA-VARIANT-seedN, so
    programs share those that they name alike: `FULL`, the recipe itself, is everybody's.

    Args:
        variants: settings of the model by name.

    Returns:
        `{"data": {DATA: {VARIANT: [score of each seed]}}}` with the seconds that the trainings took together; None
        if `--only` leaves any out.
    """
    data: dict[str, dict[str, list]] = {}
    for seed in range(SEEDS[options.scale]):
        for name, settings in data_sets(options).items():
            for variant, own in variants.items():
                score = train_and_score(f"{name}-{variant}-seed{seed}", [*settings, f"seed={seed}", *own], options)
                data.setdefault(name, {}).setdefault(variant, []).append(score)
    if options.only:
        return None
    scores = [score for runs in data.values() for seeds in runs.values() for score in seeds]
    return {"data": data, "seconds": sum(score["seconds"] for score in scores if score)}


def full_run(data: str, seed: int, options: argparse.Namespace) -> tuple[Path, float]:
    """Folder of the recipe's own VAE on a data set, trained unless it has been, and the seconds its training took."""
    name = f"{data}-{FULL}-seed{seed}"
    score = train_and_score(name, [*data_sets(options)[data], f"seed={seed}", *overridden()], options)
    return options.work_dir / "vae_runs" / name, score["seconds"] if score else 0.0


def overridden(**overrides: Any) -> list[str]:
    """The settings of a variant that gives the model other arguments."""
    return [f"model.overrides={json.dumps(overrides)}"]


def gain(better: Sequence[dict], worse: Sequence[dict], paper_gain: float, key: str = "psnr", digits: int = 2) -> str:
    """Whether a difference of the paper's comes out, and is larger than what a seed makes: all of one above the other.

    Args:
        better, worse: scores of two variants, seed by seed, of which the paper finds the first better.
        paper_gain: the paper's difference, first minus second.
        key: of the figure.

    Returns:
        "the paper +1.30, ours +0.20, +0.40 by seed: holds".
    """
    ours = [b[key] - w[key] for b, w in zip(better, worse, strict=True)]
    sign = math.copysign(1.0, paper_gain)
    high, low = ([sign * score[key] for score in scores] for scores in (better, worse))
    if len(ours) == 1:
        verdict = "one seed says nothing of its spread"
    elif min(high) > max(low):
        verdict = "holds"
    else:
        verdict = "is reversed" if max(high) < min(low) else "lies within the seeds' spread"
    by_seed = ", ".join(f"{difference:+.{digits}f}" for difference in ours)
    return f"the paper {paper_gain:+.{digits}f}, ours {by_seed} by seed: {verdict}"


def gains(better: Sequence[dict], worse: Sequence[dict], psnr: float, ssim: float) -> str:
    """`gain` of both figures of the paper's Tables 3 and 4."""
    return f"PSNR: {gain(better, worse, psnr)}; SSIM: {gain(better, worse, ssim, 'ssim', 3)}"


def train_and_score(name: str, settings: Sequence[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """The scores of the VAE that a scale's recipe with these settings gives, trained unless it has been.

    Args:
        name: of the run; the same name must mean the same settings.

    Returns:
        Means over the held-out clips, of pixels as files hold them: `psnr` (dB, one MSE a clip), `psnr_frame`, `ssim`,
        `lpips_squeeze`, and for comparison `psnr_mean_color` and `psnr_downsample`; `num_clips`, `parameters`,
        `latent_size`, `compression_rate`, and the `seconds` that the training took since it was last started. None
        for a run that `--only` leaves out.

    Raises:
        UserError: if an earlier run of this name had other settings, and whatever the training raises.
    """
    if options.only and not fnmatch.fnmatch(name, options.only):
        return None
    folder = options.work_dir / "vae_runs" / name
    recipe, more = RECIPES[options.scale]
    if STEPS[options.scale]:
        more = [*more, f"train.max_train_steps={STEPS[options.scale]}"]
    every = ["train.checkpointing_steps=100", "train.validation_steps=100000", "train.report_to=none"]
    arguments = ["--config", str(REPOSITORY / "configs" / "vae" / f"{recipe}.yaml"), *more, *every, *settings]
    config = load_config(VAETrainingConfig, [*arguments, f"output_dir={folder}", "resume=latest"])
    finished = folder / "score.json"
    if finished.exists():
        record = json.loads(finished.read_text())
        if record["settings"] != [*more, *settings]:
            raise UserError(
                f"{folder} was made with other settings ({' '.join(record['settings'])}); delete it first."
            )
        return record["score"]
    lpips = load_lpips(options)  # before a training whose score it is needed for
    started = time.monotonic()
    final = train_vae(config)
    seconds = round(time.monotonic() - started, 1)
    score = score_vae(final, config, lpips) | {"seconds": seconds}
    if PartialState().is_main_process:
        with atomic_write(finished) as path:
            path.write_text(json.dumps({"settings": [*more, *settings], "score": score}, indent=1))
    PartialState().wait_for_everyone()
    return score


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
    """The clips that a run is scored on: of the videos its training validates on, as many of each as it trains on."""
    _, files, classes = list_train_and_validation(config.data, seed=0)  # the same videos for runs of all seeds
    return ClipDataset(
        files,
        vae.config.num_frames,
        config.data.fps,
        vae.config.sample_size,
        train=False,
        clips_per_video=config.data.clips_per_video,
        classes=classes,
    )


def config_of(run: Path) -> VAETrainingConfig:
    """The config that a run was trained with."""
    return load_config(VAETrainingConfig, ["--config", str(run / "config.yaml")])
