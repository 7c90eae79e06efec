"""Videos of any length through a VidTwin, window by window: memory stays flat however long they are.

A window is as many frames as the model takes at once; `autoencoder.tiling` says where windows lie, and each is cut
into tiles by the model itself. Everything here is a generator, so that reading, the model and writing, each in a
thread of its own (`in_background`), work on different windows at the same time.
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

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.tiling import ClipGeometry, axis_starts, ramp
from pipelines.finite import check_finite_output

from ..data.streams import FrameReader
from ..data.transforms import clip_to_frames, crop, frames_to_clip, resize_to_cover

Item = TypeVar("Item")
Components = Literal["both", "structure", "dynamics"]
Together = tuple[np.ndarray, ...]  # the next frames of several videos, each uint8 (T, H, W, 3)

FRAMES_AT_ONCE = 4  # rounded to pixels: a window's worth of intermediate values would set the peak of memory


class Window(NamedTuple):
    """Some frames of a video.

    Attributes:
        start: the number of the first of them.
        frames: T of uint8 (H, W, 3); those that windows share are the same arrays.
    """

    start: int
    frames: list[np.ndarray]


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
        yield Window(start, held.copy())


@torch.no_grad()
def encode_windows(video: Iterable[Window], vae: AutoencoderKLVidTwin) -> Iterator[WindowLatents]:
    """The mean latents of every window.

    Raises:
        NonFiniteError: if they contain NaN or infinite values.
    """
    for start, frames in video:
        yield WindowLatents(start, _encode(frames, vae))


def _encode(frames: list[np.ndarray], vae: AutoencoderKLVidTwin) -> TwinLatents:
    clip = frames_to_clip(torch.from_numpy(np.stack(frames))).to(vae.device, vae.dtype)
    latents = vae.encode(clip[None]).latent_dist.mode()
    latents = latents if isinstance(latents, TwinLatents) else vae.unpack(latents)
    check_finite_output("the autoencoder", latents.pack(), vae)
    return latents


@torch.no_grad()
def decode_windows(
    video: Iterable[WindowLatents],
    vae: AutoencoderKLVidTwin,
    geometry: ClipGeometry,
    components: Components = "both",
) -> Iterator[np.ndarray]:
    """Finished frames, uint8 (T, H, W, 3), a few at a time: windows blended over the frames they share.

    Raises:
        NonFiniteError: if a decoded window contains NaN or infinite values.
    """
    shared = None  # decoded frames that the next window shares
    for (start, latents), following in zip(video, _following_starts(geometry), strict=True):
        clip = vae.decode(latents, components).sample[0].float()
        check_finite_output("the autoencoder", clip, vae)
        if shared is not None:
            overlap = shared.shape[1]
            rise = ramp(overlap, overlap).to(clip.device)[:, None, None]
            clip[:, :overlap] = shared.lerp_(clip[:, :overlap], rise)
        done, shared = clip[:, : following - start], clip[:, following - start :].clone()
        frames = np.concatenate([clip_to_frames(part).numpy() for part in done.split(FRAMES_AT_ONCE, dim=1)])
        del clip, done  # while the next one is waited for
        yield frames


def original_frames(video: Iterable[Window], geometry: ClipGeometry) -> Iterator[np.ndarray]:
    """The frames themselves, as many at a time as `decode_windows` yields."""
    for (start, frames), following in zip(video, _following_starts(geometry), strict=True):
        yield np.stack(frames[: following - start])


def _following_starts(geometry: ClipGeometry) -> list[int]:
    """For each window, the number of the first frame that is the next one's, too, or the end."""
    return [*window_starts(geometry)[1:], geometry.size[0]]


# --- what is made of a video's latents -------------------------------------------------------------------------------


def component_frames(video: FrameReader, vae: AutoencoderKLVidTwin, geometry: ClipGeometry) -> Iterator[Together]:
    """A video, and what the model makes of both its latents, of structure alone and of dynamics alone: four."""
    shown, to_encode = itertools.tee(in_background(windows(video, geometry)))
    latents = itertools.tee(encode_windows(to_encode, vae), 3)
    decoded = [
        decode_windows(z, vae, geometry, kind)
        for z, kind in zip(latents, ("both", "structure", "dynamics"), strict=True)
    ]
    yield from zip(original_frames(shown, geometry), *decoded, strict=True)


def reenacted_frames(
    ours: FrameReader, theirs: FrameReader, vae: AutoencoderKLVidTwin, geometry: ClipGeometry, strength: float
) -> Iterator[Together]:
    """Our video, theirs resized and cropped to our frames, and what ours looks like, moving as theirs: three.

    `strength`: how much of their dynamics, 0 to 1. Both videos are of one rate.
    """
    fitted = (_fitted(frame, ours.height, ours.width) for frame in theirs)
    pairs = in_background(zip(windows(ours, geometry), windows(fitted, geometry), strict=True))
    ours_shown, theirs_shown, ours_to_encode, theirs_to_encode = (
        map(itemgetter(which), copy) for which, copy in zip((0, 1, 0, 1), itertools.tee(pairs, 4), strict=True)
    )
    mixed = (
        WindowLatents(a.start, _with_dynamics(a.latents, b.latents, strength))
        for a, b in zip(encode_windows(ours_to_encode, vae), encode_windows(theirs_to_encode, vae), strict=True)
    )
    yield from zip(
        original_frames(ours_shown, geometry),
        original_frames(theirs_shown, geometry),
        decode_windows(mixed, vae, geometry),
        strict=True,
    )


def _fitted(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame (H, W, 3) resized until it covers another size, and the middle of it."""
    clip = resize_to_cover(frames_to_clip(torch.from_numpy(frame)[None]), (height, width))
    return clip_to_frames(crop(clip, (height, width), 0.5, 0.5))[0].numpy()


def _with_dynamics(ours: TwinLatents, theirs: TwinLatents, strength: float) -> TwinLatents:
    """Our structure, and a mixture of our dynamics and theirs."""
    return TwinLatents(ours.structure, torch.lerp(ours.dynamics, theirs.dynamics, strength), ours.geometry)


# --- threads ---------------------------------------------------------------------------------------------------------


def in_background(items: Iterable[Item], ahead: int = 1) -> Iterator[Item]:
    """The same items, made in a thread of their own, up to `ahead` of them before they are asked for.

    What the thread raises is raised here; leaving the loop early stops it.
    """
    made: queue.SimpleQueue[tuple[str, Item | BaseException | None]] = queue.SimpleQueue()
    asked, left = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        try:
            iterator = iter(items)
            while True:
                asked.acquire()  # before it is made: one more than `ahead` would cost a window's memory
                if left.is_set():
                    return
                made.put(("item", next(iterator)))
        except StopIteration:
            made.put(("end", None))
        except BaseException as error:  # also an interrupt is the reader's to hear of
            made.put(("error", error))
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, daemon=True)
    interrupted = False
    try:
        thread.start()
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            asked.release()
            yield value
    except KeyboardInterrupt:
        interrupted = True  # who interrupts does not want to wait for the model's step
        raise
    finally:
        left.set()
        asked.release()
        if not interrupted:
            thread.join()
