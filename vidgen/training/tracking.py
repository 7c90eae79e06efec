"""Where a run's numbers go: `metrics.jsonl` beside Accelerate's own trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

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
