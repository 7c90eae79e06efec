"""The whole path on a small embedded data set: clips -> VidTwin -> latents -> DiT -> generated clips -> report.

    python -m vidgen.demo --output-dir runs/demo          (what `make demo` runs)

It first samples from the pretrained model pretrained/sprites. The rest is done by the programs a user runs; this
one calls them in order, generates, measures and writes OUTPUT_DIR/report.html and OUTPUT_DIR/summary.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
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
from ..common.loading import SHIPPED_MODEL
from ..common.options import expand_home
from ..common.plots import loss_curves
from ..common.precision import place_model
from ..data.dataset import ClipDataset, collate_clips
from ..data.sprites import write_sprites
from ..metrics.detectors import get_detector
from ..metrics.frechet import FeatureStatistics, RankDeficientWarning, frechet_distance
from ..metrics.reconstruction import ReconstructionMetrics, downsample_baseline, mean_color_baseline
from ..training.config import DiTTrainingConfig
from .launch import launch_training
from .report import Report

FPS = 8
DETECTOR = "pooled_pixels"
VALIDATION_PER_CLASS = 8
# Shorter trainings than the configs' own, so that a CPU without bf16 products also ends within twelve minutes.
VAE_SETTINGS = ["train.max_train_steps=500", "train.validation_steps=250"]
DIT_SETTINGS = ["train.max_train_steps=3000"]
COMPONENTS = ("both", "structure", "dynamics")
console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vidgen.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--clips-per-class", type=int, default=80, help="training clips of each of the 8 motions")
    parser.add_argument("--samples-per-class", type=int, default=24, help="generated clips the distance is taken over")
    parser.add_argument("--vae", action="append", default=[], metavar="KEY=VALUE", help="override of its recipe")
    parser.add_argument("--dit", action="append", default=[], metavar="KEY=VALUE", help="override of its recipe")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()  # Diffusers warns of a cast of no module
    root = Path(expand_home(options.output_dir))
    started = time.monotonic()

    def announce(step: str) -> None:
        console.print(f"\n[bold]{step}[/bold]  [dim]{time.monotonic() - started:.0f} s[/dim]")

    announce("1/6  Generating with the model in the box, pretrained/sprites")
    console.print(f"First picture: {generated_in_the_box(root)}")

    announce("2/6  Writing sprites: shapes over backgrounds, eight motions, as .mp4 files")
    write_sprites(root / "data" / "train", options.clips_per_class, seed=0, show_progress=True)
    write_sprites(root / "data" / "validation", VALIDATION_PER_CLASS, seed=1)
    validation = ClipDataset(root / "data" / "validation", num_frames=16, fps=FPS, resolution=64, train=False)
    first_of_each = first_clips(validation)
    class_grid(root / "sprites.png", first_of_each, validation.classes)

    for run in ("vae", "dit"):  # of an earlier demo: this one shows a training from its start
        shutil.rmtree(root / run, ignore_errors=True)
    announce("3/6  Training the autoencoder")
    train_data = f"data.root={root / 'data' / 'train'}"
    launch_training(
        "train_vae.py",
        "vae/sprites.yaml",
        [train_data, f"data.validation_root={root / 'data' / 'validation'}", f"output_dir={root / 'vae'}"],
        [*VAE_SETTINGS, *options.vae],
    )

    announce("4/6  Training the DiT on its latents")
    launch_training(
        "train_dit.py",
        "dit/sprites.yaml",
        [f"vae={root / 'vae' / 'final'}", train_data, f"output_dir={root / 'dit'}"],
        [*DIT_SETTINGS, *options.dit],
    )

    announce("5/6  Generating and measuring")
    pipeline = load_for_sampling(root / "dit" / "final")
    summary = reconstruction(pipeline.vae, validation, root)
    train = ClipDataset(root / "data" / "train", num_frames=16, fps=FPS, resolution=64, train=False)
    summary |= generation(pipeline, train, options.samples_per_class, root)
    summary["seconds"] = round(time.monotonic() - started, 1)

    announce("6/6  Writing the report")
    with atomic_write(root / "summary.json") as path:
        path.write_text(json.dumps(summary, indent=2) + "\n")
    page = write_report(summary, pipeline, root)
    show(summary)
    for name, path in {"report": page, "figures": root / "summary.json", "pipeline": root / "dit" / "final"}.items():
        console.print(f"{name:9} {path}")


def generated_in_the_box(root: Path) -> Path:
    """Clips of every class by the model in the box: a video, and a picture of eight of each one's frames."""
    pipeline = load_for_sampling(SHIPPED_MODEL)
    names = sorted(pipeline.labels, key=pipeline.labels.get)
    clips = sampled(pipeline, names, num_videos_per_prompt=4, guidance_scale=3.0, num_inference_steps=25)
    labels = [name for name in names for _ in range(4)]
    save_clip_grid_video(root / "in_the_box.mp4", clips, FPS, columns=8, labels=labels)
    return class_grid(root / "in_the_box.png", clips[::4], names)


