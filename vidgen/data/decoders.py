"""Decode clips with PyAV or, if chosen, with decord or torchcodec, for the files that they read correctly.

decord and torchcodec return damaged pictures as good ones, and neither of them applies every edit list, display matrix
or pixel aspect. After a seek into some undamaged files, decord returns wrong frames. Therefore a file is given to them
only after PyAV has decoded it completely once and found nothing damaged or odd (`vidgen.data.check.inspect_video`),
and all frames of both decoders agree. PyAV reads all other files.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from ..common.errors import UserError
from .check import inspect_video
from .types import ShardMember, VideoSource
from .video import decode_numbers, find_clip, read_clip
from .video_file import file_url
from .video_index import index_video

DECODERS = ("pyav", "decord", "torchcodec")
BLOCK_FRAMES = 32  # compared at a time
TOLERANCE = 2  # gray levels: largest difference of a pixel between two conversions from YUV to RGB
CACHED_FILES = 100_000


class ClipReader:
    """Reads clips as `read_clip` does, with one of `DECODERS`.

    Raises `UserError` if the name is unknown, or the package is missing or cannot be loaded.
    """

    def __init__(self, decoder: str = "pyav") -> None:
        if decoder not in DECODERS:
            raise UserError(f"data.decoder must be one of {', '.join(DECODERS)}, not {decoder!r}.")
        self.decoder = decoder
        if decoder != "pyav":
            check_package(decoder)

    def read(
        self, path: VideoSource, *, start: float = 0.0, fps: float, num_frames: int
    ) -> tuple[torch.Tensor, str | None]:
        """Return the frames of a clip, and the reason if PyAV read them although another decoder was chosen.

        The frames are uint8 (T, H, W, 3), equal to PyAV's up to `TOLERANCE` gray levels. Raises the errors of
        `read_clip`.
        """
        reason = None if self.decoder == "pyav" else find_obstacle(path, self.decoder)
        if self.decoder == "pyav" or reason is not None:
            return read_clip(path, start=start, fps=fps, num_frames=num_frames), reason
        numbers = find_clip(index_video(path), start=start, fps=fps, num_frames=num_frames)
        return torch.from_numpy(_decode_numbers(self.decoder, os.fspath(path), numbers.tolist())), None


def check_package(decoder: str) -> None:
    """Raise a `UserError` if the package of a decoder is missing or cannot be loaded."""
    try:
        importlib.import_module(decoder)
    except ModuleNotFoundError:
        raise UserError(
            f"data.decoder={decoder} needs the package {decoder}: pip install {decoder}, or data.decoder=pyav."
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.decoder={decoder}: the package is installed but cannot be loaded ({reason.rstrip('.:')}); choose "
            "data.decoder=pyav."
        ) from error


def find_obstacle(path: VideoSource, decoder: str) -> str | None:
    """The reason why PyAV must read a file in place of another decoder, in a few words; None if there is none.

    The first call for a file decodes all of it. Raises `VideoError` if it is not a video.
    """
    if isinstance(path, ShardMember):
        return "it lies in a shard"
    status = os.stat(index_video(path).info.path)  # first index_video: a missing file is a VideoError
    return _examine(os.fspath(path), decoder, status.st_size, status.st_mtime_ns)


@lru_cache(CACHED_FILES)
def _examine(path: str, decoder: str, size: int, changed: int) -> str | None:
    report = inspect_video(path, num_frames=1, fps=1.0)
    if report.kind != "good":
        return report.reason
    try:
        index = index_video(path)
        for numbers in _choose_blocks(path, decoder, report.num_frames):
            theirs = _decode_numbers(decoder, path, numbers.tolist())
            ours = decode_numbers(index, numbers)
            if theirs.shape != ours.shape or np.abs(ours.astype(np.int16) - theirs).max() > TOLERANCE:
                return f"{decoder} returns other frames than PyAV"
    except Exception as error:  # each decoder raises different exceptions
        return f"{decoder} cannot read it ({type(error).__name__})"
    return None


def _choose_blocks(path: str, decoder: str, num_frames: int) -> Iterator[np.ndarray]:
    """The numbers of all frames, in blocks that are read separately; for decord, a new block at each keyframe."""
    borders = {0, num_frames}
    if decoder == "decord":
        borders |= {number for number in _open_decord(path).get_key_indices() if number < num_frames}
    for first, last in pairwise(sorted(borders)):
        for start in range(first, last, BLOCK_FRAMES):
            yield np.arange(start, min(last, start + BLOCK_FRAMES))


def _decode_numbers(decoder: str, path: str, numbers: list[int]) -> np.ndarray:
    """Decode the frames with these numbers, in ascending order, by decord or torchcodec: uint8 (N, H, W, 3)."""
    if decoder == "decord":
        return _open_decord(path).get_batch(numbers).asnumpy()
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(file_url(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return video.get_frames_at(numbers).data.numpy()


def _open_decord(path: str):
    import decord

    return decord.VideoReader(file_url(path), ctx=decord.cpu(0), num_threads=1)


def describe_fallbacks(decoder: str, fallbacks: Iterable[tuple[str, str]], num_videos: int) -> str | None:
    """One sentence on the videos that PyAV read in place of a chosen decoder; None where PyAV was chosen.

    `fallbacks`: (path, reason) of these videos, in any order, possibly repeated. `num_videos`: of the data set.
    """
    if decoder == "pyav":
        return None
    reasons = Counter(dict(fallbacks).values())
    if not reasons:
        return f"{decoder} read all videos."
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    listed = "; ".join(f"{reason}: {count}" for reason, count in ranked[:5])
    return f"PyAV read {reasons.total()} of {num_videos} videos in place of {decoder} ({listed})."
