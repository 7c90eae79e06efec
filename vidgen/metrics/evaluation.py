"""A whole data set reconstructed and measured on all processes, or videos that another program reconstructed.

Each figure is a mean over clips with a bootstrap interval, both of the pixels a file would hold (`uint8`) and of the
decoder's own values (`float`), beside the same figures of two plain reconstructions: the clip's mean color, and the
clip shrunk to as many values as the latent; and, with a detector, the Fréchet distance of the reconstructions to the
originals (rFVD). Every process calls these functions and gets the same result.
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

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from benchmarks.sprites.probes import ratio

from ..common.errors import UserError
from ..common.progress import progress
from ..data.dataset import ClipDataset, collate_clips
from ..data.listing import list_videos
from ..data.streams import FrameReader
from ..data.transforms import frames_to_clip
from ..data.types import VideoFile
from ..data.video import VideoError
from .detectors import Detector, refuse_namesakes
from .frechet import GroupedStatistics, added_up, bootstrap_interval, frechet_distance, quiet_about_rank
from .protocols import Protocol, detector_input, protocol_clips
from .real_clips import draw_windows, protocol_videos, read_window
from .reconstruction import clip_metrics, downsample_baseline, mean_color_baseline

if TYPE_CHECKING:
    from ..losses.lpips import LPIPS

PRECISIONS = {"uint8": True, "float": False}  # by name: whether values are rounded to pixels first


class ProtocolClips(Dataset):
    """Every clip that a protocol cuts from the videos of a data set, as samples of `ClipDataset`.

    A sample whose frames cannot be decoded has only `skipped`; `unusable` lists the videos that give no clip at all.

    Raises:
        UserError: if there is no such data set, or no video has a clip.
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
        path = self.files[window.video].path
        try:
            video = read_window(self.files, window, self.protocol)
        except VideoError as error:
            return {"skipped": [(str(path), error.reason)]}
        return {"video": video, "label": -1, "index": index, "path": str(path), "start": window.start, "skipped": []}


