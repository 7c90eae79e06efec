"""Open video files with FFmpeg: container, video stream and decoder, and the errors of unusable files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import av

from ..common.errors import UserError
from ..common.io import file_url
from .types import ArrayVideo, ShardMember, VideoSource

TIME_TOLERANCE = 1e-3  # seconds; Matroska rounds its timestamps to whole milliseconds
MAX_FRAME_PIXELS = 8192 * 8192  # a damaged header may announce frames of gigabytes
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's native decoders ignore transparency
DEFAULT_STREAM_BONUS = 5_000_000  # pixels added to the size of the default stream, as in the ffmpeg command


class VideoError(UserError):
    """A video that cannot be used. The message is one sentence, "PATH: REASON"; `path` and `reason` are its parts."""

    def __init__(self, reason: str, path: VideoSource | None = None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = None if path is None else as_source(path)


@dataclass(frozen=True)
class VideoInfo:
    """Size, rate and length of a video.

    `width` and `height` are in pixels as displayed: upright and with square pixels. `num_frames` includes repeated
    frames, such as those of empty chunks in an AVI. `duration` is in seconds.
    """

    path: Path | ShardMember | ArrayVideo
    width: int
    height: int
    fps: float
    num_frames: int
    duration: float
    codec: str

    def latest_start(self, *, fps: float, num_frames: int) -> float:
        """The latest `start` (seconds) for `read_clip`; raises `VideoError` if the video is too short."""
        if num_frames < 1 or not 0 < fps < math.inf:
            raise UserError(f"a clip needs at least 1 frame and a positive fps, got {num_frames} frames at {fps} fps")
        span = (num_frames - 1) / fps
        if self.duration <= span:
            required = f"{num_frames} frames at {fps:g} fps need more than {span:.2f} s"
            raise VideoError(f"too short: it lasts {self.duration:.2f} s, {required}", self.path)
        return max(0.0, self.duration - span - 2 * TIME_TOLERANCE)


def as_source(path: VideoSource) -> Path | ShardMember | ArrayVideo:
    return path if isinstance(path, ShardMember | ArrayVideo) else Path(path)


def open_container(source: Path | ShardMember, options: dict[str, str] | None = None) -> av.container.InputContainer:
    """Open a video for reading; a shard member is read in place."""
    if isinstance(source, ShardMember):
        end = source.offset + source.size
        url = f"subfile,,start,{source.offset},end,{end},,:{file_url(source.shard)}"
    else:
        url = file_url(source)
    return av.open(url, options=options)


def find_video_stream(container: av.container.InputContainer, path: VideoSource) -> av.VideoStream:
    """The stream that the ffmpeg command selects: the largest one, with a bonus for the default stream.

    Raises `VideoError` if there is none, or only a cover picture, or only streams of unknown codecs.
    """
    Disposition = av.stream.Disposition
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        reason = "it holds no video, only a cover picture" if container.streams.video else "it holds no video stream"
        raise VideoError(reason, path)
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise VideoError("its codec is unknown or missing from this build of PyAV", path)

    def rank(stream: av.VideoStream) -> int:
        size = stream.codec_context.width * stream.codec_context.height
        return size + DEFAULT_STREAM_BONUS * bool(stream.disposition & Disposition.default)

    return max(known, key=rank)


def create_decoder(stream: av.VideoStream, threads: int = 1) -> av.VideoCodecContext:
    """A decoder that keeps transparency where the stream has it. `threads=0` uses one thread per core."""
    decoder = stream.codec_context
    alpha_decoder = ALPHA_DECODERS.get(decoder.name)
    if stream.metadata.get("alpha_mode") == "1" and alpha_decoder in av.codecs_available:
        decoder = av.CodecContext.create(alpha_decoder, "r")
    decoder.thread_count, decoder.thread_type = threads, "AUTO"
    decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    return decoder


def summarize_error(error: Exception) -> str:
    """The reason that FFmpeg or the operating system gives, in a few words."""
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[-1] or type(error).__name__
