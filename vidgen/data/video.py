"""Video files in and out: the one place that knows about containers and decoders.

A file is first indexed with PyAV: its packets are listed, not decoded, which gives the timestamp of every frame, in
display order. Frames are then chosen by those timestamps and decoded by decord, or by PyAV where decord is missing,
fails, or cannot be trusted: where frames are stored out of order across a keyframe (B-frames in AVI, open groups of
pictures) and in streams without an index (MPEG-TS) decord silently returns frames from up to a second away. Which of
the two ran makes no difference to the frames of a sound file; in a damaged one only PyAV tells which are concealed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch

from ..errors import UserError
from ..files import written_aside

try:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
except (ImportError, OSError):  # no wheels for this platform, or ones that do not load
    decord = None

VIDEO_EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})

DECORD_FORMATS = {"mov", "matroska", "avi"}  # FFmpeg's first names of mp4, mkv and webm, avi
# Only these find the keyframe asked for: MPEG streams land past it, and then count and decode frames wrongly.
SEEKABLE_FORMATS = {"mov", "matroska"}
EPSILON = 1e-3  # seconds; Matroska rounds its timestamps to whole milliseconds
TRANSPARENCY_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave it out
PHANTOMS = 2  # frames: some files announce one or two more than they hold
HIGHEST_RATE = 1000  # frames a second; a slip of the finger would else ask for gigabytes of frames
REORDERING = 16  # frames: the most that H.264 and HEVC may shift a frame between decoding and display


class VideoError(UserError):
    """A video that cannot be used; the message is one sentence. `path` and `reason` hold its two halves."""

    def __init__(self, reason: str, path: str | os.PathLike | None = None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = None if path is None else Path(path)


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. Sizes are in pixels as displayed (after rotation), `duration` is in seconds."""

    path: Path
    width: int
    height: int
    fps: float
    num_frames: int
    duration: float
    codec: str

    def latest_start(self, *, fps: float, num_frames: int) -> float:
        """The latest `start` (seconds) for `read_clip`; raises `VideoError` if the video is too short."""
        if num_frames < 1 or fps <= 0:
            raise UserError(f"a clip has at least 1 frame and a positive fps, got {num_frames} frames at {fps} fps")
        span = (num_frames - 1) / fps
        if self.duration <= span:
            wanted = f"{num_frames} frames at {fps:g} fps need more than {span:.2f} s"
            raise VideoError(f"too short: it lasts {self.duration:.2f} s, {wanted}", self.path)
        return max(0.0, self.duration - span - 2 * EPSILON)


def probe(path: str | os.PathLike) -> VideoInfo:
    """Describe a video from its packets and first frame. Raises `VideoError` for what is not a whole video."""
    return index_video(path).info


def read_clip(
    path: str | os.PathLike,
    *,
    start: float = 0.0,
    fps: float,
    num_frames: int,
    decoder: Literal["auto", "decord", "pyav"] = "auto",
) -> torch.Tensor:
    """Read `num_frames` frames at `fps` frames a second, from `start` seconds after the file's first frame.

    Returns uint8 (T, H, W, 3), RGB, upright, over black where it is transparent. Frame i is the last one whose
    timestamp is at most start + i / fps, so frames repeat where the file's own rate is lower. Raises `VideoError` if
    the file cannot be read or the clip reaches past its end.
    """
    index = index_video(path)
    latest = index.info.latest_start(fps=fps, num_frames=num_frames)
    if not 0 <= start <= latest + 2 * EPSILON:
        raise VideoError(f"too short: a clip from {start:.2f} s must start within 0 and {latest:.2f} s", path)
    numbers = index.numbers_at(start + np.arange(num_frames) / fps)
    return torch.from_numpy(_decode(index, numbers, decoder))


