"""Video files as FFmpeg opens them: how they are named, which stream is the video, and what can go wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import av

from ..common.errors import UserError
from ..common.io import file_url
from .types import ShardMember, VideoSource

EPSILON = 1e-3  # seconds; Matroska rounds its timestamps to whole milliseconds
LARGEST_FRAME = 8192 * 8192  # pixels; a damaged header may announce frames of gigabytes
TRANSPARENCY_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave it out
DEFAULT_STREAM_BONUS = 5_000_000  # pixels added to the size of the default stream, as in the ffmpeg command


class VideoError(UserError):
    """A video that cannot be used; the message is one sentence. `path` and `reason` hold its two halves."""

    def __init__(self, reason: str, path: VideoSource | None = None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = None if path is None else as_source(path)


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. Sizes are in pixels as displayed, that is upright and with square pixels.

    `num_frames` includes repetitions, such as those of an AVI's empty chunks. `duration` is in seconds.
    """

    path: Path | ShardMember
    width: int
    height: int
    fps: float
    num_frames: int
    duration: float
    codec: str

    def latest_start(self, *, fps: float, num_frames: int) -> float:
        """The latest `start` (seconds) for `read_clip`; raises `VideoError` if the video is too short."""
        if num_frames < 1 or not 0 < fps < math.inf:
            raise UserError(f"a clip has at least 1 frame and a positive fps, got {num_frames} frames at {fps} fps")
        span = (num_frames - 1) / fps
        if self.duration <= span:
            wanted = f"{num_frames} frames at {fps:g} fps need more than {span:.2f} s"
            raise VideoError(f"too short: it lasts {self.duration:.2f} s, {wanted}", self.path)
        return max(0.0, self.duration - span - 2 * EPSILON)


def as_source(path: VideoSource) -> Path | ShardMember:
    return path if isinstance(path, ShardMember) else Path(path)


def open_container(source: Path | ShardMember, options: dict[str, str] | None = None) -> av.container.InputContainer:
    """Open for reading; a member of a shard is read in place."""
    if isinstance(source, ShardMember):
        end = source.offset + source.size
        url = f"subfile,,start,{source.offset},end,{end},,:{file_url(source.shard)}"
    else:
        url = file_url(source)
    return av.open(url, options=options)


def find_video_stream(container: av.container.InputContainer, path: VideoSource) -> av.VideoStream:
    """The stream that the ffmpeg command shows: the largest one, with a bonus for the one flagged as default.

    Raises `VideoError` if there is none, or only a cover picture, or one whose codec is unknown.
    """
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        reason = "it holds no video, only a cover picture" if container.streams.video else "it holds no video stream"
        raise VideoError(reason, path)
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise VideoError("its codec is unknown or missing from this build of PyAV", path)
    return max(known, key=_prominence)


def _is_cover(stream: av.VideoStream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _prominence(stream: av.VideoStream) -> int:
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.codec_context.width * stream.codec_context.height + DEFAULT_STREAM_BONUS * is_default


def create_decoder(stream: av.VideoStream, threads: int = 1) -> av.VideoCodecContext:
    """The stream's decoder, or one that keeps its transparency; `threads`: 0 is one for each core."""
    decoder = stream.codec_context
    capable = TRANSPARENCY_DECODERS.get(decoder.name)
    if stream.metadata.get("alpha_mode") == "1" and capable in av.codecs_available:
        decoder = av.CodecContext.create(capable, "r")
    decoder.thread_count, decoder.thread_type = threads, "AUTO"
    decoder.options = {"max_pixels": str(LARGEST_FRAME)}
    return decoder


def short_reason(error: Exception) -> str:
    """What FFmpeg or the system says went wrong, in a few words."""
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[-1] or type(error).__name__
