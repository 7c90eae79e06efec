"""Features of sets of clips, computed on all processes and kept on disk, from which Fréchet distances are computed.

Processes take shards of clips by number, keep the features of each shard in a file so that a killed run can resume,
add them to `FeatureStatistics` and sum those. Statistics are therefore the same, up to rounding, for any number of
processes, interrupted or not. Sets that several evaluations need are kept as one file of statistics.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.errors import UserError
from ..common.io import atomic_write
from ..common.progress import progress
from ..data.latent_encoding import split_evenly
from .detectors import Detector
from .frechet import ClassScore, FeatureStatistics, choose_num_groups, reduce_statistics, reduce_sum
from .protocols import Protocol, detector_input
from .real_clips import ClipBatch

SHARD_SIZE = 64  # clips per shard: the work that an interruption costs a process
FORMAT = 2  # version of the files; other versions are computed again

Source = dict[str, Any]
Clips = Callable[[Sequence[Sequence[int]]], Iterator[ClipBatch]]  # batches of numbers -> clips as a protocol cuts them


class TooFewClipsError(UserError):
    """Fewer than 4 clips of a set could be read. Raised on the main process, after all communication."""


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of clips.

    Attributes:
        samples: number of clips that were read or generated.
        unreadable: (path, reason) of the missing clips, each once.
        statistics: one for each detector.
        class_scores: one for each detector; None if it has no classes or no score was requested.
    """

    samples: int
    unreadable: list[tuple[str, str]]
    statistics: list[FeatureStatistics]
    class_scores: list[tuple[float, float] | None]


@dataclass(frozen=True)
class _Shard:
    """Features (N * R, D) of the clips of a range of numbers, by detector, and the group keys of the N clips."""

    keys: list[int]
    features: list[torch.Tensor]
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Collector:
    """Computes the features of sets of clips on all processes, and keeps them.

    Features are kept in FOLDER/NAME-HASH/features-FIRST.safetensors together with the source, which is everything they
    depend on. HASH is a hash of the source, and a file with another source is computed again.

    Attributes:
        detectors, protocol: what computes the features, and how clips are prepared for it.
        accelerator: of the processes.
        folder: shared by all processes.
        batch_size: clips per batch.
        shard_size: clips per file.
    """

    detectors: Sequence[Detector]
    protocol: Protocol
    accelerator: Accelerator
    folder: Path
    batch_size: int = 16
    shard_size: int = SHARD_SIZE

    def collect(
        self, name: str, clips: Clips, count: int, source: Source, *, keep: bool = False, scored: bool = False
    ) -> FeatureSet | None:
        """Return the statistics of the features of clips 0 to `count` - 1; reads or computes each shard.

        Args:
            source: everything that clip n depends on besides n, the detectors and the protocol, in JSON types.
            keep: replace the shards by one file of statistics, NAME-HASH.safetensors, at the end.
            scored: compute class scores too; not for sets that are kept.

        Returns:
            The statistics on the main process, None on the others.

        Raises:
            UserError: if clips or features are not finite, before anything of them is kept.
            TooFewClipsError: if fewer than 4 clips could be read.
        """
        source = self._complete_source(name, source)
        shard_folder = self.folder / f"{name}-{_hash_source(source)}"
        set_source = {**source, "count": count}
        set_file = self.folder / f"{name}-{_hash_source(set_source)}.safetensors"
        main = self.accelerator.is_main_process
        kept = _read_set(set_file, set_source, len(self.detectors)) if keep and main else None
        [is_kept] = broadcast_object_list([kept is not None])
        if is_kept:
            return kept

        # The main process lists the shards that are present; the missing ones are dealt out evenly.
        shards = split_evenly(range(count), self.shard_size)
        present = [shard for shard in shards if main and _is_present(_shard_path(shard_folder, shard), source, shard)]
        [present] = broadcast_object_list([present])
        missing = [shard for shard in shards if shard not in present]
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        paths = (_shard_path(shard_folder, shard) for shard in present[rank::processes])
        read = (_read_shard(path, len(self.detectors)) for path in paths)
        computed = self._compute_shards(name, clips, missing[rank::processes], shard_folder, source)
        feature_set = self._reduce(chain(read, computed), scored)
        if not main:
            return None
        if feature_set.samples < 4:
            reason = ": ".join(feature_set.unreadable[0]) if feature_set.unreadable else ""
            raise TooFewClipsError(
                f"only {feature_set.samples} of {count} {name} clips could be read; a distance needs 4 or more. "
                f"{reason}"
            )
        if keep:
            _write_set(set_file, set_source, feature_set)
            shutil.rmtree(shard_folder, ignore_errors=True)
        return feature_set

    def _complete_source(self, name: str, source: Source) -> Source:
        detectors = [
            [d.name, d.sha256, *([d.settings, d.preprocessing] if d.settings else [])] for d in self.detectors
        ]
        complete = {"kept": FORMAT, "clips": name, "protocol": self.protocol.describe(), "detectors": detectors}
        return json.loads(json.dumps({**complete, **source}, default=str))

    def _reduce(self, shards: Iterator[_Shard], scored: bool) -> FeatureSet:
        """Add up the shards of this process, then those of all processes."""
        statistics = [FeatureStatistics(d.dim, choose_num_groups(d.dim)) for d in self.detectors]
        scores = [ClassScore(d.dim) if scored and hasattr(d, "probabilities") else None for d in self.detectors]
        samples, unreadable = 0, []
        for shard in shards:
            samples += len(shard.keys)
            unreadable += shard.unreadable
            for detector, features, own, score in zip(self.detectors, shard.features, statistics, scores, strict=True):
                own.update(features, shard.keys)
                if score is not None:
                    score.update(detector.probabilities(features.double()), shard.keys)
        for score in filter(None, scores):
            score.totals = reduce_sum(score.totals)
        samples = int(reduce_sum(torch.tensor(samples)))
        return FeatureSet(
            samples,
            sorted(set(gather_object(unreadable))),
            [reduce_statistics(own) for own in statistics],
            [score.compute() if score and samples else None for score in scores],
        )

    def _compute_shards(
        self, name: str, clips: Clips, missing: Sequence[range], folder: Path, source: Source
    ) -> Iterator[_Shard]:
        """Yield the missing shards; each is written first."""
        batches = {shard: split_evenly(shard, self.batch_size) for shard in missing}
        clip_batches = clips([batch for shard in missing for batch in batches[shard]]) if missing else iter(())
        with progress(total=sum(map(len, missing)), description=f"{name} clips") as bar:
            for numbers in missing:
                shard = _Shard([], [], [])
                parts: list[list[torch.Tensor]] = [[torch.zeros(0, detector.dim)] for detector in self.detectors]
                for batch_numbers in batches[numbers]:
                    batch = next(clip_batches)
                    shard.keys.extend(batch.keys)
                    shard.unreadable.extend(batch.unreadable)
                    for part, features in zip(parts, self._compute_features(name, batch), strict=True):
                        part.append(features)
                    bar.update(len(batch_numbers))
                shard.features.extend(map(torch.cat, parts))
                _write_shard(_shard_path(folder, numbers), source, numbers, shard)
                yield shard

    def _compute_features(self, name: str, batch: ClipBatch) -> Iterator[torch.Tensor]:
        """Yield each detector's features of a batch of clips, which may be empty."""
        if not batch.numbers:
            yield from (torch.zeros(0, detector.dim) for detector in self.detectors)
            return
        inputs = detector_input(batch.clips.to(self.accelerator.device), self.protocol)
        for detector in self.detectors:
            features = detector(inputs).float().cpu()
            check_finite(f"{detector.name}'s features of {name} clips", batch.numbers, features)
            yield features


