"""Figures 1, 4, 7 and 8: what each latent holds, in pictures and, on sprites with known factors, in numbers.

    python -m benchmarks.disentanglement --scale cpu --clips FOLDER
    python -m benchmarks.disentanglement --scale cpu --vae RUN/final OTHER/final --clips FOLDER --clips-vae RUN/final

The paper shows clips decoded from one latent alone, and from the structure of one clip with the dynamics of another;
it gives no numbers. Here linear probes measure what each latent encodes, and probes of pixels attribute the factors of
swapped clips to their sources (`benchmarks.sprites.disentanglement`).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure
from PIL import Image

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from vidgen.common.errors import UserError
from vidgen.common.images import component_grid, reenactment_grid
from vidgen.common.io import atomic_write
from vidgen.common.loading import load_vae
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.sprites import MOTIONS
from vidgen.data.types import VideoFile
from vidgen.metrics.stats import Score

from .common import vae_runs
from .common.figures import LIGHT_GRAY, new_figure
from .common.harness import Benchmark, Results
from .common.tables import markdown_table, score_cell
from .sprites.disentanglement import (
    COMPONENTS,
    FEATURES,
    FPS,
    component_errors,
    component_scores,
    measure_disentanglement,
    render,
    sample_sprites,
)

PER_MOTION = {"smoke": (8, 4), "cpu": (256, 64), "paper": (512, 64)}  # sprites to fit probes on, and to test them on
SEEDS = (2, 3)  # of these sprites; `vae_runs` trains and scores on those of 0 and 1
SHOWN = ("slide", "orbit", "shake")  # one clip of each is in the pictures
LEVELS = 63  # per color channel in the pictures, which halves the size of their files
BATCH = 16

TARGETS = {  # names as in `sprite_targets`
    "shape": "shape",
    "texture": "texture",
    "colors": "shape colors",
    "background": "background colors",
    "motion": "motion class",
    "position": "position in each frame",
    "place": "mean position",
    "slow_motion": "slow motion",
    "fast_motion": "fast motion",
}
APPEARANCE = ("shape", "texture", "colors")
MOTION = ("motion", "position", "slow_motion", "fast_motion")
SOURCES = {
    "original": "original clip",
    "both": "both latents",
    "structure": "structure only",
    "dynamics": "dynamics only",
}
ENDS = {
    "a": "A (structure source)",
    "a_as_b": "A moving as B (ideal swap)",
    "b_as_a": "B moving as A",
    "b": "B (dynamics source)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    vae_runs.add_options(parser)
    parser.add_argument(
        "--vae", nargs="+", type=Path, metavar="FOLDER", help="VAEs to measure, instead of those of the ablations"
    )
    parser.add_argument("--clips-vae", type=Path, metavar="FOLDER", help="VAE for the real videos of --clips")


def run(options: argparse.Namespace) -> Results | None:
    # Train the VAEs that are not given.
    is_paper = options.scale == "paper"
    folders, seconds = options.vae, 0.0
    if not folders:
        data = "ucf101" if is_paper else "sprites"
        runs = [vae_runs.train_full(data, seed, options) for seed in range(vae_runs.SEEDS[options.scale])]
        folders = [folder / "final" for folder, _ in runs]
        seconds = sum(run_seconds for _, run_seconds in runs)
    clips_vae = options.clips_vae
    if options.clips is not None and clips_vae is None:
        clips_vae = folders[0]
        if not is_paper:
            folder, run_seconds = vae_runs.train_full("clips", 0, options)
            clips_vae, seconds = folder / "final", seconds + run_seconds
    if options.only or not PartialState().is_main_process:
        return None

    # Measure on sprites, then on real clips.
    pictures = options.results / BENCHMARK.name
    results: Results = {"sprites_per_motion": PER_MOTION[options.scale], "vaes": {}}
    for folder in folders:
        vae = load_vae(str(folder)).to(PartialState().device)
        if 0 in vae.dynamics_shape:
            raise UserError(f"the VAE in {folder} has a single latent: there is nothing to disentangle; leave it out.")
        name = folder.parent.name if folder.name == "final" else folder.name
        results["vaes"][name] = measure_disentanglement(vae, PER_MOTION[options.scale], SEEDS)
        if folder == folders[0]:
            first = {clip["motion"]: clip for clip in sample_sprites(vae, 1, SEEDS[1])}
            save_pictures(vae, render([first[motion] for motion in SHOWN]), pictures)
    if options.clips is not None:
        vae = load_vae(str(clips_vae)).to(PartialState().device)
        results["clips"] = measure_clips(vae, options.clips, pictures.with_name(f"{pictures.name}-clips"))
    return _to_json(results) | {"training_seconds": seconds}


def _to_json(value: Any) -> Any:
    """Scores as dicts, and floats with six digits."""
    if isinstance(value, Score):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _to_json(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- real clips and pictures -----------------------------------------------------------------------------------------


@torch.no_grad()
def measure_clips(vae: AutoencoderKLVidTwin, folder: Path, pictures: Path) -> dict[str, Any]:
    """How much of held-out real clips each latent shows alone; saves pictures of a few."""
    _, num_frames, *size = vae.clip_shape
    shape = dict(num_frames=num_frames, fps=FPS, resolution=tuple(size), train=False)
    videos = [VideoFile(video, None) for video in vae_runs.held_out_videos(folder)]
    unusable = {path for path, _ in ClipDataset(videos, **shape).check()}  # otherwise replaced by other videos
    videos = [video for video in videos if str(video.path) not in unusable]
    dataset = ClipDataset(videos, clips_per_video=vae_runs.CLIPS_PER_VIDEO, **shape)
    errors: dict[str, list] = {name: [] for name in COMPONENTS}
    for start in range(0, len(dataset), BATCH):
        clips = collate_clips([dataset[i] for i in range(start, min(start + BATCH, len(dataset)))])["video"]
        clips = clips.to(vae.device)
        packed = vae.encode(clips).latent_dist.mode()
        for name, parts in errors.items():
            parts.append(component_errors(vae.decode(packed, name).sample.float(), clips))
    indices = torch.linspace(0, len(dataset) - 1, min(len(SHOWN), len(dataset))).long().tolist()
    save_pictures(vae, torch.stack([dataset[i]["video"] for i in indices]), pictures)
    return {"num_clips": len(dataset), "components": {name: component_scores(parts) for name, parts in errors.items()}}


@torch.no_grad()
def save_pictures(vae: AutoencoderKLVidTwin, clips: torch.Tensor, pictures: Path) -> None:
    """PICTURES-components.png, and PICTURES-latent_swap.png of each structure with each dynamics."""
    latents = vae.unpack(vae.encode(clips.to(vae.device)).latent_dist.mode())
    decoded = [vae.decode(latents, name).sample.float().cpu() for name in COMPONENTS]
    components = component_grid(pictures.with_name(f"{pictures.name}-components.png"), clips, *decoded)
    rows = [TwinLatents(one[None].expand_as(latents.structure), latents.dynamics) for one in latents.structure]
    swapped = torch.stack([vae.decode(row).sample.float().cpu() for row in rows])
    swaps = reenactment_grid(pictures.with_name(f"{pictures.name}-latent_swap.png"), clips, clips, swapped)
    for path in (components, swaps):
        with Image.open(path) as picture:
            coarse = picture.point([round(round(value / 255 * LEVELS) / LEVELS * 255) for value in range(256)] * 3)
        with atomic_write(path) as unfinished:
            coarse.save(unfinished, format="png", optimize=True)


# --- claims and verdicts ---------------------------------------------------------------------------------------------

CLAIM = (
    "The paper's figures claim, without numbers: structure encodes objects and their slow motion; dynamics encodes "
    "details of each frame and fast motion; a clip decoded from the structure of A and the dynamics of B has the "
    "appearance of A and the motion of B."
)


def claims(result: dict[str, Any]) -> dict[str, tuple[dict, dict]]:
    """The claims of the figures about a VAE: in words, and the score that should exceed another one."""
    probes, attribution = result["probes"], result["latent_swap"]["factor_attribution"]

    def probe(target: str, features: str) -> dict:
        scores = probes[target][features]
        return scores["accuracy" if "accuracy" in scores else "r2"]

    pairs = {}
    for target in (*APPEARANCE, "background", "place", "slow_motion"):
        words = f"{TARGETS[target]}: probe of structure over dynamics"
        pairs[words] = probe(target, "structure"), probe(target, "dynamics")
    for target in ("motion", "fast_motion"):
        words = f"{TARGETS[target]}: probe of dynamics over structure"
        pairs[words] = probe(target, "dynamics"), probe(target, "structure")
    for latent, higher, lower in (("structure", "slow", "fast"), ("dynamics", "fast", "slow")):
        words = f"{latent}: {higher} motion over {lower} motion"
        pairs[words] = probe(f"{higher}_motion", latent), probe(f"{lower}_motion", latent)
    sources = {"a": "structure source", "b": "dynamics source"}
    for targets, wanted, other in ((APPEARANCE, "a", "b"), (MOTION, "b", "a")):
        for target in targets:
            if target in attribution:
                words = f"latent swap, {TARGETS[target]}: {sources[wanted]} over {sources[other]}"
                pairs[words] = attribution[target][wanted], attribution[target][other]
    likeness = result["latent_swap"]["likeness"]
    words = "latent swap: closer in pixels to A moving as B than to A"
    return pairs | {words: (likeness["a_as_b"]["nearest"], likeness["a"]["nearest"])}


def verdict(wanted: dict, other: dict) -> str:
    """Whether a score exceeds another one, if their intervals do not overlap."""
    if wanted["low"] > other["high"]:
        return "reproduced"
    return "reversed" if wanted["high"] < other["low"] else "inconclusive"


def verdict_table(vaes: dict[str, dict]) -> str:
    pairs = {name: claims(result) for name, result in vaes.items()}
    rows = []
    for words in next(iter(pairs.values())):
        cells = []
        for scores in pairs.values():
            wanted, other = scores.get(words, (None, None))
            text = wanted and f"**{verdict(wanted, other)}**: {wanted['value']:.2f} vs. {other['value']:.2f}"
            cells.append(text)
        rows.append([words, *cells])
    return markdown_table(["claim", *pairs], rows)


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    fit, test = (count * len(MOTIONS) for count in results["sprites_per_motion"])
    parts = [
        CLAIM,
        f"Probes are fitted on {fit} sprites and tested on {test}; no VAE was trained on them. Of two shapes (`swap`) "
        "the one that starts on the right counts; decoded clips are scored without `swap`. Intervals: the middle 95 % "
        "of bootstrap resamples of the test clips. A claim is reproduced or reversed if the two intervals do not "
        "overlap.",
        verdict_table(results["vaes"]),
    ]
    for name, result in results["vaes"].items():
        parts += [
            f"### {name}",
            _probe_table(result),
            "Decoded from one latent alone:",
            _component_table(result["components"]),
            "Latent swap: decoded from the structure of A and the dynamics of B, which moves in another way. A factor "
            "is attributed to the source that is closer than half the distance between the two, over all pairs that "
            "differ in it; the interpolation ratio runs from A (0) to B (1). After the bar: chance, from an unrelated "
            "clip:",
            _attribution_table(result["latent_swap"]["factor_attribution"]),
            _likeness_table(result["latent_swap"]["likeness"]),
        ]
    if "clips" in results:
        parts += [f"### {results['clips']['num_clips']} held-out real clips"]
        parts.append(_component_table(results["clips"]["components"]))
    return "\n\n".join(parts)


def _cell(score: dict, chance: bool = False) -> str:
    digits = 1 if max(abs(score[key]) for key in ("value", "low", "high")) >= 10 else 2
    return score_cell(score, f".{digits}f", chance)


def _probe_table(result: dict) -> str:
    counts = result["values"]
    header = ["linear probe", "unit", *(f"{name}, {counts[name]:,}" for name in FEATURES), "chance"]
    units = {"accuracy": "accuracy", "r2": "R²", "distance": "px"}
    rows = []
    for target, label in TARGETS.items():
        scores = result["probes"][target]
        for measure in next(iter(scores.values())):
            is_color = measure == "distance" and target in ("colors", "background")
            unit = "RGB L2 (at most 441)" if is_color else units[measure]
            cells = [_cell(scores[name][measure]) for name in FEATURES]
            rows.append([label, unit, *cells, f"{scores['both'][measure]['chance']:.2f}"])
    return markdown_table(header, rows)


def _component_table(components: dict[str, dict]) -> str:
    labels = {
        "psnr": "PSNR, dB",
        "change": "change between frames, R²",
        "shape": "shape accuracy",
        "texture": "texture accuracy",
        "motion": "motion accuracy",
        "colors": "color error (RGB L2)",
        "position": "position error, px",
        "fast_motion": "fast motion error, px",
    }
    columns = {key: label for key, label in labels.items() if key in components["both"]}
    rows = []
    for name, scores in components.items():
        cells = [
            "identical" if name == "original" and key in ("psnr", "change") else _cell(scores[key]) for key in columns
        ]
        rows.append([SOURCES[name], *cells])
    chances = [components["both"][key]["chance"] for key in columns]
    rows.append(["chance", *(None if value is None else f"{value:.2f}" for value in chances)])
    return markdown_table(["decoded from", *columns.values()], rows)


def _attribution_table(attribution: dict[str, dict]) -> str:
    rows = []
    for target in [name for name in TARGETS if name in attribution]:
        scores = attribution[target]
        ratio = _cell(scores["interpolation"], chance=True) if "interpolation" in scores else None
        shares = [_cell(scores[key], chance=True) for key in ("a", "b", "neither")]
        rows.append([TARGETS[target], *shares, ratio, scores["pairs"]])
    header = ["factor", "structure source", "dynamics source", "neither", "interpolation ratio", "pairs"]
    return markdown_table(header, rows)


def _likeness_table(likeness: dict[str, dict]) -> str:
    rows = [
        [label, _cell(likeness[end]["psnr"]), _cell(likeness[end]["nearest"], chance=True)]
        for end, label in ENDS.items()
    ]
    return markdown_table(["swapped clip compared with", "PSNR, dB", "closest of the four"], rows)


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(results: Results) -> Figure:
    """One panel per VAE: the attribution of factors in swapped clips, with chance."""
    vaes = results["vaes"]
    figure, [panels] = new_figure(5.5 * len(vaes), 4, columns=len(vaes))
    for axes, (name, result) in zip(panels, vaes.items(), strict=True):
        attribution = result["latent_swap"]["factor_attribution"]
        targets = [target for target in TARGETS if target in attribution]
        left = [0.0] * len(targets)
        sources = (("a", "structure source", "#1d4ed8"), ("neither", "neither", LIGHT_GRAY))
        for key, label, color in (*sources, ("b", "dynamics source", "#ea580c")):
            shares = [attribution[target][key]["value"] for target in targets]
            axes.barh(range(len(targets)), shares, left=left, color=color, label=label, height=0.7)
            left = [start + width for start, width in zip(left, shares, strict=True)]
        for i, target in enumerate(targets):
            a, b = attribution[target]["a"], attribution[target]["b"]
            axes.hlines([i, i], [a["low"], 1 - b["high"]], [a["high"], 1 - b["low"]], "black", lw=1)
            axes.vlines([a["chance"], 1 - b["chance"]], i - 0.42, i + 0.42, "#dc2626", ls="--", lw=1.3)
        axes.set_yticks(range(len(targets)), [TARGETS[target] for target in targets])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_title(f"{name}: latent swap, factor attribution", fontsize=10)
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    return figure


TITLE = "Figures 1, 4, 7 and 8: disentanglement of structure and dynamics"
BENCHMARK = Benchmark("disentanglement", TITLE, run, tables, plot, add_options)

if __name__ == "__main__":
    BENCHMARK.main()
