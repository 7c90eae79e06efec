"""Streaming a video gives the same result as processing it whole; threads only save time."""

from __future__ import annotations

import copy
import threading
import time

import numpy as np
import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from vidgen.data.transforms import clip_to_frames, frames_to_clip
from vidgen.inference.streaming import (
    WindowLatents,
    decode_windows,
    encode_windows,
    in_background,
    original_frames,
    video_geometry,
    window_starts,
    windows,
)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").eval()


def frames(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(4, 32, 32), (1, 32, 32), (3, 40, 24), (5, 32, 32), (6, 32, 48), (17, 33, 32)])
@torch.no_grad()
def test_streaming_equals_processing_the_whole_video(vae, size):
    video = frames(*size)
    geometry = video_geometry(vae, *size)
    whole = vae(frames_to_clip(torch.from_numpy(video))[None]).sample[0]
    chunks = list(decode_windows(encode_windows(windows(iter(video), geometry), vae), vae, geometry))
    streamed = np.concatenate(chunks)
    assert streamed.shape == video.shape and streamed.dtype == np.uint8
    assert np.abs(streamed.astype(int) - clip_to_frames(whole).numpy()).max() <= 1  # rounding
    originals = list(original_frames(windows(iter(video), geometry), geometry))
    assert [len(a) for a in originals] == [len(b) for b in chunks]
    np.testing.assert_array_equal(np.concatenate(originals), video)


@torch.no_grad()
def test_latents_of_windows_equal_those_of_the_whole_video(vae):
    video, geometry = frames(9, 40, 32), video_geometry(vae, 9, 40, 32)
    whole = vae.encode(frames_to_clip(torch.from_numpy(video))[None]).latent_dist.mode()
    parts = list(encode_windows(windows(iter(video), geometry), vae))
    assert [start for start, _ in parts] == window_starts(geometry) == [0, 3, 5]
    torch.testing.assert_close(torch.cat([z.pack() for _, z in parts], dim=1), whole.pack())


def test_windows_are_blended_where_they_overlap(vae):
    """Two windows of constant shades: the shade rises linearly over the overlap, and only there."""
    geometry = video_geometry(vae, 7, 32, 32)
    assert window_starts(geometry) == [0, 3]
    shades = iter([torch.full((1, 3, 4, 32, 32), -0.5), torch.full((1, 3, 4, 32, 32), 0.5)])

    class Shades:
        def decode(self, latents, components):
            return type("Output", (), {"sample": next(shades)})

    video = np.concatenate(list(decode_windows([WindowLatents(0, None), WindowLatents(3, None)], Shades(), geometry)))
    levels = video[:, 0, 0, 0].astype(int).tolist()
    assert levels == [64, 64, 64, 128, 191, 191, 191]


def test_latents_and_frames_that_are_not_finite_are_refused(vae):
    """The error names the dtype."""
    video, geometry = frames(4), video_geometry(vae, 4, 32, 32)
    [window] = encode_windows(windows(iter(video), geometry), vae)
    for part, run in (
        ("encoder", lambda model: list(encode_windows(windows(iter(video), geometry), model))),
        ("decoder", lambda model: list(decode_windows([window], model, geometry))),
    ):
        broken = copy.deepcopy(vae)
        torch.nn.init.constant_(next(getattr(broken, part).parameters()), torch.inf)
        with pytest.raises(ValueError, match=r"^The autoencoder produced NaN or infinite values in float32"):
            run(broken)


def test_a_video_that_ends_early_is_an_error(vae):
    with pytest.raises(ValueError, match="ends after 5 of 9 frames"):
        list(windows(iter(frames(5)), video_geometry(vae, 9, 32, 32)))


def test_windows_are_read_lazily(vae):
    read = []

    def counted():
        for frame in frames(40):
            read.append(1)
            yield frame

    video = windows(counted(), video_geometry(vae, 40, 32, 32))
    next(video)
    assert len(read) == 4
    next(video)
    assert len(read) == 7


def test_background_work_keeps_order_and_runs_ahead():
    def items():
        for i in range(20):
            yield i, threading.current_thread()

    got = list(in_background(items(), ahead=3))
    assert [i for i, _ in got] == list(range(20))
    assert all(thread is not threading.current_thread() for _, thread in got)


def test_two_stages_work_at_once():
    def slow(items):
        for item in items:
            time.sleep(0.05)
            yield item

    start = time.monotonic()
    assert list(slow(in_background(slow(in_background(slow(range(8))))))) == list(range(8))
    assert time.monotonic() - start < 0.9 * 3 * 8 * 0.05


def test_errors_propagate_and_closing_stops_the_thread():
    def broken():
        yield 1
        raise KeyError("the reason")

    with pytest.raises(KeyError, match="the reason"):
        list(in_background(broken()))

    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    stream = in_background(endless())
    next(stream)
    stream.close()
    assert closed.wait(5) and threading.active_count() == before
