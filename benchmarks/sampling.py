"""Quality against sampling cost: solvers, guidance intervals, caches and models of few steps.

    python -m benchmarks.sampling --scale cpu --pipeline runs/demo/dit/final
    python -m benchmarks.sampling --scale cpu --pipeline PARENT --few-steps DISTILLED --guidance-scale 3
    python -m benchmarks.sampling sampling_real --scale cpu --pipeline FOLDER --data CLIPS.csv
    accelerate launch -m benchmarks.sampling --scale paper --pipeline FOLDER --data UCF-101 --protocol tats

Clip number i has the same class and the same noise in every setting. Distances are those of `benchmarks.ucf101_fvd`;
features are kept on disk, so an interrupted run resumes. Costs are measured at every start, on one process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipelines import VidTwinPipeline, VidTwinTransformer3DModel
from pipelines.latents import normalize_latents
from pipelines.schedulers import other_solver, prediction_type_of
from vidgen.common.errors import UserError
from vidgen.metrics.flops import clock
from vidgen.metrics.fvd import Sampling, class_labels

from .common import generation
from .common.figures import BLUE, DARK_BLUE, GRAY, LIGHT_GRAY, ORANGE, TEAL, new_figure, set_log_axes
from .common.harness import Benchmark, Results, main
from .common.tables import markdown_table

DEFAULT = "default"
SOLVERS: dict[str, type[SchedulerMixin] | None] = {
    DEFAULT: None,  # the pipeline's: DDIM, or Euler for flow matching
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,  # both multistep, of order 2
    "UniPC": diffusers.UniPCMultistepScheduler,
}
Timestep = Callable[[], torch.Tensor]  # returns the pipeline's current timestep, which some caches need
CACHES: dict[str, Callable[[Timestep], Any]] = {
    "FirstBlock 0.05": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.05),
    "FirstBlock 0.2": lambda _: diffusers.FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeer 2": lambda _: _taylor_seer(2),
    "TaylorSeer 4": lambda _: _taylor_seer(4),
    "FasterCache": lambda timestep: diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=timestep,
        tensor_format="BCHW",  # required, and unused without the approximation of the unconditional branch
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
        family: settings that are compared together.
        solver, cache: names in `SOLVERS` and `CACHES`.
        steps: of the solver.
        guidance_interval: noise levels at which guidance is applied; None for no guidance.
        few_steps: whether to use the transformer of `--few-steps`, which is not guided.
    """

    family: str
    solver: str = DEFAULT
    steps: int = 50
    guidance_interval: tuple[float, float] | None = (0.0, 1.0)
    cache: str | None = None
    few_steps: bool = False

    @property
    def name(self) -> str:
        if self.few_steps:
            return f"few-step model {self.steps}"
        parts = [f"{self.solver} {self.steps}"]
        if self.guidance_interval is None:
            parts.append("unguided")
        elif self.guidance_interval != (0.0, 1.0):
            parts.append("guidance {:g} to {:g}".format(*self.guidance_interval))
        return ", ".join([*parts, *([self.cache] if self.cache else [])])


REFERENCE = Setting("fewer steps")
GUIDANCE_INTERVALS = (None, (0.0, 0.5), (0.5, 1.0), (0.2, 0.8))
SETTINGS = (
    REFERENCE,
    *(Setting("fewer steps", steps=steps) for steps in (25, 10, 5)),
    *(Setting(solver, solver, steps) for solver in ("DPM-Solver++", "UniPC") for steps in (25, 10, 5)),
    *(Setting("guidance", guidance_interval=interval) for interval in GUIDANCE_INTERVALS),
    *(Setting("caches", cache=cache) for cache in CACHES),
    *(Setting("combined", solver, 10, guidance_interval=(0.2, 0.8)) for solver in ("DPM-Solver++", "UniPC")),
)
FEW_STEPS = tuple(
    Setting("few-step model", steps=steps, guidance_interval=None, few_steps=True) for steps in (1, 2, 4)
)
SMOKE = (REFERENCE, SETTINGS[4], SETTINGS[13], SETTINGS[14])
SMOKE_DIVISOR = 10  # of the steps
SAMPLES = {"smoke": 24, "cpu": 256, "paper": None}
TIMED_CLIPS = {"smoke": 2, "cpu": 8, "paper": 8}  # batch size of the cost measurement; one clip is timed too
ROUNDS = {"smoke": 2, "cpu": 7, "paper": 5}


