"""Train the classifier with which a pipeline of real video chooses among candidates (`num_candidates`).

    python -m benchmarks.real.candidates FOLDER LIST ...

It is smaller than the classifier that judges clips in this benchmark and trained with another seed, so that no clip
is chosen by its judge.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vidgen.common.errors import UserError, run_program
from vidgen.common.io import atomic_dir

from .classifier import train_on_videos

CLIP_SHAPE, FPS, WINDOWS = (3, 16, 64, 96), 8.0, 20  # of `pretrained/real`; windows of each video
TRAINING = dict(steps=1500, seed=31, width=16, points=6, dim=56)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.candidates", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the classifier, which must not exist")
    parser.add_argument("lists", nargs="+", type=Path, metavar="LIST", help="training videos with their classes")
    parser.add_argument("--steps", type=int, default=TRAINING["steps"], help="optimizer steps (default: 1500)")
    options = parser.parse_args()
    if options.folder.exists():
        raise UserError(f"{options.folder} exists: name a new folder.")
    training = TRAINING | {"steps": options.steps}
    classifier = train_on_videos(options.lists, CLIP_SHAPE, FPS, WINDOWS, **training)
    with atomic_dir(options.folder) as unfinished:
        classifier.to(torch.bfloat16).save_pretrained(unfinished)


if __name__ == "__main__":
    run_program(main)
