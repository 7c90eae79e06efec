"""Decoders of clips: PyAV for every file; decord or torchcodec, if chosen, for the files that they read correctly.

decord and torchcodec return damaged pictures as good ones, and neither of them applies every edit list, display matrix
or pixel aspect. After a seek into some files without any damage, decord returns other frames than it was asked for.
Therefore a file goes to them only after PyAV has decoded all of it once and found nothing damaged or odd
(`vidgen.data.check.inspect_video`), and all frames are the same by both decoders. PyAV reads all other files.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from ..common.errors import UserError
from .check import inspect_video
from .types import ShardMember, VideoSource
from .video import decode_numbers, find_clip, index_video, read_clip
from .video_file import file_url

DECODERS = ("pyav", "decord", "torchcodec")
BLOCK_FRAMES = 32  # compared at a time
TOLERANCE = 2  # gray levels: largest difference of a pixel between two conversions from YUV to RGB
REMEMBERED_FILES = 100_000

Decode = Callable[[str, list[int]], np.ndarray]  # path, ascending numbers -> uint8 (N, H, W, 3)


class ClipReader:
    """Reads clips as `read_clip` does, with a decoder by name.

    Args:
        decoder: one of `DECODERS`.

    Raises:
        UserError: if the name is unknown, or the package is missing or cannot be loaded.
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

        The frames are uint8 (T, H, W, 3), equal to PyAV's to `TOLERANCE` gray levels. Raises what `read_clip` raises.
        """
        if self.decoder == "pyav":
            return read_clip(path, start=start, fps=fps, num_frames=num_frames), None
        reason = find_obstacle(path, self.decoder)
        if reason is not None:
            return read_clip(path, start=start, fps=fps, num_frames=num_frames), reason
        numbers = find_clip(index_video(path), start=start, fps=fps, num_frames=num_frames)
        return torch.from_numpy(_decode_by(self.decoder)(os.fspath(path), numbers.tolist())), None


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


def installed_decoders() -> list[str]:
    """Return the names of the decoders that can be used here, PyAV first."""
    usable = ["pyav"]
    for name in DECODERS[1:]:
        with suppress(UserError):
            check_package(name)
            usable.append(name)
    return usable


def find_obstacle(path: VideoSource, decoder: str) -> str | None:
    """Return why PyAV must read a file in place of another decoder, in a few words; None if it need not.

    The first call for a file decodes all of it. Raises `VideoError` for what is not a video.
    """
    if isinstance(path, ShardMember):
        return "it lies in a shard"
    status = os.stat(index_video(path).info.path)  # in this order: a missing file is a VideoError
    return _examine(os.fspath(path), decoder, status.st_size, status.st_mtime_ns)


@lru_cache(REMEMBERED_FILES)
def _examine(path: str, decoder: str, size: int, changed: int) -> str | None:
    report = inspect_video(path, num_frames=1, fps=1.0)
    if report.kind != "good":
        return report.reason
    try:
        index = index_video(path)
        for numbers in _choose_blocks(path, decoder, report.num_frames):
            theirs = _decode_by(decoder)(path, numbers.tolist())
            ours = decode_numbers(index, numbers)
            if theirs.shape != ours.shape or np.abs(ours.astype(np.int16) - theirs).max() > TOLERANCE:
                return f"{decoder} returns other frames than PyAV"
    except Exception as error:  # each decoder has exceptions of its own
        return f"{decoder} cannot read it ({type(error).__name__})"
    return None


def _choose_blocks(path: str, decoder: str, num_frames: int) -> Iterator[np.ndarray]:
    """The numbers of all frames, in blocks that are read by themselves; of decord, one at least for each keyframe."""
    borders = {0, num_frames}
    if decoder == "decord":
        import decord

        keyframes = decord.VideoReader(file_url(path), ctx=decord.cpu(0), num_threads=1).get_key_indices()
        borders |= {number for number in keyframes if number < num_frames}
    for first, last in pairwise(sorted(borders)):
        for start in range(first, last, BLOCK_FRAMES):
            yield np.arange(start, min(last, start + BLOCK_FRAMES))


def _decode_by(decoder: str) -> Decode:
    return {"decord": _decode_by_decord, "torchcodec": _decode_by_torchcodec}[decoder]


def _decode_by_decord(path: str, numbers: list[int]) -> np.ndarray:
    import decord

    reader = decord.VideoReader(file_url(path), ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(numbers).asnumpy()


def _decode_by_torchcodec(path: str, numbers: list[int]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(file_url(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return decoder.get_frames_at(numbers).data.numpy()


def describe_fallbacks(decoder: str, fallbacks: Iterable[tuple[str, str]], num_videos: int) -> str | None:
    """Return one sentence on the videos that PyAV read in place of a chosen decoder; None where PyAV was chosen.

    Args:
        fallbacks: (path, reason) of these videos, in any order, also several times.
        num_videos: of the data set.
    """
    if decoder == "pyav":
        return None
    reasons = list(dict(fallbacks).values())
    if not reasons:
        return f"{decoder} read all videos."
    counts = sorted(((reasons.count(reason), reason) for reason in set(reasons)), key=lambda pair: (-pair[0], pair[1]))
    listed = "; ".join(f"{reason}: {count}" for count, reason in counts[:5])
    return f"PyAV read {len(reasons)} of {num_videos} videos in place of {decoder} ({listed})."