def run(options: argparse.Namespace) -> Results | None:
    scale = options.scale
    generation.use_few_samples(options, SAMPLES)
    if len(options.detector or []) > 1:
        raise UserError("name one --detector: settings are compared by a single distance.")
    accelerator = Accelerator()
    pipeline = generation.load_options_pipeline(options, accelerator)
    sampling = generation.sampling_of(options)
    settings = settings_for(pipeline, scale)
    few_steps = None
    if options.few_steps is not None:
        few_steps = load_few_steps(options, pipeline, accelerator)
        settings += FEW_STEPS
    costs = {}
    if accelerator.is_main_process:
        costs = measure_costs(pipeline, settings, sampling, TIMED_CLIPS[scale], ROUNDS[scale], few_steps)
    accelerator.wait_for_everyone()
    evaluations = {}
    for setting in settings:
        with apply_setting(setting, pipeline, few_steps):
            evaluations[setting.name] = generation.evaluate(
                pipeline, sampling_for(setting, sampling), options, accelerator
            )
    if not accelerator.is_main_process:
        return None
    reference = settings[0].name
    return {
        "pipeline": str(options.pipeline),
        **({} if few_steps is None else {"few_steps": str(options.few_steps)}),
        "solver": type(pipeline.scheduler).__name__,
        "reference": reference,
        "evaluation": asdict(evaluations[reference][0]),
        "clips_timed": TIMED_CLIPS[scale],
        "rounds": ROUNDS[scale],
        "reference_repeated": costs.pop("reference_repeated"),
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
    """The settings of a scale, the reference first; without guidance intervals for a model without classes."""
    settings = SETTINGS
    if scale == "smoke":
        settings = [replace(setting, steps=setting.steps // SMOKE_DIVISOR) for setting in SMOKE]
    if pipeline.transformer.config.num_classes is None:
        return [setting for setting in settings if setting.guidance_interval == (0.0, 1.0)]
    return list(settings)


def load_few_steps(
    options: argparse.Namespace, pipeline: VidTwinPipeline, accelerator: Accelerator
) -> VidTwinTransformer3DModel:
    """Load the transformer of `--few-steps`.

    Raises:
        UserError: if it has no interval conditioning, or other classes or another prediction type than the pipeline.
    """
    distilled = generation.load_placed_pipeline(options.few_steps, accelerator, options.dtype)
    if not distilled.transformer.config.interval_conditioning:
        raise UserError(f"--few-steps {options.few_steps}: its transformer has no interval conditioning.")
    if distilled.config.id2label != pipeline.config.id2label:
        raise UserError(f"--few-steps {options.few_steps} has other classes than --pipeline {options.pipeline}.")
    if prediction_type_of(distilled.scheduler) != prediction_type_of(pipeline.scheduler):
        raise UserError(f"--few-steps {options.few_steps} predicts something else than --pipeline {options.pipeline}.")
    return distilled.transformer


@contextmanager
def apply_setting(
    setting: Setting, pipeline: VidTwinPipeline, few_steps: VidTwinTransformer3DModel | None = None
) -> Iterator[None]:
    """Give the pipeline a setting's solver, cache and transformer within the block."""
    scheduler, solver = pipeline.scheduler, SOLVERS[setting.solver]
    transformer = pipeline.transformer
    if setting.few_steps:
        pipeline.transformer = few_steps
    if solver is not None:
        pipeline.scheduler = other_solver(scheduler, solver)
    if setting.cache:
        pipeline.transformer.enable_cache(CACHES[setting.cache](lambda: pipeline.current_timestep))
    try:
        yield
    finally:
        pipeline.scheduler, pipeline.transformer = scheduler, transformer
        if setting.cache:
            pipeline.transformer.disable_cache()


def sampling_for(setting: Setting, sampling: Sampling) -> Sampling:
    """`sampling` with the steps and the guidance of a setting."""
    return replace(
        sampling,
        num_inference_steps=setting.steps,
        guidance_scale=1.0 if setting.guidance_interval is None else sampling.guidance_scale,
        guidance_interval=setting.guidance_interval or (0.0, 1.0),
    )


# --- cost per clip ---------------------------------------------------------------------------------------------------


def measure_costs(
    pipeline: VidTwinPipeline,
    settings: Sequence[Setting],
    sampling: Sampling,
    clips: int,
    rounds: int,
    few_steps: VidTwinTransformer3DModel | None = None,
) -> dict[str, Any]:
    """The cost of each setting; the first one is the reference.

    In each round all settings are timed in turn, and each time is divided by the reference's of the same round, so
    that other load on the machine affects all alike. Each round ends with the reference again: "reference_repeated".

    Returns:
        By name: `calls` of the transformer (NFE) and batch `rows` per clip; `flops` of the transformer per clip;
        `difference`, the largest from the reference's latents, in standard deviations; `seconds` per clip including
        decoding, and `time`, relative to the reference: medians, with the `time_range`. `one_clip` has the three for
        a batch of one clip.
    """
    costs: dict[str, Any] = {}
    expected = None
    for setting in settings:
        with apply_setting(setting, pipeline, few_steps):
            latents, counts = _count_work(pipeline, sampling_for(setting, sampling), clips)
        expected = latents if expected is None else expected
        costs[setting.name] = {**counts, "difference": (latents - expected).abs().max().item()}
    times = _measure_times(pipeline, settings, sampling, clips, rounds, few_steps)
    one_clip = times if clips == 1 else _measure_times(pipeline, settings, sampling, 1, rounds, few_steps)
    return {name: costs.get(name, {}) | time | {"one_clip": one_clip[name]} for name, time in times.items()}


def _measure_times(
    pipeline: VidTwinPipeline,
    settings: Sequence[Setting],
    sampling: Sampling,
    clips: int,
    rounds: int,
    few_steps: VidTwinTransformer3DModel | None,
) -> dict[str, Any]:
    """`seconds`, `time` and `time_range` of each setting and of "reference_repeated", in batches of `clips`."""
    turns = {setting.name: setting for setting in settings} | {"reference_repeated": settings[0]}
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, setting in turns.items():
            with apply_setting(setting, pipeline, few_steps):
                started = clock(pipeline.device)
                _generate(pipeline, sampling_for(setting, sampling), clips, "pt")
                times[name].append((clock(pipeline.device) - started) / clips)
    reference = times[settings[0].name]
    medians = {}
    for name, seconds in times.items():
        ratios = [time / reference_time for time, reference_time in zip(seconds, reference, strict=True)]
        relative = {"time": statistics.median(ratios), "time_range": [min(ratios), max(ratios)]}
        medians[name] = {"seconds": statistics.median(seconds), **relative}
    return medians


def _count_work(pipeline: VidTwinPipeline, sampling: Sampling, clips: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Normalized latents (B, L), and the transformer's work per clip."""
    rows: list[int] = []
    pipeline.transformer.requires_grad_(False)  # the counter fails at a module that returns a view of a parameter
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    # PyTorch counts all attention kernels except the CPU's.
    cpu_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {cpu_kernel: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        latents = _generate(pipeline, sampling, clips, "latent")
    hook.remove()
    counts = {"calls": len(rows), "rows": sum(rows) / clips, "flops": counter.get_total_flops() / clips}
    return normalize_latents(latents, pipeline.autoencoder), counts


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


# --- tables and plot -------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    settings = results["settings"]
    reference_flops = settings[results["reference"]]["flops"]
    rows = []
    for name, setting in settings.items():
        low, high = setting["distance"]["interval"]
        row = [name, f"{setting['distance']['value']:.3g}", f"{low:.3g} to {high:.3g}", f"{setting['time']:.2f}"]
        row += [f"{setting['one_clip']['time']:.2f}", f"{setting['flops'] / reference_flops:.2f}"]
        row += [setting["calls"], f"{setting['rows']:g}"]
        rows.append([*row, f"{setting['difference']:.2g}" if setting["family"] == "caches" else None])
    header = ["setting", "Fréchet distance", "95 % interval", "relative time", "of one clip", "relative DiT FLOPs"]
    header += ["NFE", "batch rows per clip", "largest latent difference"]
    evaluation = results["evaluation"]
    if evaluation["generated"]["value"] >= evaluation["mean_color"]["value"]:
        verdicts = "The reference is no closer to real clips than clips of one color: the distances are meaningless."
    else:
        families = dict.fromkeys(setting["family"] for setting in settings.values())
        verdicts = "\n".join(f"* {verdict(family, results)}" for family in families)
    return "\n\n".join([_describe(results), markdown_table(header, rows), verdicts])


def _describe(results: Results) -> str:
    evaluation, reference = results["evaluation"], results["settings"][results["reference"]]
    low, high = results["reference_repeated"]["time_range"]
    return (
        f"{evaluation['generated']['samples']} clips per setting, guidance "
        f"{evaluation['settings']['guidance_scale']:g}, detector `{evaluation['detector']['name']}`, protocol "
        f"`{evaluation['protocol']['name']}`; real vs. other real clips {evaluation['real_vs_real']['value']:.3g}, "
        f"reconstructed {evaluation['reconstructed']['value']:.3g}. `{DEFAULT}` is the pipeline's "
        f"{results['solver']}. Relative time of a clip, with decoding, against {results['reference']} in the same "
        f"round ({reference['seconds']:.3g} s; batches of {results['clips_timed']} clips, median of "
        f"{results['rounds']} rounds; the reference repeated: {low:.2f} to {high:.2f}), and in batches of one clip "
        f"({reference['one_clip']['seconds']:.3g} s). Latent differences are in "
        "standard deviations."
    )


def verdict(family: str, results: Results) -> str:
    """The fastest setting of a family whose distance is not above the reference's interval."""
    high = results["settings"][results["reference"]]["distance"]["interval"][1]
    others = {
        name: (setting["time"], setting["distance"]["value"])
        for name, setting in results["settings"].items()
        if setting["family"] == family and name != results["reference"]
    }
    good = [name for name, (time, distance) in others.items() if distance <= high and time < 1]
    if not good:
        return f"{family}: no other setting is faster and has a distance of at most {high:.3g}."
    name = min(good, key=others.get)
    time, distance = others[name]
    limit = f"with a distance of at most {high:.3g}"
    return f"{family}: {name} is the fastest {limit}: {distance:.3g} in {time:.2f} of the time."


def plot(results: Results) -> Figure:
    """Distance against relative time: families of different steps on the left, of equal steps on the right."""
    figure, [panels] = new_figure(11, 4.8, columns=2)
    settings, reference = results["settings"], results["reference"]
    families: dict[str, list[dict]] = {}
    for setting in settings.values():
        families.setdefault(setting["family"], []).append(setting)
    colors = (DARK_BLUE, BLUE, TEAL, ORANGE, "#7c3aed", "#dc2626", "#db2777")  # of at most seven families
    for color, (family, members) in zip(colors[: len(families)], families.items(), strict=True):
        is_curve = len({setting["steps"] for setting in members}) > 1
        points = sorted((setting["time"], setting["distance"]["value"]) for setting in members)
        panels[0 if is_curve else 1].plot(
            *zip(*points, strict=True), "o-" if is_curve else "o", color=color, label=family
        )
    panels[1].plot(1, settings[reference]["distance"]["value"], "o", color=DARK_BLUE, label=reference)

    # Reference interval, noise level and scales.
    for axes, title in zip(panels, ("solvers by number of steps", "guidance intervals and caches"), strict=True):
        axes.axhspan(*settings[reference]["distance"]["interval"], color=LIGHT_GRAY, zorder=0)
        axes.set_xlabel(f"time per clip relative to {reference}")
        axes.set_title(f"{title} (gray: 95 % interval of {reference})", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    real, place = results["evaluation"]["real_vs_real"]["value"], panels[0].get_yaxis_transform()
    panels[0].axhline(real, color=GRAY, ls="--", lw=1)
    panels[0].text(0.02, real, "real vs. other real clips", transform=place, fontsize=7, va="bottom")
    set_log_axes(panels[0], [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5])
    panels[0].set_ylabel(f"Fréchet distance, {results['evaluation']['detector']['name']}")
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    generation.add_options(parser)
    parser.add_argument(
        "--few-steps",
        metavar="FOLDER",
        help="pipeline that configs/dit/shortcut.yaml distilled from that of --pipeline: sampled in 1, 2 and 4 steps",
    )


BENCHMARK = Benchmark("sampling", "Quality against sampling cost", run, tables, plot, add_options)
REAL = Benchmark(
    "sampling_real", "Quality against sampling cost, real clips", run, tables, plot, add_options, program="sampling"
)

if __name__ == "__main__":
    main(BENCHMARK, REAL)
