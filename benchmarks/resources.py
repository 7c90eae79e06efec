"""Figure 5: FLOPs and training memory of one and the same diffusion transformer on every method's latent.

    python -m benchmarks.resources --scale cpu
    python -m benchmarks.resources --scale paper

Nothing is trained. `cpu` counts FLOPs and bytes on tensors without values; `paper` also does each training step on a
GPU, for the bytes of its allocator. All is in float32, at batch 1, with Adam.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoencoder import AutoencoderKLVidTwin
from benchmarks.common import paper
from pipelines import VidTwinTransformer3DModel
from vidgen.common.errors import UserError
from vidgen.metrics.flops import training_flops

from .common.harness import Benchmark, Results, markdown_table
from .speed.memory import ATTENTION, Build, training_memory
from .speed.pseudo_dit import PseudoDiT, token_grid

STATED, PROJECTED = "pseudo-DiT as stated", "pseudo-DiT with projections"
PSEUDO_DITS = {STATED: False, PROJECTED: True}  # whether its attention has projections
MODELS = {
    "smoke": [STATED, "tiny-test"],
    "cpu": [*PSEUDO_DITS, "S", "B", "L", "XL", "paper"],
    "paper": [*PSEUDO_DITS, "S", "B", "L", "XL", "paper"],
}
REFERENCE, FOLDED, OTHER_READING = "VidTwin", "VidTwin, 65 tokens", "MAGVIT-v2, 5 channels"
BASELINES = list(paper.LATENTS)
METHODS = {
    "smoke": ["EMU-3", REFERENCE],
    "cpu": [*BASELINES, OTHER_READING, REFERENCE, "VidTwin, released", FOLDED],
    "paper": [*BASELINES, OTHER_READING, REFERENCE, "VidTwin, released", FOLDED],
}
PATCHINGS = {
    "2": "2 in every dimension",
    "2, cropped": "2 in every dimension, no partial patches",
    "(1, 2, 2)": "1 in time, 2 in space",
    "1": "1",
    "own": "each method's own",
}
CROPPED = "2, cropped"  # only asked of the pseudo-DiTs
FIGURES = {  # of a row of the results: what it is called, and the paper's claim about it
    "step_flops": ("FLOPs of a training step", "flops"),
    "fused": ("peak memory, fused attention", "memory"),
    "math": ("peak memory, math attention", "memory"),
}
# Patches of each stream: every position is a token of the transformers of iVideoGPT, MAGVIT-v2, EMU-3 and VidTwin.
OWN_PATCHES = {
    "CMD": [(1, 16, 16), (1, 1)],  # an 8-fold image autoencoder, and patch 2 of the transformer after it
    "CV-VAE": [(1, 2, 2)],  # what diffusion transformers take on latents of its shape
    FOLDED: [(16, 1, 1), (1, 14)],  # all queries of a place, all positions of a frame
}
CLASSES = 101  # UCF-101's, for the DiTs that have some


class Stream(NamedTuple):
    """A part of a latent: its channels, and its sizes with time (or queries) first."""

    channels: int
    sizes: tuple[int, ...]


class Patches(NamedTuple):
    """A stream cut into tokens: how many lie along each axis, and what each one covers."""

    channels: int
    grid: tuple[int, ...]
    patch_size: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The stream's, filled up or cropped to whole patches."""
        return (self.channels, *(n * size for n, size in zip(self.grid, self.patch_size, strict=True)))


@cache
def latents() -> dict[str, tuple[int, list[Stream]]]:
    """Side of the clip in pixels, and the streams, of every method; ours as the model makes them."""
    found = {name: (side, [Stream(*s) for s in streams]) for name, (side, streams) in paper.LATENTS.items()}
    found[OTHER_READING] = (224, [Stream(5, (4, 28, 28))])
    for name, preset, setting in ((REFERENCE, "base", 1), ("VidTwin, released", "released", None)):
        with torch.device("meta"):
            vae = AutoencoderKLVidTwin.from_preset(preset, setting)
        shapes = (vae.structure_shape, vae.dynamics_shape)
        found[name] = (vae.config.sample_size, [Stream(shape[0], tuple(shape[1:])) for shape in shapes])
    return {**found, FOLDED: found[REFERENCE]}


