"""The packets of a video file: when its frames are shown, whether it is cut off, whether its clock is sound.

`read_packets` lists the packets of a file and decodes the first frame or, in a scan, all of them. `build_timeline`
turns this list into frames in display order with their times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from .types import ShardMember
from .video_file import VideoError, create_decoder, find_video_stream, open_container, short_reason
from .video_frames import UPRIGHT, Orientation, read_orientation

PHANTOMS = 2  # frames: some files announce one or two more than they hold
CLOCK_MAY_JUMP = 0x0200  # FFmpeg's AVFMT_TS_DISCONT: MPEG-TS, MPEG-PS, Ogg
HAS_NO_CLOCK = 0x0080  # FFmpeg's AVFMT_NOTIMESTAMPS: bare streams, for which FFmpeg invents timestamps
LONGEST_STEP = 10.0  # seconds; such a clock has jumped if it advances by more at once, as in the ffmpeg command
LONGEST_STEP_BACK = 0.1  # seconds
LARGEST_EMPTY_VOP = 20  # bytes of an MPEG-4 frame that only repeats the one before
REORDERED = 16  # frames; the longest delay of a decoder
FIELD_CODECS = {"h264", "hevc", "mpeg2video", "vc1"}  # the two fields of a frame may come in two packets


class Packet(NamedTuple):
    """A packet without its data. `is_shown`: it is to be displayed, not only decoded because others refer to it."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_keyframe: bool
    is_corrupt: bool
    is_shown: bool


class DecodedFrame(NamedTuple):
    """A decoded frame: the number of its packet (None: unknown), the packet after which it came out, its state."""

    packet: int | None
    after: int
    is_corrupt: bool
    is_keyframe: bool


@dataclass
class PacketList:
    """The packets of a file's video stream, and the frames decoded from them: the first one, or in a scan all."""

    format_name: str
    clock_may_jump: bool
    has_clock: bool
    time_base: Fraction
    rate: float  # on average
    nominal_rate: float  # as the encoder names it; used where there are no timestamps
    announced: int  # frames, by the header; 0 if unknown
    codec: str
    reorder_depth: int
    pixel_aspect: Fraction | None
    is_scanned: bool
    packets: list[Packet] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)  # numbers of the packets to be displayed
    outputs: list[DecodedFrame] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)  # by packet: why the decoder refuses it
    indexed: tuple[int, int] = (0, 0)  # entries of the container's own index, on opening and after reading
    promised: float = 0.0  # seconds, by Matroska's header
    width: int = 0  # of the first frame, as stored
    height: int = 0
    orientation: Orientation = UPRIGHT
    is_interlaced: bool = False
    color_transfer: int = 2


def read_packets(
    source: Path | ShardMember,
    *,
    scan: bool = False,
    look: Callable[[av.VideoFrame], None] | None = None,
    threads: int = 1,
) -> PacketList:
    """List the packets of the main video stream; decode its first frame or, to `scan`, every frame.

    `look` is called with every frame. Raises `VideoError` if there is no video stream, and what PyAV raises if the
    file cannot be opened.
    """
    with open_container(source) as container:
        format_name = container.format.name.split(",")[0]
        if format_name == "tty":  # FFmpeg would film the text scrolling over a terminal
            raise VideoError("it is text, not a video", source)
        stream = find_video_stream(container, source)
        codec = stream.codec_context.name
        listing = PacketList(
            format_name,
            bool(container.format.flags & CLOCK_MAY_JUMP),
            not container.format.flags & HAS_NO_CLOCK,
            stream.time_base,
            float(stream.average_rate or stream.guessed_rate or 0),
            float(stream.guessed_rate or stream.average_rate or 0),
            stream.frames,
            codec,
            stream.codec_context.reorder_depth,
            stream.sample_aspect_ratio,
            scan,
            promised=_promised_seconds(container, stream) if format_name == "matroska" else 0.0,
        )
        entries = len(stream.index_entries)
        # The delay of the decoder is part of an AVI's timing, and more threads add to it.
        decoder = create_decoder(stream, 1 if format_name == "avi" else threads)
        for packet in container.demux(stream):
            number = len(listing.packets)
            if packet.size or packet.dts is not None or packet.pts is not None:  # else it is the end
                is_shown = not packet.is_discard and not (codec == "vp8" and packet.size and _is_hidden_vp8(packet))
                listing.packets.append(
                    Packet(
                        packet.pts,
                        packet.dts,
                        packet.duration or 0,
                        packet.size,
                        packet.is_keyframe,
                        packet.is_corrupt,
                        is_shown,
                    )
                )
                if is_shown:
                    listing.shown.append(number)
                if not packet.size:
                    continue
            if listing.outputs and not scan:
                continue
            packet.pts = number  # the frame carries it, and so tells which packet it comes from
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                listing.errors[number] = short_reason(error)
                continue
            for frame in frames:
                if not listing.outputs:
                    _describe(listing, frame)
                listing.outputs.append(DecodedFrame(frame.pts, number, frame.is_corrupt, bool(frame.key_frame)))
                if look is not None:
                    look(frame)
        listing.indexed = entries, len(stream.index_entries)
    return listing


