"""The page: samples of every variant beside the baseline's, and the latents that they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..common.figures import dot_chart
from ..common.harness import Results
from ..common.tables import markdown_table, mean_and_spread
from .variants import BASELINE, VAE_LABELS, VARIANTS

Runs = dict[str, dict[str, Any]]  # records by seed


def tables(results: Results) -> str:
    parts = [
        "Mean ± half the range over seeds. A verdict needs every seed of a variant on one side of every seed of the "
        "baseline; the change is the mean over seeds that both have. Fréchet distances compare generated sprites with "
        "sprites that no training uses, and generated real clips with the training videos."
    ]
    for name, variants in results["data"].items():
        vaes = results["vaes"][name]
        parts += [f"### {name}", describe_budget(variants, vaes), sample_table(variants, results["detectors"])]
        parts += ["The latents of the VAEs (`vidgen latents`), on test clips:", latent_table(vaes)]
    return "\n\n".join(parts)


def describe_budget(variants: dict[str, Runs], vaes: dict[str, Runs]) -> str:
    """Steps and FLOPs of the trainings; every variant has these FLOPs."""
    vae, dit = (next(iter(next(iter(runs.values())).values())) for runs in (vaes, variants))
    return (
        f"Every VAE is trained for {vae['steps']:,} steps, {vae['flops']:.3g} FLOPs, every DiT for {dit['steps']:,} "
        f"steps, {dit['flops']:.3g} FLOPs on {dit['tokens']} tokens; a DiT with Muon makes fewer steps, by the FLOPs "
        "of its updates. Seconds are of the last start."
    )


def sample_table(variants: dict[str, Runs], detectors: Sequence[str]) -> str:
    """Fréchet distances and accuracies of generated clips, beside those of reconstructed and real ones."""
    has_accuracy = all(run["accuracy"] for runs in variants.values() for run in runs.values())
    header = ["option"]
    for detector in detectors:
        header += [f"Fréchet distance ({detector})", "change", "verdict", "reconstructed", "real vs. real"]
    header += ["motion accuracy", "reconstructed", "real"] if has_accuracy else []
    rows = []
    for name, runs in variants.items():
        row = [VARIANTS[name].label]
        for detector in detectors:
            ours, baseline = (distances(variants.get(key, {}), detector) for key in (name, BASELINE))
            is_compared = name != BASELINE and baseline
            row += [spread(ours.values())]
            row += [change(ours, baseline), judge(ours, baseline)] if is_compared else [None, None]
            row += [spread(distances(runs, detector, kind).values()) for kind in ("reconstructed", "real_vs_real")]
        if has_accuracy:
            kinds = ("generated", "reconstructed", "real")
            row += [spread(run["accuracy"][kind]["value"] for run in runs.values()) for kind in kinds]
        rows.append([*row, next(iter(runs.values()))["steps"], seconds(runs)])
    return markdown_table([*header, "steps of the DiT", "s"], rows)


def latent_table(vaes: dict[str, Runs]) -> str:
    """Quality and diagnostics of the latents: a row per figure, a column per VAE."""
    rows = []
    for label, figure in list_figures(first(vaes)).items():
        cells = [spread(map(figure, runs.values())) for runs in vaes.values()]
        if any(cells):
            rows.append([label, *cells])
    rows.append(["seconds of the last start", *map(seconds, vaes.values())])
    return markdown_table(["figure", *(VAE_LABELS[name] for name in vaes)], rows)


def list_figures(run: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], float | None]]:
    """The figures of the runs of VAEs with these streams and grids, by their labels."""

    def of(part: str, name: str, key: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda run: run["diagnostics"][part][name][key]

    figures = {"PSNR, dB": lambda run: run["psnr"], "SSIM": lambda run: run["ssim"]}
    for name in run["diagnostics"]["streams"]:
        figures[f"{name}: nats per clip"] = of("streams", name, "nats_per_clip")
        figures[f"{name}: nats in the first half of the channels, %"] = lambda run, name=name: first_half(
            run["diagnostics"]["streams"][name]["channel_nats"]
        )
        figures[f"{name}: largest kurtosis"] = of("streams", name, "kurtosis")
    for name in run["diagnostics"]["grids"]:
        figures[f"{name}: distance under scaling"] = of("grids", name, "scale")
        figures[f"{name}: distance under a shift, relative"] = of("grids", name, "moved")
        figures[f"{name}: power in high frequencies"] = of("grids", name, "high")
    return figures


def plot(results: Results) -> Figure:
    groups = {
        f"{name}: Fréchet distance ({detector})": {
            VARIANTS[variant].label: list(distances(runs, detector).values()) for variant, runs in variants.items()
        }
        for name, variants in results["data"].items()
        for detector in results["detectors"]
    }
    return dot_chart(groups, from_zero=True)


# --- figures of runs -------------------------------------------------------------------------------------------------


def distances(runs: Runs, detector: str, kind: str = "generated") -> dict[str, float]:
    """The distance of each seed that has one."""
    values = {seed: run["distances"][detector][kind] for seed, run in runs.items()}
    return {seed: distance["value"] for seed, distance in values.items() if distance}


def change(ours: dict[str, float], baseline: dict[str, float]) -> str | None:
    """The mean change over the seeds that both have: "-21 %"."""
    seeds = [seed for seed in ours if seed in baseline]
    if not seeds:
        return None
    return f"{100 * sum(ours[seed] / baseline[seed] - 1 for seed in seeds) / len(seeds):+.0f} %"


def judge(ours: dict[str, float], baseline: dict[str, float]) -> str:
    """Whether distances are lower than the baseline's in all seeds: better, worse or inconclusive."""
    if min(len(ours), len(baseline)) < 2:
        return "one seed"
    if max(ours.values()) < min(baseline.values()):
        return "better"
    return "worse" if min(ours.values()) > max(baseline.values()) else "inconclusive"


def first_half(nats: Sequence[float | None]) -> float | None:
    """Share of the nats that the first half of the channels holds, in %: 50 without an order."""
    if len(nats) < 2 or None in nats or not sum(nats):
        return None
    return 100 * sum(nats[: len(nats) // 2]) / sum(nats)


def first(runs: dict[str, Runs]) -> dict[str, Any]:
    """The record of the first run."""
    return next(iter(next(iter(runs.values())).values()))


def spread(values: Any) -> str | None:
    """Mean and half the range of figures; None if a run has none."""
    values = list(values)
    return mean_and_spread(values, 3) if values and None not in values else None


def seconds(runs: Runs) -> str:
    return mean_and_spread([run["seconds"] for run in runs.values()], 0)
