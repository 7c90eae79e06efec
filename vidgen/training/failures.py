"""Failures during training: divergence, unreadable videos, and images that cannot be drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from pipelines.finite import NonFiniteError

from ..common.errors import UserError
from ..data.dataset import BadVideos
from .state import PendingStep


class TrainingDiverged(UserError):
    """The loss or the gradient is not finite."""


def describe_divergence(step: PendingStep, describe_batch: Callable[[dict[str, Any]], list[str]]) -> str:
    """Half a sentence with the terms of a diverged step and its clips. Must be called on every process.

    Names the clips of the micro-batches whose loss is not finite; all clips of the step if only gradients are not.
    """
    terms = {name: value.item() for name, value in step.terms().items()}
    clips = [
        clip
        for batch, losses in zip(step.batches, step.losses, strict=True)
        if not losses["loss"].isfinite()
        for clip in describe_batch(batch)
    ]
    reports = gather_object([(terms, clips)])
    clips = [clip for _, clips_of_process in reports for clip in clips_of_process]
    if not clips:
        clips = gather_object([clip for batch in step.batches for clip in describe_batch(batch)])
    worst = next((other for other, _ in reports if not all(map(math.isfinite, other.values()))), terms)
    values = ", ".join(f"{name} {value:.4g}" for name, value in worst.items())
    return f"({values}) on {', '.join(dict.fromkeys(clips))}"


class VideoFailures:
    """Videos that were skipped, or read by PyAV instead of the chosen decoder, as the batches report them.

    Attributes:
        bad_videos: the file that lists skipped videos, OUTPUT_DIR/bad_videos.jsonl.
        fallbacks: pairs of a path and a reason, as keys in order.
    """

    def __init__(self, output_dir: Path) -> None:
        self.bad_videos = BadVideos(output_dir / "bad_videos.jsonl")
        self.fallbacks: dict[tuple[str, str], None] = {}
        self._skipped: dict[tuple[str, str], None] = {}

    def collect(self, batch: dict[str, Any]) -> None:
        """Keep what a batch reports."""
        self._skipped.update(dict.fromkeys(batch.get("skipped", ())))
        self.fallbacks.update(dict.fromkeys(batch.get("fallbacks", ())))

    def write(self, is_main_process: bool) -> None:
        """Add the skipped videos of all processes to the file. Must be called on every process."""
        skipped = gather_object(list(self._skipped))
        self._skipped.clear()
        if is_main_process:
            self.bad_videos.add(skipped)


@contextmanager
def skip_non_finite_images(step: int, report: Callable[[str], object]) -> Iterator[None]:
    """Leave out the images that the block draws, with a warning, if a model's output is not finite."""
    try:
        yield
    except NonFiniteError as error:
        report(f"warning: no images at step {step}: {error}")
