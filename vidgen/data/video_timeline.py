"""The timeline of a video: its frames in display order with their times, derived from its packets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from .types import ShardMember
from .video_file import TIME_TOLERANCE, VideoError
from .video_packets import Packet, PacketListing

MAX_STEP = 10.0  # seconds; a clock that may jump has jumped if it advances by more, as in the ffmpeg command
MAX_STEP_BACK = 0.1  # seconds
MAX_REORDER_DEPTH = 16  # frames; the longest delay of a decoder
MAX_EMPTY_VOP = 20  # bytes of an MPEG-4 frame that only repeats the one before
FIELD_CODECS = {"h264", "hevc", "mpeg2video", "vc1"}  # the two fields of a frame may be in two packets
LONG_GAP = 10.0  # seconds for which one picture is shown
LONG_GAP_INTERVALS = 100  # frame intervals


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The frames that a file lists, in display order."""

    timestamps: np.ndarray  # seconds since the first frame, one per frame, never decreasing
    last_duration: float  # seconds for which the last frame is shown; 0 if unknown
    # The timestamps that decoded frames carry, in the stream's units. None if these do not identify the frames; then
    # `output_numbers` has the number of each frame that the decoder returns from the beginning on.
    ticks: np.ndarray | None = None
    output_numbers: np.ndarray | None = None
    # For each frame the number of the frame whose image is shown, as an empty packet repeats the image before it. None
    # if each frame has an image.
    image_numbers: np.ndarray | None = None
    lost: tuple[int, ...] = ()  # frames that cannot be decoded although frames before and after them can
    keyframes: np.ndarray | None = None  # their numbers; None if they are unknown or seeking to them is unreliable
    num_missing: tuple[int, int] = (0, 0)  # listed frames at the beginning and the end that cannot be decoded
    num_steady: int = 0  # frames before the first one that may miss neighbors: cuts remove some of the last B-frames
    is_corrected: bool = False  # whether jumps of the clock were removed
    is_sorted: bool = True  # whether the timestamps increase in display order

    def find_frames(self, moments: np.ndarray) -> np.ndarray:
        """For each moment, in seconds, the number of the frame shown then: the last that has begun."""
        numbers = np.searchsorted(self.timestamps, moments + TIME_TOLERANCE, side="right") - 1
        return numbers if self.image_numbers is None else self.image_numbers[numbers]

    def find_keyframe(self, number: int) -> int | None:
        """The number of the keyframe to seek to for this frame; None where decoding must begin at the beginning."""
        if self.keyframes is None:
            return None
        place = int(np.searchsorted(self.keyframes, number, side="right")) - 1
        return (int(self.keyframes[place]) or None) if place >= 0 else None

    def find_tick(self, tick: int | None) -> int:
        """The number of the frame with this timestamp, or -1."""
        if tick is None:
            return -1
        number = int(np.searchsorted(self.ticks, tick))
        return number if number < len(self.ticks) and self.ticks[number] == tick else -1

    def number_outputs(self, listing: PacketListing) -> np.ndarray:
        """The number of each frame that was decoded in a scan."""
        if self.ticks is None:
            return self.output_numbers
        return np.searchsorted(self.ticks, [listing.packets[output.packet].pts for output in listing.outputs])


def find_long_gaps(timestamps: np.ndarray) -> np.ndarray:
    """The numbers of frames that are shown for so long that the clock is probably wrong."""
    steps = np.diff(timestamps)
    if not len(steps):
        return np.zeros(0, int)
    return np.flatnonzero(steps > max(LONG_GAP, LONG_GAP_INTERVALS * float(np.median(steps))))


def is_regular(listing: PacketListing) -> bool:
    """Whether the packets alone define which frames there are and when; otherwise the file must be scanned."""
    if listing.errors or listing.is_corrupt or not listing.starts_with_keyframe:
        return False
    shown = [listing.packets[number] for number in listing.shown]
    if not all(packet.size for packet in shown):
        return False
    first = listing.outputs[0].packet
    if listing.format_name == "avi":
        return first == 0 and len(shown) == len(listing.packets) and _are_dts_increasing(shown)
    stamps = [packet.pts for packet in shown]
    if not listing.has_clock or all(stamp is None for stamp in stamps):
        return first == listing.shown[0]
    if None in stamps or len(set(stamps)) != len(stamps) or _clock_jumps(listing):
        return False
    return first is not None and listing.packets[first].pts == min(stamps)


