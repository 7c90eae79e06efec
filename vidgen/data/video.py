"""Read clips from video files: `probe` describes a video, `read_clip` reads frames at a given rate.

A file is first indexed (`video_index`), which gives the timestamp of every frame in display order. Frames are then
chosen by their timestamps and decoded from the keyframe before the first to the last of them. PyAV, that is FFmpeg's
own libraries, does all of it: it is as fast as decord or faster, and reports damage where decord returns damaged
frames (measurements in docs/data.md).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..common.video_writing import write_video
from .types import ArrayVideo, VideoSource
from .video_arrays import probe_array, read_array_clip
from .video_file import (
    MAX_FRAME_PIXELS,
    TIME_TOLERANCE,
    VideoError,
    VideoInfo,
    as_source,
    find_video_stream,
    open_container,
    summarize_error,
)
from .video_frames import to_rgb
from .video_index import UnlistedFrames, VideoIndex, decode_frames, index_video, scan_video

__all__ = ["VideoError", "VideoHeader", "VideoInfo", "probe", "read_clip", "read_header", "write_video"]

# FFmpeg's names of formats that contain their frames; playlists and scripts make it open the files that they name.
SELF_CONTAINED_FORMATS = ("mov", "matroska", "avi", "gif")


@dataclass(frozen=True)
class VideoHeader:
    """Size in pixels before rotation and duration in seconds, as the header states them; 0 where it does not."""

    width: int
    height: int
    duration: float


def read_header(path: VideoSource) -> VideoHeader:
    """The size and duration that an untrusted file announces; none of its frames is decoded.

    Raises `VideoError` unless the file's content (not its name) is mp4, mov, mkv, webm, avi or gif. FFmpeg opens no
    other file for it.
    """
    restrictions = {
        "format_whitelist": ",".join(SELF_CONTAINED_FORMATS),
        "protocol_whitelist": "file,subfile",
        "max_pixels": str(MAX_FRAME_PIXELS),
    }
    try:
        with open_container(as_source(path), restrictions) as container:
            if container.format.name.split(",")[0] not in SELF_CONTAINED_FORMATS:  # had the option no effect
                raise VideoError("it is not a mp4, mov, mkv, webm, avi or gif", path)
            stream = find_video_stream(container, path)
            durations = (container.duration or 0) / av.time_base, float((stream.duration or 0) * stream.time_base)
            return VideoHeader(stream.codec_context.width, stream.codec_context.height, max(durations))
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError("it is not a whole mp4, mov, mkv, webm, avi or gif", path) from error


def probe(path: VideoSource) -> VideoInfo:
    """Describe a video from its packets and first frame. Raises `VideoError` if it is not a complete video."""
    return probe_array(path) if isinstance(path, ArrayVideo) else index_video(path).info


def read_clip(path: VideoSource, *, start: float = 0.0, fps: float, num_frames: int) -> torch.Tensor:
    """Read `num_frames` frames at `fps` frames per second, from `start` seconds after the file's first frame.

    Frame i is the last one whose timestamp is at most start + i / fps, so frames repeat where the file's own rate is
    lower.

    Returns:
        uint8 (T, H, W, 3), RGB, upright and with square pixels, transparent parts over black.

    Raises:
        VideoError: if the file cannot be read, the clip reaches past its end, or one of the clip's frames, or a frame
            that these depend on, is damaged or missing.
    """
    if isinstance(path, ArrayVideo):
        return read_array_clip(path, start=start, fps=fps, num_frames=num_frames)
    index = index_video(path)
    try:
        return _read_clip(index, start, fps, num_frames)
    except UnlistedFrames:  # the packets announce other frames than decoding gives
        return _read_clip(scan_video(path)[0], start, fps, num_frames)


def _read_clip(index: VideoIndex, start: float, fps: float, num_frames: int) -> torch.Tensor:
    numbers = find_clip(index, start=start, fps=fps, num_frames=num_frames)
    try:
        return torch.from_numpy(decode_numbers(index, numbers))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"its frames cannot be decoded ({summarize_error(error)})", index.info.path) from error


def find_clip(index: VideoIndex, *, start: float = 0.0, fps: float, num_frames: int) -> np.ndarray:
    """The numbers of a clip's frames, int (T,), as `read_clip` chooses them. Raises `VideoError` past the end."""
    latest = index.info.latest_start(fps=fps, num_frames=num_frames)
    if not 0 <= start <= latest + 2 * TIME_TOLERANCE:
        expected = f"a clip from {start:.2f} s must start within 0 and {latest:.2f} s"
        raise VideoError(f"too short: {expected}", index.info.path)
    return index.find_frames(start + np.arange(num_frames) / fps)


def decode_numbers(index: VideoIndex, numbers: np.ndarray) -> np.ndarray:
    """Decode the frames with these numbers, uint8 (T, H, W, 3)."""
    required = set(numbers.tolist())
    frames = {}
    seek_to = index.find_keyframe(min(required))
    if seek_to is not None or index.can_skip:
        with suppress(av.FFmpegError, VideoError):  # frames before a keyframe may depend on skipped ones
            frames = _decode_required(index, required, seek_to=seek_to, skip=index.can_skip)
    if frames.keys() != required:  # some files mark frames as keyframes that are none
        frames = _decode_required(index, required)
    if missing := sorted(required - frames.keys()):
        kind = VideoError if index.is_scanned else UnlistedFrames
        raise kind(f"frame {missing[0]} cannot be decoded", index.info.path)
    return np.stack([frames[number] for number in numbers.tolist()])


def _decode_required(
    index: VideoIndex, required: set[int], seek_to: int | None = None, skip: bool = False
) -> dict[int, np.ndarray]:
    """Decode from the keyframe `seek_to` (or from the beginning) and keep the required frames, by number."""
    info, frames, damaged = index.info, {}, -1
    before = (seek_to or 0) - 1
    converter, last = VideoReformatter(), max(required)
    for number, frame in decode_frames(index, seek_to=seek_to, only=required if skip else None):
        # Without a scan, every frame must follow the one before it.
        if not (index.is_scanned or index.ticks is None or skip or (seek_to is not None and number < seek_to)):
            if number != before + 1:
                raise UnlistedFrames(f"frame {before + 1} cannot be decoded", info.path)
            before = number
        # Damage lasts until the next keyframe.
        if frame.is_corrupt or number < index.intact[0]:
            damaged = number
        elif frame.key_frame:
            damaged = -1
        if number in required:
            if damaged >= 0:  # this frame, or one that it depends on
                raise VideoError(f"frame {damaged} is damaged", info.path)
            frames[number] = to_rgb(frame, info.width, info.height, converter, orientation=index.orientation)
        if number >= last:
            return frames
    return frames
