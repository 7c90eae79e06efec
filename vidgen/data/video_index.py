"""Index video files: list their frames and times once, and decode by that list.

An index is built from the file's packets, which are not decoded: that is fast, and correct for files with consistent
timestamps. Files with anything unusual (packets without timestamps, a clock that jumps, a first frame that cannot be
decoded) are scanned instead: every packet is decoded once, and the index lists the frames that result.
"""

from __future__ import annotations

import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from .types import ShardMember, VideoSource
from .video_file import (
    VideoError,
    VideoInfo,
    as_source,
    create_decoder,
    find_video_stream,
    open_container,
    summarize_error,
)
from .video_frames import HDR_TRANSFERS, Orientation, square_pixel_size
from .video_packets import PacketListing, check_completeness, read_packets
from .video_timeline import Timeline, build_timeline, find_long_gaps, is_regular

# Only these find the keyframe at a timestamp: MPEG streams land past it, and then count and decode frames wrongly.
SEEKABLE_FORMATS = {"mov", "matroska"}  # FFmpeg's first names of mp4, mkv and webm
# These can skip frames that no other frame depends on (many B-frames), with a setting per packet.
SKIPPING_DECODERS = {"h264", "hevc", "mpeg4", "mpeg2video"}
CACHE_FRAMES = 5_000_000  # about 100 MB in each process; UCF-101 has 2.5 million frames
CACHE_FRAMES_PER_INDEX = 100  # the fixed memory of an index, counted in frames


class UnlistedFrames(VideoError):
    """Decoding gives other frames than the packets announce: the file must be scanned."""


@dataclass(frozen=True, kw_only=True)
class VideoIndex(Timeline):
    """The frames of a file with their times, and how to decode them."""

    info: VideoInfo
    orientation: Orientation  # how stored pictures become upright
    can_skip: bool  # whether frames that no other frame depends on can be skipped
    # Whether the timestamps prove the display order. They do not if the decoder may reorder frames but the packets are
    # in display order.
    is_certain: bool
    intact: tuple[int, int]  # the first frame, and the one after the last, that is not damaged by missing frames
    rejected: frozenset[int]  # packets at the ends that the decoder rejects
    # Whether every packet gives an intact frame, as far as is known. Otherwise one thread decodes: with several,
    # FFmpeg drops more frames than those that it rejects.
    is_intact: bool
    is_scanned: bool  # whether every packet was decoded once to build this index
    is_verified: bool  # whether decoding is known to give exactly the frames listed, except those missing
    faults: tuple[str, ...]  # what is wrong with the file, as sentences that follow "PATH: "
    traits: tuple[str, ...]  # what is unusual about it, in the same form

    def select_playable(self) -> VideoIndex:
        """The index of the frames that a player shows.

        Frames at the ends that cannot be decoded are left out; the first decodable frame becomes frame 0 at 0 seconds.
        In place of a lost frame, the image before it is shown.
        """
        if not self.lost and self.num_missing == (0, 0):
            return self
        first, stop = self.num_missing[0], len(self.timestamps) - self.num_missing[1]
        begin = self.timestamps[first]
        end = self.info.duration if not self.num_missing[1] else self.timestamps[stop]
        images = np.arange(len(self.timestamps)) if self.image_numbers is None else self.image_numbers.copy()
        for number in self.lost:
            images[number] = images[number - 1]
        kept, keyframes = slice(first, stop), self.keyframes
        if keyframes is not None:
            keyframes = keyframes[(keyframes >= first) & (keyframes < stop)] - first
        return replace(
            self,
            info=replace(self.info, num_frames=stop - first, duration=float(end - begin)),
            timestamps=self.timestamps[kept] - begin,
            ticks=None if self.ticks is None else self.ticks[kept],
            output_numbers=None if self.output_numbers is None else self.output_numbers - first,
            keyframes=keyframes,
            image_numbers=images[kept] - first if self.lost or self.image_numbers is not None else None,
            lost=(),
            num_missing=(0, 0),
            num_steady=min(self.num_steady, stop) - first,
            intact=(self.intact[0] - first, self.intact[1] - first),
        )


