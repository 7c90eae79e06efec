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
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
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
    ClassScore,
    GroupedStatistics,
    bootstrap_interval,
    frechet_distance,
    frechet_infinity,
    quiet_about_rank,
)
from .protocols import Protocol, detector_input, protocol_clips
from .real_clips import RealClips, RealSet, Window, draw_windows, protocol_videos
from .reconstruction import mean_colour

CLASS_SAMPLING = ("balanced", "uniform", "prior")
CLASS_SAMPLING_OF = {"balanced": "balanced", "uniform": "uniform", "real": "prior"}  # of a protocol's labels
SHARD_SIZE = 64  # clips whose features are kept together: what an interruption costs a process

Source = dict[str, Any]
# From batches of numbers to (keys, clips (B, 3, T, H, W) as a protocol has them), without clips that cannot be had. A
# key says which clips belong together when samples are drawn anew: a real one's video, a generated one's own number.
Clips = Callable[[Sequence[Sequence[int]]], Iterator[tuple[list[int], torch.Tensor]]]


# --- the number, and what it depends on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """A squared Fréchet distance of `samples` clips to `real_samples` real ones, and its 95 % bootstrap interval."""

    value: float
    interval: tuple[float, float]
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
            `generated`, and so larger, where the data has not twice as many; its counts say.
        mean_colour: clips of one colour each, the real clips' own: what no content at all scores.
        infinity: `frechet_infinity` of `generated`; None where there are too few samples.
        class_score: mean and deviation of `ClassScore` on the generated clips; None for detectors without classes.
        notes: why the number may not be compared with others under this protocol; empty where it may.
        settings: data and sampling by name; with hashes of the weights and of the list of videos.
        versions: `vidgen.environment.environment`.
    """

    detector: dict[str, Any]
    protocol: dict[str, Any]
    generated: Distance
    reconstructed: Distance
    real_vs_real: Distance
    mean_colour: Distance
    infinity: float | None
    class_score: tuple[float, float] | None
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
            real videos have them.
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
            protocol, or its classes do not fit the data's.
    """
    sampling = sampling or Sampling()
    folder = Path(folder)
    if pipeline.vae.config.num_frames < protocol.frames:
        raise UserError(
            f"the protocol {protocol.name} compares clips of {protocol.frames} frames, but the pipeline's have "
            f"{pipeline.vae.config.num_frames}."
        )
    files, classes = protocol_videos(root, protocol, split_files)
    [real] = broadcast_object_list([_real_set(files, protocol, samples) if accelerator.is_main_process else None])
    samples = samples or protocol.generated or len(real.windows)
    if min(samples, len(real.windows)) < 4:
        raise UserError(f"a Fréchet distance needs 4 clips or more: {samples} samples, {len(real.windows)} real ones.")

    eyes = {"protocol": protocol.describe(), "detectors": [[d.name, d.sha256] for d in detectors]}
    data = {"data": data_hash(root, files, classes)}
    vae = {"vae": weights_hash(pipeline.vae)}
    drawn = {"transformer": weights_hash(pipeline.transformer), **_solver(pipeline), **asdict(sampling)}
    if sampling.class_sampling == "prior":
        drawn["frequencies"] = class_frequencies(pipeline, files, classes)

    def collect(name: str, clips: Clips, count: int, source: Source, keep: bool = False) -> Collected | None:
        return collect_features(
            name,
            clips,
            count,
            {**eyes, **source},
            detectors,
            protocol,
            accelerator,
            folder,
            batch_size=batch_size,
            shard_size=shard_size,
            keep_statistics=keep,
        )

    def read(windows: Sequence[Window], size: int = protocol.size) -> Clips:
        clips = RealClips(files, windows, replace(protocol, size=size))
        return lambda batches: clips.batches(batches, num_workers)

    count = len(real.windows)
    one_colour = changed(read(real.windows), mean_colour, protocol)
    rebuilt = changed(read(real.windows, pipeline.vae.config.sample_size), reconstruction(pipeline.vae), protocol)
    generated = generated_clips(pipeline, sampling, protocol, drawn.get("frequencies"))
    sets = {
        "real": collect("real", read(real.windows), count, data, keep=True),
        "mean_colour": collect("mean_colour", one_colour, count, data, keep=True),
        "reconstructed": collect("reconstructed", rebuilt, count, {**data, **vae}),
        "generated": collect("generated", generated, samples, {**vae, **drawn}),
    }
    if len(real.others) == count:
        sets["real_vs_real"] = collect("real_others", read(real.others), count, data, keep=True)
    if not accelerator.is_main_process:
        return None

    settings = {"root": str(root), "videos": len(files), "videos_unusable": len(real.unusable), **data, **vae, **drawn}
    settings |= {"dtype": str(pipeline.transformer.dtype).removeprefix("torch."), "batch_size": batch_size}
    settings |= {"processes": accelerator.num_processes}
    return [
        _result({name: collected.of(place) for name, collected in sets.items()}, detector, protocol, settings)
        for place, detector in enumerate(detectors)
    ]


