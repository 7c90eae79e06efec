"""The Fréchet video distance of a pipeline: generated clips against real ones, with everything the number depends on.

    results = evaluate_pipeline(pipeline, "UCF-101", get_protocol("tats"), [get_detector("i3d")], accelerator,
                                folder="runs/fvd")

Every clip has a number, which alone determines its video, or its class and noise. Features can therefore be computed
on any number of processes, interrupted or not (`vidgen.metrics.features`), with the same result.
"""

from __future__ import annotations

import hashlib
import json
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

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinPipeline
from pipelines.finite import NonFiniteError

from ..common.environment import environment
from ..common.errors import UserError
from ..common.loading import public_config, weights_hash
from ..data.captions import read_captions
from ..data.listing import data_hash
from ..data.types import VideoFile
from .detectors import Detector
from .features import SHARD_SIZE, Clips, Collector, FeatureSet, Source, check_finite
from .frechet import (
    INFINITY_GROUPS,
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    frechet_infinity,
    quiet_about_rank,
)
from .protocols import Protocol, protocol_clips
from .real_clips import ClipBatch, RealClips, Window, draw_windows, protocol_videos
from .reconstruction import mean_color_baseline

CLASS_SAMPLING = ("balanced", "uniform", "prior")
CLASS_SAMPLING_OF = {"balanced": "balanced", "uniform": "uniform", "real": "prior"}  # by a protocol's `labels`


@dataclass(frozen=True)
class Sampling:
    """How clips are generated.

    Args:
        seed: random seed; with the number of a clip it determines the clip's noise and class.
        guidance_scale, num_inference_steps, guidance_interval, structure_delay, temperature, num_candidates: as the
            pipeline takes them.
        class_sampling: "balanced" cycles through the classes, "uniform" draws them uniformly, "prior" draws them with
            their frequencies in the real clips, where long videos count more if a protocol takes several clips of one.
    """

    seed: int = 0
    guidance_scale: float | tuple[float, float] = 5.0
    num_inference_steps: int = 50
    class_sampling: str = "balanced"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    structure_delay: float = 0.0
    temperature: float = 1.0
    num_candidates: int = 1

    def __post_init__(self) -> None:
        if self.class_sampling not in CLASS_SAMPLING:
            raise UserError(f"class_sampling must be one of {', '.join(CLASS_SAMPLING)}, not {self.class_sampling!r}.")
        scales = self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)
        if not all(map(math.isfinite, scales)):
            raise UserError(f"guidance_scale must be a finite number, or one per stream, not {self.guidance_scale}.")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance_interval must be two numbers from 0 to 1, the lower first, not {low} {high}.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be a finite number of at least 0, not {self.temperature}.")
        if not 0 <= self.structure_delay <= 1:
            raise UserError(f"structure_delay must be between 0 and 1, not {self.structure_delay}.")
        for name in ("num_inference_steps", "num_candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}.")


@dataclass(frozen=True)
class Distance:
    """A squared Fréchet distance of `samples` clips to `real_samples` real ones, and its 95 % bootstrap interval.

    The interval is None where all clips of a side are in one group, which cannot be resampled.
    """

    value: float
    interval: tuple[float, float] | None
    samples: int
    real_samples: int


