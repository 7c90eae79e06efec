"""The page of the benchmark of prompts: its tables, and the plot of accuracy over guidance."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ..common.figures import BLUE, DARK_BLUE, GRAY, ORANGE, TEAL, errors, new_figure
from ..common.generation import describe_delay
from ..common.harness import Results
from ..common.tables import interval_cell, markdown_table, score_cell
from ..real.page import memorization_text
from .factors import FACTORS

COLUMNS = (*FACTORS, "all")
COMPOSITIONS = {"seen": "seen", "held_out": "held-out"}
SWAPS = {
    "swapped_parts": "appearance of A, motion of B",
    "swapped_whole": "whole caption of A, whole caption of B",
}


def tables(results: Results) -> str:
    parts = [f"{describe_sampling(results['sampling'])}. Brackets are 95 % bootstrap intervals."]
    if "sprites" in results:
        parts += sprites_text(results["sprites"])
    if "real" in results:
        parts += real_text(results["real"])
    return "\n\n".join(parts)


def describe_sampling(sampling: dict[str, Any]) -> str:
    """Steps, guidance, temperature and seed of a record."""
    guidance = " of structure and ".join(f"{scale:g}" for scale in sampling["guidance"])
    guidance += " of dynamics" * (len(sampling["guidance"]) > 1)
    temperature = sampling.get("temperature", 1)
    lowered = "" if temperature == 1 else f", temperature {temperature:g}"
    seed = f", seed {sampling['seed']}" if sampling.get("seed") else ""
    return f"{sampling['steps']} steps{describe_delay(sampling)}, guidance {guidance}{lowered}{seed}"


def sprites_text(scores: dict[str, Any]) -> list[str]:
    """The tables of sprites."""
    rows = []
    for key, label in COMPOSITIONS.items():
        rows += [[f"{name}, {label}", *_cells(scores[key][name])] for name in ("generated", "reconstruction", "real")]
    ratios = [
        f"{name} {scores['held_out']['generated'][name]['value'] / seen['value']:.2f}"
        for name, seen in scores["seen"]["generated"].items()
        if seen["value"]
    ]
    parts = [
        f"Sprites ({scores['pipeline']}), {scores['per_motion']} prompts of each motion. Motion and shape are "
        "predicted by the sprite classifier, color and background are named by their measured hue; after the bar the "
        "frequency of the most frequent name. The rows of real clips give the accuracy of these measurements.",
        markdown_table(["clips", *COLUMNS], rows),
        f"Held-out relative to seen compositions: {', '.join(ratios)}.",
        "Structure prompt of sprite A, dynamics prompt of sprite B with another motion, for sprites of one shape. "
        "Motion is compared with B, the rest with A; relative to clips with both prompts of A:",
        markdown_table(["prompts", "clips", *FACTORS, "motion of A"], _swap_rows(scores)),
        "Guidance scale, seen compositions:",
        markdown_table(
            ["guidance", *COLUMNS], [[scale, *_cells(found, False)] for scale, found in scores["guidance"].items()]
        ),
        "Negative prompts: fraction of clips that show the same as without a negative prompt, in a factor that the "
        "prompt leaves open. The negative prompt names what the clip showed, or what another clip showed.",
        markdown_table(
            ["factor", "negative prompt: the same", "negative prompt: another"],
            [
                [factor, *(score_cell(found[name]) for name in ("same", "other"))]
                for factor, found in scores["negative_prompts"].items()
            ],
        ),
    ]
    return parts


def _cells(scores: dict[str, Any], chance: bool = True) -> list[str]:
    return [score_cell(scores[name], chance=chance) for name in COLUMNS]


def _swap_rows(scores: dict[str, Any]) -> list[list[str | None]]:
    rows: list[list[str | None]] = []
    for key, label in SWAPS.items():
        for name in ("unswapped", "swapped", "relative"):
            found = scores[key][name]
            cells = [score_cell(found[factor], chance=False) if found[factor] else None for factor in FACTORS]
            last = score_cell(scores[key]["motion_of_structure"]) if name == "swapped" else None
            rows.append([label, name, *cells, last])
    return rows


def real_text(scores: dict[str, Any]) -> list[str]:
    """The table of real video, and how near generated clips are to training clips."""
    chance = scores["chance"]
    rows = [
        [name, *(interval_cell(found[key], 3) for key in chance), f"{scores['relative'].get(name, float('nan')):.2f}"]
        for name, found in scores["sets"].items()
    ]
    rows.append(["chance", *(f"{value:.3f}" for value in chance.values()), "0.00"])
    sampled = f" Generated: {describe_sampling(scores['sampling'])}." if "sampling" in scores else ""
    parts = [
        f"Real video: rank of the right caption among {scores['candidates']}, for {scores['clips']} held-out clips of "
        f"{scores['groups']} groups, by a matcher fitted to {scores['training_clips']:,} training clips (features: "
        f"{', '.join(scores['detectors'])}). The last column is 0 for chance and 1 for real clips.{sampled}",
        markdown_table(["clips", "mean reciprocal rank", "top-1", "relative to real clips"], rows),
    ]
    if "memorization" in scores:
        parts.append(memorization_text(scores["memorization"]))
    return parts


def plot(results: Results) -> Figure:
    """Accuracy of each factor over the guidance scale, or the ranking of real video if there are no sprites."""
    figure, panels = new_figure(4.6, 3.2)
    axes = panels[0, 0]
    if "sprites" in results:
        curve = results["sprites"]["guidance"]
        scales = [float(scale) for scale in curve]
        for factor, color in zip(FACTORS, (DARK_BLUE, ORANGE, TEAL, GRAY), strict=True):
            points = [{"value": s[factor]["value"], "interval": _bounds(s[factor])} for s in curve.values()]
            values = [point["value"] for point in points]
            axes.errorbar(scales, values, errors(points), fmt="o-", color=color, ms=4, label=factor)
        axes.set_xlabel("guidance scale", fontsize=9)
        axes.set_ylabel("accuracy", fontsize=9)
        axes.set_ylim(0, 1.05)
        axes.legend(fontsize=8, frameon=False)
    else:
        found = results["real"]["sets"]
        means = [score["reciprocal_rank"]["mean"] for score in found.values()]
        axes.bar(list(found), means, color=BLUE)
        axes.axhline(results["real"]["chance"]["reciprocal_rank"], color=GRAY, ls="--")
        axes.set_ylabel("mean reciprocal rank", fontsize=9)
    return figure


def _bounds(score: dict[str, float]) -> list[float]:
    """The interval of a score, which resampling may place beside its value by a rounding error."""
    return [min(score["low"], score["value"]), max(score["high"], score["value"])]
