"""Where a run's numbers go, `metrics.jsonl` beside Accelerate's own trackers, and those that say how fast it is."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from ..metrics.flops import matmul_rate

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


class SpeedMeter:
    """How fast a run goes, and what it waits for.

    Args:
        accelerator: of the run.
        flops_per_sample: of a training step, for each sample; three times the forward pass.
        samples_per_step: of all processes together.
        max_steps: of the run, for the time that remains.
    """

    def __init__(
        self, accelerator: Accelerator, flops_per_sample: float, samples_per_step: int, max_steps: int
    ) -> None:
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.flops_per_sample, self.samples_per_step = flops_per_sample, samples_per_step
        self.max_steps = max_steps
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.ceiling = matmul_rate(self.device, dtype)
        self.waited, self.not_counted, self.since, self.steps = 0.0, 0.0, time.perf_counter(), 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the length of a `with` block the run waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What a `with` block takes is not training."""
        start = time.perf_counter()
        yield
        self.not_counted += time.perf_counter() - start

    def step(self) -> None:
        """Count a step."""
        self.steps += 1

    def read(self, step: int) -> dict[str, float]:
        """What was measured since the last call, and start anew.

        `clips_per_second` of all processes; `data_wait`, the share of the time; `tflops` a second of each process's
        device, and `mfu`, their share of its measured matmul rate; `peak_memory_gib` since the start, of the device,
        or of the process on a CPU; `hours_left` at this pace after `step`.
        """
        now = time.perf_counter()
        elapsed = max(now - self.since - self.not_counted, 1e-9)
        pace = self.steps * self.samples_per_step / elapsed
        flops = pace * self.flops_per_sample / self.processes
        values = {
            "clips_per_second": pace,
            "data_wait": self.waited / elapsed,
            "tflops": flops / 1e12,
            "mfu": flops / self.ceiling,
            "peak_memory_gib": _peak_memory(self.device) / 2**30,
            "hours_left": (self.max_steps - step) * elapsed / max(self.steps, 1) / 3600,
        }
        self.waited, self.not_counted, self.since, self.steps = 0.0, 0.0, now, 0
        return values


def _peak_memory(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
