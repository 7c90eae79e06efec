"""The index of a video file: which frames it holds, and when each is shown.

The index is made from the file's packets, which are listed and not decoded: that is fast, and right for files whose
timestamps are sound. Files with anything unusual (packets without timestamps, a clock that jumps, a first frame that
cannot be decoded) are scanned instead: every packet is decoded once, and the index holds what came out.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np

from .video_file import (
    EPSILON,
    ShardMember,
    VideoError,
    VideoInfo,
    VideoSource,
    as_source,
    create_decoder,
    find_video_stream,
    open_container,
    short_reason,
)
from .video_frames import HDR_TRANSFERS, Orientation, square_pixel_size
from .video_packets import (
    PacketList,
    Timeline,
    build_timeline,
    is_plain,
    read_packets,
    refuse_truncated,
    starts_with_keyframe,
)

# Only these find the keyframe asked for: MPEG streams land past it, and then count and decode frames wrongly.
SEEKABLE_FORMATS = {"mov", "matroska"}  # FFmpeg's first names of mp4, mkv and webm
# These leave out the frames that no other frame needs (many B-frames) when told so, from one packet to the next.
SKIPPING_DECODERS = {"h264", "hevc", "mpeg4", "mpeg2video"}
INDEX_CACHE_FRAMES = 5_000_000  # about 100 MB in each process; UCF-101 has 2.5 million frames
LONG_GAP = 10.0  # seconds for which one picture is shown
MANY_INTERVALS = 100  # frame intervals that make a gap odd


@dataclass(frozen=True)
class VideoIndex:
    """What a file holds, and when each of its frames is shown.

    Attributes:
        info: size, rate, number of frames, duration.
        timestamps: seconds since the first frame, one for each frame in display order, never decreasing.
        ticks: the same in the stream's own units, which decoded frames carry; None where the file's timestamps do not
            tell the frames apart. Then frames are counted as they are decoded.
        slots: where `ticks` is None, the number of each frame that decoding from the beginning gives.
        keyframes: the numbers of the keyframes; None where the container finds none by its timestamp.
        pictures: the number of the frame whose picture is shown at each frame; None where each has its own. An empty
            packet repeats the picture before it.
        gaps: the frames that do not come out though others before and after them do.
        orientation: how stored pictures become upright.
        can_skip: whether frames on which no other is built can be left out.
        is_certain: whether timestamps alone tell the order of the frames: decoders may reorder them, and packets do.
        missing: how many frames at the beginning and at the end cannot be decoded. They are listed.
        steady: how many frames come before the first that may miss neighbors, as a cut takes B-frames from between the
            last ones.
        sound: the first frame and the one after the last whose picture is not damaged by what is missing.
        undecodable: the packets at the ends that no frame comes from because the decoder refuses them.
        is_whole: whether, as far as is known, every packet gives a sound frame; else one thread decodes, as with
            several FFmpeg leaves out others beside those that it refuses.
        is_scanned: whether every packet was decoded once to make this index.
        is_proven: whether it is known that decoding gives exactly the frames listed, but for those missing.
        faults: what is wrong with the file, in sentences that continue "the file: ...".
        traits: what is unusual about it, likewise.
    """

    info: VideoInfo
    timestamps: np.ndarray
    ticks: np.ndarray | None
    slots: np.ndarray | None
    keyframes: np.ndarray | None
    pictures: np.ndarray | None
    gaps: tuple[int, ...]
    orientation: Orientation
    can_skip: bool
    is_certain: bool
    missing: tuple[int, int] = (0, 0)
    steady: int = 0
    sound: tuple[int, int] = (0, 0)
    undecodable: frozenset[int] = frozenset()
    is_whole: bool = True
    is_scanned: bool = False
    is_proven: bool = False
    faults: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()

    def numbers_at(self, moments: np.ndarray) -> np.ndarray:
        """For each moment, in seconds, the number of the frame shown then: the last that has begun."""
        numbers = np.searchsorted(self.timestamps, moments + EPSILON, side="right") - 1
        return numbers if self.pictures is None else self.pictures[numbers]

    def keyframe_before(self, number: int) -> int | None:
        """The number of the keyframe to seek to for this frame; None where decoding must begin at the beginning."""
        if self.keyframes is None:
            return None
        place = int(np.searchsorted(self.keyframes, number, side="right")) - 1
        keyframe = int(self.keyframes[place]) if place >= 0 else 0
        return keyframe or None

    def number_of(self, tick: int | None) -> int:
        """The number of the frame with this timestamp, or -1."""
        if tick is None:
            return -1
        number = int(np.searchsorted(self.ticks, tick))
        return number if number < len(self.ticks) and self.ticks[number] == tick else -1

    def number_outputs(self, packets: PacketList) -> np.ndarray:
        """The number of each frame that came out of a scan."""
        return _number_outputs(packets, self.ticks, self.slots)

    def playable(self) -> VideoIndex:
        """The index of what a player shows: frames that cannot be decoded are left out at the beginning and the end.

        The first frame that can be decoded becomes frame 0 at 0 seconds. Between others the picture before is held.
        """
        first, stop = self.missing[0], len(self.timestamps) - self.missing[1]
        if not self.gaps and (first, stop) == (0, len(self.timestamps)):
            return self
        begin = self.timestamps[first]
        end = self.info.duration if not self.missing[1] else self.timestamps[stop]
        pictures = np.arange(len(self.timestamps)) if self.pictures is None else self.pictures.copy()
        for number in self.gaps:
            pictures[number] = pictures[number - 1]
        kept, keyframes = slice(first, stop), self.keyframes
        if keyframes is not None:
            keyframes = keyframes[(keyframes >= first) & (keyframes < stop)] - first
        return replace(
            self,
            info=replace(self.info, num_frames=stop - first, duration=float(end - begin)),
            timestamps=self.timestamps[kept] - begin,
            ticks=None if self.ticks is None else self.ticks[kept],
            slots=None if self.slots is None else self.slots - first,
            keyframes=keyframes,
            pictures=pictures[kept] - first if self.gaps or self.pictures is not None else None,
            gaps=(),
            missing=(0, 0),
            steady=min(self.steady, stop) - first,
            sound=(self.sound[0] - first, self.sound[1] - first),
        )


# --- making and keeping an index ------------------------------------------------------------------------------------


def index_video(path: VideoSource) -> VideoIndex:
    """List a file's frames, without decoding them if its packets tell them. Raises `VideoError` for no whole video."""
    source, key = _identify(path)
    index = _indices.get(key)
    if index is None:
        with _failures_named(path):
            packets = read_packets(source)
            refuse_truncated(packets, source)
            if not is_plain(packets):
                packets = read_packets(source, scan=True)
            index = _build_index(source, packets)
        _indices.put(key, index)
    return index


