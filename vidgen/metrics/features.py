"""Features of sets of clips, computed on all processes and kept: what a Fréchet distance is taken of.

Processes take clips by number in shards, keep the features of each shard in a file (a killed run goes on), fold them
into `GroupedStatistics` and add those up. So statistics are the same, to rounding, for any number of processes,
interrupted or not. Those of a set that is asked for again are kept for good.
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
from .frechet import ClassScore, GroupedStatistics, added_up, summed
from .protocols import Protocol, detector_input
from .real_clips import ClipBatch

SHARD_SIZE = 64  # clips whose features are kept together: what an interruption costs a process
KEPT = 2  # the kind of files that features are kept in; others are made anew

Source = dict[str, Any]
Clips = Callable[[Sequence[Sequence[int]]], Iterator[ClipBatch]]  # of batches of numbers, clips as a protocol has them


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
    """The features of neighboring numbers' clips: by detector, those of a clip after those of another."""

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
            refuse_broken(f"{detector.name}'s features of {name} clips", batch.numbers, features)
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
    with atomic_write(path) as unfinished:
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
    with atomic_write(path) as unfinished:
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


def refuse_broken(what: str, numbers: Sequence[int], values: torch.Tensor) -> None:
    """Raises `UserError` if values (N * R, ...) of N clips are not finite, with the numbers of the clips."""
    finite = torch.isfinite(values).reshape(len(numbers), -1).all(dim=1).tolist()
    broken = [number for number, sound in zip(numbers, finite, strict=True) if not sound]
    if broken:
        raise UserError(
            f"{what} {', '.join(map(str, broken))} hold NaN or infinite values, which no distance can be computed of: "
            "look at the model's weights and its precision."
        )
