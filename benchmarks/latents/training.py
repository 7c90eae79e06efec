"""Trainings of the autoencoders at equal FLOPs; each class has the best of a few learning rates.

A run is the folder WORK_DIR/latents/runs/NAME. It resumes from its checkpoint, and its record is
WORK_DIR/latents/trained/NAME.json.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.common.config import load_config
from vidgen.common.loading import load_vae
from vidgen.common.precision import place_model
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.metrics.flops import decode_flops, encode_flops
from vidgen.metrics.reconstruction import psnr
from vidgen.training.config import VAETrainingConfig
from vidgen.training.vae_trainer import train_vae

from ..common.harness import REPOSITORY, compute_once
from .clips import FPS, SIDE, scored_clips
from .methods import METHODS, PRESET, SEEDS, Method

BATCH_SIZE = 4
TRAINING_FLOPS = {"smoke": 1e9, "cpu": 4.15e13}  # of one run: 600 steps of VidTwin at scale cpu
TUNING_FRACTION = 0.4  # of these FLOPs, for a run that compares learning rates
# The objective and schedule of configs/vae/clips.yaml, without its GAN and flips.
SETTINGS = ["gan.weight=0", "data.flip=false", "data.clips_per_video=1", f"train.train_batch_size={BATCH_SIZE}"]
SETTINGS += ["train.checkpointing_steps=100", "train.checkpoints_total_limit=1", "train.validation_steps=1000000"]
SETTINGS += ["train.dataloader_num_workers=0", "train.report_to=none", "train.mixed_precision=bf16"]
SMOKE_SETTINGS = ["perceptual.weight=0", "data.fps=4", "train.mixed_precision=no"]


def run_once(options: argparse.Namespace, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the record WORK_DIR/latents/NAME.json, which `work` makes unless it exists.

    Raises:
        UserError: if it was made with other `options.settings`.
    """
    return compute_once(record_path(options, name), options.settings, work)


def record_path(options: argparse.Namespace, name: str) -> Path:
    """The file of a record."""
    return options.work_dir / "latents" / f"{name}.json"


@functools.cache
def training_flops(method: Method, rate: str, scale: str) -> float:
    """FLOPs of training on one clip: three times encoding and decoding."""
    with torch.device("meta"):
        model = method.build(rate, PRESET[scale], SIDE[scale])
    return 3 * (encode_flops(model) + decode_flops(model))


def count_steps(method: Method, rate: str, scale: str, fraction: float = 1.0) -> int:
    """Number of optimizer steps that a fraction of the FLOPs of a run suffices for."""
    return max(1, round(fraction * TRAINING_FLOPS[scale] / (training_flops(method, rate, scale) * BATCH_SIZE)))


