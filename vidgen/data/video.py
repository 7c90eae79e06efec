"""Video files in and out: the one place that knows about containers and decoders.

A file is first indexed: its packets are listed, not decoded, which gives the timestamp of every frame, in display
order. Frames are then chosen by those timestamps, and decoded from the keyframe before the first to the last of them.
All by PyAV, that is FFmpeg's own libraries: it is as fast as decord or faster here, and says where a file is damaged,
where decord hands out the damage as frames (figures in docs/data.md).
"""

from __future__ import annotations

import math
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..errors import UserError
from ..files import written_aside

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

# Only these find the keyframe asked for: MPEG streams land past it, and then count and decode frames wrongly.
SEEKABLE_FORMATS = {"mov", "matroska"}  # FFmpeg's first names of mp4, mkv and webm
EPSILON = 1e-3  # seconds; Matroska rounds its timestamps to whole milliseconds
TRANSPARENCY_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave it out
PHANTOMS = 2  # frames: some files announce one or two more than they hold
HIGHEST_RATE = 1000  # frames a second; a slip of the finger would else ask for gigabytes of frames
LARGEST_FRAME = 8192 * 8192  # pixels; a damaged header would else ask for gigabytes
# FFmpeg's names of formats that hold their own pictures; playlists and scripts make it open the files they name.
SELF_CONTAINED_FORMATS = ("mov", "matroska", "avi", "gif")
# These leave out the frames that no other frame needs (many B-frames) when told so, from one packet to the next.
SKIPPING_DECODERS = {"h264", "hevc", "mpeg4", "mpeg2video"}
INDEX_CACHE_FRAMES = 5_000_000  # about 100 MB in each process; UCF-101 has 2.5 million frames


class ShardMember(NamedTuple):
    """A video inside an uncompressed tar file, read where it lies; takes the place of a path.

    `offset` and `size` are those of its bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


VideoSource = str | os.PathLike | ShardMember


class VideoError(UserError):
    """A video that cannot be used; the message is one sentence. `path` and `reason` hold its two halves."""

    def __init__(self, reason: str, path: VideoSource | None = None):
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
        self.path = None if path is None else _as_source(path)


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. Sizes are in pixels as displayed (after rotation), `duration` is in seconds."""

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
        with _open(_as_source(path), trusted) as container:
            if container.format.name.split(",")[0] not in SELF_CONTAINED_FORMATS:  # had the option no effect
                raise VideoError("it is not a mp4, mov, mkv, webm, avi or gif", path)
            stream = _main_stream(container, path)
            lengths = (container.duration or 0) / av.time_base, float((stream.duration or 0) * stream.time_base)
            return VideoHeader(stream.codec_context.width, stream.codec_context.height, max(lengths))
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError("it is not a whole mp4, mov, mkv, webm, avi or gif", path) from error


def probe(path: VideoSource) -> VideoInfo:
    """Describe a video from its packets and first frame. Raises `VideoError` for what is not a whole video."""
    return index_video(path).info


def read_clip(path: VideoSource, *, start: float = 0.0, fps: float, num_frames: int) -> torch.Tensor:
    """Read `num_frames` frames at `fps` frames a second, from `start` seconds after the file's first frame.

    Returns uint8 (T, H, W, 3), RGB, upright, over black where it is transparent. Frame i is the last one whose
    timestamp is at most start + i / fps, so frames repeat where the file's own rate is lower. Raises `VideoError` if
    the file cannot be read, the clip reaches past its end, or one of its frames, or a frame that these are built on,
    is damaged.
    """
    index = index_video(path)
    latest = index.info.latest_start(fps=fps, num_frames=num_frames)
    if not 0 <= start <= latest + 2 * EPSILON:
        raise VideoError(f"too short: a clip from {start:.2f} s must start within 0 and {latest:.2f} s", path)
    numbers = index.numbers_at(start + np.arange(num_frames) / fps)
    try:
        return torch.from_numpy(_decode(index, numbers))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"its frames cannot be decoded ({short_reason(error)})", path) from error


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
    keyframes: np.ndarray | None  # their numbers; None where the container finds none by its timestamp
    can_skip: bool  # whether frames on which no other is built can be left out

    def numbers_at(self, moments: np.ndarray) -> np.ndarray:
        """For each moment, in seconds, the number of the frame shown then: the last that has begun."""
        return np.searchsorted(self.timestamps, moments + EPSILON, side="right") - 1

    def keyframe_before(self, number: int) -> int | None:
        """The tick to seek to for decoding this frame; None where decoding must begin at the beginning."""
        if self.keyframes is None:
            return None
        place = int(np.searchsorted(self.keyframes, number, side="right")) - 1
        return int(self.ticks[self.keyframes[place]]) if place > 0 else None

    def number_of(self, tick: int | None) -> int:
        """The number of the frame with this timestamp, or -1."""
        if tick is None:
            return -1
        number = int(np.searchsorted(self.ticks, tick))
        return number if number < len(self.ticks) and self.ticks[number] == tick else -1


