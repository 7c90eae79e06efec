"""Trainings of the VAEs and of the DiTs on them, their scores, and the diagnostics of the latents.

Runs are the folders WORK_DIR/equal_compute/vaes/DATA-VAE-seedN and dits/DATA-VARIANT-seedN. One is finished once it
has a `score.json`; an interrupted one resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from pipelines import VidTwinPipeline, VidTwinTransformer3DModel
from vidgen.common.config import load_config
from vidgen.common.loading import load_vae
from vidgen.common.precision import place_model
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.detectors import Detector
from vidgen.metrics.evaluation import evaluate_reconstruction
from vidgen.metrics.flops import decode_flops, encode_flops, muon_flops, transformer_flops
from vidgen.metrics.fvd import Sampling, evaluate_pipeline
from vidgen.metrics.latent_diagnostics import diagnose_latents
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import build_transformer, train_dit
from vidgen.training.optimizers import block_matrices
from vidgen.training.vae_trainer import train_vae

from ..common import generation, vae_runs
from ..common.harness import REPOSITORY, compute_once
from ..sprites.classifier import SEEDS, DrawnSprites, load_classifier, sprite_sizes
from ..sprites.tasks import PER_MOTION, SpriteTasks
from .variants import VAES, Variant

SPRITES = "sprites"
SCORE = "score.json"
# Optimizer steps by default. Only Muon adds FLOPs to a step, for which it makes fewer steps.
VAE_STEPS = {"smoke": 2, "cpu": 1500}
DIT_STEPS = {"smoke": 2, "cpu": 3000}
SAMPLES = {"smoke": 4, "cpu": 256}  # generated and real clips of a distance
DIAGNOSED = {"smoke": 4, "cpu": 64}  # clips
SAMPLING = {
    "smoke": Sampling(guidance_scale=2.0, num_inference_steps=2),
    "cpu": Sampling(guidance_scale=2.0, num_inference_steps=25),
}
FPS = {"smoke": 4, "cpu": 8}
# On top of configs/vae/sprites.yaml and configs/dit/sprites.yaml.
SHARED = ["train.validation_steps=1000000", "train.report_to=none"]
SMOKE = ["model.preset=tiny-test", "data.num_frames=4", "data.fps=4", "train.mixed_precision=no", "train.ema_decay=0"]
SMOKE_PATCHES = "model.overrides={structure_patch_size: [1, 1, 1], dynamics_patch_size: [1, 4]}"
VAE_SETTINGS = {
    "smoke": [*SMOKE, "data.resolution=32", "model.overrides={bottleneck: residual}"],
    "cpu": ["train.checkpointing_steps=100", "data.num_frames=16", "data.resolution=64"],
}
UNIFORM = "diffusion.timestep_sampling=uniform"  # of the baseline; the config has what was better here
DIT_SETTINGS = {
    "smoke": [UNIFORM, *SMOKE, "train.train_batch_size=4", "diffusion.num_inference_steps=2", SMOKE_PATCHES],
    "cpu": [UNIFORM, "train.checkpointing_steps=250", "diffusion.num_inference_steps=25"],
}


@dataclass(frozen=True)
class DataSet:
    """Videos to train and to score on.

    Args:
        name: in tables and names of runs.
        train, test: folders or CSV files.
        reference: the real clips of the Fréchet distance.
    """

    name: str
    train: Path
    test: Path
    reference: Path


def list_data_sets(options: argparse.Namespace) -> list[DataSet]:
    """Sprites, which are written if they are missing, and the real clips of the options.

    Sprites are compared with sprites of a seed that no training uses, real clips with their training list.
    """
    reference = generation.write_reference_sprites(options.work_dir, options.scale)
    sets = [DataSet(SPRITES, *vae_runs.sprite_folders(options), reference)]
    if options.train:
        sets.append(DataSet("real", options.train, options.test, options.train))
    return sets


def train_and_score_vae(data: DataSet, vae: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a VAE unless it has been.

    Returns:
        `steps`, `flops` of the training, `seconds` since its last start, `psnr` in dB and `ssim` of the test clips,
        `parameters`, `latent_size`, and `diagnostics` of its latents (`summarize_diagnostics`).
    """
    scale, folder = options.scale, vae_folder(data, vae, seed, options)
    steps = options.vae_steps or VAE_STEPS[scale]
    settings = [*SHARED, *VAE_SETTINGS[scale], f"data.root={data.train}", f"data.validation_root={data.test}"]
    settings += [f"train.max_train_steps={steps}", f"seed={seed}", *VAES[vae]]
    path = str(REPOSITORY / "configs" / "vae" / "sprites.yaml")

    def compute() -> dict[str, Any]:
        config = load_config(VAETrainingConfig, ["--config", path, *settings, f"output_dir={folder}", "resume=latest"])
        started = time.monotonic()
        final = train_vae(config)
        seconds = round(time.monotonic() - started, 1)
        model = place_model(load_vae(str(final)), PartialState().device, options.dtype)
        clips = vae_runs.held_out_clips(model, config)
        figures = evaluate_reconstruction(model, clips, networks=[])["figures"]["reconstruction"]["uint8"]
        diagnostics = diagnose_latents(model, data.test, num_clips=DIAGNOSED[scale], fps=FPS[scale])
        return {
            "steps": steps,
            "flops": 3 * (encode_flops(model) + decode_flops(model)) * config.train.train_batch_size * steps,
            "seconds": seconds,
            "psnr": figures["psnr"]["mean"],
            "ssim": figures["ssim"]["mean"],
            "parameters": model.num_parameters(),
            "latent_size": model.latent_size,
            "diagnostics": summarize_diagnostics(diagnostics.record),
        }

    return compute_once(folder / SCORE, settings, compute)


