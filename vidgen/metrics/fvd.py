"""The Fréchet video distance of a pipeline: generated clips against real ones, with all that the number depends on.

    results = evaluate_pipeline(pipeline, "UCF-101", get_protocol("tats"), [get_detector("i3d")], accelerator,
                                folder="runs/fvd")

Every clip has a number, and is what it is by its number alone: which video, which class, which noise. So features can
be collected on any number of processes, interrupted or not (`vidgen.metrics.features`), with the same result.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import ConfigMixin

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline
from pipelines.finite import NonFiniteError

from ..common.environment import environment
from ..common.errors import UserError
from ..common.loading import weights_hash
from ..data.listing import data_hash
from ..data.types import VideoFile
from .detectors import Detector
from .features import SHARD_SIZE, Clips, Collected, Collector, Source, refuse_broken
from .frechet import (
    INFINITY_GROUPS,
    GroupedStatistics,
    bootstrap_interval,
    frechet_distance,
    frechet_infinity,
    quiet_about_rank,
)
from .protocols import Protocol, protocol_clips
from .real_clips import ClipBatch, RealClips, RealSet, Window, draw_windows, protocol_videos
from .reconstruction import mean_color_baseline

CLASS_SAMPLING = ("balanced", "uniform", "prior")
CLASS_SAMPLING_OF = {"balanced": "balanced", "uniform": "uniform", "real": "prior"}  # of a protocol's labels


# --- the number, and what it depends on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """A squared Fréchet distance of `samples` clips to `real_samples` real ones, and its 95 % bootstrap interval.

    The interval is None where all clips of a side are of one group: what belongs together cannot be drawn anew.
    """

    value: float
    interval: tuple[float, float] | None
    samples: int
    real_samples: int


@dataclass(frozen=True)
class FVDResult:
    """A Fréchet video distance by one detector, with all that is needed to get it again; `asdict` is for JSON.

    Attributes:
        detector, protocol: all that they say of themselves.
        generated: the number.
        reconstructed: rFVD: the autoencoder's reconstructions of the real set against it. No DiT does better.
        real_vs_real: real clips against real ones of other videos: what sampling alone costs. Of fewer clips than
            `generated`, and so larger, where the data has not twice as many; its counts say. None where they are too
            few to be parted.
        mean_color: clips of one color each, the real clips' own: what no content at all scores.
        infinity: `frechet_infinity` of `generated`; None where there are too few samples, or groups of them.
        class_score: mean and deviation of `ClassScore` on the generated clips; None for detectors without classes.
        unreadable: (path, reason) of the real clips that are missing, for their videos could not be decoded.
        notes: why the number may not be compared with others under this protocol; empty where it may.
        settings: data and sampling by name; with hashes of the weights and of the list of videos.
        versions: `vidgen.common.environment.environment`.
    """

    detector: dict[str, Any]
    protocol: dict[str, Any]
    generated: Distance
    reconstructed: Distance
    real_vs_real: Distance | None
    mean_color: Distance
    infinity: float | None
    class_score: tuple[float, float] | None
    unreadable: list[tuple[str, str]]
    notes: list[str]
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How clips are generated.

    Args:
        seed: with a clip's number, of its noise and class.
        guidance_scale, num_inference_steps, guidance_interval: as the pipeline takes them.
        class_sampling: "balanced" gives the classes turns, "uniform" draws them, "prior" draws them as often as the
            clips of the real set have them: where a protocol takes any clip of a video, long videos count more.
    """

    seed: int = 0
    guidance_scale: float = 5.0
    num_inference_steps: int = 50
    class_sampling: str = "balanced"
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.class_sampling not in CLASS_SAMPLING:
            raise UserError(f"class_sampling must be one of {', '.join(CLASS_SAMPLING)}, not {self.class_sampling!r}.")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, not {self.guidance_scale}.")


