"""Fréchet distances of a model in training, on few clips: fast enough for every validation, comparable between steps.

The distance of few clips is biased upward, so it is only compared with that of the same run, or of runs with the same
data, number of clips and detector. Real clips, classes and noise are the same at every validation; the features of
real clips are computed once.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinPipeline

from ..common.errors import UserError
from ..data.listing import data_hash
from ..data.types import VideoFile
from .detectors import get_detector, refuse_duplicates
from .features import Clips, Collector, FeatureSet, Source, TooFewClipsError
from .frechet import frechet_distance, quiet_about_rank
from .fvd import Sampling, change_clips, generate_clips, reconstruct_by
from .protocols import Protocol
from .real_clips import ClipBatch, RealClips, draw_windows

MIN_CLIPS = 4  # of a distance
GENERATED = "generated clips"


def distance_names(detectors: Sequence[str], prefix: str) -> list[str]:
    """Names of the distances by these detectors, each given as NAME or NAME=FILE: `fvd_i3d`, or `rfvd_i3d`."""
    return [f"{prefix}_{detector.partition('=')[0]}" for detector in detectors]


class ValidationFVD:
    """Measures a model in training against real clips: one window of each of `num_samples` videos, at most.

    Args:
        detectors: NAME or NAME=FILE, as `get_detector` takes them; at least one.
        accelerator: of the processes, which all call every method.
        folder: keeps the features of real clips.
        root, files, classes: the real videos, as `list_videos` returns them for `root`.
        num_samples: number of real and of generated clips, 4 or more.
        clip_shape: (3, T, H, W) of the model's clips.
        fps: of the clips.
        seed: of the choice of videos, and of the noise of generated clips.
        batch_size: clips per batch.
        num_workers: reading processes of each process.

    Raises:
        UserError: the errors of `get_detector`; for a repeated detector, one that needs more frames or larger ones,
            or fewer than 4 usable videos.
    """

    def __init__(
        self,
        detectors: Sequence[str],
        accelerator: Accelerator,
        folder: str | os.PathLike,
        root: str | os.PathLike,
        files: Sequence[VideoFile],
        classes: Sequence[str],
        *,
        num_samples: int,
        clip_shape: tuple[int, int, int, int],
        fps: float,
        seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        # Load the detectors.
        pairs = [detector.partition("=")[::2] for detector in detectors]
        refuse_duplicates([name for name, _ in pairs])
        self.detectors = [
            get_detector(name, path or None, option="validation.detectors=NAME=") for name, path in pairs
        ]
        _, frames, height, width = clip_shape
        for detector in self.detectors:
            if frames < detector.min_frames or min(height, width) < detector.min_size:
                raise UserError(
                    f"validation.detectors: {detector.name} needs clips of {detector.min_frames} frames and "
                    f"{detector.min_size} x {detector.min_size} pixels or more, but the model's have {frames} frames "
                    f"of {height} x {width}."
                )
            detector.to(accelerator.device)

        # Choose the real clips: videos by seed, and one window of each.
        self.protocol = Protocol(
            name="validation",
            source="vidgen",
            generated=num_samples,
            real=num_samples,
            split="all",
            windows="one",
            frames=frames,
            size=height if height == width else (height, width),
            detector=self.detectors[0].name,
            labels="balanced",
            fps=fps,
        )
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
        self.files = [files[i] for i in sorted(order[:num_samples])]
        windows = None
        if accelerator.is_main_process:
            windows = draw_windows(self.files, self.protocol, None, seed).windows
        [self.windows] = broadcast_object_list([windows])
        if len(self.windows) < MIN_CLIPS:
            raise UserError(
                f"validation.detectors: a Fréchet distance needs {MIN_CLIPS} real clips or more, but there are "
                f"{len(self.windows)} usable videos in {root}; leave validation.detectors out."
            )
        self.num_samples, self.seed, self.num_workers = num_samples, seed, num_workers
        self.source: Source = {"data": data_hash(root, self.files, classes), "seed": seed}
        self.accelerator = accelerator
        self.collector = Collector(self.detectors, self.protocol, accelerator, Path(folder), batch_size)

    @torch.no_grad()
    def measure_generation(
        self, pipeline: VidTwinPipeline, sampling: Sampling, step: int, prompts: Sequence[str] = ()
    ) -> dict[str, float]:
        """The distance of `num_samples` generated clips to the real ones by each detector, `fvd_NAME`.

        `step` identifies the pipeline's weights. `prompts` are those of a pipeline without classes, in turn. NaN, with
        a warning, if a clip is not finite.
        """
        clips = _leave_out_non_finite(generate_clips(pipeline, sampling, self.protocol, prompts=prompts))
        return self._measure("generated", clips, self.num_samples, step, "fvd")

    @torch.no_grad()
    def measure_reconstruction(self, vae: VideoAutoencoder, step: int) -> dict[str, float]:
        """The distance of the reconstructed real clips to the real ones by each detector, `rfvd_NAME`.

        `step` identifies the autoencoder's weights. Raises `UserError` if clips are not finite.
        """
        clips = change_clips("reconstructed", self._real_clips(), reconstruct_by(vae), self.protocol)
        return self._measure("reconstructed", clips, len(self.windows), step, "rfvd")

    def _real_clips(self) -> Clips:
        return partial(RealClips(self.files, self.windows, self.protocol).batches, num_workers=self.num_workers)

    def _measure(self, name: str, clips: Clips, count: int, step: int, prefix: str) -> dict[str, float]:
        real = self.collector.collect("real", self._real_clips(), len(self.windows), self.source, keep=True)

        # Features of another run's step, or of one that is trained again, are not those of these weights.
        step_folder = self.collector.folder / f"step-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(step_folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        collector = Collector(self.detectors, self.protocol, self.accelerator, step_folder, self.collector.batch_size)
        try:
            fake = collector.collect(name, clips, count, {"step": step})
        except TooFewClipsError:
            fake = None

        names, distances = distance_names([detector.name for detector in self.detectors], prefix), []
        if self.accelerator.is_main_process:
            shutil.rmtree(step_folder, ignore_errors=True)
            distances = self._distances(fake, real, count)
        [distances] = broadcast_object_list([distances])
        return dict(zip(names, distances, strict=True))

    def _distances(self, fake: FeatureSet | None, real: FeatureSet, count: int) -> list[float]:
        if fake is None or any(name == GENERATED for name, _ in fake.unreadable):
            samples = fake.samples if fake else f"fewer than {MIN_CLIPS}"
            self.accelerator.print(f"warning: no FVD, because only {samples} of {count} clips are finite.")
            return [math.nan] * len(self.detectors)
        with quiet_about_rank():
            return [frechet_distance(*pair) for pair in zip(fake.statistics, real.statistics, strict=True)]


def _leave_out_non_finite(clips: Clips) -> Clips:
    """Return the source of the same clips without the batches with values that are not finite."""

    def read(batches: Sequence[Sequence[int]]) -> Iterator[ClipBatch]:
        for batch in batches:
            try:
                yield from clips([batch])
            except UserError as error:
                yield ClipBatch([], [], torch.zeros(0, 3, 1, 1, 1), [(GENERATED, str(error))])

    return read