def rate(side: int, streams: Sequence[Stream]) -> float:
    """Numbers in the latent over numbers in the clip of 16 frames."""
    return sum(s.channels * math.prod(s.sizes) for s in streams) / (3 * 16 * side**2)


def cut(method: str, streams: Sequence[Stream], patching: str) -> tuple[Patches, ...]:
    """A method's streams in patches. A size of 1 stays 1; a partial patch is filled up, but for `CROPPED`."""
    own = OWN_PATCHES.get(method) if patching == "own" or method == FOLDED else None
    found = []
    for i, (channels, sizes) in enumerate(streams):
        rest = len(sizes) - 1
        rules = {"2": (2, *[2] * rest), "2, cropped": (2, *[2] * rest), "(1, 2, 2)": (1, *[2] * rest)}
        patch = own[i] if own else rules.get(patching, (1, *[1] * rest))
        patch = tuple(map(min, patch, sizes))
        found.append(Patches(channels, token_grid(sizes, patch, crop=patching == CROPPED), patch))
    return tuple(found)


def run(options: argparse.Namespace) -> Results:
    allocate = options.scale == "paper"
    if allocate and not torch.cuda.is_available():
        raise UserError("--scale paper reads a GPU's allocator and there is no GPU here; --scale cpu counts the same.")
    rows = []
    for model in MODELS[options.scale]:
        for patching in ("2", "1") if options.scale == "smoke" else PATCHINGS:
            if patching == CROPPED and model not in PSEUDO_DITS:
                continue
            print(f"{model}, patch {PATCHINGS[patching]}", file=sys.stderr, flush=True)
            for method in METHODS[options.scale]:
                patches = cut(method, latents()[method][1], patching)
                tokens = [math.prod(p.grid) for p in patches]
                # To the pseudo-DiT a token is a token.
                cost = _cost(model, sum(tokens) if model in PSEUDO_DITS else patches, allocate)
                rows.append({"model": model, "patching": patching, "method": method, "tokens": tokens, **cost})
    return {"costs": rows}


@cache
def _cost(model: str, latent: int | tuple[Patches, ...], allocate: bool) -> dict[str, Any]:
    """Parameters, FLOPs and memory of a model on a number of tokens or on patches."""

    def build():
        return _pseudo_dit(model, latent) if model in PSEUDO_DITS else _dit(model, latent)

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build()[0].parameters())
    forward, step = training_flops(build)
    cost = {"parameters": parameters, "forward_flops": forward, "step_flops": step}
    for attention in ATTENTION if model in PSEUDO_DITS else ("fused",):
        cost[attention] = asdict(training_memory(build, attention))
        if allocate:
            cost[f"{attention}, allocated"] = _allocated(build, attention)
    return cost


def _pseudo_dit(model: str, tokens: int) -> tuple:
    pseudo_dit = PseudoDiT(projections=PSEUDO_DITS[model])
    inputs = torch.randn(1, tokens, 512), torch.randn(1, tokens, 512)
    return pseudo_dit, lambda x, target: (pseudo_dit(x) - target).square().mean(), inputs


def _dit(preset: str, patches: tuple[Patches, ...]) -> tuple:
    """Our DiT; a latent of one stream stands as structure, beside dynamics without tokens."""
    structure, dynamics = (*patches, Patches(1, (0, 1), (1, 1)))[:2]
    dit = VidTwinTransformer3DModel.from_preset(
        preset,
        structure_shape=structure.shape,
        dynamics_shape=dynamics.shape,
        structure_patch_size=structure.patch_size,
        dynamics_patch_size=dynamics.patch_size,
        num_classes=CLASSES,
    )
    latent, target = torch.randn(1, dit.latent_size), torch.randn(1, dit.latent_size)
    inputs = latent, target, torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    return dit, lambda x, target, *conditions: (dit(x, *conditions).sample - target).square().mean(), inputs