def evaluate_reconstruction(
    vae: AutoencoderKLVidTwin,
    clips: ClipDataset | ProtocolClips,
    *,
    networks: Sequence[LPIPS] = (),
    detectors: Sequence[Detector] = (),
    batch_size: int = 8,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Reconstruct every clip of a data set from its posterior's mean, and measure it.

    A clip that stands in for an unreadable one is left out and listed.

    Args:
        vae: in evaluation mode, on the device to work on.
        clips: of any size that the VAE takes; not of random crops.
        networks: of LPIPS, on the same device.
        detectors: of Fréchet distances, on the same device; see `rfvd` below.
        batch_size, num_workers: on each process.

    Returns:
        What `evaluate_pairs` returns.

    Raises:
        UserError: if nothing can be read or frames are too small; if a reconstruction is not finite, naming the clip;
            if two detectors have one name.
    """
    state = PartialState()
    own = range(state.process_index, len(clips), state.num_processes)
    loader = DataLoader(
        Subset(clips, own),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # its own: reading would else draw from the global one
    )
    num_values, skipped = None, list(getattr(clips, "unusable", ()))
    videos = {str(file.path): number for number, file in enumerate(clips.files)}

    def reconstructions() -> Iterator[_Batch]:
        nonlocal num_values
        for batch, unread in progress(loader, "reconstructing"):
            skipped.extend(unread)
            if batch is None:
                continue
            video = batch["video"].to(vae.device)
            if num_values is None:
                num_values = latent_values(vae, video[:1])
            columns = (batch["index"].tolist(), batch["path"], batch["start"].tolist())
            about = [
                {"index": index, "path": path, "start": round(start, 4)}
                for index, path, start in zip(*columns, strict=True)
            ]
            numbers = [videos[path] for path in batch["path"]]
            yield _Batch(vae(video.to(vae.dtype)).sample.float(), video, num_values, about, numbers)

    eyes = _Eyes(networks, detectors, getattr(clips, "protocol", None))
    return _measured(reconstructions(), eyes, skipped)


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
    """Measure videos that another program reconstructed against their originals, whole and at their own size.

    Videos are compared in clips of `num_frames` frames; the last of a video may be shorter, and counts as one.
    Reconstructions should be files without loss: what a codec adds is measured with them. Where they hold bytes,
    `uint8` and `float` are the same.

    Args:
        originals, reconstructions: what `list_videos` takes. Pairs have the same name: the path below the folder (of
            a list: the file's name), whatever its ending.
        networks: of LPIPS, on `device`.
        detectors: of Fréchet distances, on `device`; see `rfvd` below.
        compression_rate: the share of a clip's values in the other method's latent, for the shrunk reference.

    Returns:
        `figures`: {"reconstruction", "mean_color" and "downsample": {"uint8" and "float": {name of `clip_metrics`:
        {"mean", "low", "high"}}}}, the last two of `mean_interval`; `num_clips` and `num_videos`; `num_values`
        of the latent, `clip_shape` and `compression_rate`, None where they are not known or one; `rfvd`, for each
        detector the Fréchet distance of the reconstructions to the originals, clips of full length alone, as {"value",
        "low", "high", "vectors" of each side, "detector": what it says of itself}; `clips`, the reconstruction's
        values of each with its `path` and `start` in seconds; `skipped`, (path, reason) of videos left out.

    Raises:
        UserError: if a video has no partner, a pair differs in size or length, a file cannot be read, frames are too
            small, a clip has fewer values than the latent, or two detectors have one name.
    """
    state = PartialState()
    pairs = match_pairs(originals, reconstructions)
    own = list(enumerate(pairs))[state.process_index :: state.num_processes]

    def clips() -> Iterator[_Batch]:
        for number, (original, reconstruction) in progress(own, "measuring"):
            for start, target, image in _clips_of_pair(original, reconstruction, num_frames):
                num_values = None
                if compression_rate is not None:
                    num_values = max(1, round(compression_rate * target.numel()))
                about = {"index": (number, start), "path": str(original), "start": round(start, 4)}
                whole = target.shape[2] == num_frames
                yield _Batch(image.to(device), target.to(device), num_values, [about], [number], whole)

    return _measured(clips(), _Eyes(networks, detectors), [])


@torch.no_grad()
def latent_values(vae: AutoencoderKLVidTwin, clip: torch.Tensor) -> int:
    """How many numbers the latent of a clip (1, 3, T, H, W) has: those of all the tiles and windows that it takes."""
    latents = vae.encode(clip.to(vae.dtype)).latent_dist.mode()
    parts = (latents.structure, latents.dynamics) if isinstance(latents, TwinLatents) else (latents,)
    return sum(part.numel() for part in parts)


def match_pairs(originals: str | os.PathLike, reconstructions: str | os.PathLike) -> list[tuple[Path, Path]]:
    """(original, reconstruction) of every name, as `evaluate_pairs` says, in the order of the originals.

    Raises:
        UserError: if a video has no partner, or two of one side have the same name.
    """
    ours, theirs = (_by_name(root, list_videos(root)[0]) for root in (originals, reconstructions))
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            found, lacking = (originals, reconstructions) if name in ours else (reconstructions, originals)
            raise UserError(
                f"{found} has a video {name}, and {lacking} has none of that name: of {len(ours)} originals and "
                f"{len(theirs)} reconstructions {len(ours.keys() & theirs.keys())} have the same."
            )
    return [(path, theirs[name]) for name, path in ours.items()]


def mean_interval(
    values: Sequence[float], groups: Sequence[Any] | None = None
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a mean, by drawing as many again with replacement.

    Args:
        values: one for each clip.
        groups: what each belongs to, such as its video: whole groups are drawn, for clips of one video are alike.

    Returns:
        The lower and upper end, the same for the same values; None for both of one group alone, which says nothing of
        how others differ.
    """
    names = range(len(values)) if groups is None else groups
    of_name = {name: number for number, name in enumerate(dict.fromkeys(names))}
    numbers = np.array([of_name[name] for name in names])
    sums, counts = np.bincount(numbers, weights=np.asarray(values, dtype=np.float64)), np.bincount(numbers)
    if len(sums) == 1:
        return None, None
    score = ratio(torch.from_numpy(sums), torch.from_numpy(counts))
    return score.low, score.high


# --- inside ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Clips (B, 3, T, H, W) in [-1, 1] with their reconstructions, and what is known of each.

    `videos` are the numbers of their videos, the same on all processes.
    """

    reconstruction: torch.Tensor
    target: torch.Tensor
    num_values: int | None
    about: list[dict[str, Any]]
    videos: list[int]
    whole: bool = True  # of full length, so that detectors see them


@dataclass(frozen=True)
class _Eyes:
    """What looks at clips: LPIPS networks, and detectors under a protocol."""

    networks: Sequence[LPIPS]
    detectors: Sequence[Detector]
    protocol: Protocol | None = None

    def __post_init__(self) -> None:
        refuse_namesakes([detector.name for detector in self.detectors])

    def features(self, detector: Detector, clips: torch.Tensor) -> torch.Tensor:
        """What a detector sees in clips (B, 3, T, H, W): (B * R, D), on the CPU."""
        if self.protocol is None:
            clips = clips.clamp(-1, 1)
        else:
            clips = detector_input(protocol_clips(clips, self.protocol), self.protocol)
        return detector(clips).float().cpu()


@torch.no_grad()
def _measured(batches: Iterable[_Batch], eyes: _Eyes, skipped: list) -> dict[str, Any]:
    """The result of `evaluate_pairs` from this process's batches and the others'."""
    own, failure = [], None
    # Of originals and of reconstructions; by video, so that whole videos are drawn anew.
    seen = {d.name: (GroupedStatistics(d.dim), GroupedStatistics(d.dim)) for d in eyes.detectors}
    try:
        for batch in batches:
            own += _measure(batch, eyes)
            for detector in eyes.detectors if batch.whole else ():
                for side, clips in zip(seen[detector.name], (batch.target, batch.reconstruction), strict=True):
                    side.update(eyes.features(detector, clips), batch.videos)
    except UserError as error:  # said on all processes: none may wait for another
        failure = error
    for said in gather_object([failure and str(failure)]):
        if said:
            raise UserError(said) from failure
    entries = sorted(gather_object(own), key=lambda entry: entry["about"]["index"])
    skipped = list(dict.fromkeys(map(tuple, gather_object(skipped))))
    if not entries:
        raise UserError("no clip could be read: " + "; ".join(": ".join(entry) for entry in skipped[:3]))
    videos = [entry["about"]["path"] for entry in entries]
    figures: dict[str, Any] = {}
    for row in entries[0]["rows"]:
        for precision in PRECISIONS:
            names = entries[0]["rows"][row][precision]
            figures.setdefault(row, {})[precision] = {
                name: _figure([entry["rows"][row][precision][name] for entry in entries], videos) for name in names
            }
    about = {name: _same(entry[name] for entry in entries) for name in ("num_values", "clip_shape")}
    known = None not in about.values()
    return {
        "figures": figures,
        "num_clips": len(entries),
        "num_videos": len(set(videos)),
        **about,
        "compression_rate": about["num_values"] / math.prod(about["clip_shape"]) if known else None,
        "rfvd": {detector.name: _rfvd(detector, *map(added_up, seen[detector.name])) for detector in eyes.detectors},
        "clips": [
            {key: value for key, value in entry["about"].items() if key != "index"} | entry["rows"]["reconstruction"]
            for entry in entries
        ],
        "skipped": skipped,
    }


def _measure(batch: _Batch, eyes: _Eyes) -> list[dict[str, Any]]:
    """The figures of each clip of a batch, of its reconstruction and of the references."""
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "reconstruction": lambda: batch.reconstruction,
        "mean_color": lambda: mean_color_baseline(batch.target),
    }
    if batch.num_values is not None:
        rows["downsample"] = lambda: downsample_baseline(batch.target, batch.num_values)
    entries = [
        {"about": about, "rows": {}, "num_values": batch.num_values, "clip_shape": list(batch.target.shape[1:])}
        for about in batch.about
    ]
    for row, make in rows.items():
        try:
            image = make()
            figures = {p: clip_metrics(image, batch.target, eyes.networks, quantize=q) for p, q in PRECISIONS.items()}
        except UserError as error:
            paths = ", ".join(dict.fromkeys(about["path"] for about in batch.about))
            raise UserError(f"{paths}: {error}") from error
        for precision, values in figures.items():
            columns = {name: column.double().tolist() for name, column in values.items()}
            for i, entry in enumerate(entries):
                own = {name: column[i] for name, column in columns.items()}
                entry["rows"].setdefault(row, {})[precision] = own
    return entries


def _rfvd(detector: Detector, original: GroupedStatistics, reconstructed: GroupedStatistics) -> dict[str, Any]:
    """The distance of one detector's features of reconstructions to those of originals; whole videos are drawn."""
    vectors = original.merged().count
    value = low = high = None
    if vectors > 1:
        with quiet_about_rank():
            value = frechet_distance(reconstructed.merged(), original.merged())
        if len(original.filled) > 1:
            low, high = bootstrap_interval(reconstructed, original, paired=True)
    return {"value": value, "low": low, "high": high, "vectors": vectors, "detector": detector.describe()}


def _collate(samples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[tuple[str, str]]]:
    """A batch of the clips that are their own and no others' stand-ins, None without any; and the videos skipped."""
    own = [sample for sample in samples if not sample["skipped"]]
    return (collate_clips(own) if own else None), [entry for sample in samples for entry in sample["skipped"]]


def _figure(values: Sequence[float], videos: Sequence[str]) -> dict[str, float | None]:
    """`mean`, `low` and `high` of the clips' values, each clip of one of the videos; see `mean_interval`."""
    low, high = mean_interval(values, videos)
    return {"mean": math.fsum(values) / len(values), "low": low, "high": high}


def _same(values: Iterable[Any]) -> Any:
    """The one value of all, or None."""
    first, *others = values
    return first if all(other == first for other in others) else None


def _by_name(root: str | os.PathLike, files: Sequence[VideoFile]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for file in files:
        path = Path(str(file.path))
        name = path.relative_to(root).with_suffix("").as_posix() if Path(root).is_dir() else path.stem
        if name in named:
            raise UserError(f"{root} has two videos of the name {name}: {named[name]} and {path}.")
        named[name] = path
    return named


def _clips_of_pair(
    original: Path, reconstruction: Path, num_frames: int
) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
    """Start in seconds, and both clips (1, 3, t, H, W) in [-1, 1], t at most `num_frames`.

    Raises:
        UserError: if the two videos differ in size or length, or cannot be read.
    """
    with FrameReader(original) as ours, FrameReader(reconstruction) as theirs:
        for what, a, b in (
            ("pixels", f"{ours.width} x {ours.height}", f"{theirs.width} x {theirs.height}"),
            ("frames", ours.num_frames, theirs.num_frames),
        ):
            if a != b:
                raise UserError(f"{reconstruction} has {b} {what}, and its original {original} has {a}.")
        pairs = zip(ours, theirs, strict=True)
        for first in range(0, ours.num_frames, num_frames):
            clips = zip(*islice(pairs, num_frames), strict=True)
            target, image = (frames_to_clip(torch.from_numpy(np.stack(frames)))[None] for frames in clips)
            yield first / float(ours.fps), target, image