def _real_set(files: Sequence[VideoFile], protocol: Protocol, samples: int | None) -> RealSet:
    asked = protocol.real if samples in (None, protocol.generated) or protocol.real is None else samples
    return draw_windows(files, protocol, asked)


def _result(
    sets: dict[str, tuple[GroupedStatistics, int, tuple[float, float] | None]],
    detector: Detector,
    protocol: Protocol,
    settings: dict[str, Any],
) -> FVDResult:
    reference, real_count, _ = sets["real"]
    generated, samples, class_score = sets["generated"]
    distances = {}
    for name in ("generated", "reconstructed", "mean_colour", "real_vs_real"):
        if name in sets:
            statistics, count, _ = sets[name]
            paired = name in ("reconstructed", "mean_colour")
            distances[name] = measured(statistics, reference, count, real_count, paired)
        else:
            even, odd = reference.halves()
            share = even.merged().count / reference.merged().count
            distances[name] = measured(even, odd, round(real_count * share), round(real_count * (1 - share)))
    rows = min(generated.merged().count, reference.merged().count)
    return FVDResult(
        detector=detector.describe(),
        protocol=protocol.describe(),
        **distances,
        infinity=frechet_infinity(generated, reference) if rows >= 4 * detector.dim else None,
        class_score=class_score,
        notes=guards(protocol, detector, samples, real_count, rows, settings["class_sampling"]),
        settings=settings,
        versions=environment(),
    )


def measured(
    a: GroupedStatistics, b: GroupedStatistics, samples: int, real_samples: int, paired: bool = False
) -> Distance:
    """Their distance with its interval; without warnings, which `guards` gives in words."""
    with quiet_about_rank():
        value = frechet_distance(a.merged(), b.merged())
    return Distance(value, bootstrap_interval(a, b, paired=paired), samples, real_samples)


def guards(
    protocol: Protocol, detector: Detector, samples: int, real_samples: int, rows: int, class_sampling: str
) -> list[str]:
    """Why a number may not be compared with others under the protocol; each a sentence.

    Args:
        rows: feature vectors of the smaller side.
    """
    notes = []
    for name, count, theirs in (
        ("generated", samples, protocol.generated),
        ("real", real_samples, protocol.real),
    ):
        if theirs is not None and count != theirs:
            notes.append(f"{count} {name} clips, not the protocol's {theirs}: with fewer, distances are larger.")
    if class_sampling != CLASS_SAMPLING_OF[protocol.labels]:
        notes.append(f"Classes are {class_sampling}, not the protocol's {CLASS_SAMPLING_OF[protocol.labels]}.")
    if detector.name != protocol.detector:
        notes.append(f"The detector is {detector.name}, not the protocol's {protocol.detector}.")
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