def build_timeline(listing: PacketListing, source: Path | ShardMember) -> Timeline:
    """The frames in display order. Raises `VideoError` if there are neither timestamps nor a frame rate."""
    timeline = None
    shown = [listing.packets[number] for number in listing.shown]
    if listing.format_name == "avi" and listing.rate and _are_dts_increasing(shown):
        timeline = _build_from_chunks(listing)
    elif listing.has_clock:
        timeline = _build_from_clock(listing)
    return timeline or _build_from_rate(listing, source)


def _are_dts_increasing(packets: Sequence[Packet]) -> bool:
    stamps = [packet.dts for packet in packets]
    return None not in stamps and all(a < b for a, b in pairwise(stamps))


def _is_empty(listing: PacketListing, number: int) -> bool:
    """Whether the packet only repeats the image before it."""
    packet = listing.packets[number]
    return packet.size == 0 or (listing.codec == "mpeg4" and packet.size <= MAX_EMPTY_VOP)


# --- AVI: a frame's time is the place of its chunk -------------------------------------------------------------------


def _build_from_chunks(listing: PacketListing) -> Timeline | None:
    """The timeline of an AVI; empty chunks repeat an image. None if decoded frames do not identify their chunks."""
    shown = listing.shown
    origins = [output.packet for output in listing.outputs]
    if listing.is_scanned and (None in origins or len(set(origins)) != len(origins)):
        return None
    decoded = sorted(origins) if listing.is_scanned else shown
    # The n-th frame is shown when the decoder returns it: upon the packet that comes this many later.
    delay = min(sum(number < listing.outputs[0].after for number in decoded), len(decoded) - 1)
    places = np.array([listing.packets[number].dts for number in decoded])
    before = int(places[0]) - listing.packets[shown[0]].dts
    step = int(np.median(np.diff(places))) if len(places) > 1 else 1
    outputs = places[delay:] - places[delay]
    outputs = np.concatenate([outputs, outputs[-1] + step * np.arange(1, delay + 1)]) + before
    # Count the frames after the last decoded one: those that cannot be decoded, or the empty chunks at the end.
    after = sum(number > decoded[-1] and not _is_empty(listing, number) for number in shown)
    total = int(outputs[-1]) + 1 + after
    announced = listing.num_announced - listing.packets[shown[0]].dts
    if listing.num_indexed[0] > 1 and total < announced <= 2 * total:
        total = announced
    images = outputs[np.clip(np.searchsorted(outputs, np.arange(total), side="right") - 1, 0, None)]
    if after:
        images[-after:] = np.arange(total - after, total)
    images[:before] = np.arange(before)
    return Timeline(
        timestamps=np.arange(total) / listing.rate,
        last_duration=1 / listing.rate,
        output_numbers=outputs,
        image_numbers=images if (images != np.arange(total)).any() else None,
        num_missing=(before, after),
        num_steady=total,
    )


# --- raw streams, and files whose timestamps are useless -------------------------------------------------------------


def _build_from_rate(listing: PacketListing, source: Path | ShardMember) -> Timeline:
    """The timeline of a file without useful timestamps: frames follow each other at the nominal rate."""
    rate = listing.nominal_rate
    if not rate:
        raise VideoError("it has neither timestamps nor a frame rate", source)
    count = len(listing.outputs) if listing.is_scanned else len(listing.shown)
    return Timeline(
        timestamps=np.arange(count) / rate,
        last_duration=1 / rate,
        output_numbers=np.arange(count),
        num_steady=count,
        is_sorted=not listing.has_clock or all(packet.pts is None for packet in listing.packets),
    )


# --- files with timestamps -------------------------------------------------------------------------------------------


