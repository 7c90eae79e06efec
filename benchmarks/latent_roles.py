"""Figures 1, 4, 7 and 8: what each latent holds, as pictures and, on sprites, whose factors are known, as numbers.

    python -m benchmarks.latent_roles --scale cpu --clips FOLDER
    python -m benchmarks.latent_roles --scale cpu --vae RUN/final OTHER/final --clips FOLDER --clips-vae RUN/final

The paper shows clips decoded from one latent alone, and from the structure of one with the dynamics of another; it has
no numbers for them. Here linear probes say what can be read from each latent, and readers of pixels whose factors the
decoded clips show (`benchmarks.sprites.disentanglement`).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from benchmarks.common import vae_runs
from vidgen.common.errors import UserError
from vidgen.common.images import component_grid, reenactment_grid
from vidgen.common.io import atomic_write
from vidgen.common.loading import load_vae
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.sprites import MOTIONS
from vidgen.data.types import VideoFile

from .common.harness import Benchmark, Results, markdown_table
from .sprites.disentanglement import (
    COMPONENTS,
    FEATURES,
    FPS,
    component_errors,
    component_scores,
    render,
    sprite_roles,
    sprites_factors,
)
from .sprites.probes import Score

PER_MOTION = {"smoke": (8, 4), "cpu": (256, 64), "paper": (512, 64)}  # sprites to fit probes on, and to test them on
SEEDS = (2, 3)  # of these sprites; `vae_runs` trains and scores on those of 0 and 1
SHOWN = ("slide", "orbit", "shake")  # a clip of each is in the pictures
LEVELS = 63  # of a color in them, above black: about half the bytes, for they go into the repository
BATCH = 16

TARGETS = {  # names as in `sprite_targets`
    "shape": "shape",
    "texture": "texture",
    "colors": "shape's colors",
    "background": "background's colors",
    "motion": "motion class",
    "position": "position in each frame",
    "place": "mean place",
    "slow_motion": "slow motion",
    "fast_motion": "fast motion",
}
LOOKS = ("shape", "texture", "colors")
MOVES = ("motion", "position", "slow_motion", "fast_motion")
DECODED = {
    "drawn": "as drawn",
    "both": "both latents",
    "structure": "structure only",
    "dynamics": "dynamics only",
}
ENDS = {
    "a": "A",
    "a_as_b": "A moving as B, what is wanted",
    "b_as_a": "B moving as A",
    "b": "B",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    vae_runs.add_options(parser)
    parser.add_argument(
        "--vae", nargs="+", type=Path, metavar="FOLDER", help="VAEs to look into, instead of those of the ablations"
    )
    parser.add_argument("--clips-vae", type=Path, metavar="FOLDER", help="likewise the one to show --clips with")


def run(options: argparse.Namespace) -> Results | None:
    paper = options.scale == "paper"
    folders, trainings = options.vae, 0.0
    if not folders:
        data = "ucf101" if paper else "sprites"
        runs = [vae_runs.full_run(data, seed, options) for seed in range(vae_runs.SEEDS[options.scale])]
        folders = [folder / "final" for folder, _ in runs]
        trainings = sum(seconds for _, seconds in runs)
    clips_vae = options.clips_vae
    if options.clips is not None and clips_vae is None:
        clips_vae = folders[0]
        if not paper:
            folder, seconds = vae_runs.full_run("clips", 0, options)
            clips_vae, trainings = folder / "final", trainings + seconds
    if options.only or not PartialState().is_main_process:
        return None
    pictures = options.results / BENCHMARK.name
    results: Results = {"sprites_per_motion": PER_MOTION[options.scale], "vaes": {}}
    for folder in folders:
        vae = load_vae(str(folder)).to(PartialState().device)
        if 0 in vae.dynamics_shape:
            raise UserError(f"The VAE in {folder} has one latent, so there are no roles to tell apart; leave it out.")
        name = folder.parent.name if folder.name == "final" else folder.name
        results["vaes"][name] = sprite_roles(vae, PER_MOTION[options.scale], SEEDS)
        if folder == folders[0]:
            draw(vae, _shown_sprites(vae), pictures)
    if options.clips is not None:
        vae = load_vae(str(clips_vae)).to(PartialState().device)
        results["clips"] = clip_roles(vae, options.clips, pictures.with_name(f"{pictures.name}-clips"))
    return _plain(results) | {"training_seconds": trainings}


def _plain(value: Any) -> Any:
    """Scores as dicts, and floats of six digits: what JSON holds."""
    if isinstance(value, Score):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- real clips and pictures -----------------------------------------------------------------------------------------


@torch.no_grad()
def clip_roles(vae: AutoencoderKLVidTwin, folder: Path, pictures: Path) -> dict[str, Any]:
    """How much of real, held-out clips each latent shows alone; draws some."""
    _, num_frames, *size = vae.clip_shape
    shape = dict(num_frames=num_frames, fps=FPS, resolution=tuple(size), train=False)
    videos = [VideoFile(video, None) for video in vae_runs.held_out_videos(folder)]
    unusable = {path for path, _ in ClipDataset(videos, **shape).check()}  # others would stand in for them
    videos = [video for video in videos if str(video.path) not in unusable]
    dataset = ClipDataset(videos, clips_per_video=vae_runs.CLIPS_PER_VIDEO, **shape)
    errors: dict[str, list] = {name: [] for name in COMPONENTS}
    for start in range(0, len(dataset), BATCH):
        clips = collate_clips([dataset[i] for i in range(start, min(start + BATCH, len(dataset)))])["video"]
        clips = clips.to(vae.device)
        packed = vae.encode(clips).latent_dist.mode()
        for name, parts in errors.items():
            parts.append(component_errors(vae.decode(packed, name).sample.float(), clips))
    chosen = torch.linspace(0, len(dataset) - 1, min(len(SHOWN), len(dataset))).long().tolist()
    draw(vae, torch.stack([dataset[i]["video"] for i in chosen]), pictures)
    return {"num_clips": len(dataset), "components": {name: component_scores(parts) for name, parts in errors.items()}}


def _shown_sprites(vae: AutoencoderKLVidTwin) -> torch.Tensor:
    first = {clip["motion"]: clip for clip in sprites_factors(vae, 1, SEEDS[1])}
    return render([first[motion] for motion in SHOWN])


@torch.no_grad()
def draw(vae: AutoencoderKLVidTwin, clips: torch.Tensor, pictures: Path) -> None:
    """PICTURES-components.png, and PICTURES-reenactment.png of every structure with every dynamics."""
    latents = vae.unpack(vae.encode(clips.to(vae.device)).latent_dist.mode())
    decoded = [vae.decode(latents, name).sample.float().cpu() for name in COMPONENTS]
    components = component_grid(pictures.with_name(f"{pictures.name}-components.png"), clips, *decoded)
    rows = [TwinLatents(one[None].expand_as(latents.structure), latents.dynamics) for one in latents.structure]
    crossed = torch.stack([vae.decode(row).sample.float().cpu() for row in rows])
    reenactment = reenactment_grid(pictures.with_name(f"{pictures.name}-reenactment.png"), clips, clips, crossed)
    for path in (components, reenactment):
        with Image.open(path) as picture:
            coarse = picture.point([round(round(value / 255 * LEVELS) / LEVELS * 255) for value in range(256)] * 3)
        with atomic_write(path) as unfinished:
            coarse.save(unfinished, format="png", optimize=True)


# --- what the figures claim, and what the numbers say ----------------------------------------------------------------

CLAIM = (
    "The paper's figures claim, without numbers: structure holds what is there and how it slowly moves, dynamics the "
    "details of each frame and fast motion; a clip decoded from the structure of A and the dynamics of B looks like A "
    "and moves like B."
)


def claims(roles: dict[str, Any]) -> dict[str, tuple[dict, dict]]:
    """What the figures claim of a VAE: in words, and the score that is to be above another."""
    probes, whose = roles["probes"], roles["reenactment"]["whose"]
    found = {}

    def probe(target: str, features: str) -> dict:
        scores = probes[target][features]
        return scores["accuracy" if "accuracy" in scores else "r2"]

    for target in (*LOOKS, "background", "place", "slow_motion"):
        found[f"{TARGETS[target]}: read from structure rather than dynamics"] = (
            probe(target, "structure"),
            probe(target, "dynamics"),
        )
    for target in ("motion", "fast_motion"):
        found[f"{TARGETS[target]}: read from dynamics rather than structure"] = (
            probe(target, "dynamics"),
            probe(target, "structure"),
        )
    found["structure: slow motion rather than fast"] = (
        probe("slow_motion", "structure"),
        probe("fast_motion", "structure"),
    )
    found["dynamics: fast motion rather than slow"] = (
        probe("fast_motion", "dynamics"),
        probe("slow_motion", "dynamics"),
    )
    for targets, wanted, other in ((LOOKS, "a", "b"), (MOVES, "b", "a")):
        for target in targets:
            if target in whose:
                words = f"reenactment, {TARGETS[target]}: {wanted.upper()}'s rather than {other.upper()}'s"
                found[words] = whose[target][wanted], whose[target][other]
    likeness = roles["reenactment"]["likeness"]
    found["reenactment: nearer in pixels to A moving as B than to A"] = (
        likeness["a_as_b"]["nearest"],
        likeness["a"]["nearest"],
    )
    return found


def verdict(wanted: dict, other: dict) -> str:
    """Whether a score is above another, if their intervals tell them apart."""
    if wanted["low"] > other["high"]:
        return "holds"
    return "is reversed" if wanted["high"] < other["low"] else "not told apart"


def verdict_table(vaes: dict[str, dict]) -> str:
    found = {name: claims(roles) for name, roles in vaes.items()}
    rows = []
    for words in next(iter(found.values())):
        row = [words]
        for ours in found.values():
            if words in ours:
                wanted, other = ours[words]
                row.append(f"**{verdict(wanted, other)}**: {wanted['value']:.2f} against {other['value']:.2f}")
            else:
                row.append(None)
        rows.append(row)
    return markdown_table(["claim", *found], rows)


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results | None) -> str:
    if results is None:
        return CLAIM
    fitted, tested = (count * len(MOTIONS) for count in results["sprites_per_motion"])
    parts = [
        CLAIM,
        f"Probes and readers are fitted on {fitted} sprites and tested on {tested}, none of which a VAE was trained "
        "on. Of two shapes (`swap`) the one that starts on the right counts; decoded clips are scored without `swap`. "
        "In brackets, the middle 95 % of bootstrap resamples of the test clips. A claim holds or is reversed where "
        "two such intervals do not overlap.",
        verdict_table(results["vaes"]),
    ]
    for name, roles in results["vaes"].items():
        parts += [f"### {name}", _probe_table(roles)]
        parts += ["Decoded from one latent alone:", _component_table(roles["components"])]
        parts += [
            "Decoded from the structure of A and the dynamics of B, which moves in another way. Whose factor the "
            "clip shows (nearer to it than half the way between the two; of all pairs that differ in it); the way is "
            "how far from A's (0) to B's (1). Chance, after the bar, is an unrelated clip:",
            _whose_table(roles["reenactment"]["whose"]),
            _likeness_table(roles["reenactment"]["likeness"]),
        ]
    if "clips" in results:
        parts += [f"### {results['clips']['num_clips']} real clips, held out"]
        parts.append(_component_table(results["clips"]["components"]))
    return "\n\n".join(parts)


def _cell(score: dict, chance: bool = False) -> str:
    digits = 1 if max(abs(score[key]) for key in ("value", "low", "high")) >= 10 else 2
    text = f"{score['value']:.{digits}f} ({score['low']:.{digits}f} to {score['high']:.{digits}f})"
    return f"{text} \\| {score['chance']:.{digits}f}" if chance else text


def _probe_table(roles: dict) -> str:
    values = roles["values"]
    header = ["linear probe of", "in", *(f"{name}, {values[name]:,}" for name in FEATURES), "chance"]
    units = {"accuracy": "accuracy", "r2": "R²", "distance": "pixels"}
    rows = []
    for target, label in TARGETS.items():
        scores = roles["probes"][target]
        for measure in next(iter(scores.values())):
            colored = measure == "distance" and target in ("colors", "background")
            unit = "RGB distance (441 at most)" if colored else units[measure]
            cells = [_cell(scores[name][measure]) for name in FEATURES]
            rows.append([label, unit, *cells, f"{scores['both'][measure]['chance']:.2f}"])
    return markdown_table(header, rows)


def _component_table(components: dict[str, dict]) -> str:
    labels = {
        "psnr": "PSNR, dB",
        "change": "change between frames, R²",
        "shape": "shape, accuracy",
        "texture": "texture, accuracy",
        "motion": "motion class, accuracy",
        "colors": "colors, levels off",
        "position": "position, pixels off",
        "fast_motion": "fast motion, pixels off",
    }
    shown = {key: label for key, label in labels.items() if key in components["both"]}
    rows = [
        [
            DECODED[name],
            *("identical" if name == "drawn" and key in ("psnr", "change") else _cell(scores[key]) for key in shown),
        ]
        for name, scores in components.items()
    ]
    chances = [components["both"][key]["chance"] for key in shown]
    rows.append(["chance", *(None if value is None else f"{value:.2f}" for value in chances)])
    return markdown_table(["decoded from", *shown.values()], rows)


def _whose_table(whose: dict[str, dict]) -> str:
    rows = []
    for target in [name for name in TARGETS if name in whose]:
        scores = whose[target]
        way = _cell(scores["way"], chance=True) if "way" in scores else None
        shares = [_cell(scores[key], chance=True) for key in ("a", "b", "neither")]
        rows.append([TARGETS[target], *shares, way, scores["pairs"]])
    return markdown_table(["factor", "A's", "B's", "neither's", "way from A to B", "pairs"], rows)


def _likeness_table(likeness: dict[str, dict]) -> str:
    rows = [
        [label, _cell(likeness[end]["psnr"]), _cell(likeness[end]["nearest"], chance=True)]
        for end, label in ENDS.items()
    ]
    return markdown_table(["compared with", "PSNR, dB", "nearest of the four"], rows)


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(results: Results, path: Path) -> None:
    """A row for each VAE: probes by latent, and whose factors reenactments show, with intervals and chance."""
    from matplotlib.figure import Figure

    colors = dict(zip(FEATURES, ("#1d4ed8", "#ea580c", "#6b7280", "#d1d5db"), strict=True))
    vaes = results["vaes"]
    figure = Figure(figsize=(13, 3.5 * len(vaes) + 0.5), dpi=90, layout="constrained")
    panels = figure.subplots(len(vaes), 3, squeeze=False, width_ratios=[3, 6, 4])
    for (classes, points, crossed), (name, roles) in zip(panels, vaes.items(), strict=True):
        for axes, measure in ((classes, "accuracy"), (points, "r2")):
            targets = [target for target in TARGETS if measure in roles["probes"][target]["both"]]
            for place, features in enumerate(FEATURES):
                scores = [roles["probes"][target][features][measure] for target in targets]
                x = [i + 0.2 * (place - 1.5) for i in range(len(targets))]
                values = [max(score["value"], 0.0) for score in scores]
                axes.bar(x, values, 0.19, color=colors[features], label=features)
                axes.vlines(x, [max(s["low"], 0) for s in scores], [max(s["high"], 0) for s in scores], "black", lw=1)
            chance = [max(roles["probes"][target]["both"][measure]["chance"], 0.0) for target in targets]
            x = range(len(targets))
            axes.hlines(chance, [i - 0.42 for i in x], [i + 0.42 for i in x], "#dc2626", ls="--", label="chance")
            axes.set_xticks(x, [TARGETS[target].replace(" ", "\n", 1) for target in targets], fontsize=8)
            axes.set_ylim(0, 1.02)
            axes.set_title(f"{name}: linear probes, {'R²' if measure == 'r2' else measure}", fontsize=10)
        points.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
        _plot_whose(crossed, roles["reenactment"]["whose"])
        for axes in (classes, points, crossed):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path)


def _plot_whose(axes: Any, whose: dict[str, dict]) -> None:
    targets = [name for name in TARGETS if name in whose]
    left = [0.0] * len(targets)
    for key, label, color in (("a", "A's", "#1d4ed8"), ("neither", "neither's", "#e5e7eb"), ("b", "B's", "#ea580c")):
        shares = [whose[target][key]["value"] for target in targets]
        axes.barh(range(len(targets)), shares, left=left, color=color, label=label, height=0.7)
        left = [start + width for start, width in zip(left, shares, strict=True)]
    for i, target in enumerate(targets):
        ours, theirs = whose[target]["a"], whose[target]["b"]
        axes.hlines([i, i], [ours["low"], 1 - theirs["high"]], [ours["high"], 1 - theirs["low"]], "black", lw=1)
        axes.vlines([ours["chance"], 1 - theirs["chance"]], i - 0.42, i + 0.42, "#dc2626", ls="--", lw=1.3)
    axes.set_yticks(range(len(targets)), [TARGETS[target] for target in targets])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title("structure of A, dynamics of B: whose factor shows", fontsize=10)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


BENCHMARK = Benchmark(
    name="latent_roles",
    title="Figures 1, 4, 7 and 8: the roles of the two latents",
    needs="UCF-101 and a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
