"""Sheets of generated clips for blind raters, and the score of their answers.

    python benchmarks/sprites/rater_sheets.py FOLDER --pipeline pretrained/sprites --seed 41
    python benchmarks/sprites/rater_sheets.py FOLDER --answers FILE

The first writes sheets of 24 generated clips and, shuffled among them, 8 reconstructions: what cannot be
named there is not the generator's fault. `key.json` lies beside them and is not shown. The rater, a person or
a vision-language model, answers `question.txt` with one line per clip; the second command counts the answers.
A classifier assigns a shape to every clip, whether or not one is visible: a rater may answer "unclear".
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipelines import VidTwinPipeline
from vidgen.common.errors import UserError, run_program
from vidgen.common.images import class_grid
from vidgen.common.io import atomic_write
from vidgen.common.loading import load_pipeline
from vidgen.common.options import check_options
from vidgen.data.sprites import MOTIONS, SHAPES

from ..common.harness import markdown_table
from .classifier import DrawnSprites

PER_MOTION, REBUILT, ON_A_SHEET = 3, 8, 8  # clips
UNSEEN = 7_000_000  # a seed of sprites that nothing was trained on
QUESTION = f"""Each sheet shows short video clips, one to a row: small colored shapes move over a dark background.
Every second frame is shown. Say of every clip, from what you see alone:
1. how it moves: slide (straight across the frame), bounce (up and down twice), orbit (once around the middle), spin
   (turns on the spot), zoom (grows, then shrinks), shake (a small swing to and fro), swap (two shapes trade places) or
   still;
2. which shape it is: {", ".join(SHAPES)}; of two shapes first the one that begins on the
   left. Where you honestly can't tell, say unclear; name a shape where a reasonable person would.
Answer with a line for each clip: "N: motion, shape", of two shapes "N: swap, left shape, right shape".
"""
Clip = dict[str, Any]  # `kind`, `motion` and `shapes`, from the left as it begins; of no class no shapes are known


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="of the sheets")
    parser.add_argument("--pipeline", metavar="FOLDER", help="of a model of sprites: make sheets")
    parser.add_argument("--answers", metavar="FILE", help="answers of a rater: count")
    parser.add_argument("--seed", type=int, default=0, help="of noise, shapes and order (default: 0)")
    parser.add_argument("--steps", type=int, default=50, help="of the pipeline (default: 50)")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance (default: 3)")


@torch.no_grad()
def make_sheets(
    folder: Path, pipeline: VidTwinPipeline, seed: int = 0, steps: int = 50, guidance: float = 3.0
) -> list[Path]:
    """Write the sheets, the question and the key; returns the sheets.

    Raises:
        UserError: if the pipeline makes no videos, or does not know the motions of sprites.
    """
    missing = [motion for motion in MOTIONS if motion not in pipeline.labels]
    if pipeline.vae is None or missing:
        raise UserError(
            f"the pipeline must make videos of sprites; it has {f'no {missing[0]}' if missing else 'no vae'}."
        )
    generator = torch.Generator().manual_seed(seed)
    names = {label: name for name, label in (pipeline.labels | pipeline.subclasses).items()}
    asked = pipeline.draw_subclasses(pipeline.get_label_ids([*MOTIONS] * PER_MOTION), generator)
    frames = pipeline(
        asked, guidance_scale=guidance, num_inference_steps=steps, generator=generator, output_type="pt"
    ).frames
    vae = pipeline.vae
    sizes = dict(zip(("num_frames", "resolution"), vae.clip_shape[1:3], strict=True))
    drawn = DrawnSprites(REBUILT, UNSEEN + seed, **sizes)
    rebuilt = vae(drawn.clips().to(vae.device, vae.dtype)).sample
    clips = torch.cat([2 * frames.float().transpose(1, 2).cpu() - 1, rebuilt.float().cpu()])
    key = [generated_clip(names[label]) for label in asked]
    key += [
        {"kind": "rebuilt", "motion": f["motion"], "shapes": [s["kind"] for s in reversed(f["shapes"])]}
        for f in drawn.factors
    ]
    order = torch.randperm(len(clips), generator=generator).tolist()
    shown = F.interpolate(clips[order].clamp(-1, 1)[:, :, 1::2].flatten(0, 1), scale_factor=2, mode="nearest")
    shown = shown.unflatten(0, (len(clips), 3))  # odd frames: at even ones a shake is where it began
    sheets = []
    for start in range(0, len(clips), ON_A_SHEET):
        part = shown[start : start + ON_A_SHEET]
        rows = [f"clip {start + i + 1}" for i in range(len(part))]
        sheets.append(class_grid(folder / f"sheet-{len(sheets) + 1}.png", part, rows, num_frames=part.shape[2]))
    for name, text in (("question.txt", QUESTION), ("key.json", json.dumps([key[i] for i in order], indent=1))):
        with atomic_write(folder / name) as file:
            file.write_text(text)
    return sheets


def generated_clip(name: str) -> Clip:
    """What a class of this name shows: of two shapes the first begins on the right."""
    motion, _, kinds = name.partition("/")
    return {"kind": "generated", "motion": motion, "shapes": kinds.split("-")[::-1] if kinds else None}


def read_answers(file: Path, count: int) -> list[list[str]]:
    """What was said of each clip: its motion, and its shapes.

    Raises:
        UserError: if the file cannot be read, or a clip has no line or one that says something else.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: no answers can be read there ({error}).") from error
    said: dict[int, list[str]] = {}
    for line in lines:
        if found := re.fullmatch(r"\s*(\d+)\s*:(.*)", line):
            said[int(found[1])] = [word.strip().lower() for word in found[2].split(",")]
    for number in range(1, count + 1):
        motion, *shapes = said.get(number, [""])
        if motion not in MOTIONS or not shapes or not set(shapes) <= {*SHAPES, "unclear"}:
            raise UserError(
                f'{file}: clip {number} needs a line "{number}: motion, shape" with a motion of {", ".join(MOTIONS)} '
                f"and a shape of {', '.join(SHAPES)} or unclear."
            )
    return [said[number] for number in range(1, count + 1)]


