"""Table 3: what each part of the two latents is worth, by training without it.

    python benchmarks/ablations.py --scale cpu --clips FOLDER
    accelerate launch benchmarks/ablations.py --scale paper --data UCF-101

All variants train on the same clips in the same order for the same number of steps, each with two seeds, whose spread
says which differences mean something.
"""

from __future__ import annotations

import argparse
import json
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


def run(options: argparse.Namespace) -> Results | None:
    results: Results = {"data": {}}
    for seed in range(vae_runs.SEEDS[options.scale]):
        for data, settings in vae_runs.data_sets(options).items():
            for variant in VARIANTS:
                overrides = json.dumps(ABLATIONS.get(variant, {}))
                name = f"{data}-{variant}-seed{seed}"
                own = [*settings, f"seed={seed}", f"model.overrides={overrides}"]
                score = vae_runs.train_and_score(name, own, options)
                results["data"].setdefault(data, {}).setdefault(variant, []).append(score)
    return None if options.only else vae_runs.with_seconds(results)


def tables(results: Results | None) -> str:
    header = ["variant", "paper PSNR, SSIM"]
    rows = [[label, "{} / {}".format(*paper.ABLATIONS[name])] for name, label in VARIANTS.items()]
    ours = results["data"] if results else {}
    for data, variants in ours.items():
        header += [f"{data}: PSNR, dB", "SSIM", "parameters"]
        for row, scores in zip(rows, variants.values(), strict=True):
            row += [spread([s["psnr"] for s in scores]), spread([s["ssim"] for s in scores], 3)]
            row.append(f"{scores[0]['parameters']:,}")
    return markdown_table(header, rows) + "".join("\n\n" + ordering(*item) for item in ours.items())


def ordering(data: str, variants: dict[str, list[dict]]) -> str:
    """Which of the paper's differences come out, and whether they are larger than what a seed makes."""
    said = []
    for name, label in list(VARIANTS.items())[1:]:
        drops = [f["psnr"] - s["psnr"] for f, s in zip(variants["full"], variants[name], strict=True)]
        theirs = paper.ABLATIONS["full"][0] - paper.ABLATIONS[name][0]
        holds = "holds" if min(drops) > 0 else "is reversed" if max(drops) < 0 else "lies within the seeds' spread"
        ours = ", ".join(f"{drop:+.2f}" for drop in drops)
        said.append(f"* {label}: the paper's full model is {theirs:.2f} dB better; ours {ours} dB by seed: {holds}.")
    return f"On {data}:\n\n" + "\n".join(said)


def plot(results: Results, path: Path) -> None:
    groups = {
        f"{data}: PSNR, dB": {VARIANTS[name]: [s["psnr"] for s in scores] for name, scores in variants.items()}
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
