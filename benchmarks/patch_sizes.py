"""Fewer tokens: what folding the two latents into larger patches costs in quality and spares in work.

    python -m benchmarks.patch_sizes --scale cpu --pipeline runs/demo/dit/final
    accelerate launch -m benchmarks.patch_sizes --scale paper --pipeline FOLDER --data UCF-101 --protocol tats

DiTs that differ in their patches alone train on the latents of the pipeline's autoencoder, from the same seed: each
for as many steps as the others, and for as many FLOPs. Started again after an interruption it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from autoencoder import AutoencoderKLVidTwin
from benchmarks import ucf101_fvd
from benchmarks.common import vae_runs
from pipelines import VidTwinTransformer3DModel
from vidgen.common.config import load_config
from vidgen.common.io import atomic_write
from vidgen.common.loading import load_pipeline
from vidgen.common.precision import place_model, resolve_dtype
from vidgen.metrics.flops import transformer_flops
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.dit_trainer import train_dit

from .common.harness import REPOSITORY, Benchmark, Results, markdown_table
from .speed.timing import alternating

Patches = tuple[tuple[int, int, int], tuple[int, int]]  # over (query, row, column), and over (frame, position)
# What a scale trains with: a recipe, settings on top of it, and the steps that all take.
RECIPES = {
    "smoke": (
        "sprites",
        [
            *("model.preset=tiny-test", "data.num_frames=4", "data.fps=4", "train.mixed_precision=no"),
            *("train.ema_decay=0", "optim.lr_warmup_steps=0"),  # so that two steps leave a trace
        ],
    ),
    "cpu": ("sprites", []),
    "paper": ("ucf101", []),
}
STEPS = {"smoke": 2, "cpu": 1200, "paper": 100_000}
DEAREST = {"smoke": 2.0, "cpu": 4.0, "paper": math.inf}  # FLOPs of a step over the reference's, to take all steps
SAMPLES = {"smoke": 24, "cpu": 256, "paper": None}
SAMPLING_STEPS = {"smoke": 2, "cpu": 25, "paper": 50}
BUDGETS = {"steps": "as many steps", "flops": "as many FLOPs"}
REFERENCE = "queries, positions"  # the 65-token form of a VidTwin of 224 px: a token for each place and each frame


def forms(structure_shape: Sequence[int], dynamics_shape: Sequence[int]) -> dict[str, Patches]:
    """Patches by what they fold, the most tokens first; those that divide the latents.

    Args:
        structure_shape, dynamics_shape: (d_S, n_q, h_S, w_S) and (d_D, T, w_D + h_D) of the autoencoder.
    """
    queries, positions = structure_shape[1], dynamics_shape[2]
    every = {
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
        for name, patches in every.items()
        if all(size % patch == 0 for size, patch in zip(sizes, (*patches[0], *patches[1]), strict=True))
    }


def run(options: argparse.Namespace) -> Results | None:
    scale = options.scale
    options.samples = SAMPLES[scale] if options.samples is None else options.samples
    if scale != "paper":
        options.detector = options.detector or ["pooled_pixels"]
    vae = ucf101_fvd.pipeline_of(options, PartialState()).vae
    patches = forms(vae.structure_shape, vae.dynamics_shape)
    runs = {name: [f"model.overrides.{key}={list(size)}" for key, size in _sizes(p)] for name, p in patches.items()}
    models = {name: _untrained(vae, settings, options) for name, settings in runs.items()}
    flops = {name: transformer_flops(model) for name, model in models.items()}
    found: dict[str, Any] = {}
    for name, settings in runs.items():
        relative = flops[name] / flops[REFERENCE]
        steps = {"steps": STEPS[scale], "flops": max(1, round(STEPS[scale] / relative))}
        if relative > DEAREST[scale]:
            del steps["steps"]
        evaluated = {
            budget: train_and_evaluate(name, settings, count, options)
            for budget, count in sorted(steps.items(), key=lambda item: item[1])  # a longer training goes on
        }
        found[name] = {
            **dict(_sizes(patches[name])),
            "tokens": models[name].num_tokens,
            "flops": flops[name],
            "relative_flops": relative,
            "trained": {
                budget: {"steps": steps[budget], **evaluated[budget]} for budget in BUDGETS if budget in steps
            },
        }
    if not PartialState().is_main_process:
        return None
    for name, seconds in step_seconds(models).items():
        found[name]["step_seconds"] = seconds
    common = next(iter(found[REFERENCE]["trained"].values()))["evaluation"]
    for row in found.values():
        for trained in row["trained"].values():
            trained["distance"] = trained.pop("evaluation")["generated"]
    return {"vae": str(options.pipeline), "steps": STEPS[scale], "evaluation": common, "forms": found}


def _sizes(patches: Patches) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(("structure_patch_size", "dynamics_patch_size"), patches, strict=True))


def config_of(settings: Sequence[str], options: argparse.Namespace, *more: str) -> DiTTrainingConfig:
    """The scale's recipe on the latents of the options' autoencoder, with settings on top."""
    recipe, own = RECIPES[options.scale]
    folder = options.work_dir / "patch_sizes"
    if options.scale == "paper":
        data = [f"data.root={options.data}", "data.ucf101_split=1"]
    else:
        data = vae_runs.data_sets(argparse.Namespace(**{**vars(options), "clips": None}))["sprites"][:1]
    own = [*own, *data, f"vae={options.pipeline}", f"latent_cache={folder / 'latents'}", "train.report_to=none"]
    every = ["train.validation_steps=1000000", "train.checkpointing_steps=1000000"]
    arguments = ["--config", str(REPOSITORY / "configs" / "dit" / f"{recipe}.yaml"), *own, *every, *settings, *more]
    return load_config(DiTTrainingConfig, arguments)


def _untrained(
    vae: AutoencoderKLVidTwin, settings: Sequence[str], options: argparse.Namespace
) -> VidTwinTransformer3DModel:
    model = config_of(settings, options).model
    torch.manual_seed(0)
    return VidTwinTransformer3DModel.from_preset(model.preset, vae=vae, num_classes=8, **model.overrides).eval()


def train_and_evaluate(name: str, settings: Sequence[str], steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """The distance of a DiT's clips after so many steps, trained and measured unless it has been.

    A training of more steps goes on from one of fewer, which changes nothing where a recipe's rate is constant.

    Returns:
        `evaluation`: `FVDResult` of the scale's detector, as JSON holds it.
    """
    folder = options.work_dir / "patch_sizes" / name.replace(", ", "-").replace(" ", "")
    finished = folder / f"evaluation-{steps}.json"
    if finished.exists():
        return json.loads(finished.read_text())
    limit = [f"train.max_train_steps={steps}", f"output_dir={folder}", "resume=latest"]
    pipeline = load_pipeline(str(train_dit(config_of(settings, options, *limit))))
    pipeline.set_progress_bar_config(disable=True)
    accelerator = Accelerator()  # only now: the first one decides on the precision
    place_model(pipeline, accelerator.device, options.dtype)
    sampling = replace(ucf101_fvd.sampling_of(options), num_inference_steps=SAMPLING_STEPS[options.scale])
    (evaluated,) = ucf101_fvd.evaluate(pipeline, sampling, options, accelerator) or [None]
    if accelerator.is_main_process:
        with atomic_write(finished) as path:
            path.write_text(json.dumps({"evaluation": asdict(evaluated)}, indent=1))
    accelerator.wait_for_everyone()
    return json.loads(finished.read_text())


@torch.no_grad()
def step_seconds(models: dict[str, VidTwinTransformer3DModel]) -> dict[str, float]:
    """Time of a denoising step of one clip with guidance, taken in turns, in the fast precision."""
    device = PartialState().device
    dtype = resolve_dtype("auto", device)
    steps = {}
    for name, model in models.items():
        model = model.to(device, dtype)
        latents = torch.randn(2, model.latent_size, device=device, dtype=dtype)
        timestep, labels = torch.full((2,), 500.0, device=device), torch.tensor([0, 8], device=device)
        steps[name] = lambda m=model, x=latents, t=timestep, y=labels: m(x, t, y)
    return alternating(steps, device, repeats=15)


# --- what is shown ---------------------------------------------------------------------------------------------------


def tables(results: Results | None) -> str:
    if results is None:
        return ""
    rows = []
    reference = results["forms"][REFERENCE]["step_seconds"]
    for name, found in results["forms"].items():
        row = [
            name,
            sum(found["tokens"]),
            f"{found['relative_flops']:.2f}",
            f"{found['step_seconds'] / reference:.2f}",
        ]
        for budget in BUDGETS:
            trained = found["trained"].get(budget)
            row += [trained["steps"], _distance(trained["distance"])] if trained else [None, "not trained"]
        rows.append(row)
    header = ["folded into a token", "tokens", "FLOPs of a step", "time of a step"]
    for said in BUDGETS.values():
        header += ["steps", f"{said}: Fréchet distance"]
    evaluation = results["evaluation"]
    real, reconstructed = evaluation["real_vs_real"]["value"], evaluation["reconstructed"]["value"]
    said = (
        f"{evaluation['generated']['samples']} clips each, guidance {evaluation['settings']['guidance_scale']:g}, "
        f"detector `{evaluation['detector']['name']}`, with the 95 % interval; real clips against other real ones "
        f"{real:.3g}, reconstructed {reconstructed:.3g}, of one color {evaluation['mean_color']['value']:.3g}. "
        "FLOPs and time of a denoising step (one clip with guidance, bf16) are against "
        f'those of "{REFERENCE}", which is the 65-token form of a VidTwin of 224 px.'
    )
    return "\n\n".join([said, markdown_table(header, rows), "\n".join(f"* {v}" for v in verdicts(results))])


def _distance(distance: dict[str, Any]) -> str:
    low, high = distance["interval"]
    return f"{distance['value']:.3g} ({low:.3g} to {high:.3g})"


def verdicts(results: Results) -> list[str]:
    """Which form comes nearest to real clips at each budget, and which others cannot be told from it."""
    said = []
    for budget, words in BUDGETS.items():
        found = {
            name: row["trained"][budget]["distance"]
            for name, row in results["forms"].items()
            if budget in row["trained"]
        }
        best = min(found, key=lambda name: found[name]["value"])
        close = [
            name for name, row in found.items() if name != best and row["interval"][0] <= found[best]["interval"][1]
        ]
        tokens = {name: sum(results["forms"][name]["tokens"]) for name in found}
        line = f"After {words} {tokens[best]} tokens come nearest, {found[best]['value']:.3g}"
        if close:
            line += f"; not told from it by their intervals: {', '.join(str(tokens[name]) for name in close)}"
        said.append(f"{line}.")
    return said


def plot(results: Results, path: Path) -> None:
    """Distance against tokens, a curve for each budget."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4.4), dpi=110, layout="constrained")
    axes = figure.subplots()
    tokens = {name: sum(found["tokens"]) for name, found in results["forms"].items()}
    for (budget, words), color in zip(BUDGETS.items(), ("#2563eb", "#d97706"), strict=True):
        points = [
            (tokens[name], found["trained"][budget]["distance"])
            for name, found in results["forms"].items()
            if budget in found["trained"]
        ]
        x, distances = zip(*points, strict=True)
        y = [distance["value"] for distance in distances]
        reach = [[v - d["interval"][0] for v, d in zip(y, distances, strict=True)]]
        reach.append([d["interval"][1] - v for v, d in zip(y, distances, strict=True)])
        axes.errorbar(x, y, yerr=reach, color=color, marker="o", capsize=3, lw=1.5, label=f"after {words}")
    lines = (("real_vs_real", "real against other real clips", "left"), ("reconstructed", "reconstructed", "right"))
    for row, words, side in lines:
        value, place = results["evaluation"][row]["value"], 0.01 if side == "left" else 0.99
        axes.axhline(value, color="#6b7280", ls="--", lw=1)
        axes.text(place, value, words, transform=axes.get_yaxis_transform(), fontsize=8, va="bottom", ha=side)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(tokens.values()))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of a clip")
    axes.set_ylabel(f"Fréchet distance, {results['evaluation']['detector']['name']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


BENCHMARK = Benchmark(
    name="patch_sizes",
    title="Fewer tokens: patch sizes against quality",
    needs="a trained pipeline, UCF-101, I3D's weights and a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=ucf101_fvd.add_evaluation_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