@dataclass(frozen=True)
class FVDResult:
    """A Fréchet video distance by one detector, with everything needed to reproduce it; `asdict` gives JSON types.

    Attributes:
        detector, protocol: their descriptions.
        generated: the distance of generated clips to real ones.
        reconstructed: rFVD, the distance of the autoencoder's reconstructions of the real set to it; a lower bound
            for the DiT.
        real_vs_real: the distance of real clips to those of other videos, the noise level. If the data has fewer than
            twice that many clips, two halves are compared, and the distance is larger; None if they are too few.
        mean_color: the distance of clips of one color each, the mean of a real clip: a baseline without content.
        infinity: `frechet_infinity` of `generated`; None with too few samples or groups.
        class_score: mean and deviation of `ClassScore` of the generated clips; None for detectors without classes.
        unreadable: (path, reason) of the real clips that could not be decoded.
        notes: reasons why the number is not comparable with others under this protocol; empty if it is.
        settings: data and sampling by name, with hashes of the weights and of the list of videos.
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
    """Measure the distances of a pipeline's clips to real ones under a protocol; all processes call it.

    Args:
        pipeline: on the process's device, trained at the protocol's frame rate, which is not checked.
        root: the real videos, as `protocol_videos` takes them.
        detectors: at least one, on the process's device; all see the same clips.
        folder: keeps features and statistics; shared by all processes and evaluations.
        samples: number of generated clips, and then of real ones; the protocol's numbers by default.
        split_files: folder of UCF-101's split files if they are not beside the videos.
        batch_size: clips generated or read at a time; changes results by rounding.
        num_workers: reading processes of each process.
        shard_size: clips whose features are kept together.

    Returns:
        A result for each detector on the main process, None on the others.

    Raises:
        UserError: if the data cannot be read or has fewer than 4 clips, the pipeline's clips are too short for the
            protocol or not finite, its classes do not fit the data's, or a count is too small.
    """
    versions = environment()  # before files are written, which would count as modifications of the checkout
    sampling = sampling or Sampling()
    for name, value, minimum in (
        ("samples", samples, 1),
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{name} must be {minimum} or more, not {value}.")
    if pipeline.autoencoder.clip_shape[1] < protocol.frames:
        raise UserError(
            f"the protocol {protocol.name} compares clips of {protocol.frames} frames, but the pipeline's have "
            f"{pipeline.autoencoder.clip_shape[1]}."
        )

    # Draw the real clips.
    files, classes = protocol_videos(root, protocol, split_files)
    real = None
    if accelerator.is_main_process:
        own_count = samples is None or samples == protocol.generated or protocol.real is None
        real = draw_windows(files, protocol, protocol.real if own_count else samples)
    [real] = broadcast_object_list([real])
    count = len(real.windows)
    if samples is None:
        samples = count if protocol.generated is None else protocol.generated
    if min(samples, count) < 4:
        raise UserError(f"a Fréchet distance needs 4 clips or more: {samples} samples, {count} real ones.")

    # State what each set of clips depends on.
    data = {"data": data_hash(root, files, classes)}
    vae = {"vae": weights_hash(pipeline.vae), "vae_config": public_config(pipeline.vae)}
    dit = {
        "transformer": weights_hash(pipeline.transformer),
        "transformer_config": public_config(pipeline.transformer),
        **_describe_solver(pipeline),
        **asdict(sampling),
    }
    if sampling.class_sampling == "prior":
        dit["frequencies"] = class_frequencies(pipeline, [files[window.video] for window in real.windows], classes)

    def read(windows: Sequence[Window], size: int | tuple[int, int] = protocol.size) -> Clips:
        return partial(RealClips(files, windows, replace(protocol, size=size)).batches, num_workers=num_workers)

    prompts = [] if pipeline.class_ids else read_prompts(pipeline, root, [files[w.video] for w in real.windows])
    if prompts:
        dit["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()

    # Compute the features of every set. Those of real clips are kept for other evaluations.
    collector = Collector(detectors, protocol, accelerator, Path(folder), batch_size, shard_size)
    originals = read(real.windows)
    mean_colors = change_clips("mean_color", originals, mean_color_baseline, protocol)
    full_size = read(real.windows, pipeline.autoencoder.clip_shape[2:])
    reconstructions = change_clips("reconstructed", full_size, reconstruct_by(pipeline.autoencoder), protocol)
    samples_by_number = generate_clips(pipeline, sampling, protocol, dit.get("frequencies"), prompts)
    sets = {
        "real": collector.collect("real", originals, count, data, keep=True),
        "mean_color": collector.collect("mean_color", mean_colors, count, data, keep=True),
        "reconstructed": collector.collect("reconstructed", reconstructions, count, {**data, **vae}),
        "generated": collector.collect("generated", samples_by_number, samples, {**vae, **dit}, scored=True),
    }
    if len(real.others) == count:
        # The other videos depend on the size of the real set, so a larger set does not begin with the smaller one.
        others = {**data, "real_clips": count}
        sets["real_vs_real"] = collector.collect("real_others", read(real.others), count, others, keep=True)
    if not accelerator.is_main_process:
        return None

    settings = {"root": str(root), "videos": len(files), "videos_unusable": len(real.unusable), **data, **vae, **dit}
    settings |= {"dtype": str(pipeline.transformer.dtype).removeprefix("torch."), "batch_size": batch_size}
    settings |= {"processes": accelerator.num_processes}
    return [_build_result(sets, i, detector, protocol, settings, versions) for i, detector in enumerate(detectors)]


def _describe_solver(pipeline: VidTwinPipeline) -> Source:
    """Describe the scheduler and, if one is enabled, the cache between denoising steps."""
    scheduler = {"class": type(pipeline.scheduler).__name__, **public_config(pipeline.scheduler)}
    cache = getattr(pipeline.transformer, "_cache_config", None)
    if cache is None:
        return {"scheduler": scheduler}
    settings = {name: str(value) for name, value in vars(cache).items() if not callable(value)}
    return {"scheduler": scheduler, "cache": {"class": type(cache).__name__, **settings}}


def _build_result(
    sets: dict[str, FeatureSet],
    index: int,
    detector: Detector,
    protocol: Protocol,
    settings: dict[str, Any],
    versions: dict[str, str],
) -> FVDResult:
    """Build the result of the detector with this index."""
    statistics = {name: feature_set.statistics[index] for name, feature_set in sets.items()}
    samples = {name: feature_set.samples for name, feature_set in sets.items()}
    real, num_real = statistics["real"], samples["real"]
    distances = {
        name: measure_distance(statistics[name], real, samples[name], num_real, paired=name != "generated")
        for name in ("generated", "reconstructed", "mean_color")
    }
    generated = statistics["generated"]
    rows = min(generated.count, real.count)
    unreadable = sorted({entry for feature_set in sets.values() for entry in feature_set.unreadable})
    unconditional = settings["transformer_config"]["num_classes"] is None
    class_sampling = None if unconditional else settings["class_sampling"]
    return FVDResult(
        detector=detector.describe(),
        protocol=protocol.describe(),
        **distances,
        real_vs_real=measure_distance(*split_real(sets, index)),
        infinity=extrapolate(generated, real),
        class_score=sets["generated"].class_scores[index],
        unreadable=unreadable,
        notes=list_caveats(protocol, detector, samples["generated"], num_real, rows, class_sampling, unreadable),
        settings=settings,
        versions=versions,
    )


def split_real(sets: dict[str, FeatureSet], index: int) -> tuple[FeatureStatistics, FeatureStatistics, int, int]:
    """Return two sets of real clips by the detector with this index, and their numbers of clips.

    They are `sets["real_vs_real"]` and `sets["real"]`, or without the first one the halves of the second.
    """
    real, num_real = sets["real"].statistics[index], sets["real"].samples
    if "real_vs_real" in sets:
        return sets["real_vs_real"].statistics[index], real, sets["real_vs_real"].samples, num_real
    even, odd = real.halves()
    num_even = round(num_real * even.count / real.count)
    return even, odd, num_even, num_real - num_even


def measure_distance(
    a: FeatureStatistics, b: FeatureStatistics, samples: int, real_samples: int, paired: bool = False
) -> Distance | None:
    """Measure a distance with its interval, without warnings; None where a side has fewer than 2 feature vectors."""
    if min(a.count, b.count) < 2:
        return None
    with quiet_about_rank():
        value = frechet_distance(a, b)
    can_resample = min(len(a.filled), len(b.filled)) > 1
    return Distance(value, bootstrap_interval(a, b, paired=paired) if can_resample else None, samples, real_samples)


def extrapolate(a: FeatureStatistics, b: FeatureStatistics) -> float | None:
    """Return `frechet_infinity`; None with too few samples or groups."""
    rows, groups = min(a.count, b.count), min(len(a.filled), len(b.filled))
    return frechet_infinity(a, b) if rows >= 4 * a.dim and groups >= INFINITY_GROUPS else None


def list_caveats(
    protocol: Protocol,
    detector: Detector,
    samples: int,
    real_samples: int,
    rows: int,
    class_sampling: str | None,
    unreadable: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """List the reasons why a number is not comparable with others under the protocol, each as a sentence.

    Args:
        rows: feature vectors of the smaller side.
        class_sampling: of the generated clips; None for an unconditional pipeline.
        unreadable: (path, reason) of the missing real clips.
    """
    notes = list_count_caveats(samples, real_samples, protocol)
    if unreadable:
        path, reason = unreadable[0]
        notes.append(f"Real clips of {len(unreadable)} videos are missing, the first of {path}: {reason}.")
    if class_sampling is None:
        notes.append("The pipeline is unconditional: its clips have no class.")
    elif class_sampling != CLASS_SAMPLING_OF[protocol.labels]:
        notes.append(f"Classes are {class_sampling}, not the protocol's {CLASS_SAMPLING_OF[protocol.labels]}.")
    return notes + list_protocol_caveats(protocol, detector) + list_rank_caveats(detector, rows)


def list_count_caveats(samples: int, real_samples: int, protocol: Protocol) -> list[str]:
    """List the counts of clips that differ from the protocol's, each as a sentence."""
    counts = (("generated", samples, protocol.generated), ("real", real_samples, protocol.real))
    return [
        f"{count} {name} clips, not the protocol's {expected}: with fewer, distances are larger."
        for name, count, expected in counts
        if expected is not None and count != expected
    ]


