"""Tokens against quality: DiTs that patchify the two latents more or less coarsely.

    python -m benchmarks.patch_sizes --scale cpu --pipeline runs/demo/dit/final
    accelerate launch -m benchmarks.patch_sizes --scale paper --pipeline FOLDER --data UCF-101 --protocol tats

DiTs that differ only in their patch sizes are trained on the latents of the pipeline's autoencoder, with the same
seed, at equal steps and at equal FLOPs. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from matplotlib.figure import Figure

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel
from vidgen.common.config import load_config
from vidgen.metrics.flops import transformer_flops
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.dit_trainer import train_dit

from .common import generation
from .common.figures import BLUE, GRAY, ORANGE, errors, new_figure, set_log_axes
from .common.harness import REPOSITORY, Benchmark, Results, compute_once
from .common.tables import distance_cell, markdown_table
from .common.vae_runs import sprite_folders

PatchSizes = tuple[tuple[int, int, int], tuple[int, int]]  # (query, row, column), and (frame, position)
# Settings for a training of two steps; without warm-up and EMA the steps change the weights.
TINY = ["model.preset=tiny-test", "data.num_frames=4", "data.fps=4", "train.mixed_precision=no", "train.ema_decay=0"]
# Config in configs/dit, and settings on top of it.
CONFIGS = {
    "smoke": ("sprites", [*TINY, "optim.lr_warmup_steps=0"]),
    "cpu": ("sprites", []),
    "paper": ("ucf101", []),
}
STEPS = {"smoke": 2, "cpu": 1200, "paper": 100_000}
MAX_RELATIVE_FLOPS = {"smoke": 2.0, "cpu": 4.0, "paper": math.inf}  # of a step; above it, no training at equal steps
SAMPLES = {"smoke": 24, "cpu": 256, "paper": None}
SAMPLING_STEPS = {"smoke": 2, "cpu": 25, "paper": 50}
BUDGETS = {"steps": "equal steps", "flops": "equal FLOPs"}
# One token per position and per frame: the 65-token form of a VidTwin of 224 px.
REFERENCE = "queries, positions"


def forms(structure_shape: Sequence[int], dynamics_shape: Sequence[int]) -> dict[str, PatchSizes]:
    """Patch sizes by the axes that they merge, most tokens first; only those that divide the latents.

    Args:
        structure_shape, dynamics_shape: (d_S, n_q, h_S, w_S) and (d_D, T, w_D + h_D) of the autoencoder.
    """
    queries, positions = structure_shape[1], dynamics_shape[2]
    candidates = {
        "nothing": ((1, 1, 1), (1, 1)),
        "positions": ((1, 1, 1), (1, positions)),
        REFERENCE: ((queries, 1, 1), (1, positions)),
        f"{REFERENCE}, 2 x 2 places": ((queries, 2, 2), (1, positions)),
        f"{REFERENCE}, 2 x 2 places, 4 frames": ((queries, 2, 2), (4, positions)),
        f"{REFERENCE}, 4 x 4 places, 4 frames": ((queries, 4, 4), (4, positions)),
    }
    sizes = (*structure_shape[1:], *dynamics_shape[1:])
    return {
        name: patches
        for name, patches in candidates.items()
        if all(size % patch == 0 for size, patch in zip(sizes, (*patches[0], *patches[1]), strict=True))
    }


def run(options: argparse.Namespace) -> Results | None:
    scale = options.scale
    generation.use_few_samples(options, SAMPLES)
    vae = generation.load_options_pipeline(options, PartialState()).vae
    settings = {
        name: {"structure_patch_size": structure, "dynamics_patch_size": dynamics}
        for name, (structure, dynamics) in forms(vae.structure_shape, vae.dynamics_shape).items()
    }
    models = {name: build_untrained(vae, sizes, options) for name, sizes in settings.items()}
    flops = {name: transformer_flops(model) for name, model in models.items()}

    # Train and evaluate each form at both budgets, the shorter training first: the longer one continues it.
    rows: dict[str, Any] = {}
    for name, sizes in settings.items():
        relative = flops[name] / flops[REFERENCE]
        steps = {"steps": STEPS[scale], "flops": max(1, round(STEPS[scale] / relative))}
        if relative > MAX_RELATIVE_FLOPS[scale]:
            del steps["steps"]
        evaluations = {
            budget: train_and_evaluate(name, sizes, count, options)
            for budget, count in sorted(steps.items(), key=lambda item: item[1])
        }
        rows[name] = {**sizes, "tokens": models[name].num_tokens, "flops": flops[name], "relative_flops": relative}
        rows[name]["trained"] = {
            budget: {"steps": steps[budget], "distance": evaluations[budget]["generated"]}
            for budget in BUDGETS
            if budget in steps
        }
        if name == REFERENCE:
            common = evaluations["steps"]
    if not PartialState().is_main_process:
        return None

    return {"vae": str(options.pipeline), "steps": STEPS[scale], "evaluation": common, "forms": rows}


def config_of(sizes: dict[str, Sequence[int]], options: argparse.Namespace, *settings: str) -> DiTTrainingConfig:
    """The scale's config with these patch sizes, and settings on top."""
    name, more = CONFIGS[options.scale]
    if options.scale == "paper":
        data = [f"data.root={options.data}", "data.ucf101_split=1"]
    else:
        train, _ = sprite_folders(options)
        data = [f"data.root={train}"]
    paths = [f"vae={options.pipeline}", f"latent_cache={options.work_dir / 'patch_sizes' / 'latents'}"]
    rare = ["train.validation_steps=1000000", "train.checkpointing_steps=1000000", "train.report_to=none"]
    patches = [f"model.overrides.{key}={list(size)}" for key, size in sizes.items()]
    path = str(REPOSITORY / "configs" / "dit" / f"{name}.yaml")
    return load_config(DiTTrainingConfig, ["--config", path, *data, *paths, *rare, *more, *patches, *settings])