def load_for_sampling(folder: Path) -> VidTwinPipeline:
    """A pipeline on the accelerator, or the CPU without one, in the precision that is fast there; without bars."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pipeline = place_model(VidTwinPipeline.from_pretrained(folder), device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: VidTwinPipeline, labels: int | list[str], seed: int = 0, **options: Any) -> torch.Tensor:
    """Generated clips (N, 3, T, H, W) in [-1, 1], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    frames = pipeline(class_labels=labels, generator=generator, output_type="pt", **options).frames
    return 2 * frames.float().cpu().transpose(1, 2) - 1


def first_clips(dataset: ClipDataset) -> torch.Tensor:
    """The first clip of every class: (classes, 3, T, H, W)."""
    first = {}
    for index, file in enumerate(dataset.files):
        first.setdefault(file.label, index)
    return torch.stack([dataset[first[label]]["video"] for label in sorted(first)])


def clip_batches(dataset: ClipDataset, indices: Sequence[int], size: int = 16) -> list[torch.Tensor]:
    """Clips of a data set by index, in batches (B, 3, T, H, W)."""
    groups = [indices[start : start + size] for start in range(0, len(indices), size)]
    return [collate_clips([dataset[index] for index in group])["video"] for group in groups]


@torch.no_grad()
def reconstruction(vae: AutoencoderKLVidTwin, validation: ClipDataset, root: Path) -> dict[str, float]:
    """PSNR and SSIM of held-out clips beside two references, with the pictures of both latents' roles."""
    metrics = {name: ReconstructionMetrics() for name in ("", "_mean_color", "_downsample", "_structure", "_dynamics")}
    for clips in clip_batches(validation, range(len(validation))):
        latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode()
        for components, name in zip(COMPONENTS, ("", "_structure", "_dynamics"), strict=True):
            metrics[name].update(vae.decode(latents, components).sample.float().cpu(), clips)
        metrics["_mean_color"].update(mean_color_baseline(clips), clips)
        metrics["_downsample"].update(downsample_baseline(clips, vae.latent_size), clips)

    clips = first_clips(validation)
    latents = vae.unpack(vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode())
    decoded = [vae.decode(latents, components).sample.float().cpu() for components in COMPONENTS]
    component_grid(root / "components.png", clips, *decoded)
    save_clip_grid_video(root / "components.mp4", torch.cat([clips, *decoded]), FPS, columns=len(clips))

    movers = [validation.classes.index(name) for name in ("slide", "orbit", "zoom", "swap")]
    crossed = torch.stack(
        [
            vae.decode(type(latents)(latents.structure[[a] * len(movers)], latents.dynamics[movers])).sample
            for a in movers
        ]
    )
    reenactment_grid(root / "reenactment.png", clips[movers], clips[movers], crossed.float().cpu())

    values = {name: metric.compute() for name, metric in metrics.items()}
    return {f"{key}{name}": round(value[key], 4) for name, value in values.items() for key in ("psnr", "ssim")}


@torch.no_grad()
def generation(pipeline: VidTwinPipeline, train: ClipDataset, per_class: int, root: Path) -> dict[str, Any]:
    """Clips of every class, and how far they are from real ones beside how far real ones are from each other."""
    names = train.classes
    diffusion = saved_config(root / "dit").diffusion
    clips = []
    for label, name in enumerate(names):
        console.print(f"  {per_class} clips of {name}")
        made = sampled(
            pipeline,
            label,
            seed=label,
            num_videos_per_prompt=per_class,
            guidance_scale=diffusion.guidance_scale,
            num_inference_steps=diffusion.num_inference_steps,
        )
        clips.append(made)

    def first(count: int) -> tuple[torch.Tensor, list[str]]:
        labels = [name for name, group in zip(names, clips, strict=True) for _ in group[:count]]
        return torch.cat([group[:count] for group in clips]), labels

    class_grid(root / "generated.png", *first(2))
    moving, labels = first(4)
    save_clip_grid_video(root / "generated.mp4", moving, FPS, columns=8, labels=labels)

    # As many real clips as generated ones, twice: one half to compare with, the other for the noise level.
    detector = get_detector(DETECTOR)
    count = min(per_class * len(names), len(train) // 2)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    real = clip_batches(train, order[:count])
    others = {
        "generated": clips,
        "real_vs_real": real,
        "reconstructed": [
            pipeline.vae(x.to(pipeline.device, pipeline.vae.dtype)).sample.float().cpu().clamp(-1, 1) for x in real
        ],
        "mean_color": [mean_color_baseline(x) for x in real],
    }

    def statistics(batches: list[torch.Tensor]) -> FeatureStatistics:
        return FeatureStatistics.of(torch.cat([detector(batch) for batch in batches]))

    reference = statistics(clip_batches(train, order[count : 2 * count]))
    figures: dict[str, Any] = {"frechet_detector": DETECTOR, "frechet_clips": count}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)  # few clips in a quick run; the count is stated
        for name, batches in others.items():
            figures[f"frechet_{name}"] = round(frechet_distance(statistics(batches), reference), 5)
    return figures