# --- making and caching an index -------------------------------------------------------------------------------------


def index_video(path: VideoSource) -> VideoIndex:
    """List a file's frames, without decoding them where the packets suffice.

    Raises `VideoError` if the file is not a complete video.
    """
    source, key = _identify(path)
    index = _cache.get(key)
    if index is None:
        with _convert_errors(path):
            listing = read_packets(source)
            check_completeness(listing, source)
            if not is_regular(listing):
                listing = read_packets(source, scan=True)
            index = _build_index(source, listing)
        _cache.put(key, index)
    return index


def scan_video(
    path: VideoSource, *, on_frame: Callable[[av.VideoFrame], None] | None = None, threads: int = 1
) -> tuple[VideoIndex, PacketListing]:
    """Decode every packet once; returns the index of the frames that result, and the packets.

    `on_frame` is called with every frame. `threads=0` uses one thread per core. Raises `VideoError` if the file is not
    a complete video.
    """
    source, key = _identify(path)
    with _convert_errors(path):
        listing = read_packets(source, scan=True, on_frame=on_frame, threads=threads)
        # With several threads FFmpeg may drop frames beside those that it rejects.
        if threads != 1 and (listing.errors or len(listing.outputs) != len(listing.shown)):
            listing = read_packets(source, scan=True, on_frame=on_frame)
        check_completeness(listing, source)
        index = _build_index(source, listing)
    _cache.put(key, index)
    return index, listing


def verify_index(path: VideoSource) -> VideoIndex:
    """An index whose frames are exactly those that decoding gives, for a file that will be read completely.

    If the packets do not prove the order of the frames, the file is scanned. Otherwise only its end is decoded, from
    the last keyframe on, as the last frames may depend on frames that were cut off.
    """
    index = index_video(path)
    if index.is_verified:
        return index
    keyframe = index.find_keyframe(index.info.num_frames - 1)
    if not index.is_certain or keyframe is None or not _decodes_to_the_end(index, keyframe):
        return scan_video(path, threads=0)[0]
    index = replace(index, is_verified=True)
    _cache.put(_identify(path)[1], index)
    return index


def _decodes_to_the_end(index: VideoIndex, keyframe: int) -> bool:
    """Whether every frame from this keyframe on can be decoded without damage."""
    expected = keyframe
    try:
        for number, frame in decode_frames(index, seek_to=keyframe, threads=0):
            if number >= keyframe:
                if number != expected or frame.is_corrupt:
                    return False
                expected += 1
    except (av.FFmpegError, OSError):
        return False
    return expected == index.info.num_frames


def _identify(path: VideoSource) -> tuple[Path | ShardMember, tuple]:
    """The source, and the key of its index in the cache. Raises `VideoError` if there is no such file."""
    source = as_source(path)
    is_member = isinstance(source, ShardMember)
    try:
        status = (source.shard if is_member else source).stat()
    except FileNotFoundError:
        raise VideoError("no such file", path) from None
    except (OSError, ValueError) as error:
        raise VideoError(f"it cannot be opened ({summarize_error(error)})", path) from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("it is a folder, not a video" if stat.S_ISDIR(status.st_mode) else "it is not a file", path)
    if is_member and source.offset + source.size > status.st_size:
        raise VideoError(f"its shard is cut off: it has {status.st_size} bytes, and the video lies beyond", path)
    if (source.size if is_member else status.st_size) == 0:
        raise VideoError("the file is empty", path)
    return source, (source, status.st_size, status.st_mtime_ns)


@contextmanager
def _convert_errors(path: VideoSource) -> Iterator[None]:
    """Raise errors of FFmpeg and the system as `VideoError`."""
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise VideoError(f"not a readable video ({summarize_error(error)})", path) from error