def _describe(listing: PacketList, first: av.VideoFrame) -> None:
    listing.width, listing.height = first.width, first.height
    listing.orientation = read_orientation(first)
    listing.is_interlaced, listing.color_transfer = first.interlaced_frame, first.color_trc


def _is_hidden_vp8(packet: av.Packet) -> bool:
    """Whether the packet holds a frame that is only referred to and never shown."""
    return not memoryview(packet)[0] & 0x10


def _promised_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Where Matroska's tags or its header say that the stream ends; 0 where they do not."""
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def refuse_truncated(listing: PacketList, source: Path | ShardMember) -> None:
    """Raise `VideoError` if the container's own index or header lists packets that are not there, or no frame is."""
    opened, read = listing.indexed
    whole = sum(not packet.is_corrupt for packet in listing.packets)
    announced, tolerance = listing.announced, 0
    if listing.format_name == "mov":
        announced = max(opened, read)  # without what an edit list leaves out
    elif listing.format_name == "avi" and opened > 1:
        announced = opened  # without empty chunks, which the header counts
    elif listing.format_name == "avi":  # whose index, at the end of the file, is missing
        tolerance = max(PHANTOMS, announced // 20)
        whole = max(((packet.dts or 0) + 1 for packet in listing.packets if not packet.is_corrupt), default=0)
    else:
        tolerance = max(PHANTOMS, announced // 20)
    if whole < announced - tolerance or (listing.format_name in ("mov", "avi") and _is_corrupt(listing)):
        raise VideoError(f"cut off: {whole} of {announced} frames are whole", source)
    stamps = [packet.pts + packet.duration for packet in listing.packets if packet.pts is not None]
    end = float(max(stamps, default=0) * listing.time_base)
    tolerance = max(PHANTOMS / listing.rate if listing.rate else 0, listing.promised / 20)
    if end < listing.promised - tolerance:
        raise VideoError(f"cut off: {end:.2f} of {listing.promised:.2f} s are there", source)
    if not listing.outputs:
        raise VideoError("it holds no frame that can be decoded", source)


def _is_corrupt(listing: PacketList) -> bool:
    return any(packet.is_corrupt for packet in listing.packets)


# --- frames in display order ----------------------------------------------------------------------------------------


@dataclass
class Timeline:
    """The frames that a file lists, in display order; `VideoIndex` explains the other fields."""

    seconds: np.ndarray  # since the first, one for each frame
    last: float  # seconds for which the last frame is shown
    ticks: np.ndarray | None
    slots: np.ndarray | None
    pictures: np.ndarray | None = None
    gaps: tuple[int, ...] = ()
    keyframes: np.ndarray | None = None
    missing: tuple[int, int] = (0, 0)
    steady: int = 0  # frames before the first one that may miss neighbors: a cut takes B-frames from between the last
    is_corrected: bool = False
    is_sorted: bool = True


def is_plain(listing: PacketList) -> bool:
    """Whether the packets alone show which frames there are and when: nothing about them is unusual."""
    if listing.errors or _is_corrupt(listing) or not starts_with_keyframe(listing):
        return False
    shown = [listing.packets[number] for number in listing.shown]
    if not all(packet.size for packet in shown):
        return False
    first = listing.outputs[0].packet
    if listing.format_name == "avi":
        return first == 0 and len(shown) == len(listing.packets) and _slots_are_sound(shown)
    stamps = [packet.pts for packet in shown]
    if not listing.has_clock or all(stamp is None for stamp in stamps):
        return first == listing.shown[0]
    if None in stamps or len(set(stamps)) != len(stamps) or _clock_jumps(listing):
        return False
    return first is not None and listing.packets[first].pts == min(stamps)


def starts_with_keyframe(listing: PacketList) -> bool:
    """Whether the first packet is a keyframe, and the frame that comes from it does not say otherwise."""
    first = listing.outputs[0]
    return listing.packets[0].is_keyframe and (first.packet != 0 or first.is_keyframe)


def build_timeline(listing: PacketList, source: Path | ShardMember) -> Timeline:
    """The frames in display order. Raises `VideoError` if there are neither timestamps nor a frame rate."""
    if listing.format_name == "avi" and listing.rate and _slots_are_sound([listing.packets[i] for i in listing.shown]):
        timeline = _timeline_of_slots(listing)
    else:
        timeline = _timeline_of_clock(listing) if listing.has_clock else None
    if timeline is None:
        timeline = _timeline_of_rate(listing, source)
    return timeline


def _slots_are_sound(packets: Sequence[Packet]) -> bool:
    stamps = [packet.dts for packet in packets]
    return None not in stamps and all(a < b for a, b in zip(stamps, stamps[1:], strict=False))


def _timeline_of_slots(listing: PacketList) -> Timeline | None:
    """The timeline of an AVI, where a frame's time is the place of its chunk. Empty chunks repeat a picture."""
    shown = listing.shown
    origins = [output.packet for output in listing.outputs]
    if listing.is_scanned and (None in origins or len(set(origins)) != len(origins)):
        return None
    real = sorted(origins) if listing.is_scanned else shown
    # The n-th frame is shown when the decoder returns it: upon the packet that comes this many later.
    delay = sum(number < listing.outputs[0].after for number in real)
    delay = min(delay, len(real) - 1)
    places = np.array([listing.packets[number].dts for number in real])
    before = int(places[0]) - listing.packets[shown[0]].dts
    slots = places[delay:] - places[delay]
    step = int(np.median(np.diff(places))) if len(places) > 1 else 1
    slots = np.concatenate([slots, slots[-1] + step * np.arange(1, delay + 1)]) + before
    after = sum(number > real[-1] and not _is_null(listing, number) for number in shown)
    total = int(slots[-1]) + 1 + after
    announced = listing.announced - listing.packets[shown[0]].dts
    if listing.indexed[0] > 1 and total < announced <= 2 * total:  # it ends with empty chunks
        total = announced
    pictures = slots[np.clip(np.searchsorted(slots, np.arange(total), side="right") - 1, 0, None)]
    if after:
        pictures[-after:] = np.arange(total - after, total)
    pictures[:before] = np.arange(before)
    held = bool((pictures != np.arange(total)).any())
    return Timeline(
        np.arange(total) / listing.rate,
        1 / listing.rate,
        None,
        slots,
        pictures if held else None,
        missing=(before, after),
        steady=total,
    )


def _is_null(listing: PacketList, number: int) -> bool:
    """Whether the packet only repeats the picture before it."""
    packet = listing.packets[number]
    return packet.size == 0 or (listing.codec == "mpeg4" and packet.size <= LARGEST_EMPTY_VOP)


def _timeline_of_clock(listing: PacketList) -> Timeline | None:
    """The timeline of a file with timestamps; None if they are of no use."""
    clock, is_corrected = _read_clock(listing)
    shown = listing.shown
    decoded = [frame.packet for frame in listing.outputs] if listing.is_scanned else shown
    if None in decoded or len(set(decoded)) != len(decoded) or np.isnan(clock[decoded]).any():
        return None
    times = clock[decoded]
    is_sorted = not listing.is_scanned or bool((np.diff(times) > 0).all())
    times = np.sort(times)
    steps = np.diff(times)
    if len(steps) and not steps.min() > 0:
        return None
    if not (is_sorted or _are_regular(times)) and listing.nominal_rate:
        return None
    if listing.is_scanned:
        before, between, after = _place_silent(listing, decoded, clock, times)
        head = times[0] - float(np.median(steps) if len(steps) else 1) * np.arange(len(before), 0, -1)
        numbers = np.array([*before, *decoded, *between, *after])
        moments = np.concatenate([_fill_unknown(clock[before], head), times, clock[between], clock[after]])
    else:
        before, between, after = [], [], []
        numbers, moments = np.array(decoded), clock[decoded]
    order = np.argsort(moments, kind="stable")
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))  # of each packet in `numbers`
    numbers, moments = numbers[order], moments[order]
    slots = place[len(before) : len(before) + len(decoded)]

    pictures = np.arange(len(order))
    silent = place[len(before) + len(decoded) : len(order) - len(after)]
    is_null = np.array([_is_null(listing, number) for number in between], bool)
    held = silent[is_null]
    pictures[held] = slots[np.searchsorted(slots, held) - 1]
    ticks = moments.astype(np.int64) if is_sorted and not is_corrected else None
    if before and ticks is not None and (np.diff(ticks) <= 0).any():
        ticks = None
    unit = float(listing.time_base)
    return Timeline(
        (moments - moments[0]) * unit,
        listing.packets[numbers[-1]].duration * unit,
        ticks,
        slots if ticks is None else None,
        pictures if len(held) else None,
        tuple(silent[~is_null].tolist()),
        np.flatnonzero([listing.packets[number].is_keyframe for number in numbers]),
        (len(before), len(after)),
        _count_steady(listing, moments, clock),
        is_corrected,
        is_sorted,
    )


