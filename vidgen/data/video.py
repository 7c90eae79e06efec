"""Video files in and out: clips by time, and the names that the rest of vidgen uses.

A file is first indexed (`video_index`): its packets are listed, not decoded, which gives the timestamp of every frame,
in display order. Frames are then chosen by those timestamps, and decoded from the keyframe before the first to the
last of them (`video_frames` turns them into pixels). All by PyAV, that is FFmpeg's own libraries: it is as fast as
decord or faster here, and says where a file is damaged, where decord hands out the damage as frames (figures in
docs/data.md).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..common.video_writing import exact_rate, mp4_file, write_video
from .types import ShardMember, VideoSource
from .video_file import (
    EPSILON,
    LARGEST_FRAME,
    VideoError,
    VideoInfo,
    as_source,
    find_video_stream,
    open_container,
    short_reason,
)
from .video_frames import to_rgb
from .video_index import UnlistedFrames, VideoIndex, decode_frames, index_video, scan_video

__all__ = [
    "VIDEO_EXTENSIONS",
    "ShardMember",
    "VideoError",
    "VideoHeader",
    "VideoIndex",
    "VideoInfo",
    "VideoSource",
    "decode_frames",
    "decode_numbers",
    "exact_rate",
    "find_clip",
    "index_video",
    "mp4_file",
    "probe",
    "read_clip",
    "read_header",
    "short_reason",
    "to_rgb",
    "write_video",
]

# Endings of the video files that FFmpeg reads; `vidgen.data.formats` looks into those that other files share. Left out
# are playlists, sound, still images, raw pixels, and endings that mostly mean something else (.dat, .mod, .drc, .swf).
_ENDINGS = """
    mp4 m4v mp4v mov qt 3gp 3g2 3gpp 3gpp2 3gp2 f4v ismv mj2 avif
    avi divx xvid amv asf wmv wm wtv dvr-ms flv mkv mk3d webm ogv ogm ogx ogg nut rm rmvb rv
    mpg mpeg mpe mpv m1v m2v m2p mp2v vob vro evo ts mts m2ts m2t tp trp tod mxf gxf dv dif imx
    gif apng webp flc fli mjpeg mjpg y4m ivf obu vc1 h261 h263 h264 264 avc h265 265 hevc h266 266 vvc
    nsv nuv roq bik smk viv movie dav pva
"""
VIDEO_EXTENSIONS = frozenset(f".{ending}" for ending in _ENDINGS.split())

# FFmpeg's names of formats that hold their own pictures; playlists and scripts make it open the files they name.
SELF_CONTAINED_FORMATS = ("mov", "matroska", "avi", "gif")


@dataclass(frozen=True)
class VideoHeader:
    """What a file says of itself: pixels before rotation, seconds; 0 where it does not say."""

    width: int
    height: int
    duration: float


def read_header(path: VideoSource) -> VideoHeader:
    """The size and length that a stranger's file announces, before any of its frames is decoded.

    Raises `VideoError` unless it is a mp4, mov, mkv, webm, avi or gif, told by its content, not its name: no other
    file is opened for it.
    """
    trusted = {
        "format_whitelist": ",".join(SELF_CONTAINED_FORMATS),
        "protocol_whitelist": "file,subfile",
        "max_pixels": str(LARGEST_FRAME),
    }
    try:
        with open_container(as_source(path), trusted) as container:
            if container.format.name.split(",")[0] not in SELF_CONTAINED_FORMATS:  # had the option no effect
                raise VideoError("it is not a mp4, mov, mkv, webm, avi or gif", path)
            stream = find_video_stream(container, path)
            lengths = (container.duration or 0) / av.time_base, float((stream.duration or 0) * stream.time_base)
            return VideoHeader(stream.codec_context.width, stream.codec_context.height, max(lengths))
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError("it is not a whole mp4, mov, mkv, webm, avi or gif", path) from error


def probe(path: VideoSource) -> VideoInfo:
    """Describe a video from its packets and first frame. Raises `VideoError` for what is not a whole video."""
    return index_video(path).info


def read_clip(path: VideoSource, *, start: float = 0.0, fps: float, num_frames: int) -> torch.Tensor:
    """Read `num_frames` frames at `fps` frames a second, from `start` seconds after the file's first frame.

    Returns uint8 (T, H, W, 3), RGB, upright and with square pixels, over black where it is transparent. Frame i is the
    last one whose timestamp is at most start + i / fps, so frames repeat where the file's own rate is lower. Raises
    `VideoError` if the file cannot be read, the clip reaches past its end, or one of its frames, or a frame that these
    are built on, is damaged or missing.
    """
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
        raise VideoError(f"its frames cannot be decoded ({short_reason(error)})", index.info.path) from error


def find_clip(index: VideoIndex, *, start: float = 0.0, fps: float, num_frames: int) -> np.ndarray:
    """The numbers of a clip's frames, int (T,), as `read_clip` chooses them. Raises `VideoError` past the end."""
    latest = index.info.latest_start(fps=fps, num_frames=num_frames)
    if not 0 <= start <= latest + 2 * EPSILON:
        expected = f"a clip from {start:.2f} s must start within 0 and {latest:.2f} s"
        raise VideoError(f"too short: {expected}", index.info.path)
    return index.numbers_at(start + np.arange(num_frames) / fps)


# --- decoding chosen frames ---------------------------------------------------------------------------------------


def decode_numbers(index: VideoIndex, numbers: np.ndarray) -> np.ndarray:
    """The frames with these numbers, uint8 (T, H, W, 3)."""
    wanted = set(numbers.tolist())
    found = {}
    seek_to = index.keyframe_before(min(wanted))
    if seek_to is not None or index.can_skip:
        with suppress(av.FFmpegError, VideoError):  # what comes before a keyframe may refer to what was left out
            found = _collect(index, wanted, seek_to=seek_to, skip=index.can_skip)
    if found.keys() != wanted:  # some files promise keyframes that are none
        found = _collect(index, wanted)
    if missing := sorted(wanted - found.keys()):
        kind = VideoError if index.is_scanned else UnlistedFrames
        raise kind(f"frame {missing[0]} cannot be decoded", index.info.path)
    return np.stack([found[number] for number in numbers.tolist()])


def _collect(
    index: VideoIndex, wanted: set[int], seek_to: int | None = None, skip: bool = False
) -> dict[int, np.ndarray]:
    """Decode from the keyframe `seek_to` (or from the beginning) and keep the wanted frames, by number."""
    info, found, damaged = index.info, {}, -1
    before = (seek_to or 0) - 1
    converter, last = VideoReformatter(), max(wanted)
    for number, frame in decode_frames(index, seek_to=seek_to, only=wanted if skip else None):
        if not (index.is_scanned or index.ticks is None or skip or (seek_to is not None and number < seek_to)):
            if number != before + 1:
                raise UnlistedFrames(f"frame {before + 1} cannot be decoded", info.path)
            before = number
        if frame.is_corrupt or number < index.sound[0]:
            damaged = number
        elif frame.key_frame:
            damaged = -1
        if number in wanted:
            if damaged >= 0:  # this frame, or one that it is built on
                raise VideoError(f"frame {damaged} is damaged", info.path)
            found[number] = to_rgb(frame, info.width, info.height, converter, orientation=index.orientation)
        if number >= last:
            return found
    return found