def check_finite(what: str, numbers: Sequence[int], values: torch.Tensor) -> None:
    """Raise a `UserError` with the numbers of the clips if values (N * R, ...) of N clips are not finite."""
    finite = torch.isfinite(values).reshape(len(numbers), -1).all(dim=1).tolist()
    broken = [number for number, is_finite in zip(numbers, finite, strict=True) if not is_finite]
    if broken:
        raise UserError(
            f"{what} {', '.join(map(str, broken))} hold NaN or infinite values, for which no distance is defined: "
            "check the model's weights and its precision."
        )


# --- files ----------------------------------------------------------------------------------------------------------


def _hash_source(source: Source) -> str:
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]


def _shard_path(folder: Path, shard: range) -> Path:
    return folder / f"features-{shard.start:06d}.safetensors"


def _is_present(path: Path, source: Source, shard: range) -> bool:
    """Return whether a file holds exactly this shard, of this source."""
    metadata, _ = _read_file(path)
    return metadata.get("source") == source and metadata.get("asked") == [shard.start, shard.stop]


def _read_shard(path: Path, num_detectors: int) -> _Shard:
    metadata, tensors = _read_file(path)
    features = [tensors[f"features.{i}"] for i in range(num_detectors)]
    return _Shard(tensors["keys"].tolist(), features, [tuple(entry) for entry in metadata["unreadable"]])


def _write_shard(path: Path, source: Source, numbers: range, shard: _Shard) -> None:
    tensors = {"keys": torch.tensor(shard.keys, dtype=torch.int64)}
    tensors |= {f"features.{i}": features for i, features in enumerate(shard.features)}
    asked = [numbers.start, numbers.stop]
    _write_file(path, tensors, {"source": source, "asked": asked, "unreadable": shard.unreadable})


def _read_set(path: Path, source: Source, num_detectors: int) -> FeatureSet | None:
    """Read statistics; None if the file is missing or of another source."""
    metadata, tensors = _read_file(path)
    if metadata.get("source") != source:
        return None
    statistics = []
    for i in range(num_detectors):
        names = (name for name in tensors if name.startswith(f"{i}."))
        statistics.append(FeatureStatistics.from_state_dict({name.split(".")[1]: tensors[name] for name in names}))
    unreadable = [tuple(entry) for entry in metadata["unreadable"]]
    return FeatureSet(metadata["samples"], unreadable, statistics, [None] * num_detectors)


def _write_set(path: Path, source: Source, feature_set: FeatureSet) -> None:
    tensors = {
        f"{i}.{name}": tensor.contiguous()
        for i, statistics in enumerate(feature_set.statistics)
        for name, tensor in statistics.state_dict().items()
    }
    metadata = {"source": source, "samples": feature_set.samples, "unreadable": feature_set.unreadable}
    _write_file(path, tensors, metadata)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read metadata and tensors; both are empty if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["vidgen"])
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        return {}, {}


def _write_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    with atomic_write(path) as unfinished:
        save_file(tensors, unfinished, {"vidgen": json.dumps(metadata)})
