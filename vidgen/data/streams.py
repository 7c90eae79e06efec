"""Whole videos frame by frame, in and out; memory does not grow with their length.

    with FrameReader("in.mkv", size=256) as reader:
        with open_writer("out.mp4", fps=reader.fps, width=reader.width, height=reader.height) as writer:
            for frame in reader:
                writer.write(frame[None])

Files and decoders are `video`'s; here are order, rate and size, and the endings that can be written.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from ..common.errors import UserError
from ..common.io import atomic_dir, atomic_write, refuse_to_replace
from .video import VideoError, VideoIndex, decode_frames, exact_rate, mp4_file, short_reason, to_rgb
from .video_file import file_url
from .video_index import find_long_gaps, prove_index

LARGEST_SIZE = 16384  # pixels; beyond it no codec here goes
CENTISECOND = Fraction(1, 100)  # a GIF's unit of time
FASTEST_GIF = 2  # centiseconds; browsers show a frame of less for a tenth of a second
OUR_PICTURE = re.compile(r"frame_\d{6,}\.png")

AddFrame = Callable[[np.ndarray], None]


# --- reading --------------------------------------------------------------------------------------------------------


class VideoWarning(UserWarning):
    """A video is read although something is wrong with it; the message is one sentence that names the file."""


class FrameReader:
    """Frames of a video in order, at a constant rate: uint8 (height, width, 3), RGB, contiguous, upright.

    Frame i is the last one whose timestamp is at most i / fps, so frames repeat or are left out where the file's own
    rate is another. Transparent parts show black, and non-square pixels are resized to square ones. Frames at the
    beginning or the end that cannot be decoded are left out, as in players; a `VideoWarning` gives their number. A
    context manager; each iteration starts at the beginning.

    Args:
        path: the video.
        fps: frames per second. By default the file's own: a file of constant rate gives each of its frames once, one
            of variable rate is brought to its average rate.
        size: the short side in pixels; the long one keeps the proportions, and both are rounded to even numbers.
            Resized with antialiasing, as `ClipDataset` does. By default the frames' own size, odd or not; a stream
            that changes its size midway keeps to the first.

    Attributes:
        fps: the rate of what comes out, a `Fraction`.
        width, height: the size of what comes out, in pixels.
        num_frames: how many frames come out, exactly.
        notes: what is wrong with the file, as sentences that follow "PATH: "; each is also a `VideoWarning`.

    Raises `UserError` for an fps or size that is not positive, and `VideoError`, at once where that can be known and
    otherwise while iterating, for a file that is not a whole video.
    """

    def __init__(self, path: str | os.PathLike, *, fps: float | None = None, size: int | None = None):
        self.path = Path(path)
        if size is not None and not 1 <= size <= LARGEST_SIZE:
            raise UserError(f"{path}: size must be at least 1 pixel and at most {LARGEST_SIZE}, got {size}")
        self._index = prove_index(path).select_playable()
        info = self._index.info
        self.notes = self._index.faults
        for note in self.notes:
            warnings.warn(f"{path}: {note}", VideoWarning, stacklevel=2)
        rate, is_constant = own_rate(self._index)
        self.fps = exact_rate(rate if fps is None else fps, path)
        if fps is None and is_constant:
            pictures = self._index.pictures
            self._numbers = np.arange(info.num_frames) if pictures is None else pictures
        else:
            count = max(1, round(info.duration * self.fps))
            self._numbers = self._index.numbers_at(np.arange(count) / float(self.fps))
        self.num_frames = len(self._numbers)
        self.width, self.height = info.width, info.height
        if size is not None:
            self.width, self.height = (
                max(2, 2 * round(side * size / min(info.width, info.height) / 2)) for side in (info.width, info.height)
            )
        self._running: Iterator[np.ndarray] | None = None

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            with suppress(ValueError):  # after an interrupt another thread may be in the middle of a frame
                self._running.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        self._running = self._read()
        return self._running

    def _read(self) -> Iterator[np.ndarray]:
        given = 0
        converter = VideoReformatter()
        try:
            for number, frame in decode_frames(self._index, threads=0):
                wanted = self._numbers[given]
                if number < wanted:
                    continue
                if number > wanted:
                    break
                if frame.is_corrupt and number in range(*self._index.sound):
                    raise VideoError(f"frame {number} is damaged", self.path)
                repeats = np.searchsorted(self._numbers, number, side="right") - given
                yield from self._picture(frame, repeats, converter)
                given += repeats
                if given == self.num_frames:
                    return
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"frame {self._numbers[given]} cannot be decoded ({short_reason(error)})", self.path
            ) from error
        raise VideoError(f"frame {self._numbers[given]} cannot be decoded", self.path)

    def _picture(self, frame: av.VideoFrame, repeats: int, converter: VideoReformatter) -> Iterator[np.ndarray]:
        orientation = self._index.orientation
        picture = to_rgb(frame, self.width, self.height, converter, orientation=orientation, threads=0)
        yield picture
        for _ in range(repeats - 1):
            yield picture.copy()


def own_rate(index: VideoIndex) -> tuple[float, bool]:
    """A file's average rate, and whether it is constant: each frame within half a frame of its place at that rate.

    Frames that a cut removed from between the last ones are ignored, and so is a gap so long that the clock is
    probably wrong.
    """
    info, seconds = index.info, index.timestamps
    gaps = find_long_gaps(seconds)
    if len(gaps):
        steps = np.diff(seconds)
        steps[gaps] = np.median(steps)
        seconds = np.concatenate([[0.0], np.cumsum(steps)])
    if index.steady > 1:
        seconds = seconds[: index.steady]
    places, last = np.arange(len(seconds)), seconds[-1]
    if not last:
        return info.fps or 1.0, True  # a picture
    for fps in (info.fps, places[-1] / last):  # the header may be a little wrong
        if np.abs(seconds * fps - places).max() < 0.5:
            return fps, True
    return info.num_frames / info.duration, False


# --- writing --------------------------------------------------------------------------------------------------------


class VideoWriter:
    """Takes frames, and makes a file (or folder) of them that appears whole or not at all. From `open_writer`.

    A context manager: the file appears when the block ends, and does not if the block raises, writing fails (a
    `UserError`) or no frame was written (too).
    """

    def __init__(self, path: str | os.PathLike, width: int, height: int, file: AbstractContextManager[AddFrame]):
        self.path = Path(path)
        self.width, self.height = width, height
        self._file = file
        self._num_frames = 0

    def __enter__(self) -> VideoWriter:
        with ExitStack() as opening, _failures_named(self.path):
            self._add = opening.enter_context(self._file)
            opening.push(self._refuse_emptiness)
            self._open = opening.pop_all()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Add frames, uint8 (T, H, W, 3), RGB, T at least 1; any number of times.

        Raises `UserError` for another shape or type, and if they cannot be written (a full disk).
        """
        frames = np.asarray(frames)
        shape = (self.height, self.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != shape or frames.dtype != np.uint8 or len(frames) == 0:
            expected, given = f"(T, {self.height}, {self.width}, 3)", f"{frames.dtype} {frames.shape}"
            raise UserError(f"{self.path}: frames must be uint8 of shape {expected}, got {given}")
        with _failures_named(self.path):
            for frame in frames:
                self._add(frame)
        self._num_frames += len(frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _failures_named(self.path):
                self._open.__exit__(kind, error, trace)
        except UserError:
            if error is None:  # else what went wrong first is what counts
                raise

    def _refuse_emptiness(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._num_frames == 0:
            raise UserError(f"{self.path}: no frame to write")


def open_writer(path: str | os.PathLike, *, fps: float | Fraction, width: int, height: int) -> VideoWriter:
    """A writer of what the ending of `path` says, for frames of one size, at `fps` frames per second:

    - `.mp4`: H.264, with exactly this size, frame count and rate. Where a side is odd, browsers do not play it, as
      its colors must then be stored in full (yuv444p).
    - `.gif`: endlessly looping, with a palette for each frame. Its clock counts hundredths of a second, to which each
      frame is rounded; above 50 frames per second some are left out, as browsers slow such GIFs down.
    - no ending, or a final `/`: a folder with `frame_000000.png`, `frame_000001.png` ... It replaces a folder that is
      empty or holds nothing but such pictures; the rate is not kept.

    Raises `UserError` for another ending, an fps or a size that is not positive, a folder where a file should go, or
    a folder with other things in it.
    """
    ending = "" if os.fspath(path).endswith(("/", os.sep)) else Path(path).suffix.lower()
    path = Path(path)
    if ending not in (".mp4", ".gif", "") or path.name.lower() in (".mp4", ".gif"):
        raise UserError(f"{path}: expected a name ending in .mp4 or .gif, or without ending for a folder of PNGs")
    if width < 1 or height < 1:
        raise UserError(f"{path}: width and height must be at least 1 pixel, got {width}x{height}")
    rate = exact_rate(fps, path)
    if ending == "":
        if not path.name:
            raise UserError(f"{path}: expected a name for the folder of PNGs")
        refuse_to_replace(path, OUR_PICTURE)
        file = _png_folder(path)
    elif path.is_dir():
        raise UserError(f"{path}: it is a folder, so no file of that name can be written")
    else:
        kind = mp4_file if ending == ".mp4" else _gif_file
        file = kind(path, fps=rate, width=width, height=height)
    return VideoWriter(path, width, height, file)


@contextmanager
def _gif_file(path: Path, *, fps: Fraction, width: int, height: int) -> Iterator[AddFrame]:
    """As `mp4_file`. A palette made for each frame is closer to it than one for all, and nothing has to wait."""
    graph = av.filter.Graph()
    frames_in = graph.add_buffer(width=width, height=height, format="rgb24", time_base=CENTISECOND)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    # An ordered pattern, unlike scattered dots, does not swarm over parts that stand still.
    paletted = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=3")
    frames_out = graph.add("buffersink")
    frames_in.link_to(split)
    split.link_to(paletted, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(paletted, 0, 1)
    paletted.link_to(frames_out)
    graph.configure()

    last_delay = str(max(FASTEST_GIF, round(100 / fps)))
    with (
        atomic_write(path) as unfinished,
        av.open(file_url(unfinished), "w", format="gif", options={"final_delay": last_delay}) as container,
    ):
        stream = container.add_stream("gif", rate=100)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        stream.codec_context.time_base = CENTISECOND
        count, shown_at = 0, -FASTEST_GIF

        def add(frame: np.ndarray) -> None:
            nonlocal count, shown_at
            due = round(100 * count / fps)  # from the beginning, so that roundings do not add up
            count += 1
            if due > shown_at:  # else the frame before it is late already
                shown_at = max(due, shown_at + FASTEST_GIF)
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture.pts, picture.time_base = shown_at, CENTISECOND
                push(picture)

        def push(picture: av.VideoFrame | None) -> None:
            graph.vpush(picture)
            while True:
                try:
                    container.mux(stream.encode(graph.vpull()))
                except (av.BlockingIOError, av.EOFError):  # the graph has no more for now
                    return

        yield add
        push(None)
        container.mux(stream.encode())


@contextmanager
def _png_folder(path: Path) -> Iterator[AddFrame]:
    """Yield a function that adds a frame; all of them are in `path` when the block ends."""
    with atomic_dir(path) as unfinished:
        unfinished.mkdir()
        count = 0

        def add(frame: np.ndarray) -> None:
            nonlocal count
            Image.fromarray(frame).save(unfinished / f"frame_{count:06}.png")
            count += 1

        yield add
        refuse_to_replace(path, OUR_PICTURE)  # others may have put something there meanwhile


@contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    """Turn what the system or FFmpeg raises into one sentence about `path`."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({short_reason(error)})") from error
