"""The official training and test splits of UCF-101, from the lists that come with it.

    ucfTrainTestlist/classInd.txt       1 ApplyEyeMakeup
    ucfTrainTestlist/trainlist01.txt    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
    ucfTrainTestlist/testlist01.txt     ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi

(https://www.crcv.ucf.edu/data/UCF101.php)
"""

from __future__ import annotations

import os
from pathlib import Path

from ..common.errors import UserError
from ..common.options import expand_home
from .listing import find_videos
from .types import VideoFile

SPLIT_FOLDER = "ucfTrainTestlist"
SPLITS = (1, 2, 3)


def ucf101_split(
    root: str | os.PathLike, split: int, split_files: str | os.PathLike | None = None
) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    """The training and test videos of an official split, and the 101 classes in the order of classInd.txt.

    A listed video is found by its class folder and its name or, where there is no such file, with another extension
    (files may be re-encoded). A missing video stays in the list, so that it is reported like an unreadable one.

    Args:
        root: the folder that holds the class folders, at any depth.
        split: 1, 2 or 3.
        split_files: the folder with the lists; by default `ucfTrainTestlist` in `root` or beside it.

    Raises:
        UserError: if the split, a list, the folder, or all of the videos are missing, or a list is malformed.
    """
    root = Path(expand_home(root))
    if split not in SPLITS:
        raise UserError(f"data.ucf101_split: UCF-101 has the splits 1, 2 and 3, not {split}")
    if not root.is_dir():
        raise UserError(f"{root}: an official split of UCF-101 needs the folder of its unpacked videos")
    lists = _find_split_folder(root, split_files)
    classes = _read_classes(lists / "classInd.txt")
    label_of = {name: label for label, name in enumerate(classes)}
    found = find_videos(root)
    videos = {(path.parent.name, path.stem): path for path in found}
    exact = {(path.parent.name, path.name): path for path in found}

    def read_list(name: str) -> list[VideoFile]:
        files = []
        for number, line in _read_lines(lists / name):
            entry = Path(line.split()[0])  # the training lists give the class's number after it
            if entry.parent.name not in label_of:
                raise UserError(f"{lists / name}, line {number}: expected CLASS/NAME with a class of classInd.txt")
            path = videos.get((entry.parent.name, entry.stem), root / entry)
            path = exact.get((entry.parent.name, entry.name), path)  # prefer the listed extension
            files.append(VideoFile(path, label_of[entry.parent.name]))
        if not {file.path for file in files} & set(found):
            raise UserError(f"none of the videos of {name} is in {root}")
        return files

    return read_list(f"trainlist{split:02}.txt"), read_list(f"testlist{split:02}.txt"), classes


def _find_split_folder(root: Path, split_files: str | os.PathLike | None) -> Path:
    places = [root / SPLIT_FOLDER, root.absolute().parent / SPLIT_FOLDER]
    if split_files is not None:
        places = [Path(expand_home(split_files))]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"no split files at {' or '.join(map(str, places))}: unpack UCF101TrainTestSplits-RecognitionTask.zip there, "
        "or name its folder as data.split_files"
    )


def _read_classes(file: Path) -> list[str]:
    names: dict[int, str] = {}
    for number, line in _read_lines(file):
        index, _, name = line.partition(" ")
        if not index.isdecimal() or not name.strip():
            raise UserError(f"{file}, line {number}: expected a number and a class, got {line!r}")
        if int(index) in names:
            raise UserError(f"{file}, line {number}: the number {index} is taken by {names[int(index)]}")
        names[int(index)] = name.strip()
    return [names[index] for index in sorted(names)]


def _read_lines(file: Path) -> list[tuple[int, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read; it is one of UCF-101's split files") from error
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