def changed(clips: Clips, change: Callable[[torch.Tensor], torch.Tensor], protocol: Protocol) -> Clips:
    """The same clips, changed, and as the protocol has them."""

    def read(batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        for keys, batch in clips(batches):
            yield keys, protocol_clips(change(batch), protocol) if keys else batch

    return read


def reconstruction(vae: AutoencoderKLVidTwin) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an autoencoder makes of clips, by the mean of its posterior, clamped to [-1, 1]."""
    return lambda clips: vae(clips.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1)


def generated_clips(
    pipeline: VidTwinPipeline, sampling: Sampling, protocol: Protocol, frequencies: Sequence[float] | None = None
) -> Clips:
    """A pipeline's clips, as the protocol has them: the noise and the class of each by its number."""

    def generate(batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
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
            yield numbers, protocol_clips(clips, protocol)

    return generate


def _solver(pipeline: VidTwinPipeline) -> Source:
    """What denoises beside the weights: the scheduler and, where one is enabled, the cache between steps."""
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    cache = getattr(pipeline.transformer, "_cache_config", None)
    if cache is None:
        return {"scheduler": scheduler}
    settings = {name: str(value) for name, value in vars(cache).items() if not callable(value)}
    return {"scheduler": scheduler, "cache": {"_class_name": type(cache).__name__, **settings}}


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
    """The share of videos in each of the pipeline's classes, found by name; None for one without classes.

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


@dataclass
class Collected:
    """What is known of a set of clips: statistics and, for detectors with classes, their score, by detector."""

    samples: int
    statistics: list[GroupedStatistics]
    class_scores: list[tuple[float, float] | None]

    def of(self, detector: int) -> tuple[GroupedStatistics, int, tuple[float, float] | None]:
        """Statistics, number of clips and score by one of the detectors."""
        return self.statistics[detector], self.samples, self.class_scores[detector]


def collect_features(
    name: str,
    clips: Clips,
    count: int,
    source: Source,
    detectors: Sequence[Detector],
    protocol: Protocol,
    accelerator: Accelerator,
    folder: Path,
    *,
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    keep_statistics: bool = False,
) -> Collected | None:
    """The statistics of the features of clips by number, from what `folder` has of them or computed by all processes.

    Features are kept in FOLDER/NAME-HASH/features-FIRST.safetensors, with `source` within: HASH is of it, so another
    source has another folder, and a file that says another source is made anew.

    Args:
        source: all that the features depend on, as JSON takes it.
        keep_statistics: replace the shards by one file of statistics, NAME-HASH.safetensors, at the end.

    Returns:
        The statistics on the main process, None on the others.
    """
    source = json.loads(json.dumps({"clips": name, **source}, default=str))
    shards = folder / f"{name}-{_digest(source)}"
    whole = {**source, "count": count}
    kept = folder / f"{name}-{_digest(whole)}.safetensors"
    found = None
    if keep_statistics and accelerator.is_main_process:
        found = _read_statistics(kept, whole, len(detectors))
    [there] = broadcast_object_list([found is not None])
    if there:
        return found

    # The main process alone looks what is there, and what is missing is dealt out evenly.
    missing = None
    ranges = split_evenly(range(count), shard_size)
    if accelerator.is_main_process:
        missing = [shard for shard in ranges if not _is_there(_shard_path(shards, shard), source, shard)]
    [missing] = broadcast_object_list([missing])
    present = [shard for shard in ranges if shard not in missing]
    rank, processes = accelerator.process_index, accelerator.num_processes
    make = _made_shards(
        name, clips, missing[rank::processes], shards, source, detectors, protocol, accelerator.device, batch_size
    )
    read = (_read_shard(_shard_path(shards, shard), len(detectors)) for shard in present[rank::processes])
    statistics = [GroupedStatistics(detector.dim) for detector in detectors]
    scores = [ClassScore(detector.dim) if hasattr(detector, "probabilities") else None for detector in detectors]
    samples = 0
    for own, rows in chain(read, make):
        samples += len(own)
        for detector, features, statistic, score in zip(detectors, rows, statistics, scores, strict=True):
            statistic.update(features, own)
            if score is not None:
                score.update(detector.probabilities(features.double()), own)

    statistics = [added_up(statistic, accelerator) for statistic in statistics]
    for score in filter(None, scores):
        score.totals = _summed(score.totals, accelerator)
    samples = int(_summed(torch.tensor(samples), accelerator))
    if not accelerator.is_main_process:
        return None
    if samples < 4:
        raise UserError(f"only {samples} of {count} {name} clips could be had; a distance needs 4 or more.")
    collected = Collected(samples, statistics, [score and score.compute() for score in scores])
    if keep_statistics:
        _write_statistics(kept, whole, collected)
        shutil.rmtree(shards, ignore_errors=True)
    return collected


def added_up(statistics: GroupedStatistics, accelerator: Accelerator) -> GroupedStatistics:
    """The statistics of all processes' samples, on all of them. Memory does not grow with the number of processes.

    Two sums: of the means, weighted, for the common mean, and of the scatters about it.
    """
    if accelerator.num_processes == 1:
        return statistics
    state = statistics.state_dict()
    counts = _summed(state["counts"], accelerator)
    share = (state["counts"] / counts.clamp(min=1)).double()[:, None]
    means = _summed(share * state["means"], accelerator)
    apart = state["means"] - means
    spread = state["counts"][:, None, None] * apart[:, :, None] * apart[:, None, :]
    scatters = _summed(state["scatters"] + spread, accelerator)
    return GroupedStatistics.from_state_dict({"counts": counts, "means": means, "scatters": scatters})


def _summed(values: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), "sum").cpu()


def _made_shards(
    name: str,
    clips: Clips,
    missing: Sequence[range],
    folder: Path,
    source: Source,
    detectors: Sequence[Detector],
    protocol: Protocol,
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """(keys, features by detector) of shards, each written before it is given."""
    batches = {shard: split_evenly(shard, batch_size) for shard in missing}
    made = clips([batch for shard in missing for batch in batches[shard]]) if missing else iter(())
    with progress(total=sum(map(len, missing)), description=f"{name} clips") as bar:
        for shard in missing:
            own: list[int] = []
            parts: list[list[torch.Tensor]] = [[torch.zeros(0, detector.dim)] for detector in detectors]
            for batch in batches[shard]:
                keys, clip = next(made)
                own += keys
                if keys:
                    seen = detector_input(clip.to(device), protocol)
                    for detector, part in zip(detectors, parts, strict=True):
                        part.append(detector(seen).float().cpu())
                bar.update(len(batch))
            rows = [torch.cat(part) for part in parts]
            tensors = {"keys": torch.tensor(own, dtype=torch.int64)}
            tensors |= {f"features.{place}": row for place, row in enumerate(rows)}
            with written_aside(_shard_path(folder, shard)) as path:
                save_file(tensors, path, {"vidgen": json.dumps({"source": source, "asked": _ends(shard)})})
            yield own, rows


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"features-{shard.start:06d}.safetensors"


def _ends(shard: range) -> list[int]:
    return [shard.start, shard.stop]


def _is_there(path: Path, source: Source, shard: range) -> bool:
    """Whether a file holds just this shard, of this source."""
    said, _ = _read(path)
    return said.get("source") == source and said.get("asked") == _ends(shard)


def _read_shard(path: Path, detectors: int) -> tuple[list[int], list[torch.Tensor]]:
    """A shard's keys and its features by each detector."""
    _, tensors = _read(path)
    return tensors["keys"].tolist(), [tensors[f"features.{place}"] for place in range(detectors)]


def _read_statistics(path: Path, source: Source, detectors: int) -> Collected | None:
    """Statistics that were kept; None if there are none, or of another source."""
    said, tensors = _read(path)
    if said.get("source") != source:
        return None
    statistics = []
    for place in range(detectors):
        names = (name for name in tensors if name.startswith(f"{place}."))
        statistics.append(GroupedStatistics.from_state_dict({name.split(".")[1]: tensors[name] for name in names}))
    return Collected(said["samples"], statistics, [score and tuple(score) for score in said["class_scores"]])


def _write_statistics(path: Path, source: Source, collected: Collected) -> None:
    tensors = {
        f"{place}.{name}": tensor.contiguous()
        for place, statistics in enumerate(collected.statistics)
        for name, tensor in statistics.state_dict().items()
    }
    said = {"source": source, "samples": collected.samples, "class_scores": collected.class_scores}
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
