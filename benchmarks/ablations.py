"""Table 3: what each part of the two latents is worth, by training without it.

    python benchmarks/ablations.py --scale cpu --clips FOLDER
    accelerate launch benchmarks/ablations.py --scale paper --data UCF-101

All variants train on the same clips in the same order for the same number of steps, each with two seeds, whose spread
says which differences mean something. Small models have far larger latents for their clips than the paper's (2.6 % to
0.2 %), and how to spend values matters where they are few: all is done again with a fifth of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import paper
import vae_runs
from benchmark import Benchmark, Results, bar_chart, markdown_table, spread

from autoencoder.presets import ABLATIONS

VARIANTS = {  # names as in `autoencoder.presets`, and what the paper calls them
    "full": "full",
    "single": "(a) one latent, no decoupling",
    "dynamics_qformer": "(b) dynamics read by a Q-Former",
    "structure_conv": "(c) structure read by convolutions",
    "structure_hidden": "(d) places in the hidden dimension",
}
# The channels of latents with few values, for the variants again as FEW + name.
FEW = "few-"
FEW_CHANNELS = {
    "smoke": dict(structure_channels=2, dynamics_channels=2),
    "cpu": dict(structure_channels=3, dynamics_channels=1),
}


def run(options: argparse.Namespace) -> Results | None:
    variants = {variant: vae_runs.overridden(**ABLATIONS.get(variant, {})) for variant in VARIANTS}
    if few := FEW_CHANNELS.get(options.scale):
        variants |= {FEW + name: vae_runs.overridden(**few, **ABLATIONS.get(name, {})) for name in VARIANTS}
    return vae_runs.train_variants(variants, options)


def by_rate(results: Results) -> dict[str, dict[str, dict[str, list[dict]]]]:
    """Data sets, each with its variants: {"latents of 2.60 % of a clip": {"sprites": {"full": scores}}}."""
    rates: dict[str, dict[str, dict[str, list[dict]]]] = {}
    for data, runs in results["data"].items():
        for prefix in ("", FEW):
            variants = {name: runs[prefix + name] for name in VARIANTS if prefix + name in runs}
            if variants:
                shares = sorted({f"{100 * scores[0]['compression_rate']:.2f}" for scores in variants.values()})
                said = f"latents of {' to '.join(shares[:: max(len(shares) - 1, 1)])} % of a clip"
                rates.setdefault(said, {})[data] = variants
    return rates


def tables(results: Results | None) -> str:
    if results is None:
        return table({})
    return "\n\n".join(
        f"With {rate}:\n\n{table(data)}" + "".join("\n\n" + ordering(*item) for item in data.items())
        for rate, data in by_rate(results).items()
    )


def table(ours: dict[str, dict[str, list[dict]]]) -> str:
    """A row per variant: the paper's scores, and ours on each of our data sets."""
    header = ["variant", "paper PSNR, SSIM"]
    rows = [[label, "{} / {}".format(*paper.ABLATIONS[name])] for name, label in VARIANTS.items()]
    for data, variants in ours.items():
        header += [f"{data}: PSNR, dB", "SSIM", "parameters"]
        for row, scores in zip(rows, variants.values(), strict=True):
            row += [spread([s["psnr"] for s in scores]), spread([s["ssim"] for s in scores], 3)]
            row.append(f"{scores[0]['parameters']:,}")
    return markdown_table(header, rows)


def ordering(data: str, variants: dict[str, list[dict]]) -> str:
    """Which of the paper's differences come out, and whether they are larger than what a seed makes."""
    said = []
    for name, label in list(VARIANTS.items())[1:]:
        theirs = paper.ABLATIONS["full"][0] - paper.ABLATIONS[name][0]
        said.append(f"* full over {label}: {vae_runs.gain(variants['full'], variants[name], theirs)}.")
    return f"On {data}, in dB of PSNR:\n\n" + "\n".join(said)


def plot(results: Results, path: Path) -> None:
    groups = {
        f"{data}, {rate.split(' of ')[1]}: PSNR, dB": {
            VARIANTS[name]: [s["psnr"] for s in scores] for name, scores in variants.items()
        }
        for rate, sets in by_rate(results).items()
        for data, variants in sets.items()
    }
    groups["paper, 0.2 %: PSNR, dB"] = {VARIANTS[name]: [psnr] for name, (psnr, _) in paper.ABLATIONS.items()}
    bar_chart(path, groups)


BENCHMARK = Benchmark(
    name="ablations",
    title="Table 3: ablations",
    needs="UCF-101 and a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=vae_runs.add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