def _allocated(build: Build, attention: str) -> dict[str, int] | None:
    try:
        return asdict(training_memory(build, attention, device="cuda"))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None  # more than the device has


def ratios(costs: list[dict], model: str, patching: str, figure: str) -> dict[str, float]:
    """Each method's figure over VidTwin's: "step_flops", or the peak memory with "math" or "fused" attention."""
    values = {}
    for row in costs:
        if (row["model"], row["patching"]) == (model, patching) and figure in row:
            values[row["method"]] = row[figure]["peak"] if isinstance(row[figure], dict) else row[figure]
    return {method: value / values[REFERENCE] for method, value in values.items()}


def tables(results: Results | None) -> str:
    parts = ["### The latents\n\n" + _latent_table()]
    if results:
        costs = results["costs"]
        parts.append("### What of the paper's claim comes out\n\n" + claims(costs))
        present = list(dict.fromkeys(row["model"] for row in costs))
        parts += [f"### The {model}\n\n{_pseudo_table(costs, model)}" for model in present if model in PSEUDO_DITS]
        ours = [model for model in present if model not in PSEUDO_DITS]
        parts.append("### Our DiT sizes\n\n" + _sizes_table(costs, ours))
    return "\n\n".join(parts)


def _latent_table() -> str:
    rows = []
    for method, (side, streams) in latents().items():
        text = " + ".join(f"{s.channels} of {' x '.join(map(str, s.sizes))}" for s in streams)
        values = sum(s.channels * math.prod(s.sizes) for s in streams)
        theirs = paper.RECONSTRUCTION.get(method, (None,))[0]
        rows.append([method, text, side, f"{values:,}", f"{100 * rate(side, streams):.3f}", theirs])
    header = ["method", "channels of time x space", "clip, px", "numbers", "rate, %", "paper's rate, %"]
    return (
        markdown_table(header, rows) + "\n\n"
        "The tokens of two streams stand in one sequence. A partial patch is filled up with zeros, and a size of 1 "
        'stays 1; "no partial patches" leaves out the rest instead. The paper does not say which of the first two '
        f"sizes of MAGVIT-v2's (5, 4, 28, 28) is time: it is read as 5 frames, and in the row {OTHER_READING!r} as 4. "
        "Own patches: 1, but CV-VAE (1, 2, 2) and CMD 16 x 16 pixels of its content frame. "
        "The 65 tokens are VidTwin's with all queries of a place and all positions of a frame folded, "
        "at every patch size."
    )


def claims(costs: list[dict]) -> str:
    """Which baselines lie in the paper's ranges, from the figures: a table, and what it amounts to."""
    rows = []
    found: dict[str, dict[str, dict[str, list[str]]]] = {}  # baselines in range by DiT, patch and figure
    for model, patching in dict.fromkeys((row["model"], row["patching"]) for row in costs):
        if model not in PSEUDO_DITS:
            continue
        row, inside = [model, PATCHINGS[patching]], {}
        for figure, (_, claim) in FIGURES.items():
            low, high = paper.RESOURCES_CLAIM[claim]
            multiples = {m: round(r, 1) for m, r in ratios(costs, model, patching, figure).items() if m in BASELINES}
            inside[figure] = [method for method, ratio in multiples.items() if low <= ratio <= high]
            cells = (f"**{m} {r}**" if m in inside[figure] else f"{m} {r}" for m, r in multiples.items())
            row.append(", ".join(cells))
        found.setdefault(model, {})[PATCHINGS[patching]] = inside
        rows.append(row)
    said = []
    for figure, (title, claim) in FIGURES.items():
        low, high = paper.RESOURCES_CLAIM[claim]
        where = {model: _where(by_patch, figure) for model, by_patch in found.items()}
        said.append(f"* {title}, claimed {low}-{high} times VidTwin's: {_by_model(where)}.")
    for attention in ATTENTION:
        where = {model: _where(by_patch, "step_flops", attention) for model, by_patch in found.items()}
        said.append(f"* FLOPs and memory together, with {attention} attention: {_by_model(where)}.")
    ever = {m for by_patch in found.values() for inside in by_patch.values() for ms in inside.values() for m in ms}
    never = [row["method"] for row in costs if row["method"] in BASELINES and row["method"] not in ever]
    said.append(f"* In none of the ranges at any of these patch sizes: {', '.join(dict.fromkeys(never)) or 'none'}.")
    return (
        "Multiples of VidTwin's, to one decimal; in bold what lies in the paper's range.\n\n"
        + markdown_table(["DiT", "patch", *(title for title, _ in FIGURES.values())], rows)
        + "\n\nIn the paper's range lie:\n\n"
        + "\n".join(said)
    )


