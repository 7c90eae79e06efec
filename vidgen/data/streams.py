"""Read and write whole videos frame by frame, in memory that does not grow with their length.

with FrameReader("in.mkv", size=256) as reader:
    with open_writer("out.mp4", fps=reader.fps, width=reader.width, height=reader.height) as writer:
        for frame in reader:
            writer.write(frame[None])
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from ..common.errors import UserError
from ..common.io import atomic_dir, atomic_write, refuse_to_replace
from ..common.video_writing import exact_rate, mp4_file
from .video_file import VideoError, file_url, summarize_error
from .video_frames import to_rgb
from .video_index import VideoIndex, decode_frames, verify_index
from .video_timeline import find_long_gaps

MAX_SIZE = 16384  # pixels; the limit of the codecs used here
CENTISECOND = Fraction(1, 100)  # a GIF's unit of time
MIN_GIF_DELAY = 2  # centiseconds; browsers show a frame of less for a tenth of a second
PNG_NAME = re.compile(r"frame_\d{6,}\.png")

AddFrame = Callable[[np.ndarray], None]


# --- reading ---------------------------------------------------------------------------------------------------------


class VideoWarning(UserWarning):
    """A video is read although something is wrong with it; the message is one sentence that names the file."""


class FrameReader:
    """Frames of a video in order, at a constant rate: uint8 (height, width, 3), RGB, contiguous, upright.

    Frame i is the last one whose timestamp is at most i / fps, so frames are repeated or dropped where the file's rate
    differs. Transparent parts are shown over black, and non-square pixels are resized to square ones. Frames at the
    beginning or the end that cannot be decoded are left out, as in players; a `VideoWarning` gives their number.
    Use it as a context manager; each iteration starts at the beginning.

    Args:
        path: the video.
        fps: frames per second. By default the file's rate: a file of constant rate gives each of its frames once, one
            of variable rate is converted to its average rate.
        size: the short side in pixels; the long one keeps the proportions, and both are rounded to even numbers.
            Resized with antialiasing, as in `ClipDataset`. By default the size of the first frame, odd or not.

    Attributes:
        fps: the output rate, a `Fraction`.
        width, height: the output size in pixels.
        num_frames: the exact number of output frames.
        notes: what is wrong with the file, as sentences that follow "PATH: "; each is also a `VideoWarning`.

    Raises:
        UserError: if fps or size is not positive.
        VideoError: for a file that is not a complete video, at once where that can be known, otherwise in iteration.
    """

    def __init__(self, path: str | os.PathLike, *, fps: float | None = None, size: int | None = None):
        self.path = Path(path)
        if size is not None and not 1 <= size <= MAX_SIZE:
            raise UserError(f"{path}: size must be at least 1 pixel and at most {MAX_SIZE}, got {size}")
        self._index = verify_index(path).select_playable()
        info = self._index.info
        self.notes = self._index.faults
        for note in self.notes:
            warnings.warn(f"{path}: {note}", VideoWarning, stacklevel=2)
        rate, is_constant = measure_rate(self._index)
        self.fps = exact_rate(rate if fps is None else fps, path)
        if fps is None and is_constant:
            images = self._index.image_numbers
            self._numbers = np.arange(info.num_frames) if images is None else images
        else:
            count = max(1, round(info.duration * self.fps))
            self._numbers = self._index.find_frames(np.arange(count) / float(self.fps))
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
        done = 0
        converter, orientation = VideoReformatter(), self._index.orientation
        try:
            for number, frame in decode_frames(self._index, threads=0):
                if number < self._numbers[done]:
                    continue
                if number > self._numbers[done]:
                    break
                if frame.is_corrupt and number in range(*self._index.intact):
                    raise VideoError(f"frame {number} is damaged", self.path)
                pixels = to_rgb(frame, self.width, self.height, converter, orientation=orientation, threads=0)
                stop = int(np.searchsorted(self._numbers, number, side="right"))
                for _ in range(done, stop - 1):  # repeats; callers may modify each frame
                    yield pixels.copy()
                yield pixels
                done = stop
                if done == self.num_frames:
                    return
        except (av.FFmpegError, OSError) as error:
            reason = f"frame {self._numbers[done]} cannot be decoded ({summarize_error(error)})"
            raise VideoError(reason, self.path) from error
        raise VideoError(f"frame {self._numbers[done]} cannot be decoded", self.path)


def measure_rate(index: VideoIndex) -> tuple[float, bool]:
    """A file's average rate, and whether it is constant: each frame within half a frame of its place at that rate.

    Ignores frames that a cut removed from between the last ones, and gaps so long that the clock is probably wrong.
    """
    info, seconds = index.info, index.timestamps
    gaps = find_long_gaps(seconds)
    if len(gaps):
        steps = np.diff(seconds)
        steps[gaps] = np.median(steps)
        seconds = np.concatenate([[0.0], np.cumsum(steps)])
    if index.num_steady > 1:
        seconds = seconds[: index.num_steady]
    places, last = np.arange(len(seconds)), seconds[-1]
    if not last:
        return info.fps or 1.0, True  # a single frame
    for fps in (info.fps, places[-1] / last):  # the header may be a little wrong
        if np.abs(seconds * fps - places).max() < 0.5:
            return fps, True
    return info.num_frames / info.duration, False


# --- writing ---------------------------------------------------------------------------------------------------------


class VideoWriter:
    """Writes frames to a file or folder that appears when the `with` block ends; from `open_writer`.

    If the block raises, writing fails or no frame was written, an existing file or folder is kept.
    """

    def __init__(self, path: Path, width: int, height: int, file: AbstractContextManager[AddFrame]):
        self.path, self.width, self.height = path, width, height
        self._file = file
        self._num_frames = 0

    def __enter__(self) -> VideoWriter:
        with _convert_errors(self.path):
            self._add = self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._num_frames == 0:
            error = UserError(f"{self.path}: no frame to write")
        if error is None:
            with _convert_errors(self.path):
                self._file.__exit__(None, None, None)
            return
        with suppress(av.FFmpegError, OSError):  # only the first error is reported
            self._file.__exit__(type(error), error, error.__traceback__)
        if kind is None:
            raise error

    def write(self, frames: np.ndarray) -> None:
        """Add frames, uint8 (T, H, W, 3), RGB, T at least 1; may be called repeatedly.

        Raises `UserError` for another shape or type, and if they cannot be written (a full disk).
        """
        frames = np.asarray(frames)
        shape = (self.height, self.width, 3)
        if frames.ndim != 4 or frames.shape[1:] != shape or frames.dtype != np.uint8 or len(frames) == 0:
            expected, given = f"(T, {self.height}, {self.width}, 3)", f"{frames.dtype} {frames.shape}"
            raise UserError(f"{self.path}: frames must be uint8 of shape {expected}, got {given}")
        with _convert_errors(self.path):
            for frame in frames:
                self._add(frame)
        self._num_frames += len(frames)


def open_writer(path: str | os.PathLike, *, fps: float | Fraction, width: int, height: int) -> VideoWriter:
    """A writer of frames of one size, at `fps` frames per second. The extension of `path` selects the format:

    - `.mp4`: H.264, with exactly this size, frame count and rate. Browsers do not play it if a side is odd, as its
      colors must then be stored in full resolution (yuv444p).
    - `.gif`: an endless loop, with a palette per frame. Each frame time is rounded to hundredths of a second, the unit
      of the format; above 50 frames per second some are dropped, as browsers slow such GIFs down.
    - none, or a final `/`: a folder with `frame_000000.png`, `frame_000001.png` ... It replaces a folder that is empty
      or holds only such files; the rate is not stored.

    Raises `UserError` for another extension, an fps or a size that is not positive, a folder in place of a file, or a
    folder with other files in it.
    """
    extension = "" if os.fspath(path).endswith(("/", os.sep)) else Path(path).suffix.lower()
    path = Path(path)
    if extension not in (".mp4", ".gif", "") or path.name.lower() in (".mp4", ".gif"):
        raise UserError(f"{path}: expected a name ending in .mp4 or .gif, or without extension for a folder of PNGs")
    if width < 1 or height < 1:
        raise UserError(f"{path}: width and height must be at least 1 pixel, got {width}x{height}")
    rate = exact_rate(fps, path)
    if extension == "":
        if not path.name:
            raise UserError(f"{path}: expected a name for the folder of PNGs")
        refuse_to_replace(path, PNG_NAME)
        file = _png_folder(path)
    elif path.is_dir():
        raise UserError(f"{path}: it is a folder, so no file of that name can be written")
    else:
        file = (mp4_file if extension == ".mp4" else _gif_file)(path, fps=rate, width=width, height=height)
    return VideoWriter(path, width, height, file)


@contextmanager
def _gif_file(path: Path, *, fps: Fraction, width: int, height: int) -> Iterator[AddFrame]:
    """As `mp4_file`. A palette per frame is closer to it than one for all, and lets frames be written at once."""
    graph = av.filter.Graph()
    frames_in = graph.add_buffer(width=width, height=height, format="rgb24", time_base=CENTISECOND)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    # An ordered pattern, unlike error diffusion, does not flicker over parts without motion.
    paletted = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=3")
    frames_out = graph.add("buffersink")
    frames_in.link_to(split)
    split.link_to(paletted, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(paletted, 0, 1)
    paletted.link_to(frames_out)
    graph.configure()

    last_delay = str(max(MIN_GIF_DELAY, round(100 / fps)))
    with (
        atomic_write(path) as unfinished,
        av.open(file_url(unfinished), "w", format="gif", options={"final_delay": last_delay}) as container,
    ):
        stream = container.add_stream("gif", rate=100)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        stream.codec_context.time_base = CENTISECOND
        count, shown_at = 0, -MIN_GIF_DELAY

        def add(frame: np.ndarray) -> None:
            nonlocal count, shown_at
            due = round(100 * count / fps)  # from the beginning, so that rounding errors do not add up
            count += 1
            if due > shown_at:  # otherwise the frame before it is already late
                shown_at = max(due, shown_at + MIN_GIF_DELAY)
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
    """Yield a function that adds a frame; the folder appears at `path` when the block ends."""
    with atomic_dir(path) as unfinished:
        unfinished.mkdir()
        count = 0

        def add(frame: np.ndarray) -> None:
            nonlocal count
            Image.fromarray(frame).save(unfinished / f"frame_{count:06}.png")
            count += 1

        yield add
        refuse_to_replace(path, PNG_NAME)  # it may have been filled meanwhile


@contextmanager
def _convert_errors(path: Path) -> Iterator[None]:
    """Raise errors of FFmpeg and the system as a `UserError` that names `path`."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({summarize_error(error)})") from error
