"""Table 6: quality against the size of the latent.

    python -m benchmarks.rate_curve --scale cpu --clips FOLDER
    accelerate launch -m benchmarks.rate_curve --scale paper --data UCF-101

Rates differ by the channels of the two latents alone: the same model otherwise, the same clips in the same order, the
same number of steps. One of the four is the `full` run of `ablations.py`.

The paper gives four rates and no latents for them (only 0.20 % is a setting of its Table 8: 4 and 8 channels). Ours at
`--scale paper` keep its grid of 7 x 7, 16 queries and 7 + 7 positions, and take the channels nearest to 1 : 2 whose
rate rounds to the paper's: of the 2 408 448 values of a clip of 16 x 224 x 224, (7 * 7 * 16 d_S + 16 * 14 d_D) are
0.112 % with 2 and 5 channels, 0.163 % with 3 and 7, 0.205 % with 4 and 8, 0.479 % with 9 and 20.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from benchmarks.common import paper, vae_runs

from .common.harness import Benchmark, Results, markdown_table, spread
from .common.vae_runs import FULL

CHANNELS = {  # of structure and dynamics, from the lowest rate to the highest; FULL is the recipe's own
    "smoke": [(1, 2), (2, 4), FULL, (8, 16)],
    "cpu": [(3, 2), (6, 4), FULL, (24, 16)],
    "paper": [(2, 5), (3, 7), FULL, (9, 20)],
}
LPIPS = "lpips_squeeze"  # the paper does not name its backbone


def run(options: argparse.Namespace) -> Results | None:
    variants = {}
    for channels in CHANNELS[options.scale]:
        if channels == FULL:
            variants[FULL] = vae_runs.overridden()
        else:
            structure, dynamics = channels
            settings = vae_runs.overridden(structure_channels=structure, dynamics_channels=dynamics)
            variants[f"rate-{structure}-{dynamics}"] = settings
    return vae_runs.train_variants(variants, options)


def tables(results: Results | None) -> str:
    header = ["paper: rate", "PSNR, LPIPS"]
    rows = [[f"{rate:.2f} %", f"{psnr} / {lpips}"] for rate, psnr, lpips in paper.RATE_CURVE]
    ours = results["data"] if results else {}
    for data, runs in ours.items():
        header += [f"{data}: rate", "PSNR, dB", "LPIPS (squeeze)", "PSNR of the clip shrunk to as many values"]
        for row, scores in zip(rows, by_rate(runs), strict=True):
            row += [f"{_percent(scores):.2f} %", spread(_values(scores, "psnr")), spread(_values(scores, LPIPS), 3)]
            row.append(f"{scores[0]['psnr_downsample']:.2f}")
    return markdown_table(header, rows) + "".join("\n\n" + ordering(*item) for item in ours.items())


def ordering(data: str, runs: dict[str, list[dict]]) -> str:
    """Whether each rate beats the one below it, by more than what a seed makes."""
    said = []
    steps = zip(pairwise(by_rate(runs)), pairwise(paper.RATE_CURVE), strict=True)
    for (lower, higher), ((_, psnr, lpips), (_, more_psnr, less_lpips)) in steps:
        said.append(
            f"* {_percent(higher):.2f} % over {_percent(lower):.2f} %: "
            f"PSNR: {vae_runs.gain(higher, lower, more_psnr - psnr)}; "
            f"LPIPS: {vae_runs.gain(higher, lower, less_lpips - lpips, LPIPS, 3)}."
        )
    return f"On {data}:\n\n" + "\n".join(said)


def plot(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    data = results["data"]
    figure = Figure(figsize=(3.6 * (len(data) + 1), 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(data) + 1, squeeze=False)
    for column, (name, runs) in zip(panels.T, data.items(), strict=False):
        scores = by_rate(runs)
        rates = [_percent(seeds) for seeds in scores]
        for axes, key in zip(column, ("psnr", LPIPS), strict=True):
            values = [_values(seeds, key) for seeds in scores]
            axes.plot(rates, [sum(seeds) / len(seeds) for seeds in values], color="#2563eb", label="VidTwin")
            for rate, seeds in zip(rates, values, strict=True):
                axes.plot([rate] * len(seeds), seeds, "o", color="#1e3a8a", ms=4)
        column[0].plot(rates, [s[0]["psnr_downsample"] for s in scores], "--", color="#9ca3af", label="clip shrunk")
        column[0].legend(frameon=False, fontsize=8)
        column[0].set_title(name, fontsize=10)
    theirs = list(zip(*paper.RATE_CURVE, strict=True))
    for axes, values in zip(panels[:, -1], theirs[1:], strict=True):
        axes.plot(theirs[0], values, "o-", color="#2563eb", ms=4)
    panels[0, -1].set_title("paper", fontsize=10)
    for row, label in zip(panels, ("PSNR, dB", "LPIPS"), strict=True):
        row[0].set_ylabel(label)
    for axes in panels.flat:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        ticks = axes.lines[0].get_xdata()
        axes.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in panels[1]:
        axes.set_xlabel("latent, % of the clip's values", fontsize=9)
    figure.savefig(path)


def by_rate(runs: dict[str, list[dict]]) -> list[list[dict]]:
    """The scores of every rate, one a seed, from the lowest rate to the highest."""
    return sorted(runs.values(), key=_percent)


def _percent(scores: list[dict]) -> float:
    return 100 * scores[0]["compression_rate"]


def _values(scores: list[dict], key: str) -> list[float]:
    return [score[key] for score in scores]


BENCHMARK = Benchmark(
    name="rate_curve",
    title="Table 6: rate against quality",
    needs=vae_runs.NEEDS,
    run=run,
    tables=tables,
    plot=plot,
    add_options=vae_runs.add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