def scan_video(
    path: VideoSource, *, look: Callable[[av.VideoFrame], None] | None = None, threads: int = 1
) -> tuple[VideoIndex, PacketList]:
    """The index of what decoding every packet gives, and what was read for it; `look` sees every frame.

    `threads`: 0 is one for each core. Raises `VideoError` for what is not a whole video.
    """
    source, key = _identify(path)
    with _failures_named(path):
        packets = read_packets(source, scan=True, look=look, threads=threads)
        # With several threads FFmpeg may leave out frames beside those that it refuses.
        if threads != 1 and (packets.errors or len(packets.outputs) != len(packets.shown)):
            packets = read_packets(source, scan=True, look=look)
        refuse_truncated(packets, source)
        index = _build_index(source, packets)
    _indices.put(key, index)
    return index, packets


def prove_index(path: VideoSource) -> VideoIndex:
    """The index of a file that is going to be read from beginning to end: decoding gives exactly what it lists.

    Where packets do not tell the order of the frames for certain, the file is scanned. Otherwise only its end is
    decoded, from the last keyframe on, as the last frames may be built on what was cut away.
    """
    index = index_video(path)
    if index.is_proven:
        return index
    keyframe = index.keyframe_before(index.info.num_frames - 1)
    if not index.is_certain or keyframe is None or not _decodes_to_the_end(index, keyframe):
        return scan_video(path, threads=0)[0]
    index = replace(index, is_proven=True)
    _indices.put(_identify(path)[1], index)
    return index


def _decodes_to_the_end(index: VideoIndex, keyframe: int) -> bool:
    """Whether every frame from this keyframe on comes out whole."""
    wanted = keyframe
    try:
        for number, frame in decode_frames(index, seek_to=keyframe, threads=0):
            if number >= keyframe:
                if number != wanted or frame.is_corrupt:
                    return False
                wanted += 1
    except (av.FFmpegError, OSError):
        return False
    return wanted == index.info.num_frames