def _are_regular(times: np.ndarray) -> bool:
    """Whether the times follow each other at a constant rate."""
    places = (times - times[0]) / np.median(np.diff(times))
    return bool(np.abs(places - np.arange(len(times))).max() < 0.5)


def _count_steady(listing: PacketList, moments: np.ndarray, clock: np.ndarray) -> int:
    """How many frames come before the first one that may miss neighbors, cut away after the last packet."""
    last = listing.packets[-1]
    if last.dts is None or last.pts is None:
        return len(moments)
    return int(np.searchsorted(moments, clock[-1] - (last.pts - last.dts), side="right"))


def _place_silent(
    listing: PacketList, decoded: list[int], clock: np.ndarray, times: np.ndarray
) -> tuple[list[int], list[int], list[int]]:
    """The packets to be displayed from which no frame came: before the first frame, between frames, after the last."""
    silent = sorted(set(listing.shown) - set(decoded))
    if listing.is_interlaced and listing.codec in FIELD_CODECS:  # second fields, shown with the first ones
        silent = [number for number in silent if number in listing.errors or number < decoded[0]]
    ranks = np.searchsorted(np.sort(decoded), silent)
    before, between, after = [], [], []
    for number, rank in zip(silent, ranks, strict=True):
        moment = clock[number]
        if np.isnan(moment):
            if rank <= REORDERED:
                before.append(number)
        elif moment < times[0]:
            before.append(number)
        elif moment > times[-1] and not _is_null(listing, number):
            after.append(number)
        elif moment not in times:
            between.append(number)
    before.sort(key=lambda number: (not np.isnan(clock[number]), clock[number]))
    return before, between, sorted(after, key=lambda number: clock[number])


