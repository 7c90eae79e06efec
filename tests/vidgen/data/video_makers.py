"""Videos as the data tests need them: of any codec and timing, and damaged in many ways."""

from __future__ import annotations

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
) -> Path:
    """Write RGB or RGBA frames at 25 fps, or at the given times; skips where this build of PyAV lacks the codec."""
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    base = Fraction(1, 25) if milliseconds is None else Fraction(1, 1000)
    times = np.arange(len(frames)) if milliseconds is None else milliseconds
    with av.open(str(path), "w") as container:
        steady = {"x264-params": "mbtree=0"} if codec == "libx264" else {}  # else bytes differ from run to run
        stream = container.add_stream(codec, rate=25, options=steady | (options or {}))
        stream.codec_context.thread_count = 1  # likewise
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = base
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=8000) if audio else None
        for array, time in zip(frames, times, strict=True):
            format = "rgba" if array.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=format)
            frame.pts, frame.time_base = int(time), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            samples.rate = 8000
            container.mux(sound.encode(samples))
            container.mux(sound.encode())
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
