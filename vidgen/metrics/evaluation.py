"""A whole data set reconstructed and measured on all processes, or videos that another program reconstructed.

Each figure is a mean over clips with a bootstrap interval, both of the pixels a file would hold (`uint8`) and of the
decoder's own values (`float`), beside the same figures of two plain reconstructions: the clip's mean colour, and the
clip shrunk to as many values as the latent. Every process calls these functions and gets the same result.
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
from torch.utils.data import DataLoader, Subset

from autoencoder import AutoencoderKLVidTwin, TwinLatents

from ..data.dataset import ClipDataset, VideoFile, collate_clips, frames_to_clip, list_videos
from ..data.streams import FrameReader
from ..errors import UserError
from ..progress import progress
from .reconstruction import clip_metrics, mean_colour, shrunk

if TYPE_CHECKING:
    from ..objectives.perceptual import LPIPS

PRECISIONS = {"uint8": True, "float": False}  # by name: whether values are rounded to pixels first
RESAMPLES = 2000


@dataclass(frozen=True)
class ReconstructionProtocol:
    """How clips are cut from the videos of a benchmark.

    Attributes:
        fps, num_frames, resolution: of a clip; frames are chosen by their timestamps, the short side is resized to the
            resolution with antialiasing, and the middle is cut out.
        clips_per_video: at evenly spaced starts.
        videos: how many the data set has.
        not_stated: what its users leave open, and what is done here.
    """

    fps: float
    num_frames: int
    resolution: int
    clips_per_video: int
    videos: int
    not_stated: str


RECONSTRUCTION_PROTOCOLS = {
    # 30 videos of 5 s in 1080p (Wang et al. 2016). VidTwin, Table 1, states 25 fps and 16 x 224 x 224.
    "mcl-jcv": ReconstructionProtocol(
        fps=25,
        num_frames=16,
        resolution=224,
        clips_per_video=6,
        videos=30,
        not_stated="The paper states neither which frames of a video it takes nor how many clips, nor how it crops. "
        "Here: six clips a video, evenly spaced, which do not overlap; the frame shown at each twenty-fifth of a "
        "second, so that of a 30-fps original every sixth is left out; short side to 224 pixels, centre crop.",
    )
}


def evaluate_reconstruction(
    vae: AutoencoderKLVidTwin,
    clips: ClipDataset,
    *,
    networks: Sequence[LPIPS] = (),
    batch_size: int = 8,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Reconstruct every clip of a data set from its posterior's mean, and measure it.

    A clip that stands in for an unreadable one is left out and listed.

    Args:
        vae: in evaluation mode, on the device to work on.
        clips: of any size that the VAE takes; not of random crops.
        networks: of LPIPS, on the same device.
        batch_size, num_workers: on each process.

    Returns:
        What `evaluate_pairs` returns.

    Raises:
        UserError: if nothing can be read or frames are too small; if a reconstruction is not finite, naming the clip.
    """
    state = PartialState()
    own = range(state.process_index, len(clips), state.num_processes)
    loader = DataLoader(
        Subset(clips, own),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_clips,
        generator=torch.Generator(),  # its own: reading would else draw from the global one
    )
    num_values, skipped = None, []

    def reconstructions() -> Iterator[_Batch]:
        nonlocal num_values
        for batch in progress(loader, "reconstructing"):
            skipped.extend(batch["skipped"])
            numbers = (batch["index"] % len(clips.files)).tolist()
            kept = [i for i, n in enumerate(numbers) if str(clips.files[n].path) == batch["path"][i]]
            if not kept:
                continue
            video = batch["video"][kept].to(vae.device)
            if num_values is None:
                num_values = latent_values(vae, video[:1])
            columns = (batch["index"].tolist(), batch["path"], batch["start"].tolist())
            about = [
                {"index": index, "path": path, "start": round(start, 4)}
                for i, (index, path, start) in enumerate(zip(*columns, strict=True))
                if i in kept
            ]
            yield _Batch(vae(video.to(vae.dtype)).sample.float(), video, num_values, about)

    return _measured(reconstructions(), networks, skipped)