def write_video(
    path: str | os.PathLike, frames: np.ndarray | torch.Tensor, fps: float | Fraction, *, crf: int = 16
) -> Path:
    """Write `frames` as an H.264 (yuv420p) mp4 of exactly this size, frame count and rate.

    `frames`: uint8 (T, H, W, 3), RGB. H and W must be even: yuv420p halves the colour planes, and the alternative,
    yuv444p, does not play in browsers. `crf`: x264's quality, lower is better. The file is written beside `path` and
    renamed when complete. Raises `UserError` for frames or a rate that cannot be written.
    """
    path = Path(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise UserError(f"{path}: frames must be uint8 of shape (T, H, W, 3), got {frames.dtype} {frames.shape}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: H.264 with yuv420p needs an even height and width, got {height}x{width}")
    # The same frames give the same bytes with one thread only.
    with mp4_file(path, fps=fps, width=width, height=height, crf=crf, threads=1) as add:
        for frame in frames:
            add(frame)
    return path


@contextmanager
def mp4_file(
    path: str | os.PathLike, *, fps: float | Fraction, width: int, height: int, crf: int = 16, threads: int = 0
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a frame, uint8 (H, W, 3), RGB, to an H.264 mp4 written beside `path`.

    It becomes `path` when the block ends, and vanishes if the block raises. yuv420p where both sides are even, which
    browsers play; yuv444p, which they do not, where one is odd. `threads`: 0 is one for each core.
    """
    with (
        written_aside(path) as unfinished,
        av.open(str(unfinished), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # Without x264's macroblock tree, which on small frames decides differently from run to run.
        options = {"crf": str(crf), "threads": str(threads), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=exact_rate(fps, path), options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        # Name the matrix that PyAV converts with, BT.601; players would guess BT.709 for large frames.
        colours = stream.codec_context
        colours.color_range, colours.colorspace, colours.color_primaries, colours.color_trc = 1, 6, 6, 6

        def add(frame: np.ndarray) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield add
        container.mux(stream.encode())


def exact_rate(fps: float | Fraction, path: str | os.PathLike) -> Fraction:
    """Frames per second as the nearest plain fraction: 29.97 is 2997/100, the float 30000/1001 is that again.

    Raises `UserError`, naming `path`, if it is not a positive number.
    """
    if not 0 < fps < math.inf:
        raise UserError(f"{path}: fps must be positive, got {fps}")
    if fps > HIGHEST_RATE:
        raise UserError(f"{path}: fps must be at most {HIGHEST_RATE}, got {fps:g}")
    exact = fps if isinstance(fps, Fraction) else Fraction(float(fps))
    return exact.limit_denominator(1001) if exact > 1 else 1 / (1 / exact).limit_denominator(1001)


# --- the index: which frames there are, and when ------------------------------------------------------------------


class _Packet(NamedTuple):  # without its data
    pts: int | None
    duration: int | None
    is_keyframe: bool
    is_corrupt: bool


@dataclass(frozen=True)
class VideoIndex:
    """What a file holds, and when each of its frames is shown."""

    info: VideoInfo
    timestamps: np.ndarray  # seconds since the first frame, increasing, one for each frame in display order
    ticks: np.ndarray | None  # the same in the stream's own units; None where the file's timestamps are no guide
    suits_decord: bool
    can_seek: bool

    def numbers_at(self, moments: np.ndarray) -> np.ndarray:
        """For each moment, in seconds, the number of the frame shown then: the last that has begun."""
        return np.searchsorted(self.timestamps, moments + EPSILON, side="right") - 1

    def number_of(self, tick: int | None) -> int:
        """The number of the frame with this timestamp, or -1."""
        if tick is None:
            return -1
        number = int(np.searchsorted(self.ticks, tick))
        return number if number < len(self.ticks) and self.ticks[number] == tick else -1


def index_video(path: str | os.PathLike) -> VideoIndex:
    """List a file's frames without decoding them. Raises `VideoError` for what is not a whole video."""
    path = Path(path)
    if not path.is_file():
        raise VideoError("it is a folder, not a video" if path.is_dir() else "no such file", path)
    status = path.stat()
    if status.st_size == 0:
        raise VideoError("the file is empty", path)
    try:
        return _read_index(path, status.st_size, status.st_mtime_ns)
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError(f"not a readable video ({short_reason(error)})", path) from error


@lru_cache(maxsize=16384)  # UCF-101 has 13 320 files; an entry takes a few kilobytes
def _read_index(path: Path, size: int, modified: int) -> VideoIndex:
    """List the packets of the main video stream and decode its first frame; `size`, `modified` are for the cache."""
    packets, first = [], None
    with av.open(str(path)) as container:
        format_name = container.format.name.split(",")[0]
        if format_name == "tty":  # FFmpeg would film the text scrolling over a terminal
            raise VideoError("it is text, not a video", path)
        stream = _main_stream(container, path)
        announced, rate = stream.frames, float(stream.average_rate or stream.guessed_rate or 0)
        decoder = _decoder(stream)
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                packets.append(_Packet(packet.pts, packet.duration, packet.is_keyframe, packet.is_corrupt))
            if first is None:
                first = next(iter(decoder.decode(packet)), None)
        promised = _promised_seconds(stream) if format_name == "matroska" else 0.0
        time_base, codec, has_b_frames = stream.time_base, stream.codec_context.name, stream.codec_context.has_b_frames
    whole = [packet for packet in packets if not packet.is_corrupt]
    if first is None or not whole:
        raise VideoError("it holds no frame that can be decoded", path)
    if len(whole) < min(announced, len(packets)) or len(packets) < announced - max(PHANTOMS, announced // 20):
        raise VideoError(f"cut off: {len(whole)} of {announced} frames are whole", path)

    stamps = {packet.pts for packet in whole}
    if format_name != "avi" and None not in stamps and len(stamps) == len(whole):
        order = np.argsort([packet.pts for packet in whole])
        ticks = np.array([whole[i].pts for i in order])
        timestamps = (ticks - ticks[0]) * float(time_base)
        last = (whole[order[-1]].duration or 0) * float(time_base) or timestamps[-1] / max(1, len(whole) - 1)
        duration = float(timestamps[-1] + last)
        measured = len(whole) / duration if duration else rate
        fps = rate if abs(rate - measured) < 0.01 * measured else measured  # exact where the header is right
        if ticks[0] * float(time_base) + duration < promised - max(PHANTOMS / fps if fps else 0, promised / 20):
            raise VideoError(f"cut off: {duration:.2f} of {promised:.2f} s are there", path)
        # Every keyframe comes after all earlier frames and before all later ones.
        in_order = all(shown == place for place, shown in enumerate(order) if whole[shown].is_keyframe)
    elif rate:  # AVI has no timestamps, only a rate
        ticks, timestamps = None, np.arange(len(whole)) / rate
        duration, fps, in_order = len(whole) / rate, rate, not has_b_frames
    else:
        raise VideoError("it has neither timestamps nor a frame rate", path)

    turns = _quarter_turns(first)
    width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
    info = VideoInfo(path, width, height, fps, len(whole), duration, codec)
    plain = in_order and not turns and not _is_transparent(first)
    can_seek = ticks is not None and format_name in SEEKABLE_FORMATS
    return VideoIndex(info, timestamps, ticks, plain and format_name in DECORD_FORMATS, can_seek)


def _main_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise VideoError("it holds no video stream", path)
    if stream.codec_context is None:
        raise VideoError("its codec is unknown or missing from this build of PyAV", path)
    return stream


def _decoder(stream: av.VideoStream, threads: int = 1) -> av.VideoCodecContext:
    decoder = stream.codec_context
    capable = TRANSPARENCY_DECODERS.get(decoder.name)
    if stream.metadata.get("alpha_mode") == "1" and capable in av.codecs_available:
        decoder = av.CodecContext.create(capable, "r")
    decoder.thread_count, decoder.thread_type = threads, "AUTO"
    return decoder


def _promised_seconds(stream: av.VideoStream) -> float:
    """Where Matroska's tags say that the stream ends; 0 where they do not."""
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return 0.0


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that set the frame upright (phones store them as metadata)."""
    return round(getattr(frame, "rotation", 0) / 90) % 4


def _is_transparent(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def short_reason(error: Exception) -> str:
    """What FFmpeg or the system says went wrong, in a few words."""
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[-1] or type(error).__name__


# --- decoding chosen frames ---------------------------------------------------------------------------------------


def _decode(index: VideoIndex, numbers: np.ndarray, decoder: str) -> np.ndarray:
    if decoder not in ("auto", "decord", "pyav"):
        raise UserError(f"unknown decoder {decoder!r}, expected auto, decord or pyav")
    if decoder == "decord" and decord is None:
        raise UserError("decord is not installed; use decoder='pyav'")
    if decoder == "decord" or (decoder == "auto" and decord is not None and index.suits_decord):
        try:
            return _decode_with_decord(index, numbers)
        except Exception as error:  # its own errors share no base class, and PyAV has the last word
            if decoder == "decord":
                raise VideoError(f"decord cannot read it ({short_reason(error)})", index.info.path) from error
    try:
        return _decode_with_pyav(index, numbers)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"its frames cannot be decoded ({short_reason(error)})", index.info.path) from error


def _decode_with_decord(index: VideoIndex, numbers: np.ndarray) -> np.ndarray:
    info = index.info
    # More threads have been seen to hang; fault_tol: fail rather than repeat frames it could not decode.
    reader = decord.VideoReader(str(info.path), num_threads=1, fault_tol=1)
    if len(reader) != info.num_frames:
        raise VideoError(f"decord counts {len(reader)} frames, PyAV {info.num_frames}", info.path)
    batch = reader.get_batch(numbers.tolist())
    frames = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)  # decord.bridge may be set
    if frames.shape != (len(numbers), info.height, info.width, 3):
        raise VideoError(f"decord gives frames of shape {frames.shape[1:]}", info.path)
    return frames


def _decode_with_pyav(index: VideoIndex, numbers: np.ndarray) -> np.ndarray:
    wanted = set(numbers.tolist())
    start = min(wanted) - REORDERING
    found = {}
    if start > 0 and index.can_seek:
        found = _collect(index, wanted, seek_to=int(index.ticks[start]))
    if found.keys() != wanted:
        found = _collect(index, wanted)
    if missing := sorted(wanted - found.keys()):
        raise VideoError(f"frame {missing[0]} cannot be decoded", index.info.path)
    return np.stack([found[number] for number in numbers.tolist()])


def _collect(index: VideoIndex, wanted: set[int], seek_to: int | None = None) -> dict[int, np.ndarray]:
    """Decode from the keyframe before `seek_to` (or from the beginning) and keep the wanted frames, by number."""
    info, found, number, frame = index.info, {}, -1, None
    for number, frame in decode_frames(index, seek_to=seek_to):
        if number in wanted:
            if frame.is_corrupt:
                raise VideoError(f"frame {number} is damaged", info.path)
            found[number] = to_rgb(frame, info.width, info.height)
        if number >= max(wanted):
            return found
    if number >= 0 and info.num_frames - 1 - number <= PHANTOMS:
        for phantom in wanted.intersection(range(number + 1, info.num_frames)):
            found[phantom] = to_rgb(frame, info.width, info.height)  # the last frame stays on the screen
    return found


def decode_frames(
    index: VideoIndex, *, seek_to: int | None = None, threads: int = 1
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode from the keyframe before `seek_to`, in ticks, or from the beginning: every frame with its number.

    The number is -1 for a frame that the index does not list. `threads`: one by default, as data-loading workers are
    the parallelism; 0 is one for each core.
    """
    with av.open(str(index.info.path)) as container:
        stream = _main_stream(container, index.info.path)
        decoder = _decoder(stream, threads)
        if seek_to is not None:
            container.seek(seek_to, stream=stream)
        decoded = (frame for packet in container.demux(stream) for frame in decoder.decode(packet))
        for count, frame in enumerate(decoded):
            yield count if index.ticks is None else index.number_of(frame.pts), frame


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """A decoded frame as contiguous uint8 (height, width, 3), upright, over black where it is transparent.

    The size is named for the rare stream that changes it midway.
    """
    turns = _quarter_turns(frame)
    if turns % 2:
        width, height = height, width
    if _is_transparent(frame):
        pixels = frame.to_ndarray(format="rgba", width=width, height=height).astype(np.uint16)
        pixels = ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(pixels, turns))