def choose_learning_rates(options: argparse.Namespace, lists: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The best learning rate of each method by PSNR on the validation list, after short runs at the low rate.

    Returns:
        By method, `chosen` and `psnr` in dB by learning rate. Methods whose short runs `--only` skips are left out,
        unless these are finished.
    """
    rates: dict[str, dict[str, Any]] = {}
    for name, method in METHODS[options.scale].items():
        psnr = {}
        for learning_rate in method.learning_rates:
            run = f"{name}-lr{learning_rate:g}"
            if is_selected(run, options) or record_path(options, f"trained/{run}").exists():
                steps = count_steps(method, "low", options.scale, TUNING_FRACTION)
                record = train_and_measure(run, method, "low", 0, learning_rate, steps, options, lists)
                psnr[f"{learning_rate:g}"] = record["validation_psnr"]
        if len(psnr) == len(method.learning_rates):
            rates[name] = {"chosen": float(max(psnr, key=psnr.get)), "psnr": psnr}
    return rates


def is_selected(run: str, options: argparse.Namespace) -> bool:
    """Whether `--only` does not skip a run."""
    return not options.only or any(fnmatch.fnmatch(run, pattern) for pattern in options.only)


class Run(NamedTuple):
    """A training: its name, the name of its method, its rate, and its seed."""

    name: str
    method: str
    rate: str
    seed: int


def list_runs(options: argparse.Namespace) -> list[Run]:
    """The runs of a scale that `--only` does not skip, all methods of the low rate's first seed first."""
    runs = [
        Run(f"{method}-{rate}-seed{seed}", method, rate, seed)
        for rate, seeds in SEEDS[options.scale].items()
        for seed in range(seeds)
        for method in METHODS[options.scale]
    ]
    return [run for run in runs if is_selected(run.name, options)]


def train_and_measure(
    run: str,
    method: Method,
    rate: str,
    seed: int,
    learning_rate: float,
    steps: int,
    options: argparse.Namespace,
    lists: dict[str, Path],
) -> dict[str, Any]:
    """Train a run unless it has been.

    Returns:
        `steps`, `clips`, `flops`, `learning_rate`, `parameters`, latent shapes, `seconds` of training since its last
        start, and `validation_psnr` in dB.
    """

    def work() -> dict[str, Any]:
        started = time.monotonic()
        config = training_config(run, method, rate, seed, learning_rate, steps, options, lists)
        final = train_vae(config)
        seconds = round(time.monotonic() - started, 1)
        vae = place_model(load_run(run, method, options), PartialState().device, options.dtype)
        return {
            "folder": str(final),
            "steps": steps,
            "clips": steps * BATCH_SIZE,
            "flops": steps * BATCH_SIZE * training_flops(method, rate, options.scale),
            "learning_rate": learning_rate,
            "optimizer": method.optimizer,
            "parameters": vae.num_parameters(),
            "structure_shape": vae.structure_shape,
            "dynamics_shape": vae.dynamics_shape,
            "latent_size": vae.latent_size,
            "seconds": seconds,
            "validation_psnr": mean_psnr(vae, scored_clips(lists["validation"], options.scale)),
        }

    return run_once(options, f"trained/{run}", work)


@torch.no_grad()
def mean_psnr(vae: VideoAutoencoder, videos: ClipDataset) -> float:
    """Mean PSNR in dB of the reconstructions of clips."""
    loader = DataLoader(videos, batch_size=8, collate_fn=collate_clips, generator=torch.Generator())
    batches = (batch["video"].to(vae.device, vae.dtype) for batch in loader)
    return torch.cat([psnr(vae(video).sample, video) for video in batches]).mean().item()


def training_config(
    run: str,
    method: Method,
    rate: str,
    seed: int,
    learning_rate: float,
    steps: int,
    options: argparse.Namespace,
    lists: dict[str, Path],
) -> VAETrainingConfig:
    """The config of a run, which resumes from its newest checkpoint."""
    settings = [*SETTINGS, *(SMOKE_SETTINGS if options.scale == "smoke" else [])]
    if options.lpips_weights:
        settings.append(f"perceptual.weights={options.lpips_weights}")
    if options.lpips_sha256:
        settings.append(f"perceptual.weights_sha256={options.lpips_sha256}")
    model = [
        f"model.class_name={method.class_name}",
        f"model.preset={PRESET[options.scale]}",
        f"model.overrides={json.dumps(method.arguments(rate))}",
    ]
    data = [
        f"data.root={lists['train']}",
        f"data.validation_root={lists['validation']}",
        f"data.num_frames={method.frames}",
        f"data.resolution={SIDE[options.scale]}",
        f"data.fps={FPS[options.scale]}",
    ]
    training = [
        f"optim.name={method.optimizer}",
        f"optim.learning_rate={learning_rate}",
        f"train.max_train_steps={steps}",
        f"seed={seed}",
        f"output_dir={options.work_dir / 'latents' / 'runs' / run}",
        "resume=latest",
    ]
    path = REPOSITORY / "configs" / "vae" / "clips.yaml"
    return load_config(VAETrainingConfig, ["--config", str(path), *settings, *model, *data, *training])


def load_run(run: str, method: Method, options: argparse.Namespace) -> VideoAutoencoder:
    """Load the trained autoencoder of a run in float32, set to its clip size."""
    folder = options.work_dir / "latents" / "runs" / run / "final"
    return load_vae(str(folder), method.frames, SIDE[options.scale], SIDE[options.scale])