def list_protocol_caveats(protocol: Protocol, detector: Detector) -> list[str]:
    """List how the detector and the trials differ from the protocol's, and what its source does not state."""
    notes = []
    if detector.name != protocol.detector:
        notes.append(f"The detector is {detector.name}, not the protocol's {protocol.detector}.")
    if not detector.published:
        notes.append(
            f"The detector's weights, sha256 {detector.sha256}, are not known to be {detector.weights.publisher}'s "
            f"{detector.weights.name}."
        )
    if protocol.trials > 1:
        notes.append(f"One trial; the protocol averages {protocol.trials}: repeat with other seeds.")
    if protocol.not_stated:
        notes.append(f"{protocol.source} does not state {', '.join(protocol.not_stated)}: the choice is ours.")
    return notes


def list_rank_caveats(detector: Detector, rows: int) -> list[str]:
    """Return a sentence if there are too few feature vectors for a Fréchet distance; `rows` as in `list_caveats`."""
    if rows > detector.dim:
        return []
    return [
        f"{rows} feature vectors in {detector.dim} dimensions: the covariance is singular, and the distance is far "
        "too large."
    ]


# --- clips by their numbers -----------------------------------------------------------------------------------------


def change_clips(name: str, clips: Clips, change: Callable[[torch.Tensor], torch.Tensor], protocol: Protocol) -> Clips:
    """Return the source of the same clips, changed and prepared by the protocol; `name` is that of the changed set."""

    def read(batches: Sequence[Sequence[int]]) -> Iterator[ClipBatch]:
        for batch in clips(batches):
            yield _prepare(name, replace(batch, clips=change(batch.clips)), protocol) if batch.numbers else batch

    return read


