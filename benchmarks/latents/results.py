"""Results of the finished runs: means over seeds, gains over the references, and differences between methods."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidgen.metrics.stats import mean_interval

from ..common.harness import Results
from .clips import NUM_FRAMES, SIDE
from .methods import METHODS, SEEDS, VALUES, VIDTWIN

METRICS = ("psnr", "ssim", "lpips_squeeze")
REFERENCES = ("downsample", "block_pca")
Record = dict[str, Any]


def build_results(lists: dict[str, Path], options: argparse.Namespace) -> Results:
    """Collect the records of a scale; rates without finished runs are left out, and DiTs that are not trained.

    Returns:
        `videos`: number of each list; `clip_values` of a scored clip; `real_vs_real` by detector; `curves` of the
        references; `learning_rates` by method; `rates`: by rate the result of `collect_rate`. Missing records of a
        whole are None.
    """
    folder = options.work_dir / "latents"
    videos = {name: len(path.read_text().splitlines()) - 1 for name, path in lists.items()}
    return {
        "videos": videos,
        "clip_values": 3 * NUM_FRAMES[options.scale] * SIDE[options.scale] ** 2,
        "real_vs_real": read_record(folder, "scores/real_vs_real"),
        "curves": read_record(folder, "scores/curves"),
        "learning_rates": {
            name: found
            for name in METHODS[options.scale]
            if (found := collect_learning_rates(folder, name, options.scale))
        },
        "rates": {
            rate: collected
            for rate in VALUES[options.scale]
            if (collected := collect_rate(folder, rate, options.scale))
        },
    }


def read_record(folder: Path, name: str) -> Any:
    """Read a record of `run_once`; None if there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["score"] if path.exists() else None


def collect_learning_rates(folder: Path, name: str, scale: str) -> dict[str, float]:
    """PSNR in dB on the validation list by learning rate, of the short runs that are finished."""
    records = {
        f"{rate:g}": read_record(folder, f"trained/{name}-lr{rate:g}") for rate in METHODS[scale][name].learning_rates
    }
    return {rate: record["validation_psnr"] for rate, record in records.items() if record}


def collect_rate(folder: Path, rate: str, scale: str) -> Results | None:
    """Collect the methods of a rate, each with the seeds that are finished; None if there is none.

    Returns:
        `values` of the rate; `references`: by name `figures` and `rfvd`; `methods`: by name `label`, `figures` (mean,
        low and high over clips of means over seeds), `gain` in dB over each reference, `over`: VidTwin's advantage in
        each metric, and `runs`: for each seed the training, `rfvd`, `cost`, and `dit`, None if it is not trained.
    """
    scores = {name: read_record(folder, f"scores/{name}-{rate}") for name in REFERENCES}
    references = {name: score for name, score in scores.items() if score}
    runs = {name: collect_runs(folder, name, rate, scale) for name in METHODS[scale]}
    runs = {name: finished for name, finished in runs.items() if finished}
    if not runs:
        return None
    methods = {}
    for name, finished in runs.items():
        clips = [run["score"]["clips"] for run in finished]
        methods[name] = {
            "label": METHODS[scale][name].label,
            "figures": {metric: compare_clips(clips, None, metric) for metric in METRICS},
            "gain": {ref: compare_clips(clips, [score["clips"]], "psnr") for ref, score in references.items()},
        }
        if name != VIDTWIN and VIDTWIN in runs:
            twin = [run["score"]["clips"] for run in runs[VIDTWIN]]
            methods[name]["over"] = {metric: compare_clips(twin, clips, metric) for metric in METRICS}
        methods[name]["runs"] = [
            {k: run[k] for k in ("seed", "trained", "cost", "dit")}
            | {k: run["score"][k] for k in ("rfvd", "latent_size", "parameters", "flops")}
            | {"psnr": run["score"]["figures"]["psnr"]["mean"]}
            for run in finished
        ]
    first = next(iter(runs.values()))[0]["score"]
    return {
        "values": VALUES[scale][rate],
        "num_clips": first["num_clips"],
        "num_videos": first["num_videos"],
        "references": {
            name: {k: score[k] for k in ("figures", "rfvd", "latent_size")} for name, score in references.items()
        },
        "methods": methods,
    }


def collect_runs(folder: Path, name: str, rate: str, scale: str) -> list[Record]:
    """The records of the finished seeds of a method at a rate."""
    finished = []
    for seed in range(SEEDS[scale][rate]):
        run = f"{name}-{rate}-seed{seed}"
        parts = {"trained": "trained", "score": "scores", "cost": "costs", "dit": "dits"}
        records = {part: read_record(folder, f"{kind}/{run}") for part, kind in parts.items()}
        if records["trained"] and records["score"]:
            finished.append({"seed": seed, **records})
    return finished


def compare_clips(
    clips: Sequence[Sequence[Record]], others: Sequence[Sequence[Record]] | None, metric: str
) -> dict[str, Any]:
    """Mean over clips of a metric, averaged over seeds, or of its difference to others on the same clips.

    Args:
        clips: metrics of each clip, for each seed.
        others: of another method, subtracted clip by clip; None: nothing is subtracted.

    Returns:
        `mean`, `low` and `high` of the 95 % interval from resampled videos, and `by_seed`: the mean of each seed that
        both have; a single seed of others is subtracted from all.
    """
    videos = [clip["path"] for clip in clips[0]]
    values = [[clip[metric] for clip in seed] for seed in clips]
    if others is not None:
        other_values = [[clip[metric] for clip in seed] for seed in others]
        means = [_mean(column) for column in zip(*other_values, strict=True)]
        pairs = min(len(values), len(other_values))
        by_seed = [_mean(v) - _mean(o) for v, o in zip(values[:pairs], other_values[:pairs], strict=True)]
        if len(other_values) == 1:
            by_seed = [_mean(seed) - _mean(means) for seed in values]
    else:
        means, by_seed = [0.0] * len(videos), [_mean(seed) for seed in values]
    per_clip = [_mean(column) - mean for column, mean in zip(zip(*values, strict=True), means, strict=True)]
    low, high = mean_interval(per_clip, videos)
    return {"mean": _mean(per_clip), "low": low, "high": high, "by_seed": by_seed}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
