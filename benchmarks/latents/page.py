"""The page of the comparison: its tables, a verdict from the intervals, and the plot of PSNR over the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from ..common import paper
from ..common.figures import BLUE, DARK_BLUE, GRAY, LIGHT_BLUE, ORANGE, TEAL, new_figure
from ..common.harness import Results
from ..common.tables import distance_cell, interval_cell, markdown_table
from .methods import VIDTWIN
from .training import TUNING_FRACTION

# Rows of the paper's Tables 1 and 2 of the same family of latents.
PAPER_ROWS = {VIDTWIN: "VidTwin", "wan": "EMU-3", "magvit": "MAGVIT-v2"}
PAPER_LABELS = {"wan": "CV-VAE"}  # a second row of the same family
REFERENCES = {"block_pca": "block PCA (linear)", "downsample": "rate-matched downsampling"}
METRICS = {"psnr": ("PSNR", "dB", 2, 1), "ssim": ("SSIM", "", 3, 1), "lpips_squeeze": ("LPIPS", "", 3, -1)}
COLORS = [BLUE, LIGHT_BLUE, ORANGE, TEAL, "#b91c1c", DARK_BLUE, "#7c3aed", "#a16207"]
NO_DIT: dict[str, Any] = {"fvd": {}}


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    parts = [describe_setting(results)]
    for rate in results["rates"].values():
        percent = rate_of(results, rate)
        parts.append(f"At {rate['values']:,} latent values, {percent:.2f} % of a clip:")
        parts.append(quality_table(rate, detectors_of(results)))
        parts.append("\n".join(f"* {line}" for line in verdicts(rate)))
    parts.append(f"Sizes, trainings and costs. {describe_costs(results)}")
    parts.append(cost_table(results))
    share = f"{100 * TUNING_FRACTION:.0f} %"
    parts.append(f"PSNR in dB on the validation list by learning rate, after {share} of the FLOPs of a training:")
    parts.append(learning_rate_table(results))
    return "\n\n".join(parts)


def describe_setting(results: Results) -> str:
    """Data, intervals and noise levels, in a paragraph."""
    videos = results["videos"]
    noise = results["real_vs_real"] or {}
    levels = ", ".join(f"{d['value']:.3g} ({name})" for name, d in noise.items() if d["value"] is not None)
    clips = {rate["num_clips"] for rate in results["rates"].values()}
    text = (
        f"{videos['train']} training videos, {videos['validation']} to choose learning rates, "
        f"{', '.join(map(str, sorted(clips)))} clips of {videos['test']} test videos. All autoencoders see the same "
        "data and objective (L1, LPIPS, KL) and have the same training FLOPs; 95 % intervals are over videos, of the "
        "mean over seeds. The gain is in PSNR over block PCA of the same rate. rFVD is that of the test clips; gFVD "
        "compares generated with training clips. The paper's numbers are of other data, sizes and rates."
    )
    return f"{text} rFVD of one half of the test clips to the other: {levels}." if levels else text


def quality_table(rate: Results, detectors: Sequence[str]) -> str:
    """Scores of reconstructions and generated clips, the paper's beside them."""
    header = ["method", "paper: rate, PSNR / LPIPS / FVD", "paper: UCF-101 FVD", "values"]
    header += [f"{name}, {unit}".rstrip(", ") for name, unit, _, _ in METRICS.values()]
    header.insert(5, "gain over block PCA, dB")
    header += [f"{label} ({name})" for label in ("rFVD", "gFVD") for name in detectors]
    header += ["DiT tokens", "s per sample"]
    rows = []
    for name, method in rate["methods"].items():
        first = method["runs"][0]
        scores = [interval_cell(method["figures"][metric], digits) for metric, (_, _, digits, _) in METRICS.items()]
        gain = method["gain"].get("block_pca")
        scores.insert(1, interval_cell(gain, 2, sign="+") if gain else None)
        rfvd = ["; ".join(filter(None, (rfvd_cell(run, d) for run in method["runs"]))) for d in detectors]
        dits = [run["dit"] or NO_DIT for run in method["runs"]]
        gfvd = ["; ".join(filter(None, (gfvd_cell(dit, d) for dit in dits))) for d in detectors]
        last = [dits[0].get("tokens"), dits[0].get("seconds_per_sample")]
        rows.append([method["label"], *paper_cells(name), first["latent_size"], *scores, *rfvd, *gfvd, *last])
    for name, label in REFERENCES.items():
        if reference := rate["references"].get(name):
            scores = [interval_cell(reference["figures"][m], digits) for m, (_, _, digits, _) in METRICS.items()]
            scores.insert(1, None)
            rfvd = [rfvd_cell(reference, d) for d in detectors]
            blank = [None] * (len(detectors) + 2)
            rows.append([label, None, None, reference["latent_size"], *scores, *rfvd, *blank])
    return markdown_table(header, rows)