def vae_folder(data: DataSet, vae: str, seed: int, options: argparse.Namespace) -> Path:
    """The run folder of a VAE."""
    return options.work_dir / "equal_compute" / "vaes" / f"{data.name}-{vae}-seed{seed}"


def dit_folder(data: DataSet, variant: str, seed: int, options: argparse.Namespace) -> Path:
    """The run folder of a DiT."""
    return options.work_dir / "equal_compute" / "dits" / f"{data.name}-{variant}-seed{seed}"


def is_finished(data: DataSet, name: str, variant: Variant, seed: int, options: argparse.Namespace) -> bool:
    """Whether both runs of a variant are trained and have their scores; distances may be missing."""
    folders = vae_folder(data, variant.vae, seed, options), dit_folder(data, name, seed, options)
    return all((folder / SCORE).exists() for folder in folders)


def summarize_diagnostics(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record of `vidgen.metrics.latent_diagnostics` that distinguishes latents of one shape.

    Returns:
        By stream `nats_per_clip`, the largest excess `kurtosis` of its live channels, and `channel_nats` and
        `channel_stds`. By grid `scale`, the distance under scaling; `moved`, the mean over axes of the distance from a
        shifted latent over that of equal positions; and `high`, the mean share of power in the upper half of the
        frequencies. None where the grid has no such figure.
    """
    streams = {}
    for name, stream in record["streams"].items():
        channels = [channel for channel in stream["channels"] if not channel["dead"]] or stream["channels"]
        streams[name] = {
            "nats_per_clip": stream["nats_per_clip"],
            "kurtosis": max(channel["kurtosis"] for channel in channels),
            "channel_nats": [channel["nats"] for channel in stream["channels"]],
            "channel_stds": [channel["std"] for channel in stream["channels"]],
        }
    grids = {}
    for name, grid in record["grids"].items():
        shifts = [s["moved"] / s["unmoved"] for s in grid["shift"].values() if s["moved"] is not None and s["unmoved"]]
        grids[name] = {
            "scale": grid["scale"],
            "moved": mean_or_none(shifts),
            "high": mean_or_none([spectrum["high"] for spectrum in grid["spectrum"].values()]),
        }
    return {"streams": streams, "grids": grids}


def mean_or_none(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def train_and_score_dit(
    data: DataSet,
    name: str,
    variant: Variant,
    seed: int,
    detectors: Sequence[Detector],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train the DiT of a variant on the latents of its VAE, unless it has been.

    Returns:
        `steps`, `flops` of the training, `seconds` since its last start, `tokens`; `accuracy`: of the motion of
        generated, reconstructed and real sprites, None for other data; `distances`: by detector those of generated,
        reconstructed and other real clips.
    """
    scale = options.scale
    folder, vae = dit_folder(data, name, seed, options), vae_folder(data, variant.vae, seed, options)
    paths = [f"vae={vae / 'final'}", f"output_dir={folder}", f"latent_cache={vae / 'latents'}", "resume=latest"]
    path = str(REPOSITORY / "configs" / "dit" / "sprites.yaml")
    settings = [*SHARED, *DIT_SETTINGS[scale], f"data.root={data.train}"]
    planned = load_config(DiTTrainingConfig, ["--config", path, *settings, *variant.dit, *paths])
    steps = plan_steps(planned, options.dit_steps or DIT_STEPS[scale])
    settings += [f"train.max_train_steps={steps}", f"seed={seed}", *variant.dit]

    def compute() -> dict[str, Any]:
        config = load_config(DiTTrainingConfig, ["--config", path, *settings, *paths])
        started = time.monotonic()
        final = train_dit(config)
        seconds = round(time.monotonic() - started, 1)
        pipeline = generation.load_placed_pipeline(final, PartialState(), options.dtype)
        return {
            "steps": steps,
            "flops": sum(step_flops(pipeline.transformer, config)) * steps,
            "seconds": seconds,
            "tokens": sum(pipeline.transformer.num_tokens),
            "accuracy": score_motions(pipeline, options) if data.name == SPRITES else None,
        }

    known_by = [*settings, f"vae={variant.vae}"]
    score = compute_once(folder / SCORE, known_by, compute)
    names = [detector.name for detector in detectors]
    distances = compute_once(
        folder / f"distances-{'-'.join(names)}.json",
        known_by,
        lambda: measure_distances(folder / "final", data, detectors, options),
    )
    return score | {"distances": distances}


def plan_steps(config: DiTTrainingConfig, steps: int) -> int:
    """The number of steps of a config with the FLOPs of `steps` with AdamW, whose update costs next to nothing."""
    model, update = step_flops(build_transformer(config, load_vae(config.vae), num_classes=1), config)
    return round(steps * model / (model + update))


def step_flops(transformer: VidTwinTransformer3DModel, config: DiTTrainingConfig) -> tuple[float, float]:
    """FLOPs of a training step of a DiT: those of the model, and those of the optimizer."""
    optim = config.optim
    update = muon_flops(block_matrices(transformer, optim.muon_modulations)) if optim.name == "muon" else 0
    return 3 * transformer_flops(transformer) * config.train.train_batch_size, update


def measure_distances(
    folder: Path, data: DataSet, detectors: Sequence[Detector], options: argparse.Namespace
) -> dict[str, Any]:
    """Fréchet distances by detector of the pipeline in a folder; see `train_and_score_dit`."""
    scale = options.scale
    accelerator = Accelerator()  # after the training: the first one determines the precision of the process
    pipeline = generation.load_placed_pipeline(folder, accelerator, options.dtype)
    protocol, sampling = generation.protocol_of(options), SAMPLING[scale]
    if data.name != SPRITES:
        protocol = replace(protocol, name=data.name, labels="real")
        sampling = replace(sampling, class_sampling="prior")
    results = evaluate_pipeline(
        pipeline,
        data.reference,
        protocol,
        detectors,
        accelerator,
        folder=options.work_dir / "equal_compute" / "features",
        samples=SAMPLES[scale],
        sampling=sampling,
    )
    kinds = ("generated", "reconstructed", "real_vs_real")
    return {
        result.detector["name"]: {kind: (d := getattr(result, kind)) and asdict(d) for kind in kinds}
        for result in results or []
    }


def score_motions(pipeline: VidTwinPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Motion accuracy of generated, reconstructed and real sprites, by the classifier of `benchmarks.sprites`."""
    sizes = sprite_sizes(pipeline.autoencoder)
    sprites = DrawnSprites(len(MOTIONS) * PER_MOTION[options.scale], SEEDS["tested"], **sizes)
    classifier = load_classifier(options.work_dir / "sprites" / "classifier", options.scale, **sizes)
    tasks = SpriteTasks(pipeline, classifier, sprites, SAMPLING[options.scale])
    return tasks.generate()["accuracy"]
