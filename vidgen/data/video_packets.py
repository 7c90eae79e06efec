"""List the packets of a video file, which is fast since they are not decoded, and detect files that are cut off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av

from .types import ShardMember
from .video_file import VideoError, create_decoder, find_video_stream, open_container, summarize_error
from .video_frames import UPRIGHT, Orientation, read_orientation

CLOCK_MAY_JUMP = 0x0200  # FFmpeg's AVFMT_TS_DISCONT: MPEG-TS, MPEG-PS, Ogg
HAS_NO_CLOCK = 0x0080  # FFmpeg's AVFMT_NOTIMESTAMPS: raw streams, for which FFmpeg invents timestamps
VP8_SHOW_FRAME = 0x10  # bit of the first byte; frames without it are only references
SURPLUS_FRAMES = 2  # some files announce one or two frames more than they hold


class Packet(NamedTuple):
    """A packet without its data; times in ticks of the stream."""

    pts: int | None
    dts: int | None
    duration: int
    size: int
    is_keyframe: bool
    is_corrupt: bool


class DecodedFrame(NamedTuple):
    """A decoded frame: the number of its packet (None: unknown), and of the packet after which it was returned."""

    packet: int | None
    after: int
    is_corrupt: bool
    is_keyframe: bool


@dataclass
class PacketListing:
    """The packets of a file's video stream, and the frames decoded from them: the first one, or in a scan all."""

    format_name: str
    clock_may_jump: bool
    has_clock: bool
    time_base: Fraction
    rate: float  # average frames per second
    nominal_rate: float  # as the encoder states it; used where there are no timestamps
    num_announced: int  # frames, by the header; 0 if unknown
    announced_end: float  # seconds, by Matroska's header; 0 if unknown
    codec: str
    reorder_depth: int
    pixel_aspect: Fraction | None
    is_scanned: bool
    packets: list[Packet] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)  # numbers of the packets to be displayed, not only decoded
    outputs: list[DecodedFrame] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)  # by packet: why the decoder rejects it
    num_indexed: tuple[int, int] = (0, 0)  # entries of the container's index, on opening and after reading
    width: int = 0  # of the first frame, as stored
    height: int = 0
    orientation: Orientation = UPRIGHT
    is_interlaced: bool = False
    color_transfer: int = 2

    @property
    def is_corrupt(self) -> bool:
        return any(packet.is_corrupt for packet in self.packets)

    @property
    def starts_with_keyframe(self) -> bool:
        """Whether the first packet is marked as a keyframe, and the frame decoded from it confirms that."""
        first = self.outputs[0]
        return self.packets[0].is_keyframe and (first.packet != 0 or first.is_keyframe)


def read_packets(
    source: Path | ShardMember,
    *,
    scan: bool = False,
    on_frame: Callable[[av.VideoFrame], None] | None = None,
    threads: int = 1,
) -> PacketListing:
    """List the packets of the main video stream; decode its first frame or, with `scan`, every frame.

    `on_frame` is called with every decoded frame. Raises `VideoError` if there is no video stream, and PyAV's errors
    if the file cannot be opened.
    """
    with open_container(source) as container:
        format_name = container.format.name.split(",")[0]
        if format_name == "tty":  # FFmpeg would render the text as a scrolling terminal
            raise VideoError("it is text, not a video", source)
        stream = find_video_stream(container, source)
        codec = stream.codec_context.name
        listing = PacketListing(
            format_name=format_name,
            clock_may_jump=bool(container.format.flags & CLOCK_MAY_JUMP),
            has_clock=not container.format.flags & HAS_NO_CLOCK,
            time_base=stream.time_base,
            rate=float(stream.average_rate or stream.guessed_rate or 0),
            nominal_rate=float(stream.guessed_rate or stream.average_rate or 0),
            num_announced=stream.frames,
            announced_end=_read_announced_end(container, stream) if format_name == "matroska" else 0.0,
            codec=codec,
            reorder_depth=stream.codec_context.reorder_depth,
            pixel_aspect=stream.sample_aspect_ratio,
            is_scanned=scan,
        )
        num_indexed = len(stream.index_entries)
        # The delay of the decoder is part of an AVI's timing, and more threads add to it.
        decoder = create_decoder(stream, 1 if format_name == "avi" else threads)
        for packet in container.demux(stream):
            number = len(listing.packets)
            # List the packet, unless it only marks the end of the stream.
            if packet.size or packet.dts is not None or packet.pts is not None:
                times = packet.pts, packet.dts, packet.duration or 0
                listing.packets.append(Packet(*times, packet.size, packet.is_keyframe, packet.is_corrupt))
                is_reference = codec == "vp8" and packet.size and not memoryview(packet)[0] & VP8_SHOW_FRAME
                if not packet.is_discard and not is_reference:
                    listing.shown.append(number)
                if not packet.size:
                    continue
            if listing.outputs and not scan:
                continue
            # Decode it; the frame inherits the packet's number as its timestamp.
            packet.pts = number
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError as error:
                listing.errors[number] = summarize_error(error)
                continue
            for frame in frames:
                if not listing.outputs:
                    listing.width, listing.height = frame.width, frame.height
                    listing.orientation = read_orientation(frame)
                    listing.is_interlaced, listing.color_transfer = frame.interlaced_frame, frame.color_trc
                listing.outputs.append(DecodedFrame(frame.pts, number, frame.is_corrupt, bool(frame.key_frame)))
                if on_frame is not None:
                    on_frame(frame)
        listing.num_indexed = num_indexed, len(stream.index_entries)
    return listing


def _read_announced_end(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """The end of the stream in seconds by Matroska's tags or header; 0 where they do not state it."""
    try:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except (KeyError, ValueError):
        return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def check_completeness(listing: PacketListing, source: Path | ShardMember) -> None:
    """Raise `VideoError` if the container's index or header lists packets that are missing, or no frame is decoded."""
    num_intact = sum(not packet.is_corrupt for packet in listing.packets)
    announced = listing.num_announced
    tolerance = max(SURPLUS_FRAMES, announced // 20)
    if listing.format_name == "mov":
        announced, tolerance = max(listing.num_indexed), 0  # without frames that an edit list omits
    elif listing.format_name == "avi" and listing.num_indexed[0] > 1:
        announced, tolerance = listing.num_indexed[0], 0  # without empty chunks, which the header counts
    elif listing.format_name == "avi":  # whose index, at the end of the file, is missing
        num_intact = max(((packet.dts or 0) + 1 for packet in listing.packets if not packet.is_corrupt), default=0)
    if num_intact < announced - tolerance or (listing.format_name in ("mov", "avi") and listing.is_corrupt):
        raise VideoError(f"cut off: {num_intact} of {announced} frames are complete", source)
    ends = [packet.pts + packet.duration for packet in listing.packets if packet.pts is not None]
    end = float(max(ends, default=0) * listing.time_base)
    tolerance = max(SURPLUS_FRAMES / listing.rate if listing.rate else 0, listing.announced_end / 20)
    if end < listing.announced_end - tolerance:
        raise VideoError(f"cut off: {end:.2f} of {listing.announced_end:.2f} s are present", source)
    if not listing.outputs:
        raise VideoError("it holds no frame that can be decoded", source)
