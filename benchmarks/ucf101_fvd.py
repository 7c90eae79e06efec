"""Table 2: the Fréchet video distance of generated clips.

    accelerate launch -m benchmarks.ucf101_fvd --scale paper --pipeline FOLDER --data UCF-101 --protocol tats
    python -m benchmarks.ucf101_fvd --scale cpu --pipeline runs/demo/dit/final

Started again after an interruption it goes on. The cpu scale takes a pipeline that was trained on sprites, as `make
demo` leaves it, and compares with sprites that nothing was trained on.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from benchmarks.common import paper
from pipelines import VidTwinPipeline
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.images import class_grid
from vidgen.common.loading import load_pipeline
from vidgen.common.precision import place_model
from vidgen.data.sprites import write_sprites
from vidgen.metrics.detectors import Detector, named_detectors
from vidgen.metrics.fvd import (
    CLASS_SAMPLING,
    CLASS_SAMPLING_OF,
    FVDResult,
    Sampling,
    class_labels,
    evaluate_pipeline,
    generated_clips,
)
from vidgen.metrics.protocols import PROTOCOLS, Protocol, get_protocol
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig

from .common.harness import Benchmark, Results, markdown_table

SAMPLES = {"smoke": 24, "cpu": 512, "paper": None}
SPRITES_PER_CLASS = {"smoke": 6, "cpu": 128}  # twice the samples: real against real takes others
DETECTORS = {"smoke": ["pooled_pixels"], "cpu": ["pooled_pixels", "squeezenet"], "paper": None}  # None: the protocol's
GUIDANCE = {"smoke": 2.0, "cpu": 2.0, "paper": 5.0}  # what the recipes state
STEPS = {"smoke": 3, "cpu": 50, "paper": 50}
SHARDS = {"smoke": 8, "cpu": 64, "paper": 64}
GRID = 10  # clips in the picture of samples
ROWS = {
    "generated": "generated",
    "reconstructed": "reconstructed by the VAE (rFVD)",
    "real_vs_real": "real against other real clips (noise level)",
    "mean_color": "each real clip's mean color (no content)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_evaluation_options(parser)
    parser.add_argument("--steps", type=int, help="denoising steps (default: 50)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels at which guidance acts, of 0 (clean) to 1 (pure noise) (default: 0 1)",
    )


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """What every program takes that measures the distance of a pipeline's clips."""
    parser.add_argument("--pipeline", metavar="FOLDER", help="as train_dit.py leaves it in OUTPUT_DIR/final")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="UCF-101, its split files beside it (scale paper)")
    parser.add_argument("--split-files", type=Path, metavar="FOLDER", help="those, where they lie elsewhere")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="vidtwin", help="of the paper scale")
    parser.add_argument("--samples", type=int, metavar="N", help="generated clips (default: as the protocol has them)")
    parser.add_argument(
        "--detector",
        action="append",
        metavar="NAME_OR_PATH",
        help="its name, the file of the protocol's detector, or NAME=FILE; may be given several times",
    )
    parser.add_argument("--detector-sha256", metavar="HASH", help="of a detector's file that is not the published one")
    parser.add_argument("--seed", type=int, default=0, help="of the generated clips")
    parser.add_argument("--guidance-scale", type=float, help="default: 5, of sprites 2")
    parser.add_argument("--batch-size", type=int, default=16, help="clips generated at a time by each process")
    parser.add_argument("--class-sampling", choices=CLASS_SAMPLING, help="of the samples (default: the protocol's)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes reading real clips, of each process")


def run(options: argparse.Namespace) -> Results | None:
    accelerator = Accelerator()
    pipeline = pipeline_of(options, accelerator)
    sampling = replace(
        sampling_of(options),
        num_inference_steps=STEPS[options.scale] if options.steps is None else options.steps,
        guidance_interval=tuple(options.guidance_interval),
    )
    evaluated = evaluate(pipeline, sampling, options, accelerator)
    if evaluated is None:
        return None
    sample_grid(options.results / "ucf101_fvd_samples.png", pipeline, sampling, protocol_of(options))
    return {"pipeline": str(options.pipeline), "evaluations": [asdict(result) for result in evaluated]}


