"""Where a run's numbers go: `metrics.jsonl` beside Accelerate's own trackers, and a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from accelerate.utils import tqdm

METRICS_FILE = "metrics.jsonl"


class JSONLTracker(GeneralTracker):
    """One JSON object per logged step in OUTPUT_DIR/metrics.jsonl: `step` and scalars by name."""

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, output_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(output_dir) / METRICS_FILE

    @property
    def tracker(self) -> Path:
        return self.path

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The config is a file of its own: OUTPUT_DIR/config.yaml."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def forget_steps_after(output_dir: str | Path, step: int) -> None:
    """Drop the lines of metrics.jsonl past `step`: what a resumed run is about to log again."""
    path = Path(output_dir) / METRICS_FILE
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= step]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    unfinished.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill


def progress_bar(total: int, initial: int = 0, description: str = "") -> tqdm:
    """A bar with rate and remaining time, on the main process; a line every ten seconds where there is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, desc=description, mininterval=interval, maxinterval=interval)
