"""Reconstruction metrics and rFVD of a VAE over a dataset, or of videos that another program reconstructed.

Each figure is a mean over clips with a bootstrap interval, for the pixels that a file would hold (`uint8`) and for the
decoder's float values (`float`). The same figures are given for two baselines: per-clip mean color and rate-matched
downsampling. With detectors, the Fréchet distance of the reconstructions to the originals (rFVD) is added. Every
process calls these functions and gets the same result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset, Subset

from autoencoder import TwinLatents
from autoencoder.video_autoencoder import VideoAutoencoder

from ..common.errors import UserError
from ..common.progress import progress
from ..data.dataset import ClipDataset, collate_clips
from ..data.listing import list_videos
from ..data.streams import FrameReader
from ..data.transforms import frames_to_clip
from ..data.types import VideoFile
from ..data.video import VideoError
from .detectors import Detector, refuse_duplicates
from .frechet import FeatureStatistics, choose_num_groups, reduce_statistics
from .fvd import measure_distance
from .protocols import Protocol, detector_input, protocol_clips
from .real_clips import draw_windows, protocol_videos, read_window
from .reconstruction import clip_metrics, downsample_baseline, mean_color_baseline
from .stats import mean_interval

if TYPE_CHECKING:
    from ..losses.lpips import LPIPS

PRECISIONS = {"uint8": True, "float": False}  # name: whether values are rounded to pixels first


class ProtocolClips(Dataset):
    """Every clip that a protocol cuts from the videos of a dataset, as samples like those of `ClipDataset`.

    A sample whose frames cannot be decoded has only `skipped`; `unusable` lists the videos without a clip.

    Raises:
        UserError: if there is no such dataset, or no video has a clip.
    """

    def __init__(self, root: str | os.PathLike, protocol: Protocol) -> None:
        self.protocol = protocol
        self.files, _ = protocol_videos(root, protocol)
        drawn = draw_windows(self.files, protocol, None)
        self.windows, self.unusable = sorted(drawn.windows), drawn.unusable

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.windows[index]
        path = str(self.files[window.video].path)
        try:
            video = read_window(self.files, window, self.protocol)
        except VideoError as error:
            return {"skipped": [(path, error.reason)]}
        return {"video": video, "label": -1, "index": index, "path": path, "start": window.start, "skipped": []}


def evaluate_reconstruction(
    vae: VideoAutoencoder,
    clips: ClipDataset | ProtocolClips,
    *,
    networks: Sequence[LPIPS] = (),
    detectors: Sequence[Detector] = (),
    batch_size: int = 8,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Reconstruct every clip of a dataset from its posterior's mean, and measure the reconstructions.

    A clip that replaces an unreadable one is left out, and the unreadable one is listed.

    Args:
        vae: in evaluation mode, on the device of the computation.
        clips: of any size that the VAE accepts; without random crops.
        networks: of LPIPS, on the same device.
        detectors: of rFVD, on the same device.
        batch_size, num_workers: on each process.

    Returns:
        The result of `evaluate_pairs`.

    Raises:
        UserError: if nothing can be read or frames are too small; if a reconstruction is not finite, with the path of
            the clip; if two detectors have the same name.
    """
    sizes: dict[str, int] = {}

    def count_values(clip: torch.Tensor) -> int:
        if "latent" not in sizes:
            sizes["latent"] = count_latent_values(vae, clip)
        return sizes["latent"]

    return evaluate_codec(
        lambda video: vae(video.to(vae.dtype)).sample.float(),
        count_values,
        clips,
        device=vae.device,
        networks=networks,
        detectors=detectors,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def evaluate_codec(
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    count_values: Callable[[torch.Tensor], int],
    clips: ClipDataset | ProtocolClips,
    *,
    device: torch.device | str = "cpu",
    networks: Sequence[LPIPS] = (),
    detectors: Sequence[Detector] = (),
    batch_size: int = 8,
    num_workers: int = 0,
) -> dict[str, Any]:
    """`evaluate_reconstruction` of any method.

    Args:
        reconstruct: maps clips (B, 3, T, H, W) in [-1, 1], float32 on `device`, to their reconstructions.
        count_values: number of values that code a clip (1, 3, T, H, W).
    """
    state = PartialState()
    own_indices = range(state.process_index, len(clips), state.num_processes)
    loader = DataLoader(
        Subset(clips, own_indices),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # the default would draw from the global generator
    )
    skipped = list(getattr(clips, "unusable", ()))
    video_numbers = {str(file.path): number for number, file in enumerate(clips.files)}

    def batches() -> Iterator[_Batch]:
        for batch, unreadable in progress(loader, "reconstructing"):
            skipped.extend(unreadable)
            if batch is None:
                continue
            video = batch["video"].to(device)
            columns = (batch["index"].tolist(), batch["path"], batch["start"].tolist())
            clip_infos = [
                {"index": index, "path": path, "start": round(start, 4)}
                for index, path, start in zip(*columns, strict=True)
            ]
            numbers = [video_numbers[path] for path in batch["path"]]
            yield _Batch(reconstruct(video), video, count_values(video[:1]), clip_infos, numbers)

    return _evaluate(batches(), networks, detectors, getattr(clips, "protocol", None), skipped)


def evaluate_pairs(
    originals: str | os.PathLike,
    reconstructions: str | os.PathLike,
    *,
    networks: Sequence[LPIPS] = (),
    detectors: Sequence[Detector] = (),
    num_frames: int = 16,
    compression_rate: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure videos that another program reconstructed against their originals, at full length and size.

    Videos are compared in clips of `num_frames` frames; the last clip of a video may be shorter and counts as one.
    Reconstructions should be lossless files, because the loss of a codec is measured too. For files of uint8 pixels,
    `uint8` and `float` are the same.

    Args:
        originals, reconstructions: as `list_videos` takes them. A pair has the same name: the path below the folder
            (for a list: the file name), without the suffix.
        networks: of LPIPS, on `device`.
        detectors: of rFVD, on `device`.
        compression_rate: the other method's latent values per clip value, for the downsampling baseline.

    Returns:
        `figures`: {"reconstruction", "mean_color" and "downsample": {"uint8" and "float": {name of `clip_metrics`:
        {"mean", "low", "high"}}}}, low and high of `mean_interval`; `num_clips` and `num_videos`; `num_values` of the
        latent, `clip_shape` and `compression_rate`, None if unknown or not the same for all clips; `rfvd`, for each
        detector the Fréchet distance of the reconstructions to the originals, over clips of full length, as {"value",
        "low", "high", "vectors" on each side, "detector": its description}; `clips`, the reconstruction figures of
        each with its `path` and `start` in seconds; `skipped`, (path, reason) of videos left out.

    Raises:
        UserError: if a video has no partner, a pair differs in size or length, a file cannot be read, frames are too
            small, a clip has fewer values than the latent, or two detectors have the same name.
    """
    state = PartialState()
    pairs = list(enumerate(match_pairs(originals, reconstructions)))
    own_pairs = pairs[state.process_index :: state.num_processes]

    def read() -> Iterator[_Batch]:
        for number, (original, reconstruction) in progress(own_pairs, "measuring"):
            for start, target, image in _read_pair(original, reconstruction, num_frames):
                num_values = None
                if compression_rate is not None:
                    num_values = max(1, round(compression_rate * target.numel()))
                clip_info = {"index": (number, start), "path": str(original), "start": round(start, 4)}
                is_full = target.shape[2] == num_frames
                yield _Batch(image.to(device), target.to(device), num_values, [clip_info], [number], is_full)

    return _evaluate(read(), networks, detectors, None, [])


@torch.no_grad()
def count_latent_values(vae: VideoAutoencoder, clip: torch.Tensor) -> int:
    """Count the latent values of a clip (1, 3, T, H, W), over all tiles and windows."""
    latents = vae.encode(clip.to(vae.dtype)).latent_dist.mode()
    parts = (latents.structure, latents.dynamics) if isinstance(latents, TwinLatents) else (latents,)
    return sum(part.numel() for part in parts)


def match_pairs(originals: str | os.PathLike, reconstructions: str | os.PathLike) -> list[tuple[Path, Path]]:
    """Match originals and reconstructions by name, as `evaluate_pairs` describes, in the order of the originals.

    Raises:
        UserError: if a video has no partner, or two of one side have the same name.
    """
    sources, results = (_index_by_name(root, list_videos(root)[0]) for root in (originals, reconstructions))
    for name in [*sources, *results]:
        if name not in sources or name not in results:
            present, lacking = (originals, reconstructions) if name in sources else (reconstructions, originals)
            raise UserError(
                f"{present} has a video {name}, and {lacking} has none of that name: of {len(sources)} originals and "
                f"{len(results)} reconstructions {len(sources.keys() & results.keys())} have the same."
            )
    return [(path, results[name]) for name, path in sources.items()]


def _index_by_name(root: str | os.PathLike, files: Sequence[VideoFile]) -> dict[str, Path]:
    by_name: dict[str, Path] = {}
    for file in files:
        path = Path(str(file.path))
        name = path.relative_to(root).with_suffix("").as_posix() if Path(root).is_dir() else path.stem
        if name in by_name:
            raise UserError(f"{root} has two videos of the name {name}: {by_name[name]} and {path}.")
        by_name[name] = path
    return by_name


def _read_pair(
    original: Path, reconstruction: Path, num_frames: int
) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """Yield start in seconds, and both clips (1, 3, t, H, W) in [-1, 1], t at most `num_frames`.

    Raises:
        UserError: if the two videos differ in size or length, or cannot be read.
    """
    with FrameReader(original) as source, FrameReader(reconstruction) as result:
        for unit, a, b in (
            ("pixels", f"{source.width} x {source.height}", f"{result.width} x {result.height}"),
            ("frames", source.num_frames, result.num_frames),
        ):
            if a != b:
                raise UserError(f"{reconstruction} has {b} {unit}, and its original {original} has {a}.")
        frame_pairs = zip(source, result, strict=True)
        for first in range(0, source.num_frames, num_frames):
            clips = zip(*islice(frame_pairs, num_frames), strict=True)
            target, image = (frames_to_clip(torch.from_numpy(np.stack(frames)))[None] for frames in clips)
            yield first / float(source.fps), target, image


def _collate(samples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """Return a batch of the clips that do not replace others, None without any; and the videos skipped."""
    kept = [sample for sample in samples if not sample["skipped"]]
    return (collate_clips(kept) if kept else None), [entry for sample in samples for entry in sample["skipped"]]


# --- figures of all clips -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Clips (B, 3, T, H, W) in [-1, 1] with their reconstructions.

    Attributes:
        num_values: latent values of a clip, if known.
        clip_infos: `index`, `path` and `start` of each clip.
        videos: number of each clip's video, the same on all processes.
        is_full: whether the clips have full length, so that detectors see them.
    """

    reconstruction: torch.Tensor
    target: torch.Tensor
    num_values: int | None
    clip_infos: list[dict[str, Any]]
    videos: list[int]
    is_full: bool = True


@torch.no_grad()
def _evaluate(
    batches: Iterable[_Batch],
    networks: Sequence[LPIPS],
    detectors: Sequence[Detector],
    protocol: Protocol | None,
    skipped: list[tuple[str, str]],
) -> dict[str, Any]:
    """Return the result of `evaluate_pairs` from the batches of all processes."""
    refuse_duplicates([detector.name for detector in detectors])

    # Measure the clips of this process. Features are grouped by video, because whole videos are resampled.
    entries, failure = [], None
    statistics = {
        d.name: tuple(FeatureStatistics(d.dim, choose_num_groups(d.dim)) for _ in ("target", "reconstruction"))
        for d in detectors
    }
    try:
        for batch in batches:
            entries += _measure_batch(batch, networks)
            for detector in detectors if batch.is_full else ():
                for side, clips in zip(statistics[detector.name], (batch.target, batch.reconstruction), strict=True):
                    side.update(_compute_features(detector, clips, protocol), batch.videos)
    except UserError as error:  # raised on all processes below, so that none waits for another
        failure = error
    for message in gather_object([failure and str(failure)]):
        if message:
            raise UserError(message) from failure

    # Combine the clips of all processes.
    entries = sorted(gather_object(entries), key=lambda entry: entry["info"]["index"])
    skipped = list(dict.fromkeys(map(tuple, gather_object(skipped))))
    if not entries:
        raise UserError("no clip could be read: " + "; ".join(": ".join(entry) for entry in skipped[:3]))
    videos = [entry["info"]["path"] for entry in entries]
    figures: dict[str, Any] = {}
    for row in entries[0]["rows"]:
        for precision in PRECISIONS:
            names = entries[0]["rows"][row][precision]
            figures.setdefault(row, {})[precision] = {
                name: _summarize([entry["rows"][row][precision][name] for entry in entries], videos) for name in names
            }
    num_values, clip_shape = (_common_value(entry[name] for entry in entries) for name in ("num_values", "clip_shape"))
    is_known = num_values is not None and clip_shape is not None
    return {
        "figures": figures,
        "num_clips": len(entries),
        "num_videos": len(set(videos)),
        "num_values": num_values,
        "clip_shape": clip_shape,
        "compression_rate": num_values / math.prod(clip_shape) if is_known else None,
        "rfvd": {d.name: _measure_rfvd(d, *map(reduce_statistics, statistics[d.name])) for d in detectors},
        "clips": [
            {"path": entry["info"]["path"], "start": entry["info"]["start"]} | entry["rows"]["reconstruction"]
            for entry in entries
        ],
        "skipped": skipped,
    }


def _measure_batch(batch: _Batch, networks: Sequence[LPIPS]) -> list[dict[str, Any]]:
    """Return the figures of each clip of a batch, for its reconstruction and the baselines."""
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "reconstruction": lambda: batch.reconstruction,
        "mean_color": lambda: mean_color_baseline(batch.target),
    }
    if batch.num_values is not None:
        rows["downsample"] = lambda: downsample_baseline(batch.target, batch.num_values)
    entries = [
        {"info": info, "rows": {}, "num_values": batch.num_values, "clip_shape": list(batch.target.shape[1:])}
        for info in batch.clip_infos
    ]
    for row, make in rows.items():
        try:
            image = make()
            figures = {p: clip_metrics(image, batch.target, networks, quantize=q) for p, q in PRECISIONS.items()}
        except UserError as error:
            paths = ", ".join(dict.fromkeys(info["path"] for info in batch.clip_infos))
            raise UserError(f"{paths}: {error}") from error
        for precision, values in figures.items():
            columns = {name: column.double().tolist() for name, column in values.items()}
            for i, entry in enumerate(entries):
                clip_figures = {name: column[i] for name, column in columns.items()}
                entry["rows"].setdefault(row, {})[precision] = clip_figures
    return entries


def _compute_features(detector: Detector, clips: torch.Tensor, protocol: Protocol | None) -> torch.Tensor:
    """Return the features (B * R, D), on the CPU, of clips (B, 3, T, H, W)."""
    if protocol is None:
        clips = clips.clamp(-1, 1)
    else:
        clips = detector_input(protocol_clips(clips, protocol), protocol)
    return detector(clips).float().cpu()


def _measure_rfvd(detector: Detector, original: FeatureStatistics, reconstructed: FeatureStatistics) -> dict[str, Any]:
    """Return the distance of one detector's features of reconstructions to those of originals."""
    vectors = original.count
    distance = measure_distance(reconstructed, original, vectors, vectors, paired=True)
    value = None if distance is None else distance.value
    low, high = (distance and distance.interval) or (None, None)
    return {"value": value, "low": low, "high": high, "vectors": vectors, "detector": detector.describe()}


def _summarize(values: Sequence[float], videos: Sequence[str]) -> dict[str, float | None]:
    """Return `mean`, `low` and `high` of the values of clips, each clip of one of the videos; see `mean_interval`."""
    low, high = mean_interval(values, videos)
    return {"mean": math.fsum(values) / len(values), "low": low, "high": high}


def _common_value(values: Iterable[Any]) -> Any:
    """Return the value that all have in common, or None."""
    first, *others = values
    return first if all(other == first for other in others) else None