def counted(key: list[Clip], answers: list[list[str]]) -> dict[str, dict[str, int]]:
    """By kind of clip: how many there are, how many were named, and how many rightly."""
    counts: dict[str, dict[str, int]] = {}
    for clip, (motion, *shapes) in zip(key, answers, strict=True):
        right = {
            "clips": True,
            "motion right": motion == clip["motion"],
            "shape named": "unclear" not in shapes,
            "shape right": shapes == clip["shapes"],
            "both right": motion == clip["motion"] and shapes == clip["shapes"],
        }
        if clip["shapes"] is None:  # a model without sub-classes was asked for none
            del right["shape right"], right["both right"]
        of_kind = counts.setdefault(clip["kind"], dict.fromkeys(right, 0))
        for name, hit in right.items():
            of_kind[name] += hit
    return counts


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    options = argparse.Namespace(**check_options(vars(parser.parse_args(words))))
    folder = Path(options.folder)
    if (options.pipeline is None) == (options.answers is None):
        raise UserError("name either the pipeline to make sheets of, --pipeline, or the answers to count, --answers.")
    if options.pipeline is not None:
        pipeline = load_pipeline(options.pipeline)
        for sheet in make_sheets(folder, pipeline, options.seed, options.steps, options.guidance):
            print(sheet)
        return
    try:
        key = json.loads((folder / "key.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no sheets with a key: make them first, with --pipeline ({error}).") from error
    counts = counted(key, read_answers(Path(options.answers), len(key)))
    columns = max(counts.values(), key=len)
    rows = [[kind, *(str(of.get(column, "")) for column in columns)] for kind, of in sorted(counts.items())]
    print(markdown_table(["", *columns], rows))


if __name__ == "__main__":
    run_program(main)
