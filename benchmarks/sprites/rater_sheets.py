"""Sheets of generated clips for blind raters, and the score of their answers.

    python -m benchmarks.sprites.rater_sheets FOLDER --pipeline pretrained/sprites --seed 41
    python -m benchmarks.sprites.rater_sheets FOLDER --answers FILE

The first command writes sheets of 24 generated clips and, shuffled among them, 8 reconstructed real clips, which bound
the score. The rater, a person or a vision-language model, does not see `key.json` and answers `question.txt` with one
line per clip; the second command scores the answers. A classifier assigns a shape to every clip, whether or not one is
visible; a rater may answer "unclear".
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

from ..common.tables import markdown_table
from .classifier import DrawnSprites

PER_MOTION, RECONSTRUCTED, PER_SHEET = 3, 8, 8  # clips
UNSEEN_SEED = 7_000_000  # of sprites that no model was trained on
QUESTION = f"""Each sheet shows short video clips, one per row: small colored shapes move over a dark background.
Every second frame is shown. Judge every clip by its frames alone:
1. how it moves: slide (straight across the frame), bounce (up and down twice), orbit (once around the center), spin
   (turns on the spot), zoom (grows, then shrinks), shake (a small swing back and forth), swap (two shapes trade
   places) or still;
2. which shape it is: {", ".join(SHAPES)}; for two shapes, first the one that starts on the
   left. If you cannot tell, answer unclear; name a shape where a reasonable person would.
Answer with one line per clip: "N: motion, shape", for two shapes "N: swap, left shape, right shape".
"""
Clip = dict[str, Any]  # `kind`, `motion` and `shapes`, from the left at the start; None without subclasses


@torch.no_grad()
def make_sheets(
    folder: Path, pipeline: VidTwinPipeline, seed: int = 0, steps: int = 50, guidance: float = 3.0
) -> list[Path]:
    """Write the sheets, the question and the key; returns the sheets.

    Raises:
        UserError: if the pipeline has no VAE or does not know the motions of sprites.
    """
    missing = [motion for motion in MOTIONS if motion not in pipeline.labels]
    if pipeline.vae is None or missing:
        raise UserError(
            f"the pipeline must generate videos of sprites; it has {f'no {missing[0]}' if missing else 'no vae'}."
        )

    # Generate clips of every class, and reconstruct real ones.
    generator = torch.Generator().manual_seed(seed)
    names = {label: name for name, label in (pipeline.labels | pipeline.subclasses).items()}
    labels = pipeline.draw_subclasses(pipeline.get_label_ids([*MOTIONS] * PER_MOTION), generator)
    frames = pipeline(
        labels, guidance_scale=guidance, num_inference_steps=steps, generator=generator, output_type="pt"
    ).frames
    vae = pipeline.vae
    sizes = dict(zip(("num_frames", "resolution"), vae.clip_shape[1:3], strict=True))
    real = DrawnSprites(RECONSTRUCTED, UNSEEN_SEED + seed, **sizes)
    reconstructed = vae(real.clips().to(vae.device, vae.dtype)).sample
    clips = torch.cat([2 * frames.float().transpose(1, 2).cpu() - 1, reconstructed.float().cpu()])
    key = [describe_class(names[label]) for label in labels]
    key += [
        {"kind": "reconstructed", "motion": f["motion"], "shapes": [s["kind"] for s in reversed(f["shapes"])]}
        for f in real.factors
    ]

    # Shuffle them and write the sheets; odd frames, because at even ones a shake is at its starting point.
    order = torch.randperm(len(clips), generator=generator).tolist()
    large = F.interpolate(clips[order].clamp(-1, 1)[:, :, 1::2].flatten(0, 1), scale_factor=2, mode="nearest")
    large = large.unflatten(0, (len(clips), 3))
    sheets = []
    for start in range(0, len(clips), PER_SHEET):
        part = large[start : start + PER_SHEET]
        rows = [f"clip {start + i + 1}" for i in range(len(part))]
        sheets.append(class_grid(folder / f"sheet-{len(sheets) + 1}.png", part, rows, num_frames=part.shape[2]))
    for name, text in (("question.txt", QUESTION), ("key.json", json.dumps([key[i] for i in order], indent=1))):
        with atomic_write(folder / name) as file:
            file.write_text(text)
    return sheets


def describe_class(name: str) -> Clip:
    """The key of a generated clip of this class or subclass, whose first shape starts on the right."""
    motion, _, kinds = name.partition("/")
    return {"kind": "generated", "motion": motion, "shapes": kinds.split("-")[::-1] if kinds else None}


def read_answers(file: Path, count: int) -> list[list[str]]:
    """The answers for each clip: its motion, and its shapes.

    Raises:
        UserError: if the file cannot be read, or a clip has no line or an unknown word.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read the answers ({error}).") from error
    answers: dict[int, list[str]] = {}
    for line in lines:
        if match := re.fullmatch(r"\s*(\d+)\s*:(.*)", line):
            answers[int(match[1])] = [word.strip().lower() for word in match[2].split(",")]
    for number in range(1, count + 1):
        motion, *shapes = answers.get(number, [""])
        if motion not in MOTIONS or not shapes or not set(shapes) <= {*SHAPES, "unclear"}:
            raise UserError(
                f'{file}: clip {number} needs a line "{number}: motion, shape" with a motion of {", ".join(MOTIONS)} '
                f"and a shape of {', '.join(SHAPES)} or unclear."
            )
    return [answers[number] for number in range(1, count + 1)]


def score_answers(key: list[Clip], answers: list[list[str]]) -> dict[str, dict[str, int]]:
    """By kind of clip: the number of clips, of named shapes, and of correct answers."""
    counts: dict[str, dict[str, int]] = {}
    for clip, (motion, *shapes) in zip(key, answers, strict=True):
        hits = {
            "clips": True,
            "motion correct": motion == clip["motion"],
            "shape named": "unclear" not in shapes,
            "shape correct": shapes == clip["shapes"],
            "both correct": motion == clip["motion"] and shapes == clip["shapes"],
        }
        if clip["shapes"] is None:  # a model without subclasses
            del hits["shape correct"], hits["both correct"]
        of_kind = counts.setdefault(clip["kind"], dict.fromkeys(hits, 0))
        for name, hit in hits.items():
            of_kind[name] += hit
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sprites.rater_sheets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the sheets")
    parser.add_argument("--pipeline", metavar="FOLDER", help="make sheets of this model of sprites")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="score the answers of a rater")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, shapes and order (default: 0)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale (default: 3)")
    options = argparse.Namespace(**check_options(vars(parser.parse_args(arguments))))
    if (options.pipeline is None) == (options.answers is None):
        raise UserError("name either the pipeline to make sheets of, --pipeline, or the answers to score, --answers.")
    if options.pipeline is not None:
        pipeline = load_pipeline(options.pipeline)
        for sheet in make_sheets(options.folder, pipeline, options.seed, options.steps, options.guidance):
            print(sheet)
        return
    try:
        key = json.loads((options.folder / "key.json").read_text())
    except (OSError, ValueError) as error:
        message = f"{options.folder} has no sheets with a key: make them first, with --pipeline ({error})."
        raise UserError(message) from error
    counts = score_answers(key, read_answers(options.answers, len(key)))
    columns = max(counts.values(), key=len)
    rows = [[kind, *(str(count.get(column, "")) for column in columns)] for kind, count in sorted(counts.items())]
    print(markdown_table(["", *columns], rows))


if __name__ == "__main__":
    run_program(main)