def build_untrained(
    vae: AutoencoderKLVidTwin, sizes: dict[str, Sequence[int]], options: argparse.Namespace
) -> VidTwinTransformer3DModel:
    model = config_of(sizes, options).model
    torch.manual_seed(0)
    return VidTwinTransformer3DModel.from_preset(model.preset, vae=vae, num_classes=8, **model.overrides).eval()


def train_and_evaluate(
    name: str, sizes: dict[str, Sequence[int]], steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train a DiT for a number of steps and evaluate its clips, unless that has been done; returns an `FVDResult`.

    A longer training continues a shorter one; with a constant learning rate the result is the same.
    """
    folder = options.work_dir / "patch_sizes" / name.replace(", ", "-").replace(" ", "")

    def compute() -> dict[str, Any] | None:
        limit = [f"train.max_train_steps={steps}", f"output_dir={folder}", "resume=latest"]
        trained = train_dit(config_of(sizes, options, *limit))
        accelerator = Accelerator()  # after the training: the first one determines the precision of the process
        pipeline = generation.load_placed_pipeline(trained, accelerator, options.dtype)
        sampling = replace(generation.sampling_of(options), num_inference_steps=SAMPLING_STEPS[options.scale])
        evaluations = generation.evaluate(pipeline, sampling, options, accelerator)
        return evaluations and asdict(evaluations[0])  # None on other processes than the main one

    return compute_once(folder / f"score-{steps}.json", sizes, compute)


# --- tables and plot -------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    rows = []
    for name, form in results["forms"].items():
        row = [name, sum(form["tokens"]), f"{form['relative_flops']:.2f}"]
        for budget in BUDGETS:
            trained = form["trained"].get(budget)
            row += [trained["steps"], distance_cell(trained["distance"])] if trained else [None, "not trained"]
        rows.append(row)
    header = ["merged into a token", "tokens", "relative FLOPs of a step"]
    for label in BUDGETS.values():
        header += ["steps", f"Fréchet distance, {label}"]
    evaluation = results["evaluation"]
    real, reconstructed, color = (
        f"{evaluation[row]['value']:.3g}" for row in ("real_vs_real", "reconstructed", "mean_color")
    )
    setting = (
        f"{evaluation['generated']['samples']} clips per model, guidance "
        f"{evaluation['settings']['guidance_scale']:g}, detector `{evaluation['detector']['name']}`, 95 % intervals; "
        f"real vs. other real clips {real}, reconstructed {reconstructed}, mean color {color}. FLOPs of a "
        f'denoising step are relative to "{REFERENCE}", the 65-token form of a VidTwin of 224 px.'
    )
    return "\n\n".join([setting, markdown_table(header, rows), "\n".join(f"* {line}" for line in verdicts(results))])


def verdicts(results: Results) -> list[str]:
    """The form with the lowest distance at each budget, and the others with overlapping intervals."""
    lines = []
    for budget, label in BUDGETS.items():
        distances = {
            name: form["trained"][budget]["distance"]
            for name, form in results["forms"].items()
            if budget in form["trained"]
        }
        tokens = {name: sum(results["forms"][name]["tokens"]) for name in distances}
        best = min(distances, key=lambda name: distances[name]["value"])
        high = distances[best]["interval"][1]
        close = [str(tokens[name]) for name, d in distances.items() if name != best and d["interval"][0] <= high]
        line = f"At {label} {tokens[best]} tokens have the lowest distance, {distances[best]['value']:.3g}"
        if close:
            line += f"; inconclusive (overlapping intervals): {', '.join(close)}"
        lines.append(f"{line}.")
    return lines


def plot(results: Results) -> Figure:
    """Distance against tokens, one curve per budget."""
    figure, [[axes]] = new_figure(7, 4.4)
    tokens = {name: sum(form["tokens"]) for name, form in results["forms"].items()}
    for (budget, label), color in zip(BUDGETS.items(), (BLUE, ORANGE), strict=True):
        points = [
            (tokens[name], form["trained"][budget]["distance"])
            for name, form in results["forms"].items()
            if budget in form["trained"]
        ]
        x, distances = zip(*points, strict=True)
        y = [distance["value"] for distance in distances]
        axes.errorbar(x, y, yerr=errors(distances), color=color, marker="o", capsize=3, lw=1.5, label=f"at {label}")
    lines = (("real_vs_real", "real vs. other real clips", 0.01), ("reconstructed", "reconstructed", 0.99))
    for row, label, place in lines:
        value, side = results["evaluation"][row]["value"], "left" if place < 0.5 else "right"
        axes.axhline(value, color=GRAY, ls="--", lw=1)
        axes.text(place, value, label, transform=axes.get_yaxis_transform(), fontsize=8, va="bottom", ha=side)
    set_log_axes(axes, sorted(set(tokens.values())))
    axes.set_xlabel("tokens per clip")
    axes.set_ylabel(f"Fréchet distance, {results['evaluation']['detector']['name']}")
    axes.legend(frameon=False, fontsize=9)
    return figure


BENCHMARK = Benchmark("patch_sizes", "Tokens against quality", run, tables, plot, generation.add_options)

if __name__ == "__main__":
    BENCHMARK.main()
