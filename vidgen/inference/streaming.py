"""Pass videos of any length through a VidTwin, window by window, so that memory does not grow with their length.

A window is as long as a clip of the model; `autoencoder.tiling` places the windows, and the model cuts each into
tiles. The functions are generators, so that reading, the model and writing, each in a separate thread
(`in_background`), work on different windows at the same time.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch

from autoencoder import TwinLatents
from autoencoder.tiling import ClipGeometry, axis_starts, ramp
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines.finite import check_finite_output

from ..data.streams import FrameReader
from ..data.transforms import clip_to_frames, crop, frames_to_clip, resize_to_cover

Item = TypeVar("Item")
Components = Literal["both", "structure", "dynamics"]
ParallelFrames = tuple[np.ndarray, ...]  # the next frames of several videos, each uint8 (T, H, W, 3)

ROUNDING_FRAMES = 4  # frames converted to pixels at a time: a whole window would set the peak of memory


class Window(NamedTuple):
    """Successive frames of a video.

    Attributes:
        start: number of the first frame.
        frames: T arrays of uint8 (H, W, 3); windows that overlap share these arrays.
    """

    start: int
    frames: list[np.ndarray]


class WindowLatents(NamedTuple):
    """The latents of a window (batch size 1), and the number of its first frame."""

    start: int
    latents: TwinLatents


def video_geometry(vae: VideoAutoencoder, num_frames: int, height: int, width: int) -> ClipGeometry:
    """Return the windows and tiles of a video, also where a single one of the model's size suffices.

    Raises:
        ValueError: if the frames are smaller than a patch, or tiling is off and the video has another size.
    """
    tile = vae.clip_shape[1:]
    return vae.geometry(num_frames, height, width) or ClipGeometry(tile, tile, tile)


def window_starts(geometry: ClipGeometry) -> list[int]:
    """Return the number of each window's first frame."""
    return axis_starts(geometry.size[0], geometry.tile[0], geometry.stride[0])


def window_geometry(geometry: ClipGeometry) -> ClipGeometry | None:
    """Return the geometry of a single window's latents: None where the window has the model's size."""
    frames = min(geometry.size[0], geometry.tile[0])
    size = (frames, *geometry.size[1:])
    return None if size == geometry.tile else replace(geometry, size=size)


def windows(frames: Iterable[np.ndarray], geometry: ClipGeometry) -> Iterator[Window]:
    """Cut a stream of frames (H, W, 3) into windows; frames in an overlap are in both windows.

    Raises:
        ValueError: if there are fewer frames than the geometry requires.
    """
    length = min(geometry.size[0], geometry.tile[0])
    buffer: list[np.ndarray] = []  # the frames from number `first` on
    first, frames = 0, iter(frames)
    for start in window_starts(geometry):
        del buffer[: start - first]
        first = start
        while len(buffer) < length:
            frame = next(frames, None)
            if frame is None:
                raise ValueError(f"the video ends after {first + len(buffer)} of {geometry.size[0]} frames.")
            buffer.append(frame)
        yield Window(start, buffer.copy())


@torch.no_grad()
def encode_windows(video: Iterable[Window], vae: VideoAutoencoder) -> Iterator[WindowLatents]:
    """Encode every window to the mean of its posterior.

    Raises:
        NonFiniteError: if latents contain NaN or infinite values.
    """
    for start, frames in video:
        yield WindowLatents(start, _encode(frames, vae))


def _encode(frames: list[np.ndarray], vae: VideoAutoencoder) -> TwinLatents:
    clip = frames_to_clip(torch.from_numpy(np.stack(frames))).to(vae.device, vae.dtype)
    latents = vae.encode(clip[None]).latent_dist.mode()
    latents = latents if isinstance(latents, TwinLatents) else vae.unpack(latents)
    check_finite_output("the autoencoder", latents.pack(), vae)
    return latents


@torch.no_grad()
def decode_windows(
    video: Iterable[WindowLatents], vae: VideoAutoencoder, geometry: ClipGeometry, components: Components = "both"
) -> Iterator[np.ndarray]:
    """Decode windows to uint8 frames (T, H, W, 3), and blend successive windows where they overlap.

    Raises:
        NonFiniteError: if a decoded window contains NaN or infinite values.
    """
    overlap = None  # decoded frames (C, T, H, W) that the next window also covers
    for (start, latents), next_start in zip(video, _next_starts(geometry), strict=True):
        clip = vae.decode(latents, components).sample[0].float()
        check_finite_output("the autoencoder", clip, vae)
        if overlap is not None:
            length = overlap.shape[1]
            weights = ramp(length, length).to(clip.device)[:, None, None]
            clip[:, :length] = overlap.lerp_(clip[:, :length], weights)
        finished, overlap = clip[:, : next_start - start], clip[:, next_start - start :].clone()
        frames = np.concatenate([clip_to_frames(part).numpy() for part in finished.split(ROUNDING_FRAMES, dim=1)])
        del clip, finished  # free this memory before the next window is decoded
        yield frames