@torch.no_grad()
def evaluate_pipeline(
    pipeline: VidTwinPipeline,
    root: str | os.PathLike,
    protocol: Protocol,
    detectors: Sequence[Detector],
    accelerator: Accelerator,
    *,
    folder: str | os.PathLike,
    samples: int | None = None,
    sampling: Sampling | None = None,
    split_files: str | os.PathLike | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
) -> list[FVDResult] | None:
    """The distances of a pipeline's clips to real ones under a protocol, by each detector; called on all processes.

    Args:
        pipeline: on the process's device. Its rate must be the protocol's: nothing says at which it was trained.
        root: of the real videos, as `protocol_videos` takes it.
        detectors: at least one, on the process's device; all see the same clips.
        folder: keeps features and statistics, shared by all processes and evaluations.
        samples: generated clips; the protocol's number by default. With another the real set has as many.
        split_files: folder of UCF-101's lists, where it is not beside the videos.
        batch_size: clips generated or read at a time; changes results by rounding.
        num_workers: reading processes of each process.
        shard_size: clips whose features are kept together.

    Returns:
        A result for each detector on the main process, None on the others.

    Raises:
        UserError: if the data cannot be had or has fewer than 4 clips, the pipeline's clips are too short for the
            protocol or not finite, its classes do not fit the data's, or a count is too small.
    """
    versions = environment()  # before any file is written, which would count as a change of the code
    sampling = sampling or Sampling()
    for what, value, least in (
        ("samples", samples, 1),
        ("num_inference_steps", sampling.num_inference_steps, 1),
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{what} must be {least} or more, not {value}.")
    if pipeline.vae.config.num_frames < protocol.frames:
        raise UserError(
            f"the protocol {protocol.name} compares clips of {protocol.frames} frames, but the pipeline's have "
            f"{pipeline.vae.config.num_frames}."
        )
    files, classes = protocol_videos(root, protocol, split_files)
    [real] = broadcast_object_list([_real_set(files, protocol, samples) if accelerator.is_main_process else None])
    count = len(real.windows)
    if samples is None:
        samples = count if protocol.generated is None else protocol.generated
    if min(samples, count) < 4:
        raise UserError(f"a Fréchet distance needs 4 clips or more: {samples} samples, {count} real ones.")

    data = {"data": data_hash(root, files, classes)}
    vae = {"vae": weights_hash(pipeline.vae), "vae_config": _settings_of(pipeline.vae)}
    drawn = {
        "transformer": weights_hash(pipeline.transformer),
        "transformer_config": _settings_of(pipeline.transformer),
        **_solver(pipeline),
        **asdict(sampling),
    }
    if sampling.class_sampling == "prior":
        drawn["frequencies"] = class_frequencies(pipeline, [files[window.video] for window in real.windows], classes)

    def read(windows: Sequence[Window], size: int = protocol.size) -> Clips:
        return partial(RealClips(files, windows, replace(protocol, size=size)).batches, num_workers=num_workers)

    rebuilt = read(real.windows, pipeline.vae.config.sample_size)
    collector = Collector(detectors, protocol, accelerator, Path(folder), batch_size, shard_size)
    sets = {
        "real": collector.collect("real", read(real.windows), count, data, keep=True),
        "mean_color": collector.collect(
            "mean_color",
            changed("mean_color", read(real.windows), mean_color_baseline, protocol),
            count,
            data,
            keep=True,
        ),
        "reconstructed": collector.collect(
            "reconstructed",
            changed("reconstructed", rebuilt, reconstruction(pipeline.vae), protocol),
            count,
            {**data, **vae},
        ),
        "generated": collector.collect(
            "generated",
            generated_clips(pipeline, sampling, protocol, drawn.get("frequencies")),
            samples,
            {**vae, **drawn},
            scored=True,
        ),
    }
    if len(real.others) == count:
        # Which videos are others depends on how many clips the real set has, so a larger set does not begin with them.
        others = {**data, "real_clips": count}
        sets["real_vs_real"] = collector.collect("real_others", read(real.others), count, others, keep=True)
    if not accelerator.is_main_process:
        return None

    settings = {"root": str(root), "videos": len(files), "videos_unusable": len(real.unusable), **data, **vae, **drawn}
    settings |= {"dtype": str(pipeline.transformer.dtype).removeprefix("torch."), "batch_size": batch_size}
    settings |= {"processes": accelerator.num_processes}
    return [_result(sets, place, detector, protocol, settings, versions) for place, detector in enumerate(detectors)]


def _settings_of(part: ConfigMixin) -> dict[str, Any]:
    """The configuration of a part of a pipeline, without the path and the versions it was saved with."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def _real_set(files: Sequence[VideoFile], protocol: Protocol, samples: int | None) -> RealSet:
    asked = protocol.real if samples in (None, protocol.generated) or protocol.real is None else samples
    return draw_windows(files, protocol, asked)


def _result(
    sets: dict[str, Collected],
    place: int,
    detector: Detector,
    protocol: Protocol,
    settings: dict[str, Any],
    versions: dict[str, str],
) -> FVDResult:
    """The result of the detector of this place."""
    statistics = {name: collected.statistics[place] for name, collected in sets.items()}
    samples = {name: collected.samples for name, collected in sets.items()}
    if "real_vs_real" in sets:
        pairs = {"real_vs_real": (statistics["real_vs_real"], statistics["real"])}
        counts = {"real_vs_real": (samples["real_vs_real"], samples["real"])}
    else:
        even, odd = statistics["real"].halves()
        part = round(samples["real"] * even.merged().count / statistics["real"].merged().count)
        pairs, counts = {"real_vs_real": (even, odd)}, {"real_vs_real": (part, samples["real"] - part)}
    for name in ("generated", "reconstructed", "mean_color"):
        pairs[name], counts[name] = (statistics[name], statistics["real"]), (samples[name], samples["real"])
    distances = {
        name: measured(*pair, *counts[name], paired=name in ("reconstructed", "mean_color"))
        for name, pair in pairs.items()
    }
    both = pairs["generated"]
    rows = min(side.merged().count for side in both)
    groups = min(len(side.filled) for side in both)
    unreadable = sorted({said for collected in sets.values() for said in collected.unreadable})
    return FVDResult(
        detector=detector.describe(),
        protocol=protocol.describe(),
        **distances,
        infinity=frechet_infinity(*both) if rows >= 4 * detector.dim and groups >= INFINITY_GROUPS else None,
        class_score=sets["generated"].class_scores[place],
        unreadable=unreadable,
        notes=guards(
            protocol,
            detector,
            samples["generated"],
            samples["real"],
            rows,
            settings["class_sampling"] if settings["transformer_config"]["num_classes"] is not None else None,
            unreadable,
        ),
        settings=settings,
        versions=versions,
    )


def measured(
    a: GroupedStatistics, b: GroupedStatistics, samples: int, real_samples: int, paired: bool = False
) -> Distance | None:
    """Their distance with its interval, without warnings, which `guards` gives in words.

    None where a side has fewer than 2 feature vectors.
    """
    if min(side.merged().count for side in (a, b)) < 2:
        return None
    with quiet_about_rank():
        value = frechet_distance(a.merged(), b.merged())
    drawable = min(len(side.filled) for side in (a, b)) > 1
    return Distance(value, bootstrap_interval(a, b, paired=paired) if drawable else None, samples, real_samples)


def guards(
    protocol: Protocol,
    detector: Detector,
    samples: int,
    real_samples: int,
    rows: int,
    class_sampling: str | None,
    unreadable: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Why a number may not be compared with others under the protocol; each a sentence.

    Args:
        rows: feature vectors of the smaller side.
        class_sampling: of the generated clips; None for an unconditional pipeline.
        unreadable: (path, reason) of the real clips that are missing.
    """
    notes = []
    for name, count, theirs in (
        ("generated", samples, protocol.generated),
        ("real", real_samples, protocol.real),
    ):
        if theirs is not None and count != theirs:
            notes.append(f"{count} {name} clips, not the protocol's {theirs}: with fewer, distances are larger.")
    if unreadable:
        path, reason = unreadable[0]
        notes.append(f"Real clips of {len(unreadable)} videos are missing, the first of {path}: {reason}.")
    if class_sampling is None:
        notes.append("The pipeline is unconditional: its clips are of no class.")
    elif class_sampling != CLASS_SAMPLING_OF[protocol.labels]:
        notes.append(f"Classes are {class_sampling}, not the protocol's {CLASS_SAMPLING_OF[protocol.labels]}.")
    if detector.name != protocol.detector:
        notes.append(f"The detector is {detector.name}, not the protocol's {protocol.detector}.")
    if not detector.published:
        notes.append(
            f"The detector's weights, sha256 {detector.sha256}, are not known to be {detector.weights.publisher}'s "
            f"{detector.weights.name}."
        )
    if protocol.trials > 1:
        notes.append(f"One trial; the protocol averages {protocol.trials}: give other seeds.")
    if protocol.not_stated:
        notes.append(f"{protocol.source} does not state {', '.join(protocol.not_stated)}: the choice is ours.")
    if rows <= detector.dim:
        notes.append(
            f"{rows} feature vectors in {detector.dim} dimensions: no covariance of full rank, and a distance far too "
            "large."
        )
    return notes


# --- clips by their numbers ------------------------------------------------------------------------------------------


def changed(name: str, clips: Clips, change: Callable[[torch.Tensor], torch.Tensor], protocol: Protocol) -> Clips:
    """The same clips, changed, and as the protocol has them; `name` is that of the set they make."""

    def read(batches: Sequence[Sequence[int]]) -> Iterator[ClipBatch]:
        for batch in clips(batches):
            yield _as_protocol(name, replace(batch, clips=change(batch.clips)), protocol) if batch.numbers else batch

    return read


def _as_protocol(name: str, batch: ClipBatch, protocol: Protocol) -> ClipBatch:
    """Clips that a model made as the protocol has them. Raises `UserError` if one is not finite, naming it."""
    refuse_broken(f"{name} clips", batch.numbers, batch.clips)
    return replace(batch, clips=protocol_clips(batch.clips, protocol))


def reconstruction(vae: AutoencoderKLVidTwin) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an autoencoder makes of clips, by the mean of its posterior, clamped to [-1, 1]."""
    return lambda clips: vae(clips.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1)


def generated_clips(
    pipeline: VidTwinPipeline, sampling: Sampling, protocol: Protocol, frequencies: Sequence[float] | None = None
) -> Clips:
    """A pipeline's clips, as the protocol has them: the noise and the class of each by its number."""

    def generate(batches: Sequence[Sequence[int]]) -> Iterator[ClipBatch]:
        for batch in batches:
            numbers = list(batch)
            labels = class_labels(pipeline, numbers, sampling, frequencies)
            try:
                frames = pipeline(
                    class_labels=labels,
                    num_videos_per_prompt=1 if labels else len(numbers),
                    guidance_scale=sampling.guidance_scale,
                    num_inference_steps=sampling.num_inference_steps,
                    guidance_interval=sampling.guidance_interval,
                    generator=[torch.Generator().manual_seed(_seed(sampling.seed, n, "noise")) for n in numbers],
                    output_type="pt",
                ).frames
            except NonFiniteError as error:
                raise UserError(f"generated clips {', '.join(map(str, numbers))}: {error}") from error
            clips = 2 * frames[:, : protocol.frames].float().transpose(1, 2) - 1
            yield _as_protocol("generated", ClipBatch(numbers, numbers, clips), protocol)

    return generate


def _solver(pipeline: VidTwinPipeline) -> Source:
    """What denoises beside the weights: the scheduler and, where one is enabled, the cache between steps."""
    scheduler = {"class": type(pipeline.scheduler).__name__, **_settings_of(pipeline.scheduler)}
    cache = getattr(pipeline.transformer, "_cache_config", None)
    if cache is None:
        return {"scheduler": scheduler}
    settings = {name: str(value) for name, value in vars(cache).items() if not callable(value)}
    return {"scheduler": scheduler, "cache": {"class": type(cache).__name__, **settings}}


def class_labels(
    pipeline: VidTwinPipeline,
    numbers: Sequence[int],
    sampling: Sampling,
    frequencies: Sequence[float] | None = None,
) -> list[int] | None:
    """Class ids of samples by their numbers; None for a pipeline without classes."""
    class_ids = pipeline.class_ids
    if not class_ids:
        return None
    if sampling.class_sampling == "balanced":
        return [class_ids[number % len(class_ids)] for number in numbers]
    draws = (np.random.default_rng(_seed(sampling.seed, number, "class")) for number in numbers)
    choices = class_ids if frequencies is None else pipeline.transformer.config.num_classes
    return [int(rng.choice(choices, p=frequencies)) for rng in draws]


def class_frequencies(
    pipeline: VidTwinPipeline, files: Sequence[VideoFile], classes: Sequence[str]
) -> list[float] | None:
    """The share of each of the pipeline's classes, found by name; None for one without classes.

    Args:
        files: the video of each clip of the real set: one that has several counts as often.
        classes: names, by the labels of `files`.

    Raises:
        UserError: if a video has no class, or one that the pipeline does not know.
    """
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        return None
    known = pipeline.labels | pipeline.subclasses or {name: number for number, name in enumerate(classes)}
    counts = [0] * num_classes
    for file in files:
        name = None if file.label is None else classes[file.label]
        if name not in known or known[name] >= num_classes:
            raise UserError(
                f"class_sampling prior takes the classes of the real videos, but {file.path} is of {name!r}, which "
                "the pipeline does not know; choose balanced."
            )
        counts[known[name]] += 1
    return [count / len(files) for count in counts]


def _seed(seed: int, number: int, what: str) -> int:
    """63 bits from the evaluation's seed, a clip's number and what is drawn."""
    digest = hashlib.blake2b(f"{seed} {number} {what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
