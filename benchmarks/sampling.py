"""Fewer steps: how far generated clips are from real ones, against what a clip costs.

    python -m benchmarks.sampling --scale cpu --pipeline runs/demo/dit/final
    accelerate launch -m benchmarks.sampling --scale paper --pipeline FOLDER --data UCF-101 --protocol tats

Every setting makes the same clips by number: the same class, the same noise. Distances are those of `ucf101_fvd.py`,
and features are kept, so a program that was cut off goes on. Costs are measured anew at every start, on one process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import ucf101_fvd
from pipelines import VidTwinPipeline
from pipelines.latents import normalize_latents
from pipelines.schedulers import other_solver
from vidgen.common.errors import UserError
from vidgen.metrics.flops import clock
from vidgen.metrics.fvd import Sampling, class_labels

from .common.harness import Benchmark, Results, markdown_table

OWN = "own"
SOLVERS: dict[str, type[SchedulerMixin] | None] = {
    OWN: None,  # the pipeline's: DDIM, or Euler's for flow matching
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,  # both multistep, of order 2
    "UniPC": diffusers.UniPCMultistepScheduler,
}
Timestep = Callable[[], torch.Tensor]  # what some caches ask a pipeline for
CACHES: dict[str, Callable[[Timestep], Any]] = {
    "FirstBlock 0.05": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.05),
    "FirstBlock 0.2": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeer 2": lambda _: _taylor_seer(2),
    "TaylorSeer 4": lambda _: _taylor_seer(4),
    "FasterCache": lambda timestep: diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=timestep,
        tensor_format="BCHW",  # asked for, and of no use without the guess of the unconditional half
    ),
    "Pyramid 2": lambda timestep: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        current_timestep_callback=timestep,
    ),
}


def _taylor_seer(interval: int) -> diffusers.TaylorSeerCacheConfig:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=3, taylor_factors_dtype=torch.float32
    )


@dataclass(frozen=True)
class Setting:
    """A way to sample.

    Args:
        family: settings that are judged together.
        solver, cache: by their names above.
        steps: of the solver.
        guided: noise levels at which guidance acts; None for no guidance at all.
    """

    family: str
    solver: str = OWN
    steps: int = 50
    guided: tuple[float, float] | None = (0.0, 1.0)
    cache: str | None = None

    @property
    def name(self) -> str:
        said = [f"{self.solver} {self.steps}"]
        if self.guided is None:
            said.append("unguided")
        elif self.guided != (0.0, 1.0):
            said.append(f"guided {self.guided[0]:g} to {self.guided[1]:g}")
        if self.cache:
            said.append(self.cache)
        return ", ".join(said)


REFERENCE = Setting("fewer steps")
SETTINGS = (
    REFERENCE,
    Setting("fewer steps", steps=25),
    Setting("fewer steps", steps=10),
    Setting("fewer steps", steps=5),
    Setting("DPM-Solver++", "DPM-Solver++", 25),
    Setting("DPM-Solver++", "DPM-Solver++", 10),
    Setting("DPM-Solver++", "DPM-Solver++", 5),
    Setting("UniPC", "UniPC", 25),
    Setting("UniPC", "UniPC", 10),
    Setting("UniPC", "UniPC", 5),
    Setting("guidance", guided=None),
    Setting("guidance", guided=(0.0, 0.5)),
    Setting("guidance", guided=(0.5, 1.0)),
    Setting("guidance", guided=(0.2, 0.8)),
    *(Setting("caches", cache=cache) for cache in CACHES),
    Setting("together", "DPM-Solver++", 10, guided=(0.2, 0.8)),
    Setting("together", "UniPC", 10, guided=(0.2, 0.8)),
)
SMOKE = (REFERENCE, SETTINGS[4], SETTINGS[13], SETTINGS[14])
SMOKE_STEPS = 10  # to one
SAMPLES = {"smoke": 24, "cpu": 256, "paper": None}
TIMED = {"smoke": 2, "cpu": 8, "paper": 8}  # clips at a time, whose cost is measured
ROUNDS = {"smoke": 2, "cpu": 7, "paper": 5}  # of all settings by turns


def run(options: argparse.Namespace) -> Results | None:
    scale = options.scale
    options.samples = SAMPLES[scale] if options.samples is None else options.samples
    if scale != "paper":
        options.detector = options.detector or ["pooled_pixels"]
    if len(options.detector or []) > 1:
        raise UserError("name one --detector: settings are compared by one.")
    accelerator = Accelerator()
    pipeline = ucf101_fvd.pipeline_of(options, accelerator)
    sampling = ucf101_fvd.sampling_of(options)
    settings = settings_for(pipeline, scale)
    costs = (
        measure_costs(pipeline, settings, sampling, TIMED[scale], ROUNDS[scale]) if accelerator.is_main_process else {}
    )
    accelerator.wait_for_everyone()
    evaluations = {}
    for setting in settings:
        with applied(setting, pipeline):
            asked = sampling_for(setting, sampling)
            evaluations[setting.name] = ucf101_fvd.evaluate(pipeline, asked, options, accelerator)
    if not accelerator.is_main_process:
        return None
    reference = settings[0].name
    return {
        "pipeline": str(options.pipeline),
        "solver": type(pipeline.scheduler).__name__,
        "reference": reference,
        "evaluation": asdict(evaluations[reference][0]),
        "clips_timed": TIMED[scale],
        "rounds": ROUNDS[scale],
        "again": costs.pop("again"),
        "settings": {
            setting.name: {
                "family": setting.family,
                "steps": setting.steps,
                "distance": asdict(evaluations[setting.name][0].generated),
                **costs[setting.name],
            }
            for setting in settings
        },
    }


def settings_for(pipeline: VidTwinPipeline, scale: str) -> list[Setting]:
    """Those of the scale, the reference first; a model without classes has no guidance to vary."""
    settings = SETTINGS
    if scale == "smoke":
        settings = [replace(setting, steps=setting.steps // SMOKE_STEPS) for setting in SMOKE]
    if pipeline.transformer.config.num_classes is None:
        return [setting for setting in settings if setting.guided == (0.0, 1.0)]
    return list(settings)


@contextmanager
def applied(setting: Setting, pipeline: VidTwinPipeline) -> Iterator[None]:
    """The pipeline with a setting's solver and cache."""
    own, solver = pipeline.scheduler, SOLVERS[setting.solver]
    if solver is not None:
        pipeline.scheduler = other_solver(own, solver)
    if setting.cache:
        pipeline.transformer.enable_cache(CACHES[setting.cache](lambda: pipeline.current_timestep))
    try:
        yield
    finally:
        pipeline.scheduler = own
        if setting.cache:
            pipeline.transformer.disable_cache()


