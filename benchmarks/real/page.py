"""The page of the benchmark of real video: its tables, and the plot of paired PSNR differences."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..common.figures import BLUE, GRAY, new_figure
from ..common.harness import Results
from ..common.tables import distance_cell, interval_cell, markdown_table

DIGITS = {"psnr": 2, "ssim": 3, "lpips_squeeze": 3}
HEADINGS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips_squeeze": "LPIPS"}


def tables(results: Results) -> str:
    _, frames, height, width = results["clip_shape"]
    rate = results["latent_size"] / (3 * frames * height * width)
    parts = [
        f"{results['name']}: clips of {frames} frames, {height} x {width} pixels; {results['latent_size']:,} latent "
        f"values, {rate:.2%}. 95 % intervals in parentheses are over groups of alike clips.",
        "Reconstruction of held-out clips, 8-bit pixels, LPIPS of the squeeze backbone; below each reference, the "
        "model minus the reference, clip by clip:",
    ]
    for name, scores in results["reconstruction"].items():
        parts.append(f"{name}: {scores['clips']} clips of {scores['groups']} groups")
        parts.append(reconstruction_table(scores))
    accuracy = {name: interval_cell(score, 2) for name, score in results["accuracy"].items()}
    parts.append(
        f"Accuracy of the class of motion ({results['motion']}, {results['classes']} classes) by a classifier"
    )
    parts.append(markdown_table(["clips", "accuracy"], list(accuracy.items())))
    if (repeats := results.get("repeats", 1)) > 1:
        parts.append(f"Generated and animated clips: {repeats} of each test clip, with other noise.")
    for name, sampling in results.get("sampling", {}).items():
        low, high = sampling["guidance_interval"]
        parts.append(
            f"Clips are {name} in {sampling['num_inference_steps']} steps with guidance "
            f"{sampling['guidance_scale']:g}, at noise levels {low:g} to {high:g}, and temperature "
            f"{sampling['temperature']:g}."
        )
        if (count := sampling.get("num_candidates", 1)) > 1:
            parts[-1] += f" Of {count} candidates the pipeline's classifier, not the one above, chooses one."
    for name, rows in results["components"].items():
        parts.append(f"Decoded from one latent, and latent swaps (structure of A, dynamics of B), {name}:")
        parts.append(components_table(rows))
    if "image_to_video" in results:
        parts.append(
            "Image-to-video; the background is also relative to that of reconstructions. The overlay shows the first "
            "frame where a clip does not move."
        )
        keys = {"background": 2, "first_frame_psnr": 2}
        cells = [
            [
                name,
                *(interval_cell(row[key], digits) for key, digits in keys.items()),
                f"{row['relative_background']:.3f}",
            ]
            for name, row in results["image_to_video"].items()
        ]
        heads = ["clips", "background similarity", "PSNR of the first frame, dB", "relative background"]
        parts.append(markdown_table(heads, cells))
    parts += ["Fréchet distances to the test clips:", distances_table(results["distances"])]
    if "memorization" in results:
        parts.append(memorization_text(results["memorization"]))
    return "\n\n".join(parts)


def reconstruction_table(scores: dict[str, Any]) -> str:
    rows = []
    for method, figures in scores["figures"].items():
        rows.append([method, *(interval_cell(figures[m], digits) for m, digits in DIGITS.items())])
        if difference := scores["difference"].get(method):
            cells = [interval_cell(difference[m], digits, sign="+") for m, digits in DIGITS.items()]
            rows.append([f"model minus {method}", *cells])
    return markdown_table(["method", *HEADINGS.values()], rows)


def components_table(rows: dict[str, dict[str, Any]]) -> str:
    keys = {"background": "background similarity", "motion": "correlation of motion", "accuracy": "class accuracy"}
    cells = []
    for row, scores in rows.items():
        for suffix, of in (("", row), ("_a", "swap, compared with A"), ("_b", "swap, compared with B")):
            values = [scores.get(f"{key}{suffix}") for key in keys]
            if any(values):
                cells.append([of, *(interval_cell(value, 2) if value else None for value in values)])
    return markdown_table(["clips", *keys.values()], cells)


def distances_table(distances: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(distances.values())))
    rows = [[detector, *(distance_cell(by_set[name]) for name in names)] for detector, by_set in distances.items()]
    return markdown_table(["detector", *names], rows)


def memorization_text(scores: dict[str, Any]) -> str:
    copies, median = scores["copies"], scores["median"]
    return (
        "Nearest training clip, by the root mean square difference of clips averaged to 4 frames of 12 x 18 pixels: "
        f"median {median['generated']:.1f} levels of 255 for generated and {median['test']:.1f} for test clips. "
        f"{copies['generated']['value']:.1%} of generated clips ({copies['generated']['low']:.1%} to "
        f"{copies['generated']['high']:.1%}) are nearer than {scores['threshold']:.1f}, the 1st percentile of "
        "test clips."
    )


def plot(results: Results) -> Figure:
    """The model's PSNR minus that of each reference, by data set."""
    sets = results["reconstruction"]
    figure, [panels] = new_figure(3.2 * len(sets) + 1.5, 2.4, columns=len(sets), sharey=True)
    for axes, (name, scores) in zip(panels, sets.items(), strict=True):
        for row, difference in enumerate(scores["difference"].values()):
            psnr = difference["psnr"]
            if psnr["low"] is not None:
                axes.plot([psnr["low"], psnr["high"]], [row, row], color=BLUE)
            axes.plot(psnr["mean"], row, "o", color=BLUE)
        axes.axvline(0, color=GRAY, lw=1)
        axes.set_yticks(range(len(scores["difference"])), list(scores["difference"]))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("PSNR over the reference, dB", fontsize=8)
    return figure