class _IndexCache:
    """The most recently used indices, up to `CACHE_FRAMES` frames in total."""

    def __init__(self) -> None:
        self._indices: OrderedDict[tuple, VideoIndex] = OrderedDict()
        self._size = 0

    def get(self, key: tuple) -> VideoIndex | None:
        if key in self._indices:
            self._indices.move_to_end(key)
        return self._indices.get(key)

    def put(self, key: tuple, index: VideoIndex) -> None:
        self._remove(key)
        self._indices[key] = index
        self._size += CACHE_FRAMES_PER_INDEX + index.info.num_frames
        while self._size > CACHE_FRAMES and len(self._indices) > 1:
            self._remove(next(iter(self._indices)))

    def _remove(self, key: tuple) -> None:
        if key in self._indices:
            self._size -= CACHE_FRAMES_PER_INDEX + self._indices.pop(key).info.num_frames


_cache = _IndexCache()


def _build_index(source: Path | ShardMember, listing: PacketListing) -> VideoIndex:
    timeline = build_timeline(listing, source)
    if timeline.ticks is None or listing.format_name not in SEEKABLE_FORMATS:
        timeline = replace(timeline, keyframes=None)
    count, span = len(timeline.timestamps), float(timeline.timestamps[-1])
    duration = span + (timeline.last_duration or span / max(1, count - 1))
    fps = _choose_rate(listing, timeline, duration)
    width, height = square_pixel_size(listing.width, listing.height, listing.pixel_aspect)
    if listing.orientation.transpose:
        width, height = height, width
    is_reordered = any(a > b for a, b in pairwise(p.pts for p in listing.packets if p.pts is not None))
    is_certain = timeline.ticks is not None and (is_reordered or not listing.reorder_depth)
    intact = _find_intact(listing, timeline)
    is_complete = not listing.errors and not timeline.lost and timeline.num_missing == (0, 0)
    origins = [output.packet for output in listing.outputs if output.packet is not None]
    fails_at_ends = bool(origins) and not any(min(origins) <= number <= max(origins) for number in listing.errors)
    return VideoIndex(
        **vars(timeline),
        info=VideoInfo(source, width, height, fps, count, duration, listing.codec),
        orientation=listing.orientation,
        # The second field of an interlaced frame may be skipped without the first.
        can_skip=is_certain and listing.codec in SKIPPING_DECODERS and not listing.is_interlaced,
        is_certain=is_certain,
        intact=intact,
        rejected=frozenset(listing.errors if listing.is_scanned and fails_at_ends else ()),
        is_intact=not listing.is_scanned or (is_complete and intact == (0, count)),
        is_scanned=listing.is_scanned,
        is_verified=listing.is_scanned,
        faults=tuple(_describe_faults(listing, timeline, intact)),
        traits=tuple(_describe_traits(listing, timeline)),
    )


def _choose_rate(listing: PacketListing, timeline: Timeline, duration: float) -> float:
    """Frames per second: as in the header, which is exact, unless the timestamps contradict it."""
    steady, count = timeline.num_steady, len(timeline.timestamps)
    if 1 < steady < count:
        measured = (steady - 1) / float(timeline.timestamps[steady - 1])
    else:
        measured = count / duration if duration else listing.rate
    for rate in (listing.rate, listing.nominal_rate):
        if abs(rate - measured) < 0.01 * measured:
            return rate
    return measured


def _find_intact(listing: PacketListing, timeline: Timeline) -> tuple[int, int]:
    """The first frame, and the one after the last, that is not damaged by frames missing before or after it.

    Damage to over half of the frames is not counted as damage at the ends.
    """
    first, stop = timeline.num_missing[0], len(timeline.timestamps) - timeline.num_missing[1]
    if not listing.is_scanned:
        return first, stop
    outputs, numbers = listing.outputs, timeline.number_outputs(listing).tolist()
    # Without a keyframe at the beginning, frames depend on missing ones until a keyframe comes.
    waits = not listing.starts_with_keyframe and any(output.is_keyframe for output in outputs)
    begin = next((i for i, o in enumerate(outputs) if not o.is_corrupt and (o.is_keyframe or not waits)), len(outputs))
    end = next((i for i, output in enumerate(reversed(outputs)) if not output.is_corrupt), len(outputs))
    if begin + end > len(outputs) // 2:
        return first, stop
    return (numbers[begin] if begin else first), (numbers[-end] if end else stop)


