"""The full pipeline on a small dataset: clips -> VidTwin -> latents -> DiT -> generated clips -> report.

    python -m vidgen.demo --output-dir runs/demo          (the command of `make demo`)

The demo samples from the bundled models pretrained/real and pretrained/sprites, then trains a smaller one from
scratch. It runs the training programs as a user does, generates, measures, and writes OUTPUT_DIR/report.html and
OUTPUT_DIR/summary.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from rich.console import Console
from rich.table import Table

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline

from ..common.config import load_config
from ..common.errors import run_program
from ..common.images import class_grid, component_grid, reenactment_grid, save_clip_grid_video
from ..common.io import atomic_write
from ..common.options import expand_home
from ..common.plots import loss_curves
from ..data.dataset import ClipDataset, collate_clips
from ..data.sprites import write_sprites
from ..metrics.detectors import get_detector
from ..metrics.frechet import FeatureStatistics, frechet_distance, quiet_about_rank
from ..metrics.reconstruction import ReconstructionMetrics, downsample_baseline, mean_color_baseline
from ..training.config import DiTTrainingConfig
from .bundled import (
    FPS,
    decompose_real_video,
    load_for_sampling,
    sample_clips,
    sample_real_video,
    sample_sprites,
)
from .launch import launch_training
from .report import write_report

DETECTOR = "pooled_pixels"
COMPONENTS = ("both", "structure", "dynamics")
VALIDATION_PER_CLASS = 8
# Fewer steps than in the configs, so that a CPU without bf16 products finishes within twelve minutes.
VAE_SETTINGS = ["train.max_train_steps=500", "train.validation_steps=250"]
DIT_SETTINGS = ["train.max_train_steps=3000"]
REPORT_MEDIA = (
    *("real.mp4", "real.png", "real_swaps.png", "photo.mp4", "photo.png", "gestures.mp4"),
    *("pretrained.mp4", "pretrained.png", "generated.mp4", "generated.png", "components.mp4", "components.png"),
    *("reenactment.png", "sprites.png", "vae_curves.png", "dit_curves.png"),
)
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vidgen.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--clips-per-class", type=int, default=80, help="training clips of each of the 8 motions")
    parser.add_argument("--samples-per-class", type=int, default=24, help="generated clips for the Fréchet distance")
    parser.add_argument("--vae", action="append", default=[], metavar="KEY=VALUE", help="override of the VAE's config")
    parser.add_argument("--dit", action="append", default=[], metavar="KEY=VALUE", help="override of the DiT's config")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()  # Diffusers warns about a cast that changes no module
    root = Path(expand_home(options.output_dir))
    started = time.monotonic()

    def announce(step: str) -> None:
        console.print(f"\n[bold]{step}[/bold]  [dim]{time.monotonic() - started:.0f} s[/dim]")

    announce("1/7  The bundled model of real video, pretrained/real: its two latents, and samples")
    console.print(f"First picture: {decompose_real_video(root)}")
    console.print(f"A photo animated: {sample_real_video(root)}")

    announce("2/7  Sampling from the bundled model of sprites, pretrained/sprites")
    console.print(f"Picture: {sample_sprites(root)}")

    announce("3/7  Writing sprites: shapes on backgrounds, eight motions, as .mp4 files")
    write_sprites(root / "data" / "train", options.clips_per_class, seed=0, show_progress=True)
    write_sprites(root / "data" / "validation", VALIDATION_PER_CLASS, seed=1)
    train, validation = (
        ClipDataset(root / "data" / part, num_frames=16, fps=FPS, resolution=64, train=False)
        for part in ("train", "validation")
    )
    class_grid(root / "sprites.png", load_first_clips(validation), validation.classes)

    for run in ("vae", "dit"):  # train from scratch, also where an earlier demo left a run
        shutil.rmtree(root / run, ignore_errors=True)
    announce("4/7  Training the autoencoder")
    train_data = f"data.root={root / 'data' / 'train'}"
    launch_training(
        "train_vae.py",
        "vae/sprites.yaml",
        [train_data, f"data.validation_root={root / 'data' / 'validation'}", f"output_dir={root / 'vae'}"],
        [*VAE_SETTINGS, *options.vae],
    )

    announce("5/7  Training the DiT on its latents")
    launch_training(
        "train_dit.py",
        "dit/sprites.yaml",
        [f"vae={root / 'vae' / 'final'}", train_data, f"output_dir={root / 'dit'}"],
        [*DIT_SETTINGS, *options.dit],
    )

    announce("6/7  Generating and measuring")
    pipeline = load_for_sampling(root / "dit" / "final")
    summary = evaluate_reconstruction(pipeline.autoencoder, validation, root)
    summary |= evaluate_generation(pipeline, train, options.samples_per_class, root)
    summary["seconds"] = round(time.monotonic() - started, 1)

    announce("7/7  Writing the report")
    with atomic_write(root / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    for run in ("vae", "dit"):
        loss_curves(root / f"{run}_curves.png", root / run / "metrics.jsonl")
    values = summary | format_values(summary, pipeline)
    page = write_report(root / "report.html", values, [root / name for name in REPORT_MEDIA])

    table = Table("figure", "value", title="Summary", title_justify="left")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    for name, path in {"report": page, "figures": root / "summary.json", "pipeline": root / "dit" / "final"}.items():
        console.print(f"{name:9} {path}")


# --- clips ----------------------------------------------------------------------------------------------------------


def load_first_clips(dataset: ClipDataset) -> torch.Tensor:
    """Load the first clip of every class: (classes, 3, T, H, W)."""
    first = {}
    for index, file in enumerate(dataset.files):
        first.setdefault(file.label, index)
    return torch.stack([dataset[first[label]]["video"] for label in sorted(first)])


def load_batches(dataset: ClipDataset, indices: Sequence[int], size: int = 16) -> list[torch.Tensor]:
    """Load clips by index, in batches (B, 3, T, H, W)."""
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [collate_clips([dataset[index] for index in group])["video"] for group in groups]


# --- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_reconstruction(vae: AutoencoderKLVidTwin, validation: ClipDataset, root: Path) -> dict[str, float]:
    """Measure PSNR and SSIM of held-out clips and two baselines; write pictures of components and latent swaps."""
    metrics = {name: ReconstructionMetrics() for name in ("", "_mean_color", "_downsample", "_structure", "_dynamics")}
    for clips in load_batches(validation, range(len(validation))):
        latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode()
        for components, name in zip(COMPONENTS, ("", "_structure", "_dynamics"), strict=True):
            metrics[name].update(vae.decode(latents, components).sample.float().cpu(), clips)
        metrics["_mean_color"].update(mean_color_baseline(clips), clips)
        metrics["_downsample"].update(downsample_baseline(clips, vae.latent_size), clips)

    clips = load_first_clips(validation)
    latents = vae.unpack(vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode())
    decoded = [vae.decode(latents, components).sample.float().cpu() for components in COMPONENTS]
    component_grid(root / "components.png", clips, *decoded)
    save_clip_grid_video(root / "components.mp4", torch.cat([clips, *decoded]), FPS, columns=len(clips))

    motions = [validation.classes.index(name) for name in ("slide", "orbit", "zoom", "swap")]
    swapped = [
        vae.decode(type(latents)(latents.structure[[i] * len(motions)], latents.dynamics[motions])).sample
        for i in motions
    ]
    reenactment_grid(root / "reenactment.png", clips[motions], clips[motions], torch.stack(swapped).float().cpu())

    values = {name: metric.compute() for name, metric in metrics.items()}
    return {f"{key}{name}": round(value[key], 4) for name, value in values.items() for key in ("psnr", "ssim")}


@torch.no_grad()
def evaluate_generation(pipeline: VidTwinPipeline, train: ClipDataset, per_class: int, root: Path) -> dict[str, Any]:
    """Sample clips of every class, and measure their Fréchet distance to real ones beside three references."""
    names = train.classes
    diffusion = load_config(DiTTrainingConfig, ["--config", str(root / "dit" / "config.yaml")]).diffusion
    settings = {"guidance_scale": diffusion.guidance_scale, "num_inference_steps": diffusion.num_inference_steps}
    clips = []
    for label, name in enumerate(names):
        console.print(f"  {per_class} clips of {name}")
        clips.append(sample_clips(pipeline, label, seed=label, num_videos_per_prompt=per_class, **settings))

    def take(count: int) -> tuple[torch.Tensor, list[str]]:
        labels = [name for name, group in zip(names, clips, strict=True) for _ in group[:count]]
        return torch.cat([group[:count] for group in clips]), labels

    class_grid(root / "generated.png", *take(2))
    video_clips, labels = take(4)
    save_clip_grid_video(root / "generated.mp4", video_clips, FPS, columns=8, labels=labels)

    # Two sets of real clips, each of the size of the generated one: the reference, and the noise level.
    detector = get_detector(DETECTOR)
    count = min(per_class * len(names), len(train) // 2)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    real = load_batches(train, order[:count])
    sets = {
        "generated": clips,
        "real_vs_real": real,
        "reconstructed": [
            pipeline.vae(x.to(pipeline.device, pipeline.vae.dtype)).sample.float().cpu().clamp(-1, 1) for x in real
        ],
        "mean_color": [mean_color_baseline(x) for x in real],
    }

    def compute_statistics(batches: list[torch.Tensor]) -> FeatureStatistics:
        return FeatureStatistics.of(torch.cat([detector(batch) for batch in batches]))

    reference = compute_statistics(load_batches(train, order[count : 2 * count]))
    figures: dict[str, Any] = {"frechet_detector": DETECTOR, "frechet_clips": count}
    with quiet_about_rank():  # a quick run has few clips; their count is stated
        for name, batches in sets.items():
            figures[f"frechet_{name}"] = round(frechet_distance(compute_statistics(batches), reference), 5)
    return figures


def format_values(summary: dict[str, Any], pipeline: VidTwinPipeline) -> dict[str, Any]:
    """Return the rounded figures at the top of the report, and the sizes of models, clips and latents."""
    vae = pipeline.autoencoder
    return {
        "psnr_short": f"{summary['psnr']:.2f}",
        "psnr_mean_color_short": f"{summary['psnr_mean_color']:.2f}",
        "minutes": f"{summary['seconds'] / 60:.1f}",
        "compression_rate": f"{100 * vae.compression_rate:.2f}",
        "vae_parameters": vae.num_parameters(),
        "dit_parameters": pipeline.transformer.num_parameters(),
        "clip_values": math.prod(vae.clip_shape),
        "latent_values": vae.latent_size,
        "structure_shape": vae.structure_shape,
        "dynamics_shape": vae.dynamics_shape,
    }


if __name__ == "__main__":
    run_program(main)
