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

from .types import ShardMember, VideoSource
from .video_file import (
    EPSILON,
    VideoError,
    VideoInfo,
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

# Only these find the keyframe at a timestamp: MPEG streams land past it, and then count and decode frames wrongly.
SEEKABLE_FORMATS = {"mov", "matroska"}  # FFmpeg's first names of mp4, mkv and webm
# These can skip the frames that no other frame needs (many B-frames), as set from one packet to the next.
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
        ticks: the timestamps that decoded frames carry, in the stream's units. None if these do not identify the
            frames; then frames are counted as they are decoded.
        slots: if `ticks` is None, the number of each frame that decoding from the beginning gives.
        keyframes: the numbers of the keyframes; None if the container cannot seek to them by timestamp.
        pictures: for each frame the number of the frame whose picture is shown; None if each has a picture. An empty
            packet repeats the picture before it.
        gaps: frames that are not decoded although frames before and after them are.
        orientation: how stored pictures become upright.
        can_skip: whether frames that no other frame needs can be skipped.
        is_certain: whether the timestamps prove the display order. They do not if the decoder may reorder frames but
            the packets are in display order.
        missing: how many frames at the beginning and at the end cannot be decoded. They are listed.
        steady: how many frames come before the first one that may miss neighbors: a cut removes B-frames from between
            the last frames.
        sound: the first frame, and the one after the last, that is not damaged by what is missing.
        undecodable: numbers of the packets at the ends that the decoder refuses.
        is_whole: whether every packet gives a sound frame, as far as is known. Otherwise one thread decodes: with
            several, FFmpeg drops more frames than those that it refuses.
        is_scanned: whether every packet was decoded once to make this index.
        is_proven: whether decoding is known to give exactly the frames listed, except those missing.
        faults: what is wrong with the file, as sentences that follow "PATH: ".
        traits: what is unusual about the file, in the same form.
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

    def select_playable(self) -> VideoIndex:
        """The index of the frames that a player shows.

        Frames at the ends that cannot be decoded are left out; the first decodable frame becomes frame 0 at 0 seconds.
        In a gap between frames the picture before is held.
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
    """List a file's frames, without decoding them where the packets suffice.

    Raises `VideoError` if the file is not a whole video.
    """
    source, key = _identify(path)
    index = _indices.get(key)
    if index is None:
        with _name_failures(path):
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
    """Decode every packet once; returns the index of the frames that come out, and the packets.

    `look` is called with every frame. `threads`: 0 is one for each core. Raises `VideoError` if the file is not a
    whole video.
    """
    source, key = _identify(path)
    with _name_failures(path):
        packets = read_packets(source, scan=True, look=look, threads=threads)
        # With several threads FFmpeg may leave out frames beside those that it refuses.
        if threads != 1 and (packets.errors or len(packets.outputs) != len(packets.shown)):
            packets = read_packets(source, scan=True, look=look)
        refuse_truncated(packets, source)
        index = _build_index(source, packets)
    _indices.put(key, index)
    return index, packets


def prove_index(path: VideoSource) -> VideoIndex:
    """The index of a file that is about to be read as a whole: decoding gives exactly the frames that it lists.

    If the packets do not prove the order of the frames, the file is scanned. Otherwise only its end is decoded, from
    the last keyframe on, as the last frames may refer to what was cut away.
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
def _name_failures(path: VideoSource) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError(f"not a readable video ({short_reason(error)})", path) from error


class UnlistedFrames(VideoError):
    """Decoding gives other frames than the packets announce: the file must be scanned."""


class _IndexCache:
    """The most recently used indices, up to `INDEX_CACHE_FRAMES` frames in total."""

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


def _build_index(source: Path | ShardMember, listing: PacketList) -> VideoIndex:
    line = build_timeline(listing, source)
    count = len(line.seconds)
    span = float(line.seconds[-1])
    duration = span + (line.last or span / max(1, count - 1))
    fps = _choose_rate(listing, line, duration)
    width, height = square_pixel_size(listing.width, listing.height, listing.pixel_aspect)
    if listing.orientation.transpose:
        width, height = height, width
    is_reordered = any(a > b for a, b in zip(*_neighbors(listing), strict=True))
    is_certain = line.ticks is not None and (is_reordered or not listing.reorder_depth)
    sound = _find_sound(listing, line)
    return VideoIndex(
        VideoInfo(source, width, height, fps, count, duration, listing.codec),
        line.seconds,
        line.ticks,
        line.slots,
        line.keyframes if line.ticks is not None and listing.format_name in SEEKABLE_FORMATS else None,
        line.pictures,
        line.gaps,
        listing.orientation,
        # The second field of an interlaced frame may be left out by itself.
        is_certain and listing.codec in SKIPPING_DECODERS and not listing.is_interlaced,
        is_certain,
        line.missing,
        line.steady,
        sound,
        frozenset(listing.errors) if listing.is_scanned and _fails_at_ends(listing) else frozenset(),
        not listing.is_scanned
        or (not listing.errors and not line.gaps and sound == (0, count) and line.missing == (0, 0)),
        listing.is_scanned,
        listing.is_scanned,
        tuple(_describe_faults(listing, line, sound)),
        tuple(_describe_traits(listing, line)),
    )


def _choose_rate(listing: PacketList, line: Timeline, duration: float) -> float:
    """Frames a second: as the header says, which is exact, unless the timestamps say otherwise."""
    steady = line.steady if 1 < line.steady < len(line.seconds) else 0
    if steady:
        measured = (steady - 1) / float(line.seconds[steady - 1])
    else:
        measured = len(line.seconds) / duration if duration else listing.rate
    for rate in (listing.rate, listing.nominal_rate):
        if abs(rate - measured) < 0.01 * measured:
            return rate
    return measured


def _neighbors(listing: PacketList) -> tuple[list[int], list[int]]:
    """The timestamps of the packets, and of those after them."""
    stamps = [packet.pts for packet in listing.packets if packet.pts is not None]
    return stamps[:-1], stamps[1:]


def _fails_at_ends(listing: PacketList) -> bool:
    """Whether the packets that the decoder refuses all lie before the first frame or after the last."""
    origins = [output.packet for output in listing.outputs if output.packet is not None]
    return bool(origins) and all(number < min(origins) or number > max(origins) for number in listing.errors)


def _find_sound(listing: PacketList, line: Timeline) -> tuple[int, int]:
    """The first frame, and the one after the last, that is not damaged by what is missing before or after it.

    Damage to over half of the frames is not counted as damage at the ends.
    """
    first, stop = line.missing[0], len(line.seconds) - line.missing[1]
    if not listing.is_scanned:
        return first, stop
    outputs, numbers = listing.outputs, _number_outputs(listing, line.ticks, line.slots).tolist()
    # Without a keyframe at the beginning, frames refer to missing ones until a keyframe comes.
    waits = not starts_with_keyframe(listing) and any(output.is_keyframe for output in outputs)
    begin = next((i for i, o in enumerate(outputs) if not o.is_corrupt and (o.is_keyframe or not waits)), len(outputs))
    end = next((i for i, output in enumerate(reversed(outputs)) if not output.is_corrupt), len(outputs))
    if begin + end > len(outputs) // 2:
        return first, stop
    return (numbers[begin] if begin else first), (numbers[-end] if end else stop)


def _number_outputs(listing: PacketList, ticks: np.ndarray | None, slots: np.ndarray | None) -> np.ndarray:
    """The number of each decoded frame."""
    if ticks is None:
        return slots
    return np.searchsorted(ticks, [listing.packets[output.packet].pts for output in listing.outputs])


def _describe_faults(listing: PacketList, line: Timeline, sound: tuple[int, int]) -> Iterator[str]:
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
    if listing.orientation.is_oblique:
        yield listing.orientation.describe()
    if listing.color_transfer in HDR_TRANSFERS:
        yield f"it is HDR ({HDR_TRANSFERS[listing.color_transfer]}) and shown without tone mapping"


def _describe_traits(listing: PacketList, line: Timeline) -> Iterator[str]:
    orientation = "" if listing.orientation.is_oblique else listing.orientation.describe()
    if orientation:
        yield orientation
    if listing.pixel_aspect and listing.pixel_aspect != 1:
        yield f"its pixels are not square ({listing.pixel_aspect.numerator}:{listing.pixel_aspect.denominator})"
    if line.pictures is not None:
        repeats = int((line.pictures != np.arange(len(line.pictures))).sum())
        yield f"{repeats} of its {len(line.pictures)} frames are empty and repeat the picture before"


def find_long_gaps(seconds: np.ndarray) -> np.ndarray:
    """The numbers of frames that are shown for so long that the clock is probably wrong."""
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