def saved_config(run: Path) -> DiTTrainingConfig:
    """The config a run was started with."""
    return load_config(DiTTrainingConfig, ["--config", str(run / "config.yaml")])


def write_report(summary: dict[str, Any], pipeline: VidTwinPipeline, root: Path) -> Path:
    """OUTPUT_DIR/report.html: everything the demo made, on one page."""
    for run in ("vae", "dit"):
        loss_curves(root / f"{run}_curves.png", root / run / "metrics.jsonl")
    vae, transformer = pipeline.vae, pipeline.transformer
    values = 3 * vae.config.num_frames * vae.config.sample_size**2
    report = Report("vidgen demo", "A video autoencoder with two latents, and a DiT that generates both, on sprites")
    report.figures(
        {
            "reconstruction": f"{summary['psnr']:.2f} dB",
            "the clip's mean color": f"{summary['psnr_mean_color']:.2f} dB",
            "clip as a latent": f"{100 * vae.compression_rate:.2f} %",
            "Fréchet distance, generated": summary["frechet_generated"],
            "real against real": summary["frechet_real_vs_real"],
            "time": f"{summary['seconds'] / 60:.1f} min",
        }
    )
    report.section(
        "The model in the box",
        "What pretrained/sprites generates, trained for two hours on two cores: four clips of each class.",
    )
    report.video(root / "in_the_box.mp4").image(root / "in_the_box.png", "One of each class, eight of its frames.")
    report.section(
        "Generated clips",
        "What this demo trained: four clips of each class, sampled by the DiT with the class as its only input and "
        "decoded by VidTwin.",
    )
    report.video(root / "generated.mp4").image(root / "generated.png", "Two of each class, eight of their frames.")
    report.table(
        [
            ["generated against real", summary["frechet_generated"]],
            ["reconstructed against real (what the autoencoder costs)", summary["frechet_reconstructed"]],
            ["real against real (the noise level)", summary["frechet_real_vs_real"]],
            ["mean color against real (what no shapes at all would score)", summary["frechet_mean_color"]],
        ],
        ["clips", "Fréchet distance"],
        f"On {summary['frechet_clips']} clips a side and 128 measurements of color, place, detail and motion each "
        f"(detector {summary['frechet_detector']}, vidgen/metrics/detectors.py); lower is closer.",
    )
    report.section(
        "Two latents",
        f"A clip of {values:,} values becomes {vae.latent_size:,}: structure {vae.structure_shape}, what is there and "
        f"how it slowly moves, and dynamics {vae.dynamics_shape}, the averages of every frame over its rows and "
        "columns. Top to bottom: held-out clips, decoded from both, from structure alone, from dynamics alone.",
    )
    report.video(root / "components.mp4").image(root / "components.png")
    report.table(
        [
            ["both latents", summary["psnr"], summary["ssim"]],
            ["structure alone", summary["psnr_structure"], summary["ssim_structure"]],
            ["dynamics alone", summary["psnr_dynamics"], summary["ssim_dynamics"]],
            ["the clip's one mean color", summary["psnr_mean_color"], summary["ssim_mean_color"]],
            [
                "rate-matched downsampling",
                summary["psnr_downsample"],
                summary["ssim_downsample"],
            ],
        ],
        ["held-out clips rebuilt from", "PSNR, dB", "SSIM"],
    )
    report.section("Reenactment", "The structure of one clip with the dynamics of another.")
    report.image(root / "reenactment.png")
    report.section("Training", "The data, and the curves of both trainings.")
    report.image(root / "sprites.png", "One held-out clip of each class.")
    report.image(root / "vae_curves.png", f"Autoencoder, {vae.num_parameters():,} parameters.")
    report.image(root / "dit_curves.png", f"DiT, {transformer.num_parameters():,} parameters.")
    return report.save(root / "report.html")


def show(summary: dict[str, Any]) -> None:
    """The summary as a table."""
    table = Table("figure", "value", title="Summary", title_justify="left")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


if __name__ == "__main__":
    run_program(main)
