"""Table 4: what a larger model is worth at the same latent.

    python -m benchmarks.model_scaling --scale cpu --clips FOLDER
    accelerate launch -m benchmarks.model_scaling --scale paper --data UCF-101

Three sizes train on the same clips in the same order for the same number of steps. The middle one is the `full` run of
`ablations.py`.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from benchmarks.common import paper, vae_runs

from .common.harness import Benchmark, Results, dot_chart, markdown_table, spread

RUNS = {  # the paper's sizes, and what their runs are called
    "small": "size-small",
    "base": vae_runs.FULL,
    "large": "size-large",
}
SETTINGS = {
    "smoke": [
        vae_runs.overridden(hidden_size=16),
        vae_runs.overridden(),
        vae_runs.overridden(hidden_size=48, num_layers=3),
    ],
    "cpu": [
        vae_runs.overridden(hidden_size=64),
        vae_runs.overridden(),
        vae_runs.overridden(hidden_size=192, num_layers=3),
    ],
    "paper": [["model.preset=small"], vae_runs.overridden(), ["model.preset=large"]],
}


def run(options: argparse.Namespace) -> Results | None:
    return vae_runs.train_variants(dict(zip(RUNS.values(), SETTINGS[options.scale], strict=True)), options)


def tables(results: Results | None) -> str:
    header = ["size", "paper PSNR, SSIM"]
    rows = [[size, "{} / {}".format(*paper.MODEL_SCALING[size])] for size in RUNS]
    ours = results["data"] if results else {}
    for data, runs in ours.items():
        header += [f"{data}: parameters", "PSNR, dB", "SSIM"]
        for row, name in zip(rows, RUNS.values(), strict=True):
            scores = runs[name]
            row += [f"{scores[0]['parameters']:,}", spread([s["psnr"] for s in scores])]
            row.append(spread([s["ssim"] for s in scores], 3))
    return markdown_table(header, rows) + "".join("\n\n" + ordering(*item) for item in ours.items())


def ordering(data: str, runs: dict[str, list[dict]]) -> str:
    """Whether each size beats the one below it, by more than what a seed makes."""
    said = []
    for smaller, larger in pairwise(RUNS):
        figures = zip(paper.MODEL_SCALING[larger], paper.MODEL_SCALING[smaller], strict=True)
        verdicts = vae_runs.gains(runs[RUNS[larger]], runs[RUNS[smaller]], *(a - b for a, b in figures))
        said.append(f"* {larger} over {smaller}: {verdicts}.")
    return f"On {data}:\n\n" + "\n".join(said)


def plot(results: Results, path: Path) -> None:
    groups = {
        f"{data}: PSNR, dB": {size: [s["psnr"] for s in runs[name]] for size, name in RUNS.items()}
        for data, runs in results["data"].items()
    }
    groups["paper: PSNR, dB"] = {size: [psnr] for size, (psnr, _) in paper.MODEL_SCALING.items()}
    dot_chart(path, groups)


BENCHMARK = Benchmark(
    name="model_scaling",
    title="Table 4: model sizes",
    needs=vae_runs.NEEDS,
    run=run,
    tables=tables,
    plot=plot,
    add_options=vae_runs.add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