def sampling_for(setting: Setting, sampling: Sampling) -> Sampling:
    """How a setting draws clips."""
    return replace(
        sampling,
        num_inference_steps=setting.steps,
        guidance_scale=1.0 if setting.guided is None else sampling.guidance_scale,
        guidance_interval=setting.guided or (0.0, 1.0),
    )


# --- what a clip costs -----------------------------------------------------------------------------------------------


def measure_costs(
    pipeline: VidTwinPipeline, settings: Sequence[Setting], sampling: Sampling, clips: int, rounds: int
) -> dict[str, Any]:
    """What each setting takes, the first one being the reference.

    Settings take turns, and times are told against the reference's of the same round: what else a machine does comes
    and goes, and falls on all alike. At the end of a round the reference is timed once more, as "again".

    Returns:
        By name: `calls` of the transformer and `rows` it was given for a clip; `flops` of the transformer for a clip;
        `difference`, the largest of any latent from the reference's, in deviations; `seconds` for a clip, decoded, and
        `time`, that against the reference: medians, with the `time_range`.
    """
    costs: dict[str, Any] = {}
    expected = None
    for setting in settings:
        with applied(setting, pipeline):
            latents, counted = _counted(pipeline, sampling_for(setting, sampling), clips)
        expected = latents if expected is None else expected
        costs[setting.name] = {**counted, "difference": (latents - expected).abs().max().item()}
    taken: dict[str, list[float]] = {setting.name: [] for setting in settings} | {"again": []}
    for _ in range(rounds):
        for name, setting in [*((s.name, s) for s in settings), ("again", settings[0])]:
            with applied(setting, pipeline):
                started = clock(pipeline.device)
                _generate(pipeline, sampling_for(setting, sampling), clips, "pt")
                taken[name].append((clock(pipeline.device) - started) / clips)
    reference = taken[settings[0].name]
    for name, seconds in taken.items():
        ratios = [own / theirs for own, theirs in zip(seconds, reference, strict=True)]
        timed = {"time": statistics.median(ratios), "time_range": [min(ratios), max(ratios)]}
        costs[name] = costs.get(name, {}) | {"seconds": statistics.median(seconds), **timed}
    return costs


