"""The same DiT on the latents of every autoencoder, at equal training FLOPs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinTransformer3DModel
from vidgen.common.config import load_config
from vidgen.data.listing import list_videos
from vidgen.metrics.detectors import Detector
from vidgen.metrics.flops import transformer_flops
from vidgen.metrics.fvd import FVDResult, Sampling, evaluate_pipeline
from vidgen.metrics.protocols import Protocol, get_protocol
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.dit_trainer import train_dit

from ..common.generation import load_placed_pipeline
from ..common.harness import REPOSITORY
from ..speed.timing import time_once
from .clips import FPS, NUM_FRAMES, SIDE
from .methods import Method
from .training import load_run

BATCH_SIZE = 32
TRAINING_FLOPS = {"smoke": 1e8, "cpu": 1e13}  # of one DiT: 735 steps on VidTwin's latents at scale cpu
SAMPLES = {"smoke": 4, "cpu": 384}  # generated and real clips
CROPS = {"smoke": 1, "cpu": 4}  # of each training video in the latent cache
SIZE = {"smoke": (1, 1, 24), "cpu": (4, 4, 32)}  # layers, heads and their dimension
SAMPLING = {
    "smoke": Sampling(guidance_scale=2.0, num_inference_steps=2, class_sampling="prior"),
    "cpu": Sampling(guidance_scale=2.0, num_inference_steps=25, class_sampling="prior"),
}
TIMED_SAMPLES = {"smoke": 1, "cpu": 8}
# The schedule of configs/dit/sprites.yaml, with uniform timesteps.
SETTINGS = [f"train.train_batch_size={BATCH_SIZE}", "train.checkpointing_steps=250", "train.validation_steps=1000000"]
SETTINGS += ["diffusion.timestep_sampling=uniform"]
SETTINGS += ["train.mixed_precision=bf16", "train.report_to=none", "train.dataloader_num_workers=0"]
SMOKE_SETTINGS = ["train.mixed_precision=no", "train.train_batch_size=4", "optim.lr_warmup_steps=0"]
DISTANCES = ("generated", "reconstructed", "real_vs_real", "mean_color")


def transformer_arguments(method: Method, scale: str) -> dict[str, Any]:
    """Constructor arguments of the DiT on the latents of a method."""
    layers, heads, head_dim = SIZE[scale]
    patches = {"structure_patch_size": (1, 1, 1), "dynamics_patch_size": (1, 1)} | method.patches
    size = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    return size | {name: list(patch) for name, patch in patches.items()}


def build_transformer(
    vae: VideoAutoencoder, method: Method, num_classes: int | None, scale: str
) -> VidTwinTransformer3DModel:
    """Create the untrained DiT on the latents of an autoencoder, on the meta device."""
    with torch.device("meta"):
        arguments = transformer_arguments(method, scale)
        return VidTwinTransformer3DModel.from_preset("tiny", vae=vae, num_classes=num_classes, **arguments)


def train_and_evaluate(
    run: str, method: Method, lists: dict[str, Path], detectors: Sequence[Detector], options: argparse.Namespace
) -> dict[str, Any]:
    """Train the DiT on the latents of a trained run, and measure its clips.

    Returns:
        `tokens`, `steps`, `flops`, `parameters`, `seconds_per_sample`; `fvd`, by detector, the distances of
        `FVDResult` with their intervals; `samples`.
    """
    scale = options.scale
    num_classes = len(list_videos(lists["train"])[1]) or None
    transformer = build_transformer(load_run(run, method, options), method, num_classes, scale)
    step_flops = 3 * transformer_flops(transformer) * BATCH_SIZE
    steps = max(1, round(TRAINING_FLOPS[scale] / step_flops))
    trained = train_dit(training_config(run, method, steps, lists, options))
    accelerator = Accelerator()  # after the training: the first one determines the precision of the process
    pipeline = load_placed_pipeline(trained, accelerator, options.dtype)
    results = evaluate_pipeline(
        pipeline,
        lists["train"],
        protocol_of(scale),
        detectors,
        accelerator,
        folder=options.work_dir / "latents" / "features",
        sampling=SAMPLING[scale],
        batch_size=16,
    )
    return {
        "tokens": sum(transformer.num_tokens),
        "steps": steps,
        "flops": steps * step_flops,
        "parameters": transformer.num_parameters(),
        "seconds_per_sample": time_sampling(pipeline, scale),
        "samples": SAMPLES[scale],
        "fvd": {result.detector["name"]: describe(result) for result in results or []},
    }


def training_config(
    run: str, method: Method, steps: int, lists: dict[str, Path], options: argparse.Namespace
) -> DiTTrainingConfig:
    """The config of a DiT, which resumes from its newest checkpoint."""
    scale, folder = options.scale, options.work_dir / "latents"
    settings = [*SETTINGS, *(SMOKE_SETTINGS if scale == "smoke" else [])]
    arguments = transformer_arguments(method, scale).items()
    settings += [f"model.overrides.{name}={value}" for name, value in arguments]
    settings += [
        f"vae={folder / 'runs' / run / 'final'}",
        f"data.root={lists['train']}",
        f"data.num_frames={method.frames}",
        f"data.resolution={SIDE[scale]}",
        f"data.fps={FPS[scale]}",
        f"latents.crops={CROPS[scale]}",
        f"train.max_train_steps={steps}",
        f"output_dir={folder / 'dits' / run}",
        "resume=latest",
    ]
    path = REPOSITORY / "configs" / "dit" / "sprites.yaml"
    return load_config(DiTTrainingConfig, ["--config", str(path), *settings])


def protocol_of(scale: str) -> Protocol:
    """The protocol of sprites, with the clips and classes of the training list."""
    counts = {"generated": SAMPLES[scale], "real": SAMPLES[scale]}
    sizes = {"frames": NUM_FRAMES[scale], "size": SIDE[scale], "fps": FPS[scale]}
    return replace(get_protocol("sprites"), name="latents", labels="real", **counts, **sizes)


def time_sampling(pipeline: Any, scale: str) -> float:
    """Seconds per generated clip, guidance and decoding included, in one batch after a warm-up."""
    count, sampling = TIMED_SAMPLES[scale], SAMPLING[scale]
    classes = pipeline.class_ids
    labels = [classes[i % len(classes)] for i in range(count)] if classes else None

    def sample(steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        pipeline(
            class_labels=labels,
            num_videos_per_prompt=1 if labels else count,
            guidance_scale=sampling.guidance_scale,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
        )

    sample(1)
    return time_once(lambda: sample(sampling.num_inference_steps), PartialState().device) / count


def describe(result: FVDResult) -> dict[str, Any]:
    """The distances of a result, each with its interval, None where there is none."""
    return {name: asdict(distance) if (distance := getattr(result, name)) else None for name in DISTANCES}
