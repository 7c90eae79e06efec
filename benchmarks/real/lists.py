"""The lists of videos with which `pretrained/real` and `real_robot` were trained, and their benchmarks.

    python -m benchmarks.real.lists ../shared/data/real runs/lists

DATA is a folder with the data sets DROID and EgoGestAR.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from vidgen.common.errors import UserError, run_program
from vidgen.common.io import atomic_write

from .clips import read_rows

SPLITS = ("train", "test")
COLUMNS = ("path", "label", "caption")
GESTURES_OF_VAE = 2  # times that a gesture is in the training list; a robot scene is in it once
GESTURES_OF_DIT = 6


def write_lists(data: Path, folder: Path) -> list[Path]:
    """Write the lists, with absolute paths, and return them.

    `vae_train.csv` and `vae_test.csv` are for `configs/vae/real.yaml`; `dit_train.csv`, with captions of robot scenes
    and none of gestures, for `configs/dit/real.yaml`; `captions_train.csv` and `captions_test.csv`, of robot scenes,
    for `configs/dit/real_robot.yaml` and `benchmarks.text`. A caption names its room: "..., in a kitchen".

    Args:
        data: folder with `droid` (`labels.csv`, `train_scene.csv`, `test_scene.csv`) and `egogestar` (`train.csv`,
            `test.csv`).
        folder: of the lists.

    Raises:
        UserError: as `read_rows`; if a robot scene is not in `labels.csv`.
    """
    droid, egogestar = data / "droid", data / "egogestar"
    captions = {row["path"]: row["caption"] for row in read_rows(droid / "labels.csv", "caption")}
    scenes = {split: read_rows(droid / f"{split}_scene.csv", "label") for split in SPLITS}
    gestures = {split: read_rows(egogestar / f"{split}.csv", "label") for split in SPLITS}
    for split in SPLITS:
        for row in scenes[split]:
            if row["path"] not in captions:
                raise UserError(f"{droid / 'labels.csv'} has no row of {row['path']}, which {split}_scene.csv lists.")
            row["caption"] = caption_with_room(captions[row["path"]], row["label"])
    copies = {"train": GESTURES_OF_VAE, "test": 1}
    lists = {f"vae_{split}": (scenes[split] + gestures[split] * copies[split], COLUMNS[:2]) for split in SPLITS}
    lists |= {f"captions_{split}": (scenes[split], COLUMNS) for split in SPLITS}
    lists["dit_train"] = scenes["train"] + gestures["train"] * GESTURES_OF_DIT, COLUMNS
    return [write_list(folder / f"{name}.csv", *content) for name, content in lists.items()]


def caption_with_room(caption: str, room: str) -> str:
    """The caption with its room: "Move it." and "industrial_office" give "Move it, in an industrial office"."""
    article = "an" if room[0] in "aeiou" else "a"
    return f"{caption.strip().rstrip('.')}, in {article} {room.replace('_', ' ')}"


def write_list(table: Path, rows: list[dict[str, str]], columns: tuple[str, ...]) -> Path:
    with atomic_write(table) as path, path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *([row.get(name, "") for name in columns] for row in rows)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.lists", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with droid and egogestar")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the lists")
    options = parser.parse_args()
    for table in write_lists(options.data, options.folder):
        print(table)


if __name__ == "__main__":
    run_program(main)