def _build_from_clock(listing: PacketListing) -> Timeline | None:
    """The timeline of a file with timestamps; None if they are useless."""
    clock, is_corrected = _read_clock(listing)
    decoded = [frame.packet for frame in listing.outputs] if listing.is_scanned else listing.shown
    if None in decoded or len(set(decoded)) != len(decoded) or np.isnan(clock[decoded]).any():
        return None
    times = clock[decoded]
    is_sorted = not listing.is_scanned or bool((np.diff(times) > 0).all())
    times = np.sort(times)
    steps = np.diff(times)
    if len(steps) and not steps.min() > 0:
        return None
    if not (is_sorted or _have_constant_rate(times)) and listing.nominal_rate:
        return None

    # After a scan, put packets that gave no frame among the decoded ones.
    before, between, after = [], [], []
    numbers, moments = np.array(decoded), clock[decoded]
    if listing.is_scanned:
        before, between, after = _place_undecoded(listing, decoded, clock, times)
        head = times[0] - float(np.median(steps) if len(steps) else 1) * np.arange(len(before), 0, -1)
        head = np.where(np.isnan(clock[before]), head, clock[before])
        numbers = np.array([*before, *decoded, *between, *after])
        moments = np.concatenate([head, times, clock[between], clock[after]])
    order = np.argsort(moments, kind="stable")
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))  # of each packet in `numbers`
    numbers, moments = numbers[order], moments[order]
    outputs = place[len(before) : len(before) + len(decoded)]

    # Empty packets repeat an image; other packets between decoded ones are lost.
    images = np.arange(len(order))
    undecoded = place[len(before) + len(decoded) : len(order) - len(after)]
    is_empty = np.array([_is_empty(listing, number) for number in between], bool)
    repeats = undecoded[is_empty]
    images[repeats] = outputs[np.searchsorted(outputs, repeats) - 1]
    ticks = moments.astype(np.int64) if is_sorted and not is_corrected else None
    if before and ticks is not None and (np.diff(ticks) <= 0).any():
        ticks = None
    unit = float(listing.time_base)
    return Timeline(
        timestamps=(moments - moments[0]) * unit,
        last_duration=listing.packets[numbers[-1]].duration * unit,
        ticks=ticks,
        output_numbers=outputs if ticks is None else None,
        image_numbers=images if len(repeats) else None,
        lost=tuple(undecoded[~is_empty].tolist()),
        keyframes=np.flatnonzero([listing.packets[number].is_keyframe for number in numbers]),
        num_missing=(len(before), len(after)),
        num_steady=_count_steady(listing, moments, clock),
        is_corrected=is_corrected,
        is_sorted=is_sorted,
    )


def _have_constant_rate(times: np.ndarray) -> bool:
    places = (times - times[0]) / np.median(np.diff(times))
    return bool(np.abs(places - np.arange(len(times))).max() < 0.5)


def _count_steady(listing: PacketListing, moments: np.ndarray, clock: np.ndarray) -> int:
    """How many frames come before the first one that may miss neighbors, cut away after the last packet."""
    last = listing.packets[-1]
    if last.dts is None or last.pts is None:
        return len(moments)
    return int(np.searchsorted(moments, clock[-1] - (last.pts - last.dts), side="right"))


def _place_undecoded(
    listing: PacketListing, decoded: list[int], clock: np.ndarray, times: np.ndarray
) -> tuple[list[int], list[int], list[int]]:
    """The packets to be displayed that gave no frame: before the first frame, between frames, and after the last."""
    undecoded = sorted(set(listing.shown) - set(decoded))
    if listing.is_interlaced and listing.codec in FIELD_CODECS:  # second fields, shown with the first ones
        undecoded = [number for number in undecoded if number in listing.errors or number < decoded[0]]
    ranks = np.searchsorted(np.sort(decoded), undecoded)
    before, between, after = [], [], []
    for number, rank in zip(undecoded, ranks, strict=True):
        moment = clock[number]
        if np.isnan(moment):
            if rank <= MAX_REORDER_DEPTH:
                before.append(number)
        elif moment < times[0]:
            before.append(number)
        elif moment > times[-1] and not _is_empty(listing, number):
            after.append(number)
        elif moment not in times:
            between.append(number)
    before.sort(key=lambda number: (not np.isnan(clock[number]), clock[number]))
    return before, between, sorted(after, key=lambda number: clock[number])


def _read_clock(listing: PacketListing) -> tuple[np.ndarray, bool]:
    """The timestamp of each packet (NaN: none), and whether jumps of the clock were removed from them."""
    stamps = np.array([np.nan if packet.pts is None else packet.pts for packet in listing.packets], float)
    if not _clock_jumps(listing):
        return stamps, False
    usual_step = float(np.median(np.abs(np.array(_dts_steps(listing), float))))
    offset, before = 0.0, None
    for number, packet in enumerate(listing.packets):
        if packet.dts is not None:
            if before is not None and _is_jump(listing, packet.dts - before):
                offset += before + usual_step - packet.dts
            before = packet.dts
        stamps[number] += offset
    return stamps, True


def _clock_jumps(listing: PacketListing) -> bool:
    if listing.format_name in ("mov", "avi"):
        return False
    return any(_is_jump(listing, step) for step in _dts_steps(listing))


def _dts_steps(listing: PacketListing) -> list[int]:
    return [later - earlier for earlier, later in pairwise(p.dts for p in listing.packets if p.dts is not None)]


def _is_jump(listing: PacketListing, step: int) -> bool:
    seconds = step * float(listing.time_base)
    if listing.clock_may_jump:
        return not -MAX_STEP_BACK <= seconds <= MAX_STEP
    return seconds < -MAX_STEP_BACK * MAX_REORDER_DEPTH  # less may be due to frames listed out of order