def original_frames(video: Iterable[Window], geometry: ClipGeometry) -> Iterator[np.ndarray]:
    """Yield the frames of a video in the same chunks as `decode_windows`."""
    for (start, frames), next_start in zip(video, _next_starts(geometry), strict=True):
        yield np.stack(frames[: next_start - start])


def _next_starts(geometry: ClipGeometry) -> list[int]:
    """Return for each window the first frame of the next one; for the last, the number of frames."""
    return [*window_starts(geometry)[1:], geometry.size[0]]


def stream_components(video: FrameReader, vae: VideoAutoencoder, geometry: ClipGeometry) -> Iterator[ParallelFrames]:
    """Yield a video's frames with those decoded from both latents, from structure alone and from dynamics alone."""
    originals, inputs = itertools.tee(in_background(windows(video, geometry)))
    latents = itertools.tee(encode_windows(inputs, vae), 3)
    kinds: tuple[Components, ...] = ("both", "structure", "dynamics")
    decoded = [decode_windows(z, vae, geometry, kind) for z, kind in zip(latents, kinds, strict=True)]
    yield from zip(original_frames(originals, geometry), *decoded, strict=True)


def stream_reenactment(
    source: FrameReader, driver: FrameReader, vae: VideoAutoencoder, geometry: ClipGeometry, strength: float
) -> Iterator[ParallelFrames]:
    """Yield the source's frames, the driver's frames in the source's size, and the latent swap of both.

    Args:
        source: gives the structure.
        driver: gives the dynamics; at the source's frame rate.
        strength: interpolation from the source's dynamics (0) to the driver's (1).
    """
    resized = (_resize_and_crop(frame, source.height, source.width) for frame in driver)
    pairs = in_background(zip(windows(source, geometry), windows(resized, geometry), strict=True))
    source_windows, driver_windows, source_inputs, driver_inputs = (
        map(itemgetter(index), copy) for index, copy in zip((0, 1, 0, 1), itertools.tee(pairs, 4), strict=True)
    )
    swapped = (
        WindowLatents(a.start, _swap_dynamics(a.latents, b.latents, strength))
        for a, b in zip(encode_windows(source_inputs, vae), encode_windows(driver_inputs, vae), strict=True)
    )
    yield from zip(
        original_frames(source_windows, geometry),
        original_frames(driver_windows, geometry),
        decode_windows(swapped, vae, geometry),
        strict=True,
    )


def _resize_and_crop(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a frame (H, W, 3) until it covers another size, and crop its center."""
    clip = resize_to_cover(frames_to_clip(torch.from_numpy(frame)[None]), (height, width))
    return clip_to_frames(crop(clip, (height, width), 0.5, 0.5))[0].numpy()


def _swap_dynamics(source: TwinLatents, driver: TwinLatents, strength: float) -> TwinLatents:
    dynamics = torch.lerp(source.dynamics, driver.dynamics, strength)
    return TwinLatents(source.structure, dynamics, source.geometry)


def in_background(items: Iterable[Item], ahead: int = 1) -> Iterator[Item]:
    """Yield the same items, produced in another thread, up to `ahead` items before they are needed.

    Exceptions of the thread are raised here; leaving the loop early stops the thread.
    """
    results: queue.SimpleQueue[tuple[str, Item | BaseException | None]] = queue.SimpleQueue()
    permits, stopped = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        try:
            iterator = iter(items)
            while True:
                permits.acquire()  # before the item is produced: an additional item costs a window's memory
                if stopped.is_set():
                    return
                results.put(("item", next(iterator)))
        except StopIteration:
            results.put(("end", None))
        except BaseException as error:  # an interrupt too is for the consumer
            results.put(("error", error))
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, daemon=True)
    interrupted = False
    try:
        thread.start()
        while True:
            kind, value = results.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            permits.release()
            yield value
    except KeyboardInterrupt:
        interrupted = True  # do not wait for the model's step
        raise
    finally:
        stopped.set()
        permits.release()
        if not interrupted:
            thread.join()