def paper_cells(name: str) -> list[str | None]:
    """The paper's row of Table 1, and its FVD on UCF-101, of a method."""
    rows = [row for row in (PAPER_ROWS.get(name), PAPER_LABELS.get(name)) if row]
    table_1 = [
        f"{row}: {rate:.2f} %, {psnr:.2f} / {lpips:.3f} / {fvd:.0f}"
        for row in rows
        for rate, psnr, lpips, _, fvd in [paper.RECONSTRUCTION[row]]
    ]
    table_2 = [f"{paper.UCF101_FVD[row]}" for row in rows if row in paper.UCF101_FVD]
    return ["; ".join(table_1) or None, "; ".join(table_2) or None]


def describe_costs(results: Results) -> str:
    """What the seconds and the memory of `cost_table` are of."""
    runs = [run for rate in results["rates"].values() for m in rate["methods"].values() for run in m["runs"]]
    costs = [run["cost"] for run in runs if run["cost"]]
    if not costs:
        return "Seconds and memory are not measured yet:"
    return (
        f"Seconds are of a clip of the stated frames in float32 on {costs[0]['device']}, memory is of "
        f"{costs[0]['timed_clips']} clips at once:"
    )


def cost_table(results: Results) -> str:
    """Sizes, trainings and costs of the first seed of every method at every rate."""
    header = ["method", "rate, %", "parameters", "frames", "latent", "GFLOPs of a clip", "optimizer", "learning rate"]
    header += ["steps", "clips", "training minutes", "encode, s", "decode, s", "memory, MiB"]
    header += ["DiT parameters", "DiT steps"]
    rows = []
    for rate in results["rates"].values():
        for method in rate["methods"].values():
            run = method["runs"][0]
            trained, cost, dit = run["trained"], run["cost"] or {}, run["dit"] or NO_DIT
            seconds = [cost.get(key) for key in ("encode_seconds", "decode_seconds")]
            rows.append(
                [
                    method["label"],
                    f"{rate_of(results, rate):.2f}",
                    f"{run['parameters']:,}",
                    cost.get("frames"),
                    shape_cell(trained),
                    f"{sum(run['flops']) / 1e9:.2f}",
                    trained["optimizer"],
                    f"{trained['learning_rate']:g}",
                    trained["steps"],
                    trained["clips"],
                    f"{trained['seconds'] / 60:.0f}",
                    *(None if value is None else f"{value:.3f}" for value in seconds),
                    None if "memory_mib" not in cost else f"{cost['memory_mib']:.0f}",
                    f"{dit['parameters']:,}" if "parameters" in dit else None,
                    dit.get("steps"),
                ]
            )
    return markdown_table(header, rows)


def learning_rate_table(results: Results) -> str:
    """PSNR of the short runs; the best learning rate of each method is bold."""
    labels = {name: m["label"] for rate in results["rates"].values() for name, m in rate["methods"].items()}
    rows = []
    for name, psnr in results["learning_rates"].items():
        best = max(psnr, key=psnr.get, default=None)
        cells = [
            f"**{rate}: {value:.2f}**" if rate == best else f"{rate}: {value:.2f}" for rate, value in psnr.items()
        ]
        rows.append([labels.get(name, name), ", ".join(cells)])
    return markdown_table(["method", "learning rate: PSNR"], rows)