def _counted(pipeline: VidTwinPipeline, sampling: Sampling, clips: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Latents (B, L) in the DiT's units, and what the transformer did for each."""
    rows: list[int] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    # PyTorch counts all kernels of attention but the CPU's.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {on_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        latents = _generate(pipeline, sampling, clips, "latent")
    hook.remove()
    counted = {"calls": len(rows), "rows": sum(rows) / clips, "flops": counter.get_total_flops() / clips}
    return normalize_latents(latents, pipeline.vae), counted


def _generate(pipeline: VidTwinPipeline, sampling: Sampling, clips: int, output_type: str) -> torch.Tensor:
    labels = class_labels(pipeline, range(clips), replace(sampling, class_sampling="balanced"))
    return pipeline(
        class_labels=labels,
        num_videos_per_prompt=1 if labels else clips,
        guidance_scale=sampling.guidance_scale,
        num_inference_steps=sampling.num_inference_steps,
        guidance_interval=sampling.guidance_interval,
        generator=[torch.Generator().manual_seed(number) for number in range(clips)],
        output_type=output_type,
    ).frames


# --- what is shown ---------------------------------------------------------------------------------------------------


def tables(results: Results | None) -> str:
    if results is None:
        return ""
    reference = results["settings"][results["reference"]]
    rows = []
    for name, found in results["settings"].items():
        low, high = found["distance"]["interval"]
        rows.append(
            [
                name,
                f"{found['distance']['value']:.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{found['time']:.2f}",
                f"{found['flops'] / reference['flops']:.2f}",
                found["calls"],
                f"{found['rows']:g}",
                f"{found['difference']:.2g}" if found["family"] == "caches" else None,
            ]
        )
    header = ["setting", "Fréchet distance", "95 % interval", "time", "the DiT's FLOPs", "its calls", "rows a clip"]
    header.append("largest difference of latents")
    families = dict.fromkeys(found["family"] for found in results["settings"].values())
    verdicts = "\n".join(f"* {verdict(family, results)}" for family in families)
    evaluation = results["evaluation"]
    if evaluation["generated"]["value"] >= evaluation["mean_color"]["value"]:
        verdicts = (
            "The reference is no nearer to real clips than clips of one color are: nothing follows from distances."
        )
    return "\n\n".join([_said(results), markdown_table(header, rows), verdicts])


def _said(results: Results) -> str:
    evaluation, again = results["evaluation"], results["again"]
    real, settings = evaluation["real_vs_real"], evaluation["settings"]
    low, high = again["time_range"]
    return (
        f"{evaluation['generated']['samples']} clips a setting, guidance {settings['guidance_scale']:g}, detector "
        f"`{evaluation['detector']['name']}`, protocol `{evaluation['protocol']['name']}`; real clips against other "
        f"real ones {real['value']:.3g}, reconstructed {evaluation['reconstructed']['value']:.3g}. `own` is the "
        f"pipeline's {results['solver']}. Time is a clip's, decoded, against {results['reference']}'s of the same "
        f"round ({results['settings'][results['reference']]['seconds']:.3g} s; {results['clips_timed']} clips at a "
        f"time, median of {results['rounds']} rounds; the reference once more: {low:.2f} to {high:.2f}). Differences "
        "are in deviations of the latents."
    )


def verdict(family: str, results: Results) -> str:
    """The cheapest of a family that is as good as the reference: no farther than its interval reaches."""
    low, high = results["settings"][results["reference"]]["distance"]["interval"]
    within = f"the reference's interval, {low:.3g} to {high:.3g}"
    others = {
        name: found
        for name, found in results["settings"].items()
        if found["family"] == family and name != results["reference"]
    }
    good = {name: found for name, found in others.items() if found["distance"]["value"] <= high}
    if not others:
        return f"{family}: nothing was compared."
    if not good:
        name = min(others, key=lambda name: others[name]["distance"]["value"])
        return f"{family}: none keeps to {within}; the nearest is {name} with {others[name]['distance']['value']:.3g}."
    name = min(good, key=lambda name: good[name]["time"])
    found = good[name]
    if found["time"] >= 1:
        return f"{family}: what keeps to {within} is no faster: {name} takes {found['time']:.2f} of the time."
    better = ", below it" if found["distance"]["value"] < low else ""
    return (
        f"{family}: {name} is the cheapest within {within}{better}: {found['distance']['value']:.3g} in "
        f"{found['time']:.2f} of the time."
    )


COLORS = ("#1e3a8a", "#2563eb", "#0d9488", "#d97706", "#7c3aed", "#dc2626")


def plot(results: Results, path: Path) -> None:
    """Distance against time, on log scales: curves over steps beside all else, each setting a numbered point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    settings, real = results["settings"], results["evaluation"]["real_vs_real"]["value"]
    for axes in panels:
        axes.axhspan(*settings[results["reference"]]["distance"]["interval"], color="#e5e7eb", zorder=0)
        axes.axhline(real, color="#6b7280", ls="--", lw=1)
        axes.text(
            0.02, real, "real against other real clips", transform=axes.get_yaxis_transform(), fontsize=7, va="bottom"
        )
    families: dict[str, list[str]] = {}
    for name, found in settings.items():
        families.setdefault(found["family"], []).append(name)
    numbers = {name: number for number, name in enumerate(settings, 1)}
    for color, members in zip(COLORS, families.values(), strict=False):
        points = {name: (settings[name]["time"], settings[name]["distance"]["value"]) for name in members}
        curve = len({settings[name]["steps"] for name in members}) > 1
        axes = panels[0 if curve else 1]
        if curve:
            axes.plot(*zip(*sorted(points.values()), strict=True), color=color, lw=1, zorder=1)
        for name, (x, y) in points.items():
            label = f"{numbers[name]}  {name}"
            for shown in panels if name == results["reference"] else [axes]:
                shown.plot(x, y, "o", color=color, ms=11, mec="white", mew=0.7, label=label)
                label = None  # once in the legend
                shown.annotate(str(numbers[name]), (x, y), ha="center", va="center", color="white", fontsize=6.5)
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5]))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"time of a clip against {results['reference']}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel(f"Fréchet distance, {results['evaluation']['detector']['name']}")
    panels[0].set_title("solvers, by steps; gray: the reference's 95 % interval", fontsize=10)
    panels[1].set_title(f"{results['reference']}, and what spares work in other ways", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, markerscale=0.7)
    figure.savefig(path)


BENCHMARK = Benchmark(
    name="sampling",
    title="Fewer steps: quality against time",
    needs="a trained pipeline, UCF-101, I3D's weights and a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=ucf101_fvd.add_evaluation_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
