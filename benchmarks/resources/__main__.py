"""Figure 5: FLOPs and training memory of the paper's transformer on every method's latent; training costs.

    python -m benchmarks.resources --scale cpu
    python -m benchmarks.resources training_cost --scale cpu

Nothing is trained: FLOPs and bytes are counted on tensors without data, so no GPU is needed and `paper` equals `cpu`.
Figure 5 is in float32, at batch size 1, with Adam.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from matplotlib.figure import Figure

from ..common import paper
from ..common.figures import DARK_BLUE, LIGHT_BLUE, TEAL, new_figure
from ..common.harness import Benchmark, Results, main
from ..common.tables import markdown_table
from .flops import training_flops
from .latents import (
    BASELINES,
    CROPPED,
    FOLDED,
    OTHER_READING,
    PATCHINGS,
    REFERENCE,
    RELEASED,
    count_tokens,
    latent_table,
)
from .memory import ATTENTION, training_memory
from .pseudo_dit import PseudoDiT
from .training_cost import run_training_cost, training_cost_tables

STATED, PROJECTED = "pseudo-DiT as stated", "pseudo-DiT with projections"
PSEUDO_DITS = {STATED: False, PROJECTED: True}  # whether the attention has projections
METHODS = {"smoke": ["EMU-3", REFERENCE], "cpu": [*BASELINES, OTHER_READING, REFERENCE, RELEASED, FOLDED]}
METHODS["paper"] = METHODS["cpu"]
FIGURES = {  # keys of the results: label, and the paper's claim
    "step_flops": ("FLOPs of a training step", "flops"),
    "fused": ("peak memory, fused attention", "memory"),
    "math": ("peak memory, math attention", "memory"),
}

# --- counting --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Results:
    rows = []
    for model in [STATED] if options.scale == "smoke" else PSEUDO_DITS:
        for patching in ("2", "1") if options.scale == "smoke" else PATCHINGS:
            print(f"{model}, patch {PATCHINGS[patching]}", file=sys.stderr, flush=True)
            for method in METHODS[options.scale]:
                tokens = count_tokens(method, patching)
                cost = measure_cost(PSEUDO_DITS[model], sum(tokens))
                rows.append({"model": model, "patching": patching, "method": method, "tokens": tokens, **cost})
    return {"costs": rows}


@cache
def measure_cost(projections: bool, tokens: int) -> dict[str, Any]:
    """Parameters, FLOPs and memory of a pseudo-DiT on a number of tokens."""

    def build() -> tuple:
        model = PseudoDiT(projections=projections)
        inputs = torch.randn(1, tokens, 512), torch.randn(1, tokens, 512)
        return model, lambda x, target: (model(x) - target).square().mean(), inputs

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build()[0].parameters())
    forward, step = training_flops(build)
    cost = {"parameters": parameters, "forward_flops": forward, "step_flops": step}
    return cost | {attention: asdict(training_memory(build, attention)) for attention in ATTENTION}


def ratios(costs: list[dict], model: str, patching: str, figure: str) -> dict[str, float]:
    """Each method's figure relative to VidTwin's: "step_flops", or peak memory with "math" or "fused" attention."""
    values = {
        row["method"]: row[figure]["peak"] if isinstance(row[figure], dict) else row[figure]
        for row in costs
        if (row["model"], row["patching"]) == (model, patching) and figure in row
    }
    return {method: value / values[REFERENCE] for method, value in values.items()}


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    costs = [row for row in results["costs"] if row["model"] in PSEUDO_DITS]  # older records have other models too
    sections = {
        "The paper's claim": claim_table(costs),
        "The latents": latent_table(),
        "FLOPs and memory": cost_table(costs),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in sections.items())


def claim_table(costs: list[dict]) -> str:
    """Ratios to VidTwin, and which baselines are within the paper's ranges."""
    rows = []
    for model, patching in dict.fromkeys((row["model"], row["patching"]) for row in costs):
        row, within = [model, PATCHINGS[patching]], {}
        for figure, (_, claim) in FIGURES.items():
            low, high = paper.RESOURCES_CLAIM[claim]
            rounded = {m: round(r, 1) for m, r in ratios(costs, model, patching, figure).items() if m in BASELINES}
            within[figure] = [method for method, ratio in rounded.items() if low <= ratio <= high]
            row.append(", ".join(f"**{m} {r}**" if m in within[figure] else f"{m} {r}" for m, r in rounded.items()))
        for attention in ("fused", "math"):
            row.append(", ".join(m for m in within["step_flops"] if m in within[attention]) or "none")
        rows.append(row)
    header = ["DiT", "patch", *(title for title, _ in FIGURES.values())]
    header += [f"within both ranges, {attention} attention" for attention in ("fused", "math")]
    flops, memory = ("{}-{}".format(*paper.RESOURCES_CLAIM[claim]) for claim in ("flops", "memory"))
    return (
        f"Ratios to VidTwin, to one decimal. The paper claims {flops} for FLOPs and {memory} for memory (bold).\n\n"
        + markdown_table(header, rows)
    )