def _fill_unknown(moments: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(moments), otherwise, moments)


def _timeline_of_rate(listing: PacketList, source: Path | ShardMember) -> Timeline:
    """The timeline of a file without useful timestamps: frames follow each other at the nominal rate."""
    rate = listing.nominal_rate
    if not rate:
        raise VideoError("it has neither timestamps nor a frame rate", source)
    count = len(listing.outputs) if listing.is_scanned else len(listing.shown)
    is_misled = listing.has_clock and any(packet.pts is not None for packet in listing.packets)
    return Timeline(np.arange(count) / rate, 1 / rate, None, np.arange(count), steady=count, is_sorted=not is_misled)


def _read_clock(listing: PacketList) -> tuple[np.ndarray, bool]:
    """The timestamp of each packet (NaN: none), and whether jumps of the clock were removed from them."""
    stamps = np.array([np.nan if packet.pts is None else packet.pts for packet in listing.packets], float)
    if not _clock_jumps(listing):
        return stamps, False
    step = _usual_step(listing)
    offset, before = 0.0, None
    for number, packet in enumerate(listing.packets):
        if packet.dts is not None:
            if before is not None and _is_jump(listing, packet.dts - before):
                offset += before + step - packet.dts
            before = packet.dts
        stamps[number] += offset
    return stamps, True


def _clock_jumps(listing: PacketList) -> bool:
    if listing.format_name in ("mov", "avi"):
        return False
    stamps = [packet.dts for packet in listing.packets if packet.dts is not None]
    return any(_is_jump(listing, later - earlier) for earlier, later in zip(stamps, stamps[1:], strict=False))


def _is_jump(listing: PacketList, ticks: int) -> bool:
    seconds = ticks * float(listing.time_base)
    if listing.clock_may_jump:
        return not -LONGEST_STEP_BACK <= seconds <= LONGEST_STEP
    return seconds < -LONGEST_STEP_BACK * REORDERED  # less may be due to frames listed out of order


def _usual_step(listing: PacketList) -> float:
    stamps = [packet.dts for packet in listing.packets if packet.dts is not None]
    return float(np.median(np.abs(np.diff(stamps)))) if len(stamps) > 1 else 0.0
