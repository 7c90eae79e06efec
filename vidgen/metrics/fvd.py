"""The Fréchet video distance of a pipeline: generated clips against real ones, with all that the number depends on.

    results = evaluate_pipeline(pipeline, "UCF-101", get_protocol("tats"), [get_detector("i3d")], accelerator,
                                folder="runs/fvd")

Every clip has a number, and is what it is by its number alone: which video, which class, which noise. Processes take
clips by number in shards, keep the features of each shard in a file (a killed run goes on), fold them into
`GroupedStatistics` and add those up. So the result is the same, to rounding, for any number of processes, interrupted
or not. Statistics of the real set are kept for good.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import ConfigMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline

from ..data.dataset import VideoFile
from ..environment import environment
from ..errors import UserError
from ..files import written_aside
from ..latent_cache import data_hash, split_evenly
from ..models import weights_hash
from ..progress import progress
from .detectors import Detector
from .frechet import (
    INFINITY_GROUPS,
    ClassScore,
    GroupedStatistics,
    added_up,
    bootstrap_interval,
    frechet_distance,
    frechet_infinity,
    quiet_about_rank,
    summed,
)
from .protocols import Protocol, detector_input, protocol_clips
from .real_clips import ClipBatch, RealClips, RealSet, Window, draw_windows, protocol_videos
from .reconstruction import mean_colour

CLASS_SAMPLING = ("balanced", "uniform", "prior")
CLASS_SAMPLING_OF = {"balanced": "balanced", "uniform": "uniform", "real": "prior"}  # of a protocol's labels
SHARD_SIZE = 64  # clips whose features are kept together: what an interruption costs a process
KEPT = 2  # the kind of files that features are kept in; others are made anew

Source = dict[str, Any]
Clips = Callable[[Sequence[Sequence[int]]], Iterator[ClipBatch]]  # of batches of numbers, clips as a protocol has them


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
        mean_colour: clips of one colour each, the real clips' own: what no content at all scores.
        infinity: `frechet_infinity` of `generated`; None where there are too few samples, or groups of them.
        class_score: mean and deviation of `ClassScore` on the generated clips; None for detectors without classes.
        unreadable: (path, reason) of the real clips that are missing, for their videos could not be decoded.
        notes: why the number may not be compared with others under this protocol; empty where it may.
        settings: data and sampling by name; with hashes of the weights and of the list of videos.
        versions: `vidgen.environment.environment`.
    """

    detector: dict[str, Any]
    protocol: dict[str, Any]
    generated: Distance
    reconstructed: Distance
    real_vs_real: Distance | None
    mean_colour: Distance
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
        "mean_colour": collector.collect(
            "mean_colour", changed("mean_colour", read(real.windows), mean_colour, protocol), count, data, keep=True
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
    for name in ("generated", "reconstructed", "mean_colour"):
        pairs[name], counts[name] = (statistics[name], statistics["real"]), (samples[name], samples["real"])
    distances = {
        name: measured(*pair, *counts[name], paired=name in ("reconstructed", "mean_colour"))
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
            protocol, detector, samples["generated"], samples["real"], rows, settings["class_sampling"], unreadable
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
    class_sampling: str,
    unreadable: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Why a number may not be compared with others under the protocol; each a sentence.

    Args:
        rows: feature vectors of the smaller side.
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
    if class_sampling != CLASS_SAMPLING_OF[protocol.labels]:
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
    _refuse_broken(f"{name} clips", batch.numbers, batch.clips)
    return replace(batch, clips=protocol_clips(batch.clips, protocol))


def _refuse_broken(what: str, numbers: Sequence[int], values: torch.Tensor) -> None:
    """Raises `UserError` if values (N * R, ...) of N clips are not finite, with the numbers of the clips."""
    finite = torch.isfinite(values).reshape(len(numbers), -1).all(dim=1).tolist()
    broken = [number for number, sound in zip(numbers, finite, strict=True) if not sound]
    if broken:
        raise UserError(
            f"{what} {', '.join(map(str, broken))} hold NaN or infinite values, which no distance can be computed of: "
            "look at the model's weights and its precision."
        )


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
            frames = pipeline(
                class_labels=labels,
                num_videos_per_prompt=1 if labels else len(numbers),
                guidance_scale=sampling.guidance_scale,
                num_inference_steps=sampling.num_inference_steps,
                guidance_interval=sampling.guidance_interval,
                generator=[torch.Generator().manual_seed(_seed(sampling.seed, n, "noise")) for n in numbers],
                output_type="pt",
            ).frames
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
    num_classes = pipeline.transformer.config.num_classes
    if num_classes is None:
        return None
    if sampling.class_sampling == "balanced":
        return [number % num_classes for number in numbers]
    draws = (np.random.default_rng(_seed(sampling.seed, number, "class")) for number in numbers)
    return [int(rng.choice(num_classes, p=frequencies)) for rng in draws]


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
    known = pipeline.labels or {name: number for number, name in enumerate(classes)}
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


# --- features of clips, on all processes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Collected:
    """What is known of a set of clips.

    Attributes:
        samples: the clips that could be had.
        unreadable: (path, reason) of the others, each once.
        statistics: by detector.
        class_scores: by detector; None where it has no classes, or no score was asked for.
    """

    samples: int
    unreadable: list[tuple[str, str]]
    statistics: list[GroupedStatistics]
    class_scores: list[tuple[float, float] | None]


@dataclass(frozen=True)
class _Shard:
    """The features of neighbouring numbers' clips: by detector, those of a clip after those of another."""

    keys: list[int]
    features: list[torch.Tensor]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Collector:
    """Computes the features of sets of clips, on all processes, and keeps them.

    Features are kept in FOLDER/NAME-HASH/features-FIRST.safetensors, with all that they depend on within: HASH is of
    that, so another source has another folder, and a file that says another source is made anew.

    Attributes:
        detectors, protocol: what looks at clips, and how.
        accelerator: of the processes.
        folder: shared by all of them.
        batch_size: clips at a time; clips that are given already are in batches of so many.
        shard_size: clips whose features are in one file.
    """

    detectors: Sequence[Detector]
    protocol: Protocol
    accelerator: Accelerator
    folder: Path
    batch_size: int = 16
    shard_size: int = SHARD_SIZE

    def collect(
        self, name: str, clips: Clips, count: int, source: Source, *, keep: bool = False, scored: bool = False
    ) -> Collected | None:
        """The statistics of the features of clips 0 to `count` - 1, from what the folder has or computed.

        Args:
            source: all that clip n depends on beside n, the detectors and the protocol, as JSON takes it.
            keep: replace the shards by one file of statistics, NAME-HASH.safetensors, at the end.
            scored: compute the class scores too; not of sets that are kept.

        Returns:
            The statistics on the main process, None on the others.

        Raises:
            UserError: if clips or features are not finite, before anything is kept of them, or fewer than 4 clips
                could be had.
        """
        source = self._whole_source(name, source)
        shards = self.folder / f"{name}-{_digest(source)}"
        whole = {**source, "count": count}
        kept = self.folder / f"{name}-{_digest(whole)}.safetensors"
        main = self.accelerator.is_main_process
        found = _read_statistics(kept, whole, len(self.detectors)) if keep and main else None
        [there] = broadcast_object_list([found is not None])
        if there:
            return found

        # The main process alone looks what is there, and what is missing is dealt out evenly.
        ranges = split_evenly(range(count), self.shard_size)
        present = [part for part in ranges if main and _is_there(_shard_path(shards, part), source, part)]
        [present] = broadcast_object_list([present])
        missing = [part for part in ranges if part not in present]
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        read = (_read_shard(_shard_path(shards, shard), len(self.detectors)) for shard in present[rank::processes])
        made = self._made(name, clips, missing[rank::processes], shards, source)
        collected = self._added_up(chain(read, made), scored)
        if not main:
            return None
        if collected.samples < 4:
            said = ": ".join(collected.unreadable[0]) if collected.unreadable else ""
            raise UserError(
                f"only {collected.samples} of {count} {name} clips could be had; a distance needs 4 or more. {said}"
            )
        if keep:
            _write_statistics(kept, whole, collected)
            shutil.rmtree(shards, ignore_errors=True)
        return collected

    def _whole_source(self, name: str, source: Source) -> Source:
        eyes = {"protocol": self.protocol.describe(), "detectors": [[d.name, d.sha256] for d in self.detectors]}
        return json.loads(json.dumps({"kept": KEPT, "clips": name, **eyes, **source}, default=str))

    def _added_up(self, shards: Iterator[_Shard], scored: bool) -> Collected:
        """What this process's shards and the others' come to."""
        statistics = [GroupedStatistics(detector.dim) for detector in self.detectors]
        scores = [
            ClassScore(detector.dim) if scored and hasattr(detector, "probabilities") else None
            for detector in self.detectors
        ]
        samples, unreadable = 0, []
        for shard in shards:
            samples += len(shard.keys)
            unreadable += shard.unreadable
            for detector, features, own, score in zip(self.detectors, shard.features, statistics, scores, strict=True):
                own.update(features, shard.keys)
                if score is not None:
                    score.update(detector.probabilities(features.double()), shard.keys)
        for score in filter(None, scores):
            score.totals = summed(score.totals)
        samples = int(summed(torch.tensor(samples)))
        return Collected(
            samples,
            sorted(set(gather_object(unreadable))),
            [added_up(own) for own in statistics],
            [score.compute() if score and samples else None for score in scores],
        )

    def _made(
        self, name: str, clips: Clips, missing: Sequence[range], folder: Path, source: Source
    ) -> Iterator[_Shard]:
        """Shards, each written before it is given."""
        batches = {shard: split_evenly(shard, self.batch_size) for shard in missing}
        made = clips([batch for shard in missing for batch in batches[shard]]) if missing else iter(())
        with progress(total=sum(map(len, missing)), description=f"{name} clips") as bar:
            for shard in missing:
                own = _Shard([], [], [])
                parts: list[list[torch.Tensor]] = [[torch.zeros(0, detector.dim)] for detector in self.detectors]
                for asked in batches[shard]:
                    batch = next(made)
                    own.keys.extend(batch.keys)
                    own.unreadable.extend(batch.unreadable)
                    for part, features in zip(parts, self._features(name, batch), strict=True):
                        part.append(features)
                    bar.update(len(asked))
                own.features.extend(map(torch.cat, parts))
                _write_shard(_shard_path(folder, shard), source, shard, own)
                yield own

    def _features(self, name: str, batch: ClipBatch) -> Iterator[torch.Tensor]:
        """By each detector, of a batch of clips that may be empty."""
        if not batch.numbers:
            yield from (torch.zeros(0, detector.dim) for detector in self.detectors)
            return
        seen = detector_input(batch.clips.to(self.accelerator.device), self.protocol)
        for detector in self.detectors:
            features = detector(seen).float().cpu()
            _refuse_broken(f"{detector.name}'s features of {name} clips", batch.numbers, features)
            yield features


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"features-{shard.start:06d}.safetensors"


def _ends(shard: range) -> list[int]:
    return [shard.start, shard.stop]


def _is_there(path: Path, source: Source, shard: range) -> bool:
    """Whether a file holds just this shard, of this source."""
    said, _ = _read(path)
    return said.get("source") == source and said.get("asked") == _ends(shard)


def _read_shard(path: Path, detectors: int) -> _Shard:
    said, tensors = _read(path)
    features = [tensors[f"features.{place}"] for place in range(detectors)]
    return _Shard(tensors["keys"].tolist(), features, [tuple(entry) for entry in said["unreadable"]])


def _write_shard(path: Path, source: Source, asked: range, shard: _Shard) -> None:
    tensors = {"keys": torch.tensor(shard.keys, dtype=torch.int64)}
    tensors |= {f"features.{place}": features for place, features in enumerate(shard.features)}
    said = {"source": source, "asked": _ends(asked), "unreadable": shard.unreadable}
    with written_aside(path) as unfinished:
        save_file(tensors, unfinished, {"vidgen": json.dumps(said)})


def _read_statistics(path: Path, source: Source, detectors: int) -> Collected | None:
    """Statistics that were kept; None if there are none, or of another source."""
    said, tensors = _read(path)
    if said.get("source") != source:
        return None
    statistics = []
    for place in range(detectors):
        names = (name for name in tensors if name.startswith(f"{place}."))
        statistics.append(GroupedStatistics.from_state_dict({name.split(".")[1]: tensors[name] for name in names}))
    unreadable = [tuple(entry) for entry in said["unreadable"]]
    return Collected(said["samples"], unreadable, statistics, [None] * detectors)


def _write_statistics(path: Path, source: Source, collected: Collected) -> None:
    tensors = {
        f"{place}.{name}": tensor.contiguous()
        for place, statistics in enumerate(collected.statistics)
        for name, tensor in statistics.state_dict().items()
    }
    said = {"source": source, "samples": collected.samples, "unreadable": collected.unreadable}
    with written_aside(path) as unfinished:
        save_file(tensors, unfinished, {"vidgen": json.dumps(said)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a file of ours says of itself, and its tensors; nothing of one that is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["vidgen"])
            return said, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}, {}


def _digest(source: Source) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