def _identify(path: VideoSource) -> tuple[Path | ShardMember, tuple]:
    """The source, and what its index is kept under. Raises `VideoError` if there is no such file."""
    source = as_source(path)
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
    return source, (source, status.st_size, status.st_mtime_ns)


@contextmanager
def _failures_named(path: VideoSource) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError(f"not a readable video ({short_reason(error)})", path) from error


class UnlistedFrames(VideoError):
    """Decoding gives other frames than the packets list: the file must be scanned."""


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
        if key in self._kept:
            self._frames -= _CACHED_FRAMES + self._kept.pop(key).info.num_frames
        self._kept[key] = index
        self._frames += _CACHED_FRAMES + index.info.num_frames
        while self._frames > INDEX_CACHE_FRAMES and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._frames -= _CACHED_FRAMES + oldest.info.num_frames


_CACHED_FRAMES = 100  # what an index weighs besides its frames, counted in frames
_indices = _IndexCache()


def _build_index(source: Path | ShardMember, found: PacketList) -> VideoIndex:
    line = build_timeline(found, source)
    count = len(line.seconds)
    span = float(line.seconds[-1])
    duration = span + (line.last or span / max(1, count - 1))
    fps = _choose_rate(found, line, duration)
    width, height = square_pixel_size(found.width, found.height, found.pixel_aspect)
    if found.orientation.transpose:
        width, height = height, width
    is_reordered = any(a > b for a, b in zip(*_neighbors(found), strict=True))
    is_certain = line.ticks is not None and (is_reordered or not found.reorder_depth)
    sound = _find_sound(found, line)
    return VideoIndex(
        VideoInfo(source, width, height, fps, count, duration, found.codec),
        line.seconds,
        line.ticks,
        line.slots,
        line.keyframes if line.ticks is not None and found.format_name in SEEKABLE_FORMATS else None,
        line.pictures,
        line.gaps,
        found.orientation,
        # The second field of an interlaced frame may be left out by itself.
        is_certain and found.codec in SKIPPING_DECODERS and not found.is_interlaced,
        is_certain,
        line.missing,
        line.steady,
        sound,
        frozenset(found.errors) if found.is_scanned and _fails_at_ends(found) else frozenset(),
        not found.is_scanned
        or (not found.errors and not line.gaps and sound == (0, count) and line.missing == (0, 0)),
        found.is_scanned,
        found.is_scanned,
        tuple(_describe_faults(found, line, sound)),
        tuple(_describe_traits(found, line)),
    )


def _choose_rate(found: PacketList, line: Timeline, duration: float) -> float:
    """Frames a second: as the header says, which is exact, unless the timestamps say otherwise."""
    steady = line.steady if 1 < line.steady < len(line.seconds) else 0
    if steady:
        measured = (steady - 1) / float(line.seconds[steady - 1])
    else:
        measured = len(line.seconds) / duration if duration else found.rate
    for rate in (found.rate, found.nominal_rate):
        if abs(rate - measured) < 0.01 * measured:
            return rate
    return measured


def _neighbors(found: PacketList) -> tuple[list[int], list[int]]:
    """The timestamps of the packets, and of those after them."""
    stamps = [packet.pts for packet in found.packets if packet.pts is not None]
    return stamps[:-1], stamps[1:]


def _fails_at_ends(found: PacketList) -> bool:
    """Whether the packets that the decoder refuses all lie before the first frame or after the last."""
    origins = [output.packet for output in found.outputs if output.packet is not None]
    return bool(origins) and all(number < min(origins) or number > max(origins) for number in found.errors)


def _find_sound(found: PacketList, line: Timeline) -> tuple[int, int]:
    """The first frame and the one after the last that are not damaged by what is missing before or after them.

    More damage than that, of over half the frames, is none of the ends: then these are all frames that come out.
    """
    first, stop = line.missing[0], len(line.seconds) - line.missing[1]
    if not found.is_scanned:
        return first, stop
    outputs, numbers = found.outputs, _number_outputs(found, line.ticks, line.slots).tolist()
    # After a beginning without a keyframe, frames are built on what is not there until a keyframe comes.
    waits = not starts_with_keyframe(found) and any(output.is_keyframe for output in outputs)
    begin = next((i for i, o in enumerate(outputs) if not o.is_corrupt and (o.is_keyframe or not waits)), len(outputs))
    end = next((i for i, output in enumerate(reversed(outputs)) if not output.is_corrupt), len(outputs))
    if begin + end > len(outputs) // 2:
        return first, stop
    return (numbers[begin] if begin else first), (numbers[-end] if end else stop)


