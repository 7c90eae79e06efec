"""Check a data set before training: which videos are unreadable, too short or odd.

Every video is decoded completely, in worker processes: a file that crashes the decoder or keeps it busy for too long
ends only its process, is reported, and a new process takes the next file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import av
from av.video.reformatter import VideoReformatter

from ..common.io import atomic_write
from .streams import measure_rate
from .types import VideoSource
from .video_file import VideoError
from .video_frames import is_transparent, to_rgb
from .video_index import VideoIndex, scan_video
from .video_packets import PacketListing

START_SECONDS = 120  # for a process to import its modules
MAX_ASPECT = 3  # one side over the other; beyond it a square crop shows little of the frame


@dataclass(frozen=True)
class VideoReport:
    """The result of checking a video.

    `kind` is "good", "odd" (usable; `reason` names what is unusual), "short" or "unreadable". Sizes are in pixels as
    displayed, `duration` is in seconds; they are 0 where they could not be read.
    """

    path: str
    kind: str = "good"
    reason: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    num_frames: int = 0
    duration: float = 0.0
    codec: str = ""


def inspect_video(path: VideoSource, *, num_frames: int, fps: float) -> VideoReport:
    """Decode a whole video and report its properties; never raises for the content of a file.

    It is short if it cannot give a clip of `num_frames` at `fps`. It is odd if its frame rate varies, its clock jumps
    or its timestamps are out of order, frames cannot be decoded or are empty, it is stored rotated or mirrored, its
    pixels are not square, it is HDR, transparent or interlaced, one side is over three times the other, its size
    changes, or FFmpeg reports an error.
    """
    sizes: set[tuple[int, int]] = set()
    interlaced = transparent = False

    def inspect_frame(frame: av.VideoFrame) -> None:
        nonlocal interlaced, transparent
        if not sizes:
            to_rgb(frame, frame.width, frame.height, VideoReformatter())  # raises for colors that cannot be converted
        sizes.add((frame.width, frame.height))
        interlaced |= frame.interlaced_frame
        transparent = transparent or is_transparent(frame)

    try:
        with _capture_errors() as messages:
            index, listing = scan_video(path, on_frame=inspect_frame)
    except VideoError as error:
        return VideoReport(str(path), "unreadable", error.reason)
    info = index.info
    known = {name: getattr(info, name) for name in ("width", "height", "fps", "num_frames", "duration", "codec")}
    if damage := _find_damage(index, listing):
        return VideoReport(str(path), "unreadable", damage, **known)
    odd = [*index.faults, *index.traits]
    if not measure_rate(index.select_playable())[1]:
        odd.append("its frame rate varies")
    if max(info.width, info.height) > MAX_ASPECT * min(info.width, info.height):
        odd.append(f"one side is over {MAX_ASPECT} times the other")
    if interlaced:
        odd.append("it is interlaced")
    if transparent:
        odd.append("it is partly transparent")
    if len(sizes) > 1:
        odd.append("its size changes midway")
    if messages and not index.faults:
        odd.append(f"FFmpeg reports {messages[0]!r}")
    try:
        info.latest_start(fps=fps, num_frames=num_frames)
    except VideoError as error:
        return VideoReport(str(path), "short", error.reason, **known)
    return VideoReport(str(path), "odd" if odd else "good", "; ".join(odd), **known)


def _find_damage(index: VideoIndex, listing: PacketListing) -> str:
    """The first damage that is not at the beginning or the end, as a sentence; empty if there is none."""
    intact = range(*index.intact)
    for output, number in zip(listing.outputs, index.number_outputs(listing), strict=True):
        if output.is_corrupt and number in intact:
            return f"frame {number} is damaged"
    for packet, reason in listing.errors.items():
        if packet not in index.rejected:
            number = sum(output.after <= packet for output in listing.outputs)
            return f"frame {number} cannot be decoded ({reason})"
    return ""


@contextmanager
def _capture_errors() -> Iterator[list[str]]:
    """Collect the messages that FFmpeg logs as errors within the block, in this thread."""
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # otherwise the last message may come while the next file is read
    messages: list[str] = []
    try:
        with av.logging.Capture() as logs:
            yield messages
            messages += [message.strip() for _, _, message in logs]
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)


def check_videos(
    paths: Sequence[VideoSource],
    *,
    num_frames: int = 16,
    fps: float = 8.0,
    jobs: int | None = None,
    timeout: float = 60.0,
    inspect: Callable[..., VideoReport] = inspect_video,
) -> Iterator[VideoReport]:
    """Yield the reports of all videos, in order of completion, from `jobs` processes (default: one per core).

    A file that crashes its process or takes over `timeout` seconds is reported as unreadable.
    """
    waiting = deque(paths)
    idle: list[_Inspector] = []
    busy: list[_Inspector] = []
    try:
        while waiting or busy:
            # Give the next files to idle or new processes.
            while waiting and len(busy) < (jobs or os.cpu_count() or 1):
                inspector = idle.pop() if idle else _Inspector(inspect, timeout)
                inspector.begin(waiting.popleft(), num_frames=num_frames, fps=fps)
                busy.append(inspector)
            # Wait for a report or a deadline.
            deadline = min(inspector.deadline for inspector in busy)
            wait([inspector.connection for inspector in busy], max(0.0, deadline - time.monotonic()))
            for inspector in list(busy):
                if (report := inspector.poll()) is not None:
                    busy.remove(inspector)
                    if inspector.process.is_alive():
                        idle.append(inspector)
                    yield report
    finally:
        for inspector in [*idle, *busy]:
            inspector.stop()


class _Inspector:
    """A process that inspects one video after another, until it crashes or hangs."""

    def __init__(self, inspect: Callable[..., VideoReport], timeout: float):
        context = multiprocessing.get_context("spawn")  # forking beside threads may deadlock
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, inspect), daemon=True)
        self.process.start()
        theirs.close()
        self.timeout = timeout
        self._is_ready = False

    def begin(self, path: VideoSource, **settings: float) -> None:
        self.path = path
        self.deadline = time.monotonic() + (self.timeout if self._is_ready else START_SECONDS)
        with suppress(OSError):  # the process has ended, which `poll` reports
            self.connection.send((path, settings))

    def poll(self) -> VideoReport | None:
        """The report on the video, or on a crash or timeout, which end the process; None while it is inspected."""
        try:
            if self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, VideoReport):
                    return message
                self._is_ready, self.deadline = True, time.monotonic() + self.timeout
            if time.monotonic() < self.deadline:
                return None
            reason = f"decoding it takes over {self.timeout:g} s"
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            reason = f"it crashes the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        if not self._is_ready:
            raise RuntimeError("a process for checking videos did not start")
        self.stop()
        return VideoReport(str(self.path), "unreadable", reason)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, inspect: Callable[..., VideoReport]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    connection.send("ready")
    while True:
        try:
            path, settings = connection.recv()
        except EOFError:  # the parent is gone
            return
        connection.send(inspect(path, **settings))


def write_reports(file: str | os.PathLike, reports: Sequence[VideoReport]) -> Path:
    """Write the reports of all videos that are not good to a JSONL file, sorted by path; keys as in `VideoReport`."""
    lines = [json.dumps(asdict(r)) for r in sorted(reports, key=lambda report: report.path) if r.kind != "good"]
    with atomic_write(file) as unfinished:
        unfinished.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Path(file)
