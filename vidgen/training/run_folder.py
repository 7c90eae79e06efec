"""What a training run has written to its folder: config, curves, checkpoints and the best model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..common.errors import UserError
from ..common.plots import read_curves
from .best_model import BEST, PREFIX, RECORD, higher_is_better
from .checkpoints import list_checkpoints
from .resume import CONFIG
from .tracking import METRICS_FILE

BASELINE = re.compile(r".*_(mean_colou?r|downsample)")  # names of values that do not depend on the model


@dataclass(frozen=True)
class RunFolder:
    """A training run, finished or not.

    Attributes:
        folder: the run folder.
        name: unique among the runs that are read together.
        config: values of all keys by dotted name.
        curves: {metric: {step: value}}, as in `metrics.jsonl`.
        checkpoints: names of the checkpoint folders, oldest first.
        best: `metric`, `value` and `step` of the model in OUTPUT/best; None without one.
        has_final: whether the final model is written.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    curves: dict[str, dict[int, float]]
    checkpoints: list[str]
    best: dict[str, Any] | None
    has_final: bool

    @property
    def kind(self) -> str:
        """The trained model: VAE or DiT."""
        return "DiT" if any(key.startswith("diffusion.") for key in self.config) else "VAE"

    @property
    def last_step(self) -> int:
        """The last step with a logged value."""
        return max((max(points) for points in self.curves.values()), default=0)

    def best_validation(self, metric: str) -> tuple[int, float] | None:
        """The step and the value of the best validation by a metric; None if it was not measured."""
        points = self.curves.get(metric)
        if not points:
            return None
        choose = max if higher_is_better(metric) else min
        return choose(points.items(), key=lambda point: point[1])


def ranks_models(metric: str) -> bool:
    """Whether a logged value is a validation metric of the model, not of a baseline."""
    return metric.startswith(PREFIX) and not BASELINE.fullmatch(metric)


def read_runs(folders: Sequence[str | os.PathLike]) -> list[RunFolder]:
    """Read run folders, and the run folders below folders that are none; in the given order, each once.

    Raises:
        UserError: if a folder is missing, holds no run, or holds a file that cannot be read.
    """
    paths: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name run folders (output_dir of a training) or their parents.")
        runs = [folder] if (folder / METRICS_FILE).is_file() else _find_runs(folder)
        if not runs:
            raise UserError(f"{folder} holds no training run: there is no {METRICS_FILE} in it or in a folder below.")
        paths |= dict.fromkeys(path.resolve() for path in runs)
    return [_read_run(path, name) for path, name in zip(paths, _short_names(list(paths)), strict=True)]


def _find_runs(folder: Path) -> list[Path]:
    return sorted(path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{METRICS_FILE}"))


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that they share."""
    if len(paths) == 1:
        return [paths[0].name]
    shared = Path(os.path.commonpath(paths))
    return [path.relative_to(shared).as_posix() if path != shared else path.name for path in paths]


def _read_run(folder: Path, name: str) -> RunFolder:
    try:
        config = (
            _flatten(OmegaConf.to_container(OmegaConf.load(folder / CONFIG))) if (folder / CONFIG).is_file() else {}
        )
        curves = read_curves(folder / METRICS_FILE)
        best = json.loads((folder / BEST / RECORD).read_text()) if (folder / BEST / RECORD).is_file() else None
    except Exception as error:  # YAML and JSON libraries raise many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the run {folder} cannot be read: {reason}") from error
    checkpoints = [path.name for path in list_checkpoints(folder)]
    return RunFolder(folder, name, config, curves, checkpoints, best, (folder / "final").is_dir())


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted key."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        is_nested = isinstance(value, dict) and value
        values |= _flatten(value, f"{prefix}{key}.") if is_nested else {f"{prefix}{key}": value}
    return values