def _describe_faults(listing: PacketListing, timeline: Timeline, intact: tuple[int, int]) -> Iterator[str]:
    before, after = timeline.num_missing
    for end, missing, damaged in (
        ("first", before, intact[0] - before),
        ("last", after, len(timeline.timestamps) - after - intact[1]),
    ):
        if missing:
            yield f"the {end} {'frame' if missing == 1 else f'{missing} frames'} cannot be decoded"
        if damaged:
            frames = "frame that can be decoded is" if damaged == 1 else f"{damaged} frames that can be decoded are"
            yield f"the {end} {frames} damaged"
    if timeline.lost:
        yield f"{len(timeline.lost)} of its frames, between others, cannot be decoded"
    if timeline.is_corrected:
        yield "its clock jumps"
    if not timeline.is_sorted:
        yield "its timestamps are out of order or repeat"
    gaps = find_long_gaps(timeline.timestamps)
    if len(gaps):
        yield f"one of its frames is shown for {np.diff(timeline.timestamps)[gaps].max():.0f} s"
    if listing.orientation.is_oblique:
        yield listing.orientation.describe()
    if listing.color_transfer in HDR_TRANSFERS:
        yield f"it is HDR ({HDR_TRANSFERS[listing.color_transfer]}) and shown without tone mapping"


def _describe_traits(listing: PacketListing, timeline: Timeline) -> Iterator[str]:
    if not listing.orientation.is_oblique and listing.orientation.describe():
        yield listing.orientation.describe()
    if listing.pixel_aspect and listing.pixel_aspect != 1:
        yield f"its pixels are not square ({listing.pixel_aspect.numerator}:{listing.pixel_aspect.denominator})"
    if (images := timeline.image_numbers) is not None:
        repeats = int((images != np.arange(len(images))).sum())
        yield f"{repeats} of its {len(images)} frames are empty and repeat the picture before"


# --- decoding by an index --------------------------------------------------------------------------------------------


def decode_frames(
    index: VideoIndex, *, seek_to: int | None = None, only: set[int] | None = None, threads: int = 1
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode every frame with its number, from the keyframe `seek_to` or from the beginning.

    The number is -1 for a frame that the index does not list. `only`: frames to decode with those that they depend on;
    of the others, those that no frame depends on are skipped. `threads`: one by default, as data-loading workers run
    in parallel; 0 is one per core.
    """
    threads = threads if index.is_intact else 1
    with open_container(index.info.path) as container:
        stream = find_video_stream(container, index.info.path)
        decoder = create_decoder(stream, threads)
        if seek_to is not None:
            container.seek(int(index.ticks[seek_to]), stream=stream)
        count, delay = 0, None
        required = None if only is None else {None, *index.ticks[list(only)].tolist()}
        for place, packet in enumerate(container.demux(stream)):
            if not packet.size and (packet.dts is not None or packet.pts is not None):
                continue  # an empty packet, which a decoder would take for the end
            if required is not None:
                decoder.skip_frame = "DEFAULT" if packet.pts in required else "NONREF"
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                if seek_to is None and place in index.rejected:
                    continue
                raise
            for frame in frames:
                if index.ticks is not None:
                    number = index.find_tick(frame.pts)
                else:
                    number = int(index.output_numbers[count]) if count < len(index.output_numbers) else -1
                    delay = place if delay is None else delay
                    if not index.is_scanned and packet.size and place - count != delay:
                        raise UnlistedFrames(f"frame {number} cannot be decoded", index.info.path)
                yield number, frame
                count += 1
