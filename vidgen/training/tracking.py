"""Metric logging and throughput: `metrics.jsonl` beside Accelerate's trackers, and the speed of training."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..common.io import atomic_write
from ..metrics.flops import matmul_rate

METRICS_FILE = "metrics.jsonl"


class JSONLTracker(GeneralTracker):
    """Writes one JSON object per logged step to OUTPUT_DIR/metrics.jsonl: `step` and scalars by name."""

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
        """Does nothing: the config is saved as OUTPUT_DIR/config.yaml."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def drop_metrics_after(output_dir: str | Path, step: int) -> None:
    """Remove the lines of metrics.jsonl after `step`, which a resumed run will log again."""
    path = Path(output_dir) / METRICS_FILE
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if _read_step(line) <= step]
        with atomic_write(path) as unfinished:
            unfinished.write_text("".join(lines))


def _read_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # incomplete, because the run was killed


def log_media(trackers: Sequence[GeneralTracker], files: Mapping[str, Path], step: int) -> None:
    """Log images (.png) and short videos (.gif) to the trackers that show them: TensorBoard, wandb and trackio.

    The bytes of the files are logged unchanged. Called on the main process.

    Args:
        files: by the name under which they are logged.
    """
    for tracker in trackers:
        if tracker.name == "tensorboard":
            _log_to_tensorboard(tracker.tracker, files, step)
        elif tracker.name in ("wandb", "trackio"):
            library = importlib.import_module(tracker.name)
            kinds = {".png": library.Image, ".gif": library.Video}
            tracker.log({name: kinds[path.suffix](str(path)) for name, path in files.items()}, step=step)


def _log_to_tensorboard(writer: Any, files: Mapping[str, Path], step: int) -> None:
    """Log encoded images; TensorBoard plays an animated GIF in the place of an image.

    `SummaryWriter.add_video` encodes a GIF in the same way, but needs moviepy.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, path in files.items():
        with Image.open(path) as image:
            size = {"width": image.width, "height": image.height, "colorspace": 3}
        encoded = Summary.Image(**size, encoded_image_string=path.read_bytes())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=encoded)]), step)
    writer.flush()


class SpeedMeter:
    """Measures the throughput of a run and the time it waits for data.

    Args:
        accelerator: of the run.
        flops_per_sample: FLOPs of a training step per sample; three times those of the forward pass.
        samples_per_step: of all processes together.
        max_steps: of the run, for the estimate of the remaining time.
    """

    def __init__(
        self, accelerator: Accelerator, flops_per_sample: float, samples_per_step: int, max_steps: int
    ) -> None:
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.flops_per_sample, self.samples_per_step = flops_per_sample, samples_per_step
        self.max_steps = max_steps
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        self.peak_rate = matmul_rate(self.device, dtype)
        self._reset()

    def _reset(self) -> None:
        self.wait_time, self.paused_time, self.start, self.steps = 0.0, 0.0, time.perf_counter(), 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start = time.perf_counter()
        yield
        self.wait_time += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, such as that of a validation."""
        start = time.perf_counter()
        yield
        self.paused_time += time.perf_counter() - start

    def step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def read(self, step: int) -> dict[str, float]:
        """Return the measurements since the last call, made after `step`, and reset them.

        Returns:
            `clips_per_second`: of all processes together.
            `data_wait`: fraction of the time spent waiting for data.
            `tflops`: TFLOP/s per device.
            `mfu`: fraction of the device's measured rate of matrix products.
            `peak_memory_gib`: since the start; of the device, on a CPU of the process.
            `hours_left`: at this speed.
        """
        elapsed = max(time.perf_counter() - self.start - self.paused_time, 1e-9)
        clips_per_second = self.steps * self.samples_per_step / elapsed
        flops = clips_per_second * self.flops_per_sample / self.processes
        values = {
            "clips_per_second": clips_per_second,
            "data_wait": self.wait_time / elapsed,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak_rate,
            "peak_memory_gib": _peak_memory(self.device) / 2**30,
            "hours_left": (self.max_steps - step) * elapsed / max(self.steps, 1) / 3600,
        }
        self._reset()
        return values


def _peak_memory(device: torch.device) -> float:
    """Peak memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