def _where(by_patch: dict[str, dict[str, list[str]]], figure: str, other: str | None = None) -> str:
    """Baselines in the range of a figure, and of another one, at each patch size that has some."""
    said = []
    for patch, inside in by_patch.items():
        methods = [method for method in inside[figure] if method in inside[other or figure]]
        if methods:
            said.append(f"{', '.join(methods)} (patch: {patch})")
    return "; ".join(said) or "none"


def _by_model(where: dict[str, str]) -> str:
    """The same said once of all DiTs, or of each what is true of it."""
    if len(set(where.values())) == 1:
        return next(iter(where.values()))
    return "; ".join(f"{model}: {text}" for model, text in where.items())


def _pseudo_table(costs: list[dict], model: str) -> str:
    mine = [row for row in costs if row["model"] == model]
    allocated = any("fused, allocated" in row for row in mine)
    kinds = [kind for name in ATTENTION for kind in (name, f"{name}, allocated")[: 1 + allocated]]
    header = ["patch", "method", "tokens", "forward, GFLOP", "step, GFLOP"]
    for kind in kinds:
        header += [f"{kind}: activations, MiB", "peak, MiB"]
    rows = []
    for row in mine:
        of = {
            figure: ratios(costs, model, row["patching"], figure)[row["method"]]
            for figure in ("step_flops", *ATTENTION)
        }
        tokens = " + ".join(f"{n:,}" for n in row["tokens"]) + (
            f" = {sum(row['tokens']):,}" * (len(row["tokens"]) > 1)
        )
        cells = [PATCHINGS[row["patching"]], row["method"], tokens, f"{row['forward_flops'] / 1e9:,.1f}"]
        cells.append(f"{row['step_flops'] / 1e9:,.1f} ({of['step_flops']:.2f}x)")
        for kind in kinds:
            memory = row[kind]
            ratio = f" ({of[kind]:.2f}x)" if kind in of else ""
            cells += (
                ["", "out of memory"]
                if memory is None
                else [_mib(memory["activations"]), _mib(memory["peak"]) + ratio]
            )
        rows.append(cells)
    first = mine[0]
    memory = first["fused"]
    return (
        f"{first['parameters']:,} parameters: {_mib(memory['parameters'])} MiB, their gradients "
        f"{_mib(memory['gradients'])} MiB, Adam's moments {_mib(memory['optimizer'])} MiB, whatever the latent. The "
        "backward pass frees activations while it makes gradients, so a peak is less than the sum.\n\n"
        + markdown_table(header, rows)
    )