def cost_table(costs: list[dict]) -> str:
    """FLOPs and peak memory of a training step: one row per patch size and method, and columns for each model."""
    header, rows, parameters = ["patch", "method", "tokens"], {}, {}
    for row in costs:
        model, method, patching = row["model"], row["method"], row["patching"]
        memory = {attention: row[attention] for attention in ("fused", "math")}
        if model not in parameters:
            header += [f"{model}: GFLOP", *(f"{attention}: peak, MiB" for attention in memory)]
        parameters[model] = row["parameters"]  # VidTwin's, which is the last one
        tokens = " + ".join(f"{n:,}" for n in row["tokens"])
        cells = rows.setdefault((patching, method), [PATCHINGS[patching], method, tokens])
        cells.append(f"{row['step_flops'] / 1e9:,.1f} ({ratios(costs, model, patching, 'step_flops')[method]:.2f}x)")
        cells += [f"{m['peak'] / 2**20:,.0f}" for m in memory.values()]
    counts = ", ".join(f"{model} {count:,} parameters" for model, count in parameters.items())
    return f"FLOPs (and their ratio to VidTwin's) and peak memory of a training step. {counts}.\n\n" + markdown_table(
        header, list(rows.values())
    )


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(results: Results) -> Figure:
    """Bars of the pseudo-DiT as stated: FLOPs and memory by method, one column per patch size."""
    costs = [row for row in results["costs"] if row["model"] == STATED]
    patchings = [name for name in PATCHINGS if name != CROPPED and any(row["patching"] == name for row in costs)]
    units = {"step_flops": (1e9, "GFLOP"), "fused": (2**20, "MiB"), "math": (2**20, "MiB")}
    colors = {REFERENCE: DARK_BLUE, FOLDED: TEAL}
    size = 3.5 * len(patchings) + 1.4, 2.75 * len(FIGURES) + 0.5
    figure, panels = new_figure(*size, rows=len(FIGURES), columns=len(patchings), sharey=True, sharex="row")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for line, (name, (title, claim)) in zip(panels, FIGURES.items(), strict=True):
        low, high = paper.RESOURCES_CLAIM[claim]
        unit, unit_name = units[name]
        everything = []
        for axes, patching in zip(line, patchings, strict=True):
            multiples = ratios(costs, STATED, patching, name)
            by_method = {row["method"]: row[name] for row in costs if row["patching"] == patching}
            methods = [method for method in (*BASELINES, REFERENCE, FOLDED) if method in by_method]
            values = [(by_method[m] if name == "step_flops" else by_method[m]["peak"]) / unit for m in methods]
            reference = values[methods.index(REFERENCE)]
            axes.axvspan(low * reference, high * reference, color="#fde68a", alpha=0.6, lw=0)
            axes.barh(range(len(methods)), values, color=[colors.get(m, LIGHT_BLUE) for m in methods], height=0.65)
            for place, (method, value) in enumerate(zip(methods, values, strict=True)):
                multiple = multiples[method]
                text = f"{multiple:.2g}x" if multiple < 10 else f"{multiple:,.0f}x"
                axes.text(1.12 * value, place, text, va="center", fontsize=8)
            axes.set_yticks(range(len(methods)), methods)
            axes.set_xscale("log")
            if axes in panels[0]:
                axes.set_title(f"patch: {PATCHINGS[patching]}", fontsize=10)
            axes.set_xlabel(f"{title}, {unit_name}", fontsize=8)
            everything += values
        line[0].set_xlim(min(everything) / 2, 6 * max(everything))
    panels[0, 0].invert_yaxis()
    figure.suptitle(
        f"Pseudo-DiT of Figure 5 as stated, {costs[0]['parameters']:,} parameters, batch size 1\n"
        "labels: ratio to VidTwin (logarithmic axes); yellow: the paper's claim for the baselines",
        fontsize=11,
    )
    return figure


RESOURCES = Benchmark("resources", "Figure 5: FLOPs and training memory", run, tables, plot, program="resources")
TRAINING_COST = Benchmark(
    "training_cost", "Training cost", run_training_cost, training_cost_tables, program="resources"
)

if __name__ == "__main__":
    main(RESOURCES, TRAINING_COST)
