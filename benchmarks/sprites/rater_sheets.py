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
from collections import Counter
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
from .classifier import DrawnSprites, sprite_sizes

PER_MOTION, RECONSTRUCTED, PER_SHEET = 3, 8, 8  # clips
STEPS, GUIDANCE = 50, 3.0
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


@torch.no_grad()
def make_sheets(folder: Path, pipeline: VidTwinPipeline, seed: int) -> list[Path]:
    """Write the sheets, the question and the key; returns the sheets.

    Raises:
        UserError: if the pipeline does not know the motions of sprites.
    """
    if missing := [motion for motion in MOTIONS if motion not in pipeline.labels]:
        raise UserError(f"the pipeline must generate sprites; it has no class {missing[0]!r}.")

    # Generate clips of every class, and reconstruct real ones. The first shape of a class starts on the right.
    generator = torch.Generator().manual_seed(seed)
    names = {label: name for name, label in (pipeline.labels | pipeline.subclasses).items()}
    labels = pipeline.draw_subclasses(pipeline.get_label_ids([*MOTIONS] * PER_MOTION), generator)
    frames = pipeline(
        labels, guidance_scale=GUIDANCE, num_inference_steps=STEPS, generator=generator, output_type="pt"
    ).frames
    vae = pipeline.autoencoder
    sizes = sprite_sizes(vae)
    real = DrawnSprites(RECONSTRUCTED, UNSEEN_SEED + seed, **sizes)
    reconstructed = vae(real.clips().to(vae.device, vae.dtype)).sample
    clips = torch.cat([2 * frames.float().transpose(1, 2).cpu() - 1, reconstructed.float().cpu()])
    key = []
    for label in labels:
        motion, _, kinds = names[label].partition("/")
        key.append({"kind": "generated", "motion": motion, "shapes": kinds.split("-")[::-1] if kinds else None})
    for factors in real.factors:
        shapes = [shape["kind"] for shape in reversed(factors["shapes"])]
        key.append({"kind": "reconstructed", "motion": factors["motion"], "shapes": shapes})

    # Shuffle them and write the sheets; odd frames, because at even ones a shake is at its starting point.
    order = torch.randperm(len(clips), generator=generator).tolist()
    large = F.interpolate(clips[order].clamp(-1, 1)[:, :, 1::2].flatten(0, 1), scale_factor=2, mode="nearest")
    sheets = []
    for start, part in zip(range(0, len(clips), PER_SHEET), large.unflatten(0, (-1, 3)).split(PER_SHEET), strict=True):
        rows = [f"clip {start + i + 1}" for i in range(len(part))]
        sheets.append(class_grid(folder / f"sheet-{len(sheets) + 1}.png", part, rows, num_frames=part.shape[2]))
    for name, text in (("question.txt", QUESTION), ("key.json", json.dumps([key[i] for i in order], indent=1))):
        with atomic_write(folder / name) as file:
            file.write_text(text)
    return sheets


def read_answers(text: str, count: int) -> list[list[str]]:
    """The answers for each clip: its motion, and its shapes. `UserError` if one is missing or has an unknown word."""
    answers = {}
    for match in re.finditer(r"^\s*(\d+)\s*:(.*)$", text, re.MULTILINE):
        answers[int(match[1])] = [word.strip().lower() for word in match[2].split(",")]
    for number in range(1, count + 1):
        motion, *shapes = answers.get(number, [""])
        if motion not in MOTIONS or not shapes or not set(shapes) <= {*SHAPES, "unclear"}:
            raise UserError(
                f'clip {number} needs a line "{number}: motion, shape" with a motion of {", ".join(MOTIONS)} and a '
                f"shape of {', '.join(SHAPES)} or unclear."
            )
    return [answers[number] for number in range(1, count + 1)]


def score_answers(key: list[dict[str, Any]], answers: list[list[str]]) -> dict[str, Counter]:
    """By kind of clip: the number of clips, of named shapes, and of correct answers."""
    counts: dict[str, Counter] = {}
    for clip, (motion, *shapes) in zip(key, answers, strict=True):
        of_kind = counts.setdefault(clip["kind"], Counter())
        of_kind["clips"] += 1
        of_kind["motion correct"] += motion == clip["motion"]
        of_kind["shape named"] += "unclear" not in shapes
        if clip["shapes"]:  # None for a model without subclasses
            of_kind["shape correct"] += shapes == clip["shapes"]
            of_kind["both correct"] += motion == clip["motion"] and shapes == clip["shapes"]
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sprites.rater_sheets", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the sheets")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--pipeline", metavar="FOLDER", help="make sheets of this model of sprites")
    task.add_argument("--answers", type=Path, metavar="FILE", help="score the answers of a rater")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, shapes and order (default: 0)")
    options = argparse.Namespace(**check_options(vars(parser.parse_args(arguments))))
    if options.pipeline:
        print(*make_sheets(options.folder, load_pipeline(options.pipeline), options.seed), sep="\n")
        return
    try:
        key, answers = json.loads((options.folder / "key.json").read_text()), options.answers.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the key of the sheets and the answers: {error}.") from error
    counts = score_answers(key, read_answers(answers, len(key)))
    columns = max(counts.values(), key=len)
    rows = [[kind, *(count.get(column) for column in columns)] for kind, count in sorted(counts.items())]
    print(markdown_table(["", *columns], rows))


if __name__ == "__main__":
    run_program(main)
