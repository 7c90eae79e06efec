"""Pipelines, DiT trainings and Fréchet distances, shared by the benchmarks of generated clips."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from pipelines import VidTwinPipeline
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.loading import load_pipeline
from vidgen.common.precision import place_model
from vidgen.common.progress import progress
from vidgen.metrics.detector_options import parse_detectors
from vidgen.metrics.detectors import Detector
from vidgen.metrics.fvd import CLASS_SAMPLING, CLASS_SAMPLING_OF, FVDResult, Sampling, evaluate_pipeline
from vidgen.metrics.protocols import PROTOCOLS, Protocol, get_protocol
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae

from .harness import write_sprites_once

SAMPLES = {"smoke": 24, "cpu": 512, "paper": None}  # None: the protocol's
SPRITES_PER_CLASS = {"smoke": 6, "cpu": 128}  # twice the samples, because real against real takes others
DETECTORS = {"smoke": ["pooled_pixels"], "cpu": ["pooled_pixels", "squeezenet"], "paper": None}
GUIDANCE = {"smoke": 2.0, "cpu": 2.0, "paper": 5.0}  # as in the configs
BATCH = 32  # clips that `sample_clips` samples at once
SHARDS = {"smoke": 8, "cpu": 64, "paper": 64}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of programs that measure a Fréchet distance of a pipeline's clips."""
    parser.add_argument("--pipeline", metavar="FOLDER", help="trained pipeline: OUTPUT_DIR/final of train_dit.py")
    data = "UCF-101 beside its split files (scale paper), or videos or a CSV file (default: sprites)"
    parser.add_argument("--data", type=Path, metavar="FOLDER|CSV", help=data)
    parser.add_argument("--split-files", type=Path, metavar="FOLDER", help="split files, if they are elsewhere")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="vidtwin", help="FVD protocol (scale paper)")
    parser.add_argument("--samples", type=int, metavar="N", help="generated clips (default: the protocol's)")
    add_detector_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated clips")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance (default: 5, sprites 2)")
    parser.add_argument("--batch-size", type=int, default=16, help="clips per batch of each process (default: 16)")
    parser.add_argument("--class-sampling", choices=CLASS_SAMPLING, help="class sampling (default: the protocol's)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes of each process that read real clips")


def add_detector_options(parser: argparse.ArgumentParser, default: str = "the protocol's") -> None:
    parser.add_argument(
        "--detector",
        action="append",
        metavar="NAME_OR_PATH",
        help=f"a name, the weights of the protocol's detector, or NAME=FILE; repeatable (default: {default})",
    )
    parser.add_argument("--detector-sha256", metavar="HASH", help="hash of its file, if not the published one")


def use_few_samples(options: argparse.Namespace, samples: dict[str, int | None]) -> None:
    """Set the defaults of comparisons of many models: `samples` by scale, and one detector without weights."""
    options.samples = samples[options.scale] if options.samples is None else options.samples
    if options.scale != "paper":
        options.detector = options.detector or ["pooled_pixels"]


def evaluate(
    pipeline: VidTwinPipeline, sampling: Sampling, options: argparse.Namespace, accelerator: Accelerator
) -> list[FVDResult] | None:
    """`evaluate_pipeline` with a program's options; all programs keep features in one folder."""
    protocol = protocol_of(options)
    if protocol.name == "clips":
        _, frames, *size = pipeline.autoencoder.clip_shape
        protocol = replace(protocol, frames=frames, size=tuple(size))
    return evaluate_pipeline(
        pipeline,
        options.data or write_reference_sprites(options.work_dir, options.scale),
        protocol,
        [detector.to(accelerator.device) for detector in detectors_of(options, protocol)],
        accelerator,
        folder=options.work_dir / "ucf101_fvd" / "features",
        samples=SAMPLES[options.scale] if options.samples is None else options.samples,
        sampling=sampling,
        split_files=options.split_files,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        shard_size=SHARDS[options.scale],
    )


def load_options_pipeline(options: argparse.Namespace, accelerator: Accelerator | PartialState) -> VidTwinPipeline:
    """Load the options' pipeline on the process's device; scale smoke trains a tiny one if none is given.

    Raises:
        UserError: if no pipeline, no data to compare with or no detector is given.
    """
    detectors_of(options, protocol_of(options))  # report a wrong one before any work
    if options.scale == "smoke" and options.pipeline is None:
        options.pipeline = train_tiny_pipeline(options.work_dir / "ucf101_fvd")
    if options.pipeline is None:
        raise UserError("name a pipeline, as train_dit.py leaves it in OUTPUT_DIR/final: --pipeline FOLDER.")
    if options.data is None and options.scale == "paper":
        raise UserError("--scale paper compares with UCF-101: give its folder as --data FOLDER.")
    return load_placed_pipeline(options.pipeline, accelerator, options.dtype)


