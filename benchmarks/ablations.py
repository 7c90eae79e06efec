"""Table 3: what each part of the two latents is worth, by training without it.

    python -m benchmarks.ablations --scale cpu --clips FOLDER
    accelerate launch -m benchmarks.ablations --scale paper --data UCF-101

All variants train on the same clips in the same order for the same number of steps, each with two seeds, whose spread
says which differences mean something. Small models have far larger latents for their clips than the paper's (2.6 % to
0.2 %), so the one ablation that is about how to spend few values, (a), is done again with a fifth of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from autoencoder.presets import ABLATIONS
from benchmarks.common import paper, vae_runs

from .common.harness import Benchmark, Results, dot_chart, markdown_table, spread

VARIANTS = {  # names as in `autoencoder.presets`, and what the paper calls them
    vae_runs.FULL: "full",
    "single": "(a) one latent, no decoupling",
    "dynamics_qformer": "(b) dynamics read by a Q-Former",
    "structure_conv": "(c) structure read by convolutions",
    "structure_hidden": "(d) places in the hidden dimension",
}
# Latents with few values, as FEW + name. One latent of so few has a single channel at every place; half the grid gives
# it four.
FEW = "few-"
FEW_CHANNELS = {
    "smoke": dict(structure_channels=2, dynamics_channels=2),
    "cpu": dict(structure_channels=3, dynamics_channels=1),
}
HALF_GRID = "single_half_grid"
HALF_GRID_CHANNELS = {
    "smoke": dict(structure_channels=2, dynamics_channels=2, structure_downsamples=2),
    "cpu": dict(structure_channels=12, dynamics_channels=1, structure_downsamples=1),
}
FEW_VARIANTS = {
    vae_runs.FULL: "full",
    "single": VARIANTS["single"],
    HALF_GRID: "(a) one latent, half the grid",
}
LABELS = VARIANTS | FEW_VARIANTS
PAPERS = paper.ABLATIONS | {HALF_GRID: paper.ABLATIONS["single"]}
Variants = dict[str, list[dict]]  # scores by name, one a seed


def run(options: argparse.Namespace) -> Results | None:
    variants = {variant: vae_runs.overridden(**ABLATIONS.get(variant, {})) for variant in VARIANTS}
    if few := FEW_CHANNELS.get(options.scale):
        half = HALF_GRID_CHANNELS[options.scale]
        variants[FEW + vae_runs.FULL] = vae_runs.overridden(**few)
        variants[FEW + "single"] = vae_runs.overridden(**few, **ABLATIONS["single"])
        variants[FEW + HALF_GRID] = vae_runs.overridden(**half, **ABLATIONS["single"])
    return vae_runs.train_variants(variants, options)


def chapters(results: Results) -> list[dict[str, Variants]]:
    """Data sets with their variants of the recipe's own latent, and again with those of few values."""
    found = []
    for prefix, names in (("", VARIANTS), (FEW, FEW_VARIANTS)):
        data = {
            data: {name: runs[prefix + name] for name in names if prefix + name in runs}
            for data, runs in results["data"].items()
        }
        if all(data.values()):
            found.append(data)
    return found


def share(data: dict[str, Variants]) -> str:
    """Of a clip's values in the full latent: "2.60 %"."""
    return f"{100 * next(iter(data.values()))[vae_runs.FULL][0]['compression_rate']:.2f} %"


def tables(results: Results | None) -> str:
    if results is None:
        return table({}, VARIANTS)
    said = []
    for data in chapters(results):
        said.append(f"With latents of {share(data)} of a clip:")
        said.append(table(data, next(iter(data.values()))))
        said += [ordering(*item) for item in data.items()]
    return "\n\n".join(said)


def table(ours: dict[str, Variants], names: Iterable[str]) -> str:
    """A row per variant: the paper's scores, and ours on each of our data sets."""
    header = ["variant", "paper PSNR, SSIM"]
    rows = {name: [LABELS[name], "{} / {}".format(*PAPERS[name])] for name in names}
    for data, variants in ours.items():
        header += [f"{data}: PSNR, dB", "SSIM", "LPIPS (squeeze)", "values", "parameters"]
        for name, scores in variants.items():
            rows[name] += [spread([s["psnr"] for s in scores]), spread([s["ssim"] for s in scores], 3)]
            rows[name] += [spread([s["lpips_squeeze"] for s in scores], 3), f"{scores[0]['latent_size']:,}"]
            rows[name].append(f"{scores[0]['parameters']:,}")
    return markdown_table(header, list(rows.values()))


def ordering(data: str, variants: Variants) -> str:
    """Which of the paper's differences come out, and whether they are larger than what a seed makes."""
    said = []
    for name, scores in variants.items():
        if name != vae_runs.FULL:
            theirs = (a - b for a, b in zip(PAPERS[vae_runs.FULL], PAPERS[name], strict=True))
            verdicts = vae_runs.gains(variants[vae_runs.FULL], scores, *theirs)
            said.append(f"* full over {LABELS[name]}: {verdicts}.")
    return f"On {data}:\n\n" + "\n".join(said)


def plot(results: Results, path: Path) -> None:
    groups = {
        f"{data}, {share(sets)}: PSNR, dB": {
            LABELS[name]: [s["psnr"] for s in scores] for name, scores in variants.items()
        }
        for sets in chapters(results)
        for data, variants in sets.items()
    }
    groups["paper, 0.2 %: PSNR, dB"] = {VARIANTS[name]: [psnr] for name, (psnr, _) in paper.ABLATIONS.items()}
    dot_chart(path, groups)


BENCHMARK = Benchmark(
    name="ablations",
    title="Table 3: ablations",
    needs=vae_runs.NEEDS,
    run=run,
    tables=tables,
    plot=plot,
    add_options=vae_runs.add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