def given_tables(results: Results) -> str:
    """Scores of given weights beside the paper's Table 1."""
    frames, height, width = results["clips"]
    detectors = sorted({name for vae in results["vaes"].values() for name in vae["rfvd"]})
    header = ["autoencoder", "parameters", "clip of a tile", "values", "rate, %", "PSNR, dB", "SSIM", "LPIPS"]
    header += [*(f"rFVD ({name})" for name in detectors), "PSNR of rate-matched downsampling, dB"]
    header += ["GFLOPs of a tile", "encode, s", "decode, s", "memory, MiB"]
    rows: list[list[Any]] = [
        [f"{name} (paper, MCL-JCV)", None, None, None, f"{rate:.2f}", f"{psnr:.2f}", f"{ssim:.3f}", f"{lpips:.3f}"]
        + [None] * (len(detectors) + 5)
        for name, (rate, psnr, lpips, ssim, _) in paper.RECONSTRUCTION.items()
    ]
    for name, vae in results["vaes"].items():
        scores = [interval_cell(vae["figures"][metric], digits) for metric, (_, _, digits, _) in METRICS.items()]
        rfvd = [rfvd_cell(vae, d) for d in detectors]
        tile = " x ".join(map(str, vae["clip_shape"][1:]))
        row = [name, f"{vae['parameters']:,}", tile, vae["latent_size"], f"{100 * vae['compression_rate']:.2f}"]
        cost = vae["cost"]
        cells = [f"{sum(vae['flops']) / 1e9:.1f}", f"{cost['encode_seconds']:.3f}", f"{cost['decode_seconds']:.3f}"]
        cells.append(f"{cost['memory_mib']:.0f}")
        rows.append([*row, *scores, *rfvd, interval_cell(vae["downsample_psnr"], 2), *cells])
    first = next(iter(results["vaes"].values()))
    text = (
        f"{first['num_clips']} clips of {first['num_videos']} videos, {frames} frames at {results['fps']:g} fps, "
        f"{height} x {width} pixels; 95 % intervals over videos; LPIPS of the squeeze backbone. The paper's FVD is of "
        "I3D and is not comparable with these detectors. Seconds and memory are of a tile in float32 on "
        f"{first['cost']['device']}, memory of {first['cost']['timed_clips']} at once."
    )
    return f"{text}\n\n{markdown_table(header, rows)}"


# --- verdict ---------------------------------------------------------------------------------------------------------


def verdicts(rate: Results) -> list[str]:
    """One line per method: where VidTwin is better, worse, or the difference is inconclusive."""
    lines = []
    for method in rate["methods"].values():
        if "over" in method:
            parts = []
            for metric, (name, unit, digits, sign) in METRICS.items():
                difference = method["over"][metric]
                value = f"{difference['mean']:+.{digits}f} {unit}".rstrip()
                parts.append(f"{name} {value}: {judge(difference, sign)}")
            parts += judge_distances(rate["methods"][VIDTWIN]["runs"], method["runs"])
            lines.append(f"VidTwin vs. {method['label']}: {'; '.join(parts)}.")
    for name, label in REFERENCES.items():
        gain = rate["methods"].get(VIDTWIN, {}).get("gain", {}).get(name)
        if gain:
            lines.append(f"VidTwin vs. {label}: PSNR {gain['mean']:+.2f} dB: {judge(gain, 1)}.")
    return lines


def judge(difference: dict[str, Any], sign: int) -> str:
    """Say whether a difference is "better" or "worse": its interval excludes 0, and all seeds have its sign.

    Args:
        difference: of `compare_clips`.
        sign: 1 if higher is better, -1 if lower is.
    """
    low, high = difference["low"], difference["high"]
    if low is None:
        return "inconclusive (one video)"
    if low <= 0 <= high or any(seed * difference["mean"] <= 0 for seed in difference["by_seed"]):
        return "inconclusive"
    return "better" if sign * low > 0 else "worse"