def _number_outputs(found: PacketList, ticks: np.ndarray | None, slots: np.ndarray | None) -> np.ndarray:
    """The number of each decoded frame."""
    if ticks is None:
        return slots
    return np.searchsorted(ticks, [found.packets[output.packet].pts for output in found.outputs])


def _describe_faults(found: PacketList, line: Timeline, sound: tuple[int, int]) -> Iterator[str]:
    count = len(line.seconds)
    for end, missing, damaged in (
        ("first", line.missing[0], sound[0] - line.missing[0]),
        ("last", line.missing[1], count - line.missing[1] - sound[1]),
    ):
        if missing:
            yield f"the {end} {_count(missing)} cannot be decoded"
        if damaged:
            yield f"the {end} {_count(damaged)} that can be decoded {'is' if damaged == 1 else 'are'} damaged"
    if line.gaps:
        yield f"{len(line.gaps)} of its frames, between others, cannot be decoded"
    if line.is_corrected:
        yield "its clock jumps"
    if not line.is_sorted:
        yield "its timestamps are out of order or repeat"
    gaps = find_long_gaps(line.seconds)
    if len(gaps):
        yield f"one of its frames is shown for {np.diff(line.seconds)[gaps].max():.0f} s"
    if found.orientation.is_oblique:
        yield found.orientation.describe()
    if found.color_transfer in HDR_TRANSFERS:
        yield f"it is HDR ({HDR_TRANSFERS[found.color_transfer]}) and shown without tone mapping"


def _describe_traits(found: PacketList, line: Timeline) -> Iterator[str]:
    orientation = "" if found.orientation.is_oblique else found.orientation.describe()
    if orientation:
        yield orientation
    if found.pixel_aspect and found.pixel_aspect != 1:
        yield f"its pixels are not square ({found.pixel_aspect.numerator}:{found.pixel_aspect.denominator})"
    if line.pictures is not None:
        repeats = int((line.pictures != np.arange(len(line.pictures))).sum())
        yield f"{repeats} of its {len(line.pictures)} frames are empty and repeat the picture before"


def find_long_gaps(seconds: np.ndarray) -> np.ndarray:
    """The numbers of the frames that are shown for so long that the clock is likelier to be wrong."""
    steps = np.diff(seconds)
    if not len(steps) or steps.max() <= LONG_GAP:
        return np.zeros(0, int)
    return np.flatnonzero(steps > max(LONG_GAP, MANY_INTERVALS * float(np.median(steps))))


def _count(frames: int) -> str:
    return "frame" if frames == 1 else f"{frames} frames"


# --- decoding by an index -------------------------------------------------------------------------------------------


def decode_frames(
    index: VideoIndex, *, seek_to: int | None = None, only: set[int] | None = None, threads: int = 1
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode from the keyframe of number `seek_to`, or from the beginning: every frame with its number.

    The number is -1 for a frame that the index does not list. `only`: frames to decode with what they are built on;
    of the others, those that nothing is built on are left out. `threads`: one by default, as data-loading workers
    are the parallelism; 0 is one for each core.
    """
    threads = threads if index.is_whole else 1
    with open_container(index.info.path) as container:
        stream = find_video_stream(container, index.info.path)
        decoder = create_decoder(stream, threads)
        if seek_to is not None:
            container.seek(int(index.ticks[seek_to]), stream=stream)
        count, delay = 0, None
        shown = None if only is None else {None, *index.ticks[list(only)].tolist()}
        for place, packet in enumerate(container.demux(stream)):
            if not packet.size and (packet.dts is not None or packet.pts is not None):
                continue  # an empty packet, which a decoder would take for the end
            if shown is not None:
                decoder.skip_frame = "DEFAULT" if packet.pts in shown else "NONREF"
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                if seek_to is None and place in index.undecodable:
                    continue
                raise
            for frame in frames:
                if index.ticks is not None:
                    number = index.number_of(frame.pts)
                else:
                    number = int(index.slots[count]) if count < len(index.slots) else -1
                    delay = place if delay is None else delay
                    if not index.is_scanned and packet.size and place - count != delay:
                        raise UnlistedFrames(f"frame {number} cannot be decoded", index.info.path)
                yield number, frame
                count += 1
