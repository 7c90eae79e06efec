"""Table 3: what each part of the two latents is worth, by training without it.

    python benchmarks/ablations.py --scale cpu --clips FOLDER
    accelerate launch benchmarks/ablations.py --scale paper --data UCF-101

All variants train on the same clips in the same order for the same number of steps, each with two seeds, whose spread
says which differences mean something. Small models have far larger latents for their clips than the paper's (2.6 % to
0.2 %), so the one ablation that is about how to spend few values, (a), is done again with a fifth of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
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
# (a) at the smaller rate; both latents have as many values.
FEW = {
    "smoke": dict(structure_channels=2, dynamics_channels=2),
    "cpu": dict(structure_channels=3, dynamics_channels=1),
}
FEW_VARIANTS = {"few-full": "full", "few-single": VARIANTS["single"]}


def run(options: argparse.Namespace) -> Results | None:
    variants = {variant: vae_runs.overridden(**ABLATIONS.get(variant, {})) for variant in VARIANTS}
    if options.scale in FEW:
        few = FEW[options.scale]
        variants["few-full"] = vae_runs.overridden(**few)
        variants["few-single"] = vae_runs.overridden(**few, **ABLATIONS["single"])
    return vae_runs.train_variants(variants, options)


def tables(results: Results | None) -> str:
    ours = results["data"] if results else {}
    papers = ["{} / {}".format(*paper.ABLATIONS[name]) for name in VARIANTS]
    text = table(["variant", "paper PSNR, SSIM"], zip(VARIANTS.values(), papers, strict=True), ours, VARIANTS)
    text += "".join("\n\n" + ordering(*item) for item in ours.items())
    with_few = {data: variants for data, variants in ours.items() if FEW_VARIANTS.keys() <= variants.keys()}
    if with_few:
        first = next(iter(with_few.values()))
        full, single = (f"{100 * first[name][0]['compression_rate']:.2f} %" for name in FEW_VARIANTS)
        text += f"\n\nWith latents of {full} of a clip ({single} without decoupling):\n\n"
        text += table(["variant"], ([label] for label in FEW_VARIANTS.values()), with_few, FEW_VARIANTS) + "\n"
        theirs = paper.ABLATIONS["full"][0] - paper.ABLATIONS["single"][0]
        for data, variants in with_few.items():
            verdict = vae_runs.gain(variants["few-full"], variants["few-single"], theirs)
            text += f"\n* {data}, full over {VARIANTS['single']}: {verdict}."
    return text


def table(header: list[str], heads: Iterable[Sequence[str]], ours: dict[str, dict], names: Iterable[str]) -> str:
    """A row per variant: what heads it, then its scores on each of our data sets."""
    header, rows = [*header], [[*head] for head in heads]
    for data, variants in ours.items():
        header += [f"{data}: PSNR, dB", "SSIM", "parameters"]
        for row, name in zip(rows, names, strict=True):
            scores = variants[name]
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
        f"{data}: PSNR, dB": {label: [s["psnr"] for s in variants[name]] for name, label in VARIANTS.items()}
        for data, variants in results["data"].items()
    }
    groups["paper: PSNR, dB"] = {VARIANTS[name]: [psnr] for name, (psnr, _) in paper.ABLATIONS.items()}
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