def evaluate(
    pipeline: VidTwinPipeline, sampling: Sampling, options: argparse.Namespace, accelerator: Accelerator
) -> list[FVDResult] | None:
    """`evaluate_pipeline` as a program's options have it. All programs keep features in one folder."""
    protocol = protocol_of(options)
    return evaluate_pipeline(
        pipeline,
        options.data or held_back_sprites(options.work_dir, options.scale),
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


def pipeline_of(options: argparse.Namespace, accelerator: Accelerator) -> VidTwinPipeline:
    """The pipeline of the options, on the process's device; at the smoke scale one is trained where none is given.

    Raises:
        UserError: if there is none, no data to compare with, or no detector.
    """
    detectors_of(options, protocol_of(options))  # a wrong one says so before anything is done
    if options.scale == "smoke" and options.pipeline is None:
        options.pipeline = train_tiny(options.work_dir / "ucf101_fvd")
    if options.pipeline is None:
        raise UserError("name a pipeline, as train_dit.py leaves it in OUTPUT_DIR/final: --pipeline FOLDER.")
    if options.data is None and options.scale == "paper":
        raise UserError("--scale paper compares with UCF-101: give its folder as --data FOLDER.")
    pipeline = place_model(load_pipeline(str(options.pipeline)), accelerator.device, options.dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How the options draw clips, but for the steps."""
    return Sampling(
        seed=options.seed,
        guidance_scale=GUIDANCE[options.scale] if options.guidance_scale is None else options.guidance_scale,
        class_sampling=options.class_sampling or CLASS_SAMPLING_OF[protocol_of(options).labels],
    )


def protocol_of(options: argparse.Namespace) -> Protocol:
    """That of the options, or that of sprites, which smaller ones fit a smaller network."""
    if options.scale == "paper":
        return get_protocol(options.protocol)
    sprites = replace(get_protocol("sprites"), generated=SAMPLES[options.scale], real=SAMPLES[options.scale])
    return replace(sprites, frames=4, size=32, fps=4) if options.scale == "smoke" else sprites


def detectors_of(options: argparse.Namespace, protocol: Protocol) -> list[Detector]:
    """The detectors asked for, or the scale's, or the protocol's own."""
    asked = options.detector or DETECTORS[options.scale] or [protocol.detector]
    return named_detectors(asked, protocol.detector, options.detector_sha256)


def held_back_sprites(work_dir: Path, scale: str) -> Path:
    """Sprites of another seed than any training's, written where missing."""
    folder = work_dir / "data" / "sprites" / "fvd"
    with PartialState().main_process_first():
        if not folder.exists():
            small = dict(resolution=32, num_frames=8) if scale == "smoke" else {}
            write_sprites(folder, SPRITES_PER_CLASS[scale], seed=2, show_progress=True, **small)
    return folder


def train_tiny(folder: Path) -> Path:
    """A pipeline of a tiny VAE and DiT after a few steps on sprites: it says nothing, but all parts of it run."""
    from vidgen.training.dit_trainer import train_dit
    from vidgen.training.vae_trainer import train_vae

    final = folder / "dit" / "final"
    if (final / "model_index.json").exists():
        return final
    data = folder / "sprites"
    with PartialState().main_process_first():
        if not data.exists():
            write_sprites(data, 2, seed=0, resolution=32)
    shared = [f"data.root={data}", "data.fps=4", "model.preset=tiny-test", "train.max_train_steps=4"]
    shared += ["train.train_batch_size=4", "train.mixed_precision=no", "train.report_to=none", "train.ema_decay=0"]
    shared += ["train.dataloader_num_workers=0"]
    own = ["perceptual.weight=0", "gan.weight=0", "model.overrides={heads: residual}", f"output_dir={folder}/vae"]
    own += ["data.resolution=32", "data.num_frames=4"]
    vae = train_vae(load_config(VAETrainingConfig, [*shared, *own]))
    own = [f"vae={vae}", "diffusion.num_inference_steps=2", f"output_dir={folder}/dit"]
    return train_dit(load_config(DiTTrainingConfig, [*shared, *own]))


@torch.no_grad()
def sample_grid(path: Path, pipeline: VidTwinPipeline, sampling: Sampling, protocol: Protocol) -> None:
    """PNG of the first samples, generated once more: a sample is the same whenever it is asked for."""
    numbers = range(GRID)
    balanced = replace(sampling, class_sampling="balanced")
    [batch] = generated_clips(pipeline, balanced, protocol)([numbers])
    names = {number: name for name, number in (pipeline.labels | pipeline.subclasses).items()}
    labels = class_labels(pipeline, numbers, balanced) or numbers
    class_grid(path, batch.clips.cpu(), [str(names.get(label, label)) for label in labels])


def tables(results: Results | None) -> str:
    ours = results["evaluations"] if results else []
    return "\n\n".join([*map(table_of, ours), published(ours)])


def table_of(result: dict[str, Any]) -> str:
    """One detector's distances with all that they depend on."""
    header = ["clips", "FVD", "95 % interval", "clips against real clips"]
    rows = []
    for name, label in ROWS.items():
        distance = result[name]
        if distance is None:  # too few real clips to part them
            rows.append([label, None, None, None])
            continue
        interval = distance["interval"] and " to ".join(map(number, distance["interval"]))
        counts = f"{distance['samples']} / {distance['real_samples']}"
        rows.append([label, number(distance["value"]), interval, counts])
        if name == "generated" and result["infinity"] is not None:
            rows.append(["generated, extrapolated to infinitely many", number(result["infinity"]), None, None])
    if result["class_score"] is not None:
        mean, deviation = result["class_score"]
        rows.append(
            [f"class score, {result['detector']['name']} (higher is better)", mean, f"± {deviation:.2g}", None]
        )
    p, d, s = result["protocol"], result["detector"], result["settings"]
    rate = f"{p['fps']:g} fps" if p["fps"] else f"every {p['stride']}. frame" if p["stride"] > 1 else "own rate"
    low, high = s.get("guidance_interval", (0, 1))
    unconditional = s.get("transformer_config", {}).get("num_classes", 0) is None
    classes = "no classes" if unconditional else f"classes {s['class_sampling']}"
    within = "" if (low, high) == (0, 1) else f" at noise levels of {low:g} to {high:g}"
    said = (
        f"Detector `{d['name']}` ({d['dim']} values a {d['row']}; sha256 {(d['sha256'] or 'none: no weights')[:16]}), "
        f"protocol `{p['name']}`: {p['frames']} frames of {p['size']} px, {rate}, split {p['split']}. "
        f"Guidance {s['guidance_scale']:g}{within}, {s['num_inference_steps']} steps, seed {s['seed']}, {classes}."
    )
    notes = "".join(f"\n* {note}" for note in result["notes"])
    return said + "\n\n" + markdown_table(header, rows) + (f"\n\nNot comparable where:\n{notes}" if notes else "")


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def published(ours: list[dict[str, Any]]) -> str:
    """The paper's table and what others publish with a protocol, ours beside where it is of one."""
    rows = [[name, value, "not stated", "the paper, Table 2"] for name, value in paper.UCF101_FVD.items()]
    rows += [[name, value, protocol, source] for name, value, protocol, source in paper.UCF101_FVD_ELSEWHERE]
    for result in ours:
        if result["protocol"]["name"] != "sprites":
            name = f"**ours**, by {result['detector']['name']}"
            rows.append([name, number(result["generated"]["value"]), result["protocol"]["name"], "this page"])
    return "UCF-101, published:\n\n" + markdown_table(["method", "FVD", "protocol", "source"], rows)


def plot(results: Results, path: Path) -> None:
    """A bar for each distance with its interval, a panel for each detector."""
    from matplotlib.figure import Figure

    evaluations = results["evaluations"]
    figure = Figure(figsize=(4.5 * len(evaluations) + 2.5, 2.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(evaluations), squeeze=False)[0]
    for place, (axes, result) in enumerate(zip(panels, evaluations, strict=True)):
        distances = [result[name] or {"value": 0, "interval": None} for name in ROWS]  # no bar where there is none
        values = [distance["value"] for distance in distances]
        reach = [[abs(edge - d["value"]) for edge in d["interval"] or [d["value"]] * 2] for d in distances]
        axes.barh(range(len(ROWS)), values, xerr=list(zip(*reach, strict=True)), color="#93b4f5", ecolor="#1e3a8a")
        axes.set_yticks(range(len(ROWS)), [label.split(" (")[0] for label in ROWS.values()] if not place else [])
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_title(f"Fréchet distance, {result['detector']['name']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


BENCHMARK = Benchmark(
    name="ucf101_fvd",
    title="Table 2: generation",
    needs="UCF-101, I3D's weights and a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