def _sizes_table(costs: list[dict], models: list[str]) -> str:
    rows: dict[tuple[str, str], list] = {}
    parameters = []
    for row in costs:
        if row["model"] in models:
            key = row["patching"], row["method"]
            cells = rows.setdefault(key, [PATCHINGS[key[0]], key[1], f"{sum(row['tokens']):,}"])
            allocated = ""
            if "fused, allocated" in row:
                memory = row["fused, allocated"]
                allocated = f" (allocated: {_gib(memory['peak']) if memory else 'out of memory'})"
            cells.append(f"{row['step_flops'] / 1e9:,.1f}, {_gib(row['fused']['peak'])}{allocated}")
            if key == ("1", REFERENCE):
                parameters.append(f"{row['model']} {row['parameters']:,}")
    return (
        "GFLOP of a training step, and its peak memory in GiB with fused attention. Parameters, with VidTwin at "
        "patch 1: "
        + ", ".join(parameters)
        + ".\n\n"
        + markdown_table(["patch", "method", "tokens", *models], list(rows.values()))
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def plot(results: Results, path: Path) -> None:
    """Bars of the pseudo-DiT as stated: FLOPs and memory by method, a column of panels for each patch size."""
    from matplotlib.figure import Figure

    costs = results["costs"]
    shown = [name for name in PATCHINGS if name != CROPPED and any(row["patching"] == name for row in costs)]
    units = {"step_flops": (1e9, "GFLOP"), "fused": (2**20, "MiB"), "math": (2**20, "MiB")}
    figure = Figure(figsize=(3.5 * len(shown) + 1.4, 2.75 * len(FIGURES) + 0.5), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    panels = figure.subplots(len(FIGURES), len(shown), sharey=True, sharex="row", squeeze=False)
    for line, (name, (title, claim)) in zip(panels, FIGURES.items(), strict=True):
        low, high = paper.RESOURCES_CLAIM[claim]
        unit, unit_name = units[name]
        largest = smallest = None
        for axes, patching in zip(line, shown, strict=True):
            multiples = ratios(costs, STATED, patching, name)
            found = {row["method"]: row for row in costs if (row["model"], row["patching"]) == (STATED, patching)}
            methods = [m for m in (*BASELINES, REFERENCE, FOLDED) if m in found]
            values = [(found[m][name]["peak"] if name != "step_flops" else found[m][name]) / unit for m in methods]
            reference = values[methods.index(REFERENCE)]
            axes.axvspan(low * reference, high * reference, color="#fde68a", alpha=0.6, lw=0)
            colors = {REFERENCE: "#1e3a8a", FOLDED: "#0d9488"}
            axes.barh(range(len(methods)), values, color=[colors.get(m, "#93b4f5") for m in methods], height=0.65)
            for place, (method, value) in enumerate(zip(methods, values, strict=True)):
                multiple = multiples[method]
                text = f"{multiple:.2g}x" if multiple < 10 else f"{multiple:,.0f}x"
                axes.text(1.12 * value, place, text, va="center", fontsize=8)
            largest, smallest = max([*values, largest or 0]), min([*values, smallest or math.inf])
            axes.set_yticks(range(len(methods)), methods)
            axes.set_xscale("log")
            if axes in panels[0]:
                axes.set_title(f"patch: {PATCHINGS[patching]}", fontsize=10)
            axes.set_xlabel(f"{title}, {unit_name}", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        line[0].set_xlim(smallest / 2, 6 * largest)
    panels[0, 0].invert_yaxis()
    parameters = next(row["parameters"] for row in costs if row["model"] == STATED)
    figure.suptitle(
        f"The pseudo-DiT of Figure 5 as stated, {parameters:,} parameters, batch 1\n"
        "multiples of VidTwin's, logarithmic axes; yellow: the paper's claim for the baselines",
        fontsize=11,
    )
    figure.savefig(path, format="png")


BENCHMARK = Benchmark(
    name="resources",
    title="Figure 5: FLOPs and training memory",
    needs="a GPU, for the allocator's figures beside the counted ones",
    run=run,
    tables=tables,
    plot=plot,
)

if __name__ == "__main__":
    BENCHMARK.main()