def judge_distances(twin: Sequence[Results], other: Sequence[Results]) -> list[str]:
    """Compare the rFVD and gFVD of all seeds by detector: "better" if all intervals of VidTwin are lower."""
    parts = []
    for label, find in (("rFVD", rfvd_interval), ("gFVD", gfvd_interval)):
        for detector in twin[0]["rfvd"]:
            ours, theirs = ([find(run, detector) for run in runs] for runs in (twin, other))
            if None in ours or None in theirs:
                continue
            if max(high for _, high in ours) < min(low for low, _ in theirs):
                verdict = "better"
            elif min(low for low, _ in ours) > max(high for _, high in theirs):
                verdict = "worse"
            else:
                verdict = "inconclusive"
            parts.append(f"{label} ({detector}): {verdict}")
    return parts


def rfvd_interval(run: Results, detector: str) -> tuple[float, float] | None:
    """The interval of the rFVD of a run; None if there is none."""
    distance = run["rfvd"].get(detector) or {}
    return None if distance.get("low") is None else (distance["low"], distance["high"])


def gfvd_interval(run: Results, detector: str) -> tuple[float, float] | None:
    """The interval of the gFVD of a run; None if there is none."""
    distances = (run["dit"] or NO_DIT)["fvd"].get(detector) or {}
    interval = (distances.get("generated") or {}).get("interval")
    return interval and tuple(interval)


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(results: Results) -> Figure:
    """PSNR over the rate: the references as curves, every run of a method as a dot."""
    figure, [[axes]] = new_figure(7, 4.4)
    for (name, points), style in zip((results["curves"] or {}).items(), ("--", "-"), strict=False):
        axes.plot(*zip(*points, strict=True), style, color=GRAY, lw=1.5, label=REFERENCES[name])
    labels = dict.fromkeys(name for rate in results["rates"].values() for name in rate["methods"])
    for number, name in enumerate(labels):
        label, color = None, COLORS[number % len(COLORS)]
        for rate in results["rates"].values():
            if method := rate["methods"].get(name):
                percent = rate_of(results, rate) * 1.02 ** (number - len(labels) / 2)  # beside each other
                figures = method["figures"]["psnr"]
                if figures["low"] is not None:
                    axes.plot([percent] * 2, [figures["low"], figures["high"]], color=color, lw=1)
                seeds = [run["psnr"] for run in method["runs"]]
                legend = None if label else method["label"]
                label = method["label"]
                axes.plot([percent] * len(seeds), seeds, "o", color=color, ms=5, label=legend)
    ticks = [rate_of(results, rate) for rate in results["rates"].values()]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rate: latent, % of the clip's values")
    axes.set_ylabel("PSNR, dB")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


# --- cells -----------------------------------------------------------------------------------------------------------


def rate_of(results: Results, rate: Results) -> float:
    """Latent values in % of those of a scored clip."""
    return 100 * rate["values"] / results["clip_values"]


def detectors_of(results: Results) -> list[str]:
    """Names of the detectors of the results."""
    runs = [run for rate in results["rates"].values() for m in rate["methods"].values() for run in m["runs"]]
    return list(dict.fromkeys(name for run in runs for name in run["rfvd"]))


def rfvd_cell(run: Results, detector: str) -> str | None:
    """The rFVD of a run with its interval."""
    distance = run["rfvd"].get(detector)
    return distance_cell(distance and distance | {"interval": rfvd_interval(run, detector)})


def gfvd_cell(dit: Results, detector: str) -> str | None:
    """The distance of a DiT's generated clips with its interval."""
    return distance_cell((dit["fvd"].get(detector) or {}).get("generated"))


def shape_cell(trained: Results) -> str:
    """Shapes of the latents that have values: "3 x 4 x 8 x 8 + 4 x 16 x 8"."""
    shapes = [trained["structure_shape"], trained["dynamics_shape"]]
    return " + ".join(" x ".join(map(str, shape)) for shape in shapes if 0 not in shape)