def index_video(path: VideoSource) -> VideoIndex:
    """List a file's frames without decoding them. Raises `VideoError` for what is not a whole video."""
    source = _as_source(path)
    file = source.shard if isinstance(source, ShardMember) else source
    try:
        status = file.stat()
    except FileNotFoundError:
        raise VideoError("no such file", path) from None
    except (OSError, ValueError) as error:
        raise VideoError(f"it cannot be opened ({short_reason(error)})", path) from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("it is a folder, not a video" if stat.S_ISDIR(status.st_mode) else "it is not a file", path)
    if isinstance(source, ShardMember) and source.offset + source.size > status.st_size:
        raise VideoError(f"its shard is cut off: it has {status.st_size} bytes, and the video lies beyond", path)
    if (source.size if isinstance(source, ShardMember) else status.st_size) == 0:
        raise VideoError("the file is empty", path)
    key = (source, status.st_size, status.st_mtime_ns)
    index = _indices.get(key)
    if index is None:
        try:
            index = _read_index(source)
        except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
            raise VideoError(f"not a readable video ({short_reason(error)})", path) from error
        _indices.put(key, index)
    return index


class _IndexCache:
    """The indices used last, as many as hold `INDEX_CACHE_FRAMES` together."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, VideoIndex] = OrderedDict()
        self._frames = 0

    def get(self, key: tuple) -> VideoIndex | None:
        index = self._kept.get(key)
        if index is not None:
            self._kept.move_to_end(key)
        return index

    def put(self, key: tuple, index: VideoIndex) -> None:
        self._kept[key] = index
        self._frames += _CACHED_FRAMES + index.info.num_frames
        while self._frames > INDEX_CACHE_FRAMES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._frames -= _CACHED_FRAMES + oldest.info.num_frames


_CACHED_FRAMES = 100  # what an index weighs besides its frames, counted in frames
_indices = _IndexCache()


def _as_source(path: VideoSource) -> Path | ShardMember:
    return path if isinstance(path, ShardMember) else Path(path)


def _open(source: Path | ShardMember, options: dict[str, str] | None = None) -> av.container.InputContainer:
    """Open for reading; FFmpeg itself reads a shard's slice, and takes no name for a protocol's."""
    name = f"file:{source}"
    if isinstance(source, ShardMember):
        name = f"subfile,,start,{source.offset},end,{source.offset + source.size},,:{source.shard}"
    return av.open(name, options=options)


def _read_index(path: Path | ShardMember) -> VideoIndex:
    """List the packets of the main video stream and decode its first frame."""
    packets, first = [], None
    with _open(path) as container:
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
        time_base, codec = stream.time_base, stream.codec_context.name
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
    elif rate:  # AVI has no timestamps, only a rate
        ticks, timestamps, order = None, np.arange(len(whole)) / rate, np.arange(len(whole))
        duration, fps = len(whole) / rate, rate
    else:
        raise VideoError("it has neither timestamps nor a frame rate", path)

    turns = _quarter_turns(first)
    width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
    info = VideoInfo(path, width, height, fps, len(whole), duration, codec)
    keyframes = None
    if ticks is not None and format_name in SEEKABLE_FORMATS:
        keyframes = np.flatnonzero([whole[i].is_keyframe for i in order])
    # The second field of an interlaced frame may be left out by itself.
    can_skip = ticks is not None and codec in SKIPPING_DECODERS and not first.interlaced_frame
    return VideoIndex(info, timestamps, ticks, keyframes, can_skip)


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
    decoder.options = {"max_pixels": str(LARGEST_FRAME)}
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


def _decode(index: VideoIndex, numbers: np.ndarray) -> np.ndarray:
    wanted = set(numbers.tolist())
    found = {}
    seek_to = index.keyframe_before(min(wanted))
    if seek_to is not None or index.can_skip:
        with suppress(av.FFmpegError, VideoError):  # what comes before a keyframe may refer to what was left out
            found = _collect(index, wanted, seek_to=seek_to, skip=index.can_skip)
    if found.keys() != wanted:  # some files promise keyframes that are none
        found = _collect(index, wanted)
    if missing := sorted(wanted - found.keys()):
        raise VideoError(f"frame {missing[0]} cannot be decoded", index.info.path)
    return np.stack([found[number] for number in numbers.tolist()])


def _collect(
    index: VideoIndex, wanted: set[int], seek_to: int | None = None, skip: bool = False
) -> dict[int, np.ndarray]:
    """Decode from the keyframe at `seek_to` (or from the beginning) and keep the wanted frames, by number."""
    info, found, number, frame, damaged = index.info, {}, -1, None, -1
    converter, last = VideoReformatter(), max(wanted)
    for number, frame in decode_frames(index, seek_to=seek_to, only=wanted if skip else None):
        if frame.is_corrupt:
            damaged = number
        elif frame.key_frame:
            damaged = -1
        if number in wanted:
            if damaged >= 0:  # this frame, or one that it is built on
                raise VideoError(f"frame {damaged} is damaged", info.path)
            found[number] = to_rgb(frame, info.width, info.height, converter)
        if number >= last:
            return found
    if number >= 0 and info.num_frames - 1 - number <= PHANTOMS:
        for phantom in wanted.intersection(range(number + 1, info.num_frames)):
            found[phantom] = to_rgb(frame, info.width, info.height, converter)  # the last stays on the screen
    return found


def decode_frames(
    index: VideoIndex, *, seek_to: int | None = None, only: set[int] | None = None, threads: int = 1
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode from the keyframe at `seek_to`, in ticks, or from the beginning: every frame with its number.

    The number is -1 for a frame that the index does not list. `only`: frames to decode with what they are built on;
    of the others, those that nothing is built on are left out. `threads`: one by default, as data-loading workers
    are the parallelism; 0 is one for each core.
    """
    with _open(index.info.path) as container:
        stream = _main_stream(container, index.info.path)
        decoder = _decoder(stream, threads)
        if seek_to is not None:
            container.seek(seek_to, stream=stream)
        count = 0
        shown = None if only is None else {None, *index.ticks[list(only)].tolist()}
        for packet in container.demux(stream):
            if shown is not None:
                decoder.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
            for frame in decoder.decode(packet):
                yield count if index.ticks is None else index.number_of(frame.pts), frame
                count += 1


def to_rgb(
    frame: av.VideoFrame, width: int, height: int, converter: VideoReformatter, *, threads: int = 1
) -> np.ndarray:
    """A decoded frame as contiguous uint8 (height, width, 3), upright, over black where it is transparent.

    The size is named for the rare stream that changes it midway; `converter` keeps its tables from frame to frame;
    `threads` as in `decode_frames`, of which a small frame wants one.
    """
    turns = _quarter_turns(frame)
    if turns % 2:
        width, height = height, width
    if _is_transparent(frame):
        pixels = converter.reformat(frame, width, height, "rgba", threads=threads).to_ndarray().astype(np.uint16)
        pixels = ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        pixels = converter.reformat(frame, width, height, "rgb24", threads=threads).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, turns) if turns else pixels)
