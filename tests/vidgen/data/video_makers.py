"""Make videos for the data tests: of any codec and timing, and damaged in many ways."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    milliseconds=None,
    options: dict | None = None,
    rotation: int = 0,
    audio: bool = False,
    ticks=None,
    container_options: dict | None = None,
    **attributes,
) -> Path:
    """Write RGB or RGBA frames at 25 fps, or at the given times; skips where this build of PyAV lacks the codec.

    `ticks`: the frames' times in units of 1/25 s. `attributes`: of the codec context (`color_trc=16`).
    """
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    base = Fraction(1, 25) if milliseconds is None else Fraction(1, 1000)
    times = np.arange(len(frames)) if milliseconds is None else milliseconds
    times = times if ticks is None else ticks
    with av.open(str(path), "w", options=container_options) as container:
        steady = {"x264-params": "mbtree=0"} if codec == "libx264" else {}  # otherwise bytes differ from run to run
        stream = container.add_stream(codec, rate=25, options=steady | (options or {}))
        stream.codec_context.thread_count = 1  # for the same reason
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = base
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        audio_stream = container.add_stream("aac", rate=8000) if audio else None
        for array, time in zip(frames, times, strict=True):
            format = "rgba" if array.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=format)
            frame.pts, frame.time_base = int(time), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio_stream is not None:
            encode_silence(container, audio_stream)
    return path


def encode_silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    """A second of silence, at 8 kHz."""
    samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
    samples.rate = 8000
    container.mux(stream.encode(samples))
    container.mux(stream.encode())


def encode_audio(path: Path) -> Path:
    """Write a file without video."""
    with av.open(str(path), "w") as container:
        encode_silence(container, container.add_stream("aac", rate=8000))
    return path


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The reference: every frame in decoding order, and its seconds since the first."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(container.streams.best("video")))
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
        return pictures, np.array([float((frame.pts - decoded[0].pts) * frame.time_base) for frame in decoded])


def copy_packets(source: Path, target: Path, *, first: int = 0, change=lambda number, packet: None) -> Path:
    """Copy the packets from number `first` on without encoding, as `ffmpeg -c copy` does.

    `change` may modify the `pts` and `dts` of each.
    """
    with av.open(str(source)) as container, av.open(str(target), "w") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(container.demux(video=0)):
            if packet.size and number >= first:
                change(number, packet)
                packet.stream = stream
                copy.mux(packet)
    return target


def trim(source: Path, target: Path, *, start: int, duration: int) -> Path:
    """Write an mp4 of 25 fps with another edit list: `duration` milliseconds from frame `start` on, as phones do."""
    content = bytearray(source.read_bytes())
    place = content.index(b"elst") + 12
    _, begin = struct.unpack(">Ii", content[place : place + 8])
    with av.open(str(source)) as container:
        step = int(1 / 25 / container.streams.video[0].time_base)
    content[place : place + 8] = struct.pack(">Ii", duration, begin + start * step)
    target.write_bytes(content)
    return target


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write (a, b, c, d) into the track header of an mp4: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


MUTATIONS = ("flipped bits", "cut off", "swapped header", "zeros", "text")


def mutate(content: bytes, mutation: str, other: bytes, rng: np.random.Generator) -> bytes:
    """A video file, damaged in one of `MUTATIONS`; `other` is a file of another kind, for its header."""
    damaged = bytearray(content)
    size = len(content)
    if mutation == "flipped bits":
        for place in rng.integers(0, size, max(8, size // 500)):
            damaged[place] ^= 1 << int(rng.integers(8))
    elif mutation == "cut off":
        del damaged[int(rng.integers(1, size * 9 // 10)) :]
    elif mutation == "swapped header":
        length = int(rng.integers(200, 2000))
        damaged[:length] = other[:length]
    elif mutation == "zeros":
        length = int(rng.integers(size // 4, size // 2))
        start = int(rng.integers(0, size - length))
        damaged[start : start + length] = bytes(length)
    elif mutation == "text":
        damaged = bytearray(b"this is not a video\n" * (size // 40))
    return bytes(damaged)
