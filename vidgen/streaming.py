"""Videos of any length through a VidTwin, window by window: memory stays flat however long they are.

A window is as many frames as the model takes at once; `autoencoder.tiling` says where windows lie, and each is cut
into tiles by the model itself. Everything here is a generator, so that reading, the model and writing, each in a
thread of its own (`in_background`), work on different windows at the same time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.tiling import ClipGeometry, axis_starts, ramp

from .data.dataset import clip_to_frames, frames_to_clip

Item = TypeVar("Item")
Components = Literal["both", "structure", "dynamics"]


class Window(NamedTuple):
    """Some frames of a video.

    Attributes:
        start: the number of the first of them.
        frames: uint8 (T, H, W, 3).
    """

    start: int
    frames: np.ndarray


class WindowLatents(NamedTuple):
    """The latents of a window (batch 1), by the number of its first frame."""

    start: int
    latents: TwinLatents


def video_geometry(vae: AutoencoderKLVidTwin, num_frames: int, height: int, width: int) -> ClipGeometry:
    """The windows and tiles of a video, also where one of the model's own size suffices.

    Raises:
        ValueError: if the frames are smaller than a patch, or tiling is off and the video is of another size.
    """
    tile = vae.clip_shape[1:]
    return vae.geometry(num_frames, height, width) or ClipGeometry(tile, tile, tile)


def window_starts(geometry: ClipGeometry) -> list[int]:
    """The number of each window's first frame."""
    return axis_starts(geometry.size[0], geometry.tile[0], geometry.stride[0])


def window_geometry(geometry: ClipGeometry) -> ClipGeometry | None:
    """What one window's latents carry: None where the window is of the model's own size."""
    frames = min(geometry.size[0], geometry.tile[0])
    size = (frames, *geometry.size[1:])
    return None if size == geometry.tile else replace(geometry, size=size)


def windows(frames: Iterable[np.ndarray], geometry: ClipGeometry) -> Iterator[Window]:
    """Cut a video, frame by frame (H, W, 3), into windows; the frames that windows share are in both.

    Raises:
        ValueError: if there are fewer frames than the geometry says.
    """
    length = min(geometry.size[0], geometry.tile[0])
    held: list[np.ndarray] = []  # the frames from number `first` on
    first, frames = 0, iter(frames)
    for start in window_starts(geometry):
        del held[: start - first]
        first = start
        while len(held) < length:
            frame = next(frames, None)
            if frame is None:
                raise ValueError(f"the video ends after {first + len(held)} of {geometry.size[0]} frames.")
            held.append(frame)
        yield Window(start, np.stack(held))


@torch.no_grad()
def encode_windows(video: Iterable[Window], vae: AutoencoderKLVidTwin) -> Iterator[WindowLatents]:
    """The mean latents of every window."""
    for start, frames in video:
        clip = frames_to_clip(torch.from_numpy(frames)).to(vae.device, vae.dtype)
        latents = vae.encode(clip[None]).latent_dist.mode()
        yield WindowLatents(start, latents if isinstance(latents, TwinLatents) else vae.unpack(latents))


@torch.no_grad()
def decode_windows(
    video: Iterable[WindowLatents], vae: AutoencoderKLVidTwin, components: Components = "both"
) -> Iterator[np.ndarray]:
    """Finished frames, uint8 (T, H, W, 3), a few at a time: windows blended over the frames they share."""
    held, first = None, 0  # decoded frames that a later window may still change, from number `first` on
    for start, latents in video:
        clip = vae.decode(latents, components).sample[0].float()
        if held is not None:
            done, shared = held.split([start - first, held.shape[1] - (start - first)], dim=1)
            yield clip_to_frames(done).numpy()
            overlap = shared.shape[1]
            rise = ramp(overlap, overlap).to(clip.device)[:, None, None]
            clip[:, :overlap] = shared * (1 - rise) + clip[:, :overlap] * rise
        held, first = clip, start
    if held is not None:
        yield clip_to_frames(held).numpy()


def original_frames(video: Iterable[Window]) -> Iterator[np.ndarray]:
    """The frames themselves, as many at a time as `decode_windows` yields."""
    held, first = None, 0
    for start, frames in video:
        if held is not None:
            yield held[: start - first]
        held, first = frames, start
    if held is not None:
        yield held


def in_background(items: Iterable[Item], ahead: int = 1) -> Iterator[Item]:
    """The same items, made in a thread of their own, up to `ahead` of them before they are asked for.

    What the thread raises is raised here; leaving the loop early stops it.
    """
    made: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(ahead)
    left = threading.Event()

    def put(kind: str, value: Item | BaseException | None) -> bool:
        while not left.is_set():
            try:
                made.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # also an interrupt is the reader's to hear of
            put("error", error)
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        left.set()
        thread.join()