def _prepare(name: str, batch: ClipBatch, protocol: Protocol) -> ClipBatch:
    """Prepare a model's clips by the protocol. Raises `UserError` with the numbers of clips that are not finite."""
    check_finite(f"{name} clips", batch.numbers, batch.clips)
    return replace(batch, clips=protocol_clips(batch.clips, protocol))


def reconstruct_by(vae: VideoAutoencoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that reconstructs clips from the posterior's mean, clamped to [-1, 1]."""
    return lambda clips: vae(clips.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1)


def generate_clips(
    pipeline: VidTwinPipeline,
    sampling: Sampling,
    protocol: Protocol,
    frequencies: Sequence[float] | None = None,
    prompts: Sequence[str] = (),
) -> Clips:
    """Return the source of a pipeline's clips, prepared by the protocol.

    A clip's number gives its noise, and its class or, of a pipeline without classes, its prompt.
    """

    def generate(batches: Sequence[Sequence[int]]) -> Iterator[ClipBatch]:
        for batch in batches:
            numbers = list(batch)
            labels = class_labels(pipeline, numbers, sampling, frequencies)
            try:
                texts = [prompts[number % len(prompts)] for number in numbers] if prompts and not labels else None
                frames = pipeline(
                    class_labels=labels,
                    prompt=texts,
                    num_videos_per_prompt=1 if labels or texts else len(numbers),
                    guidance_scale=sampling.guidance_scale,
                    num_inference_steps=sampling.num_inference_steps,
                    guidance_interval=sampling.guidance_interval,
                    structure_delay=sampling.structure_delay,
                    temperature=sampling.temperature,
                    num_candidates=sampling.num_candidates,
                    generator=[torch.Generator().manual_seed(_seed(sampling.seed, n, "noise")) for n in numbers],
                    output_type="pt",
                ).frames
            except NonFiniteError as error:
                raise UserError(f"generated clips {', '.join(map(str, numbers))}: {error}") from error
            clips = 2 * frames[:, : protocol.frames].float().transpose(1, 2) - 1
            yield _prepare("generated", ClipBatch(numbers, numbers, clips), protocol)

    return generate


def read_prompts(pipeline: VidTwinPipeline, root: str | os.PathLike, files: Sequence[VideoFile]) -> list[str]:
    """Return the first caption of each video; empty if no video has one, or the pipeline takes no prompts."""
    if not pipeline.takes_prompts or pipeline.text_encoder is None:
        return []
    prompts = [captions[0] if captions else "" for captions in read_captions(root, files)]
    return prompts if any(prompts) else []


def class_labels(
    pipeline: VidTwinPipeline, numbers: Sequence[int], sampling: Sampling, frequencies: Sequence[float] | None = None
) -> list[int] | None:
    """Return the class ids of samples by their numbers; None for an unconditional pipeline."""
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
    """Return the frequency of each of the pipeline's classes, matched by name; None for an unconditional pipeline.

    Args:
        files: the video of each clip of the real set; a video with several clips counts several times.
        classes: names, by the labels of `files`.

    Raises:
        UserError: if a video has no class, or one that the pipeline does not have.
    """
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        return None
    ids = pipeline.labels | pipeline.subclasses or {name: number for number, name in enumerate(classes)}
    counts = [0] * num_classes
    for file in files:
        name = None if file.label is None else classes[file.label]
        if name not in ids or ids[name] >= num_classes:
            raise UserError(
                f"class_sampling prior takes the classes of the real videos, but {file.path} is of {name!r}, which "
                "the pipeline does not know; choose balanced."
            )
        counts[ids[name]] += 1
    return [count / len(files) for count in counts]


def _seed(seed: int, number: int, purpose: str) -> int:
    """Derive 63 bits from the evaluation's seed, a clip's number and the purpose of the draw."""
    digest = hashlib.blake2b(f"{seed} {number} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
