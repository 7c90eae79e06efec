"""Table 2: the Fréchet video distance of generated clips.

    accelerate launch -m benchmarks.ucf101_fvd --scale paper --pipeline FOLDER --data UCF-101 --protocol tats
    python -m benchmarks.ucf101_fvd --scale cpu --pipeline runs/demo/dit/final

An interrupted run resumes. The cpu scale takes a pipeline that was trained on sprites, as `make demo` leaves it, and
compares it with sprites that no model was trained on.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from pipelines import VidTwinPipeline
from vidgen.common.images import class_grid
from vidgen.metrics.fvd import Sampling, class_labels, generate_clips
from vidgen.metrics.protocols import Protocol

from .common import generation, paper
from .common.harness import Benchmark, Results
from .common.tables import markdown_table

STEPS = {"smoke": 3, "cpu": 50, "paper": 50}
GRID = 10  # clips in the picture of samples
ROWS = {
    "generated": "generated",
    "reconstructed": "reconstructed by the VAE (rFVD)",
    "real_vs_real": "real vs. other real clips (noise level)",
    "mean_color": "mean color of each real clip (no content)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    generation.add_options(parser)
    parser.add_argument("--steps", type=int, help="denoising steps (default: 50)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels at which guidance is applied, from 0 (clean) to 1 (pure noise) (default: 0 1)",
    )
    generation.add_structure_delay(parser)


def run(options: argparse.Namespace) -> Results | None:
    accelerator = Accelerator()
    pipeline = generation.load_options_pipeline(options, accelerator)
    sampling = replace(
        generation.sampling_of(options),
        num_inference_steps=STEPS[options.scale] if options.steps is None else options.steps,
        guidance_interval=tuple(options.guidance_interval),
        structure_delay=options.structure_delay,
    )
    evaluations = generation.evaluate(pipeline, sampling, options, accelerator)
    if evaluations is None:
        return None
    picture = options.results / "ucf101_fvd-samples.png"
    save_sample_grid(picture, pipeline, sampling, generation.protocol_of(options))
    return {"pipeline": str(options.pipeline), "evaluations": [asdict(result) for result in evaluations]}


@torch.no_grad()
def save_sample_grid(path: Path, pipeline: VidTwinPipeline, sampling: Sampling, protocol: Protocol) -> None:
    """PNG of the first samples, generated again: a sample depends on its number alone."""
    numbers = range(GRID)
    balanced = replace(sampling, class_sampling="balanced")
    [batch] = generate_clips(pipeline, balanced, protocol)([numbers])
    names = {number: name for name, number in (pipeline.labels | pipeline.subclasses).items()}
    labels = class_labels(pipeline, numbers, balanced) or numbers
    class_grid(path, batch.clips.cpu(), [str(names.get(label, label)) for label in labels])


def tables(results: Results) -> str:
    evaluations = results["evaluations"]
    return "\n\n".join([*map(evaluation_table, evaluations), published_table(evaluations)])


def evaluation_table(result: dict[str, Any]) -> str:
    """The distances of one detector, and everything that they depend on."""
    rows = []
    for name, label in ROWS.items():
        distance = result[name]
        if distance is None:  # too few real clips for two sets
            rows.append([label, None, None, None])
            continue
        interval = distance["interval"] and " to ".join(map(format_fvd, distance["interval"]))
        counts = f"{distance['samples']} / {distance['real_samples']}"
        rows.append([label, format_fvd(distance["value"]), interval, counts])
        if name == "generated" and result["infinity"] is not None:
            rows.append(["generated, extrapolated to infinitely many", format_fvd(result["infinity"]), None, None])
    p, d, s = result["protocol"], result["detector"], result["settings"]
    if result["class_score"] is not None:
        mean, deviation = result["class_score"]
        rows.append([f"class score, {d['name']} (higher is better)", mean, f"± {deviation:.2g}", None])

    # The setting.
    rate = f"{p['fps']:g} fps" if p["fps"] else f"frame stride {p['stride']}" if p["stride"] > 1 else "native rate"
    low, high = s.get("guidance_interval", (0, 1))
    interval = "" if (low, high) == (0, 1) else f" at noise levels of {low:g} to {high:g}"
    unconditional = s.get("transformer_config", {}).get("num_classes", 0) is None
    classes = "no classes" if unconditional else f"{s['class_sampling']} classes"
    setting = (
        f"Detector `{d['name']}` ({d['dim']} values per {d['row']}; sha256 {(d['sha256'] or 'none: no weights')[:16]})"
        f", protocol `{p['name']}`: {p['frames']} frames of {p['size']} px, {rate}, split {p['split']}. "
        f"Guidance {s['guidance_scale']:g}{interval}, {s['num_inference_steps']} steps{generation.describe_delay(s)}, "
        f"seed {s['seed']}, {classes}."
    )
    table = markdown_table(["clips", "FVD", "95 % interval", "clips / real clips"], rows)
    notes = "".join(f"\n* {note}" for note in result["notes"])
    return f"{setting}\n\n{table}" + (f"\n\nNot comparable with the protocol's numbers:\n{notes}" if notes else "")


def format_fvd(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def published_table(ours: list[dict[str, Any]]) -> str:
    """The paper's table and what other papers publish, and ours if measured with a protocol of UCF-101."""
    rows = [[name, value, "not stated", "VidTwin, Table 2"] for name, value in paper.UCF101_FVD.items()]
    rows += [[name, value, protocol, source] for name, value, protocol, source in paper.UCF101_FVD_ELSEWHERE]
    for result in ours:
        if result["protocol"]["name"] != "sprites":
            name = f"**ours**, {result['detector']['name']}"
            rows.append([name, format_fvd(result["generated"]["value"]), result["protocol"]["name"], "this page"])
    return "UCF-101, published:\n\n" + markdown_table(["method", "FVD", "protocol", "source"], rows)


BENCHMARK = Benchmark("ucf101_fvd", "Table 2: generation", run, tables, add_options=add_options)

if __name__ == "__main__":
    BENCHMARK.main()