def evaluate_pairs(
    originals: str | os.PathLike,
    reconstructions: str | os.PathLike,
    *,
    networks: Sequence[LPIPS] = (),
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
        compression_rate: the share of a clip's values in the other method's latent, for the shrunk reference.

    Returns:
        `figures`: {"reconstruction", "mean_colour" and "shrunk": {"uint8" and "float": {name of `clip_metrics`:
        {"mean", "low", "high"}}}}, the last two of `bootstrap_interval`; `num_clips` and `num_videos`; `num_values`
        of the latent, `clip_shape` and `compression_rate`, None where they are not known or one; `clips`, the
        reconstruction's values of each with its `path` and `start` in seconds; `skipped`, (path, reason) of videos
        left out.

    Raises:
        UserError: if a video has no partner, a pair differs in size or length, a file cannot be read, or frames are
            too small.
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
                yield _Batch(image.to(device), target.to(device), num_values, [about])

    return _measured(clips(), networks, [])


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


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[Any] | None = None, confidence: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
    """The percentile interval of a mean, by drawing as many again with replacement, `RESAMPLES` times.

    Args:
        values: one for each clip.
        groups: what each belongs to, such as its video: whole groups are drawn, for clips of one video are alike.

    Returns:
        The lower and upper end, the same for the same values; None for both of one group alone, which says nothing of
        how others differ.
    """
    values = np.asarray(values, dtype=np.float64)
    names = range(len(values)) if groups is None else groups
    of_name = {name: number for number, name in enumerate(dict.fromkeys(names))}
    numbers = np.array([of_name[name] for name in names])
    sums, counts = np.bincount(numbers, weights=values), np.bincount(numbers)
    if len(sums) == 1:
        return None, None
    draws = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# --- inside ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Clips (B, 3, T, H, W) in [-1, 1] with their reconstructions, and what is known of each."""

    reconstruction: torch.Tensor
    target: torch.Tensor
    num_values: int | None
    about: list[dict[str, Any]]


@torch.no_grad()
def _measured(batches: Iterable[_Batch], networks: Sequence[LPIPS], skipped: list) -> dict[str, Any]:
    """The result of `evaluate_pairs` from this process's batches and the others'."""
    own, failure = [], None
    try:
        for batch in batches:
            own += _measure(batch, networks)
    except UserError as error:  # said on all processes, none of which may wait for another
        failure = error
    for other in gather_object([failure and str(failure)]):
        if other:
            raise failure or UserError(other)
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
        "clips": [
            {key: value for key, value in entry["about"].items() if key != "index"} | entry["rows"]["reconstruction"]
            for entry in entries
        ],
        "skipped": skipped,
    }


def _measure(batch: _Batch, networks: Sequence[LPIPS]) -> list[dict[str, Any]]:
    """The figures of each clip of a batch, of its reconstruction and of the references."""
    for network in networks:
        network.check_size(*batch.target.shape[-2:])
    rows: dict[str, Callable[[], torch.Tensor]] = {
        "reconstruction": lambda: batch.reconstruction,
        "mean_colour": lambda: mean_colour(batch.target),
    }
    if batch.num_values is not None:
        rows["shrunk"] = lambda: shrunk(batch.target, batch.num_values)
    entries = [
        {"about": about, "rows": {}, "num_values": batch.num_values, "clip_shape": list(batch.target.shape[1:])}
        for about in batch.about
    ]
    for row, make in rows.items():
        image = make()
        for precision, quantize in PRECISIONS.items():
            try:
                values = clip_metrics(image, batch.target, networks, quantize=quantize)
            except ValueError as error:
                paths = ", ".join(dict.fromkeys(about["path"] for about in batch.about))
                raise UserError(f"{paths}: {error}") from error
            columns = {name: column.double().tolist() for name, column in values.items()}
            for i, entry in enumerate(entries):
                own = {name: column[i] for name, column in columns.items()}
                entry["rows"].setdefault(row, {})[precision] = own
    return entries


def _figure(values: Sequence[float], videos: Sequence[str]) -> dict[str, float | None]:
    low, high = bootstrap_interval(values, videos)
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
