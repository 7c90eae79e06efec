"""Split videos into training and validation sets, as the config says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from .config import DataConfig
from .csv_table import TABLE_SUFFIXES
from .listing import list_videos
from .summary import identify_file, summarize
from .types import ShardMember, VideoFile
from .ucf101 import ucf101_split

Report = Callable[[str], object]


def list_train_and_validation(
    data: DataConfig, seed: int, report: Report | None = None
) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    """The training videos, the validation videos, and the names of the classes.

    The validation videos are, in this order of precedence:

    1. the videos of `validation_root`, with labels among the training classes;
    2. with `ucf101_split`, `num_validation_videos` of the official test list, alternating between classes;
    3. `num_validation_videos`, but at most a fifth, held out from `root`.

    `report` is called with a summary of each data set. Raises the errors of `list_videos`, `ucf101_split` and
    `split_validation`, and `UserError` if none of the videos exists.
    """
    validation = None
    if data.ucf101_split is not None:
        files, validation, classes = _list_ucf101(data, report)
        if data.num_validation_videos < len(validation):
            _, validation = split_validation(validation, data.num_validation_videos, seed)
    else:
        files, classes = _list_existing(data.root, report)
    if data.validation_root is not None:
        validation, names = _list_existing(data.validation_root, report)
        label_of = {name: label for label, name in enumerate(classes)}
        validation = [VideoFile(path, None if i is None else label_of.get(names[i])) for path, i in validation]
    elif validation is None:
        files, validation = split_validation(files, min(data.num_validation_videos, len(files) // 5), seed)
    return files, validation, classes


def list_videos_to_encode(
    data: DataConfig, seed: int, report: Report | None = None
) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    """The training videos of a DiT, its validation videos, and the names of the classes.

    As `list_train_and_validation`, but nothing is held out of `root` unless `hold_out` is set.
    """
    if data.validation_root is None and data.ucf101_split is None and not data.hold_out:
        files, classes = list_training_videos(data, report)
        return files, [], classes
    return list_train_and_validation(data, seed, report)


def list_training_videos(data: DataConfig, report: Report | None = None) -> tuple[list[VideoFile], list[str]]:
    """All training videos, none held out: those of `root`, or of the training list of `ucf101_split`.

    Raises the errors of `list_videos` and `ucf101_split`, and `UserError` if none of the videos exists.
    """
    if data.ucf101_split is None:
        return _list_existing(data.root, report)
    files, _, classes = _list_ucf101(data, report)
    return files, classes


def split_validation(
    files: Sequence[VideoFile], num_validation: int, seed: int
) -> tuple[list[VideoFile], list[VideoFile]]:
    """Hold out `num_validation` files: (training, validation), in the given order, the same for the same seed.

    The classes take turns, in random order, so each gives at least one where `num_validation` allows, and a class
    gives its last file only when no other is left. A path listed twice stays on one side. Raises `UserError` if no
    file would be left to train on.
    """
    by_class: dict[int | None, list[Path | ShardMember]] = defaultdict(list)
    for path, label in {file.path: file.label for file in files}.items():
        by_class[label].append(path)
    available = sum(map(len, by_class.values()))
    if not 0 <= num_validation < available:
        raise UserError(f"cannot hold out {num_validation} of {available} videos: choose from 0 to {available - 1}")

    rng = np.random.default_rng(seed)
    labels = sorted(by_class, key=lambda label: -1 if label is None else label)
    queues = [[by_class[label][i] for i in rng.permutation(len(by_class[label]))] for label in labels]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    turns = [(place == len(queue) - 1, place, path) for queue in queues for place, path in enumerate(queue)]
    held = {path for *_, path in sorted(turns, key=lambda turn: turn[:2])[:num_validation]}
    return [file for file in files if file.path not in held], [file for file in files if file.path in held]


def _list_existing(root: str, report: Report | None) -> tuple[list[VideoFile], list[str]]:
    files, classes = list_videos(root, report)
    if all(identify_file(file.path) is None for file in files):
        hint = "; paths in a CSV are relative to its folder" if Path(root).suffix.lower() in TABLE_SUFFIXES else ""
        raise UserError(f"{root}: none of its videos exists, the first would be {files[0].path}{hint}")
    return files, classes


def _list_ucf101(data: DataConfig, report: Report | None) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    train, test, classes = ucf101_split(data.root, data.ucf101_split, data.split_files)
    if report is not None:
        for part, files in (("train", train), ("test", test)):
            report(summarize(f"{data.root}, {part} list {data.ucf101_split}", files, classes))
    return train, test, classes