def load_placed_pipeline(folder: str | Path, accelerator: Accelerator | PartialState, dtype: str) -> VidTwinPipeline:
    """Load a pipeline on the process's device, without progress bars."""
    pipeline = place_model(load_pipeline(str(folder)), accelerator.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_clips(pipeline: VidTwinPipeline, count: int, sampling: Sampling, **inputs: Any) -> torch.Tensor:
    """Sample clips (N, 3, T, H, W) in [-1, 1], on the CPU; the noise of each does not depend on its batch.

    Args:
        count: number of clips N.
        inputs: arguments of the pipeline: lists and tensors have a row per clip, other values serve all clips.
    """
    clips = []
    for indices in progress(torch.arange(count).split(BATCH), "sampling"):
        rows = {}
        for name, value in inputs.items():
            if isinstance(value, list):
                value = [value[i] for i in indices.tolist()]
            rows[name] = value[indices] if isinstance(value, torch.Tensor) else value
        frames = pipeline(
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=sampling.num_inference_steps,
            guidance_interval=sampling.guidance_interval,
            structure_delay=sampling.structure_delay,
            temperature=sampling.temperature,
            num_candidates=sampling.num_candidates,
            generator=[torch.Generator().manual_seed(sampling.seed + i) for i in indices.tolist()],
            output_type="pt",
            **rows,
        ).frames
        clips.append(2 * frames.float().cpu().transpose(1, 2) - 1)
    return torch.cat(clips)


def add_temperature(parser: argparse.ArgumentParser) -> None:
    """Declare `--temperature`."""
    parser.add_argument("--temperature", type=float, default=1.0, help="factor on the first noise (default: 1)")


def add_structure_delay(parser: argparse.ArgumentParser) -> None:
    """Declare `--structure-delay`."""
    parser.add_argument(
        "--structure-delay",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="fraction of the steps by which structure is denoised later than dynamics (default: 0)",
    )


def describe_delay(settings: dict[str, Any]) -> str:
    """The delay of structure in the settings of a record, as a part of a sentence; empty without one."""
    delay = settings.get("structure_delay", 0)
    return f", structure delayed by {delay:g} of the steps" if delay else ""


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How the options sample clips, with the default number of steps."""
    return Sampling(
        seed=options.seed,
        guidance_scale=GUIDANCE[options.scale] if options.guidance_scale is None else options.guidance_scale,
        class_sampling=options.class_sampling or CLASS_SAMPLING_OF[protocol_of(options).labels],
    )


def protocol_of(options: argparse.Namespace) -> Protocol:
    """The options' protocol, or at the smaller scales that of sprites with their number and size, or with `--data`."""
    if options.scale == "paper":
        return get_protocol(options.protocol)
    sprites = replace(get_protocol("sprites"), generated=SAMPLES[options.scale], real=SAMPLES[options.scale])
    if getattr(options, "data", None) is not None:  # some programs have no such option
        return replace(sprites, name="clips", labels="real")
    return replace(sprites, frames=4, size=32, fps=4) if options.scale == "smoke" else sprites


def detectors_of(options: argparse.Namespace, protocol: Protocol) -> list[Detector]:
    """The options' detectors, or the scale's, or the protocol's."""
    names = options.detector or DETECTORS[options.scale] or [protocol.detector]
    return parse_detectors(names, protocol.detector, options.detector_sha256)


def write_reference_sprites(work_dir: Path, scale: str) -> Path:
    """Write sprites of a seed that no training uses, unless they exist; returns their folder."""
    folder = work_dir / "data" / "sprites" / "fvd"
    small = dict(resolution=32, num_frames=8) if scale == "smoke" else {}
    return write_sprites_once(folder, SPRITES_PER_CLASS[scale], seed=2, show_progress=True, **small)


def train_tiny_pipeline(folder: Path) -> Path:
    """Train a tiny VAE and DiT on sprites for a few steps, to run all parts; returns the pipeline's folder."""
    final = folder / "dit" / "final"
    if (final / "model_index.json").exists():
        return final
    data = write_sprites_once(folder / "sprites", 2, seed=0, resolution=32)
    shared = [f"data.root={data}", "data.fps=4", "model.preset=tiny-test", "train.max_train_steps=4"]
    shared += ["train.train_batch_size=4", "train.mixed_precision=no", "train.report_to=none", "train.ema_decay=0"]
    shared += ["train.dataloader_num_workers=0"]
    settings = [
        "perceptual.weight=0",
        "gan.weight=0",
        "model.overrides={bottleneck: residual}",
        f"output_dir={folder}/vae",
    ]
    settings += ["data.resolution=32", "data.num_frames=4"]
    vae = train_vae(load_config(VAETrainingConfig, [*shared, *settings]))
    settings = [f"vae={vae}", "diffusion.num_inference_steps=2", "diffusion.frame_timesteps=0.5"]
    settings += [f"output_dir={folder}/dit"]
    return train_dit(load_config(DiTTrainingConfig, [*shared, *settings]))
