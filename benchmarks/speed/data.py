"""The speed of data: reading clips, training on them, and reconstructing whole videos."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader

from autoencoder import AutoencoderKLVidTwin
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.decoders import ClipReader, installed_decoders
from vidgen.data.sprites import write_sprites
from vidgen.data.streams import FrameReader, open_writer
from vidgen.inference import operations, streaming

from .timing import Row, device_of, in_own_process, peak_gib, time_once, wall_seconds

# Frames and (height, width) of one minute of video; a tenth of it is measured as well.
VIDEO = {"smoke": (40, (64, 64)), "cpu": (1500, (360, 640)), "paper": (1500, (720, 1280))}
FPS = 25
TILE = {"smoke": dict(sample_size=64), "cpu": dict(sample_size=256, patch_size=32)}
TILE["paper"] = TILE["cpu"]
# Videos to read: their number, (height, width), and the sides of clips that are cut from them.
DRIFTING = {"smoke": (1, (60, 80), (32,)), "cpu": (12, (240, 320), (64, 224)), "paper": (48, (240, 320), (224,))}
SPRITES_PER_CLASS = {"smoke": 1, "cpu": 8, "paper": 32}


def video(scale: str) -> list[Row]:
    """`vidgen reconstruct` of one minute of video, relative to its stages alone, and its peak memory."""
    frames, size = VIDEO[scale]
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        AutoencoderKLVidTwin.from_preset("tiny", **TILE[scale]).save_pretrained(folder / "model")
        for length in (frames // 10, frames):
            path = folder / f"{length}.mp4"
            _write_video(path, length, size)
            rows.append({"frames": length, "size": f"{size[1]} x {size[0]}"})
            rows[-1] |= in_own_process(_reconstruct, scale, folder / "model", path)
        short, long = rows
        stages = in_own_process(_stages_alone, scale, folder / "model", folder / f"{frames}.mp4")
        long |= stages
        long["fraction of slowest stage"] = long["frames/s"] / min(stages.values())
        long["peak relative to short video"] = long["peak, GiB"] / short["peak, GiB"]
    return rows


def _write_video(path: Path, frames: int, size: tuple[int, int], seed: int = 0) -> None:
    """Write a video of a texture, as of a photograph, that drifts over the frame."""
    generator, (height, width) = torch.Generator().manual_seed(seed), size
    texture = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    texture = F.interpolate(texture, size=size, mode="bicubic")[0]
    picture = (texture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    with open_writer(path, fps=FPS, width=width, height=height) as writer:
        for i in range(frames):
            writer.write(np.roll(picture, (2 * i, 3 * i), (0, 1))[None])


def _reconstruct(scale: str, model: Path, path: Path) -> Row:
    output = str(path.with_name("out.mp4"))
    seconds = wall_seconds(lambda: operations.reconstruct(str(path), output, model=str(model)))
    with FrameReader(path) as reader:
        rate = reader.num_frames / seconds
    return {"s": seconds, "frames/s": rate, "peak, GiB": peak_gib("cpu")}


def _stages_alone(scale: str, model: Path, path: Path) -> Row:
    """Frames per second of reading, of the model and of writing, each measured alone."""
    vae = AutoencoderKLVidTwin.from_pretrained(model).eval()
    rates: Row = {}
    with FrameReader(path) as reader:
        height, width = reader.height, reader.width
        geometry = streaming.video_geometry(vae, reader.num_frames, height, width)
        start = time.perf_counter()
        windows = [window for i, window in enumerate(streaming.windows(reader, geometry)) if i < 8]
        rates["reading, frames/s"] = reader.num_frames / (time.perf_counter() - start)
    part = replace(geometry, size=(windows[-1].start + geometry.tile[0], *geometry.size[1:]))
    start = time.perf_counter()
    chunks = list(streaming.decode_windows(streaming.encode_windows(windows, vae), vae, part))
    # Frames that windows share count once, as in the whole video.
    rates["model, frames/s"] = geometry.stride[0] * len(windows) / (time.perf_counter() - start)
    start = time.perf_counter()
    with open_writer(path.with_name("alone.mp4"), fps=FPS, width=width, height=height) as writer:
        for chunk in chunks:
            writer.write(chunk)
    rates["writing, frames/s"] = sum(map(len, chunks)) / (time.perf_counter() - start)
    return rates


def data(scale: str) -> list[Row]:
    """Clips of 16 frames at 8 fps: plain decoding, each decoder, `ClipDataset`, a loader; waiting of a training."""
    rows = []
    count, size, sides = DRIFTING[scale]
    with tempfile.TemporaryDirectory() as folder:
        sprites, larger = Path(folder) / "sprites", Path(folder) / "larger"
        write_sprites(sprites, SPRITES_PER_CLASS[scale], seed=0)
        for number in range(count):
            _write_video(larger / f"{number}.mp4", 7 * FPS, size, seed=number)
        for name, root, side in (("64 x 64", sprites, 64), *((f"{size[1]} x {size[0]}", larger, s) for s in sides)):
            clips = ClipDataset(root, 16, 8, side, clips_per_video=2)
            rows.append(
                {"videos": name, "clip side, px": side, **_clip_rates(clips, epochs=1 if scale == "smoke" else 3)}
            )
        rows[0] |= _data_wait(ClipDataset(sprites, 16, 8, 64, clips_per_video=1 if scale == "smoke" else 4), scale)
    return rows


def _clip_rates(clips: ClipDataset, epochs: int) -> Row:
    """Clips per second, the best of a few epochs in turns; the loader in wall-clock time, the others in CPU time."""
    loader = _build_loader(clips)
    starts = [(clips.files[index % len(clips.files)].path, clips[index]["start"]) for index in range(len(clips))]
    methods: dict[str, Callable[[], Any]] = {
        "decoding alone": lambda: [_decode_alone(path, start) for path, start in starts],
        "dataset": lambda: [clips[index] for index in range(len(clips))],
        "loader": lambda: list(loader),
    }
    readers = {f"read by {name}": ClipReader(name) for name in installed_decoders()}
    for name, reader in readers.items():
        methods[name] = lambda r=reader: [r.read(path, start=start, fps=8, num_frames=16) for path, start in starts]
    times: dict[str, list[float]] = {name: [] for name in methods}
    for epoch in range(epochs + 1):
        for name, run in methods.items():
            clock = time.perf_counter if name == "loader" else time.process_time  # CPU time is less noisy
            start = clock()
            run()
            if epoch:  # the first one starts the worker
                times[name].append(clock() - start)
    rates = {name: len(clips) / min(seconds) for name, seconds in times.items()}
    ratios = {f"{name} / decoding": rates[name] / rates["decoding alone"] for name in ("dataset", "loader")}
    ratios |= {f"{name} / by pyav": rates[name] / rates["read by pyav"] for name in list(readers)[1:]}
    return {f"{name}, clips/s": rate for name, rate in rates.items()} | ratios


def _build_loader(clips: ClipDataset) -> DataLoader:
    return DataLoader(
        clips, batch_size=4, num_workers=1, persistent_workers=True, prefetch_factor=4, collate_fn=collate_clips
    )


def _decode_alone(path: Path, start: float) -> list[np.ndarray]:
    """Read a clip's frames in the simplest way: seek, decode in order up to the last one, convert the needed ones."""
    moments, frames, converter = [start + i / 8 for i in range(16)], [], VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streaming.video[0]
        stream.thread_count = 1
        container.seek(int(start / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if moments and frame.time >= moments[0] - 0.5 / stream.average_rate:
                frames.append(converter.reformat(frame, format="rgb24", threads=1).to_ndarray())
                moments.pop(0)
            if not moments:
                break
    return frames


def _data_wait(clips: ClipDataset, scale: str) -> Row:
    """The fraction of a tiny VAE's training time that waits for the next batch, with one worker and batch size 4."""
    device = device_of(scale)
    model = AutoencoderKLVidTwin.from_preset("tiny").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = _build_loader(clips)

    def step(batch: dict[str, Any]) -> None:
        clip = batch["video"].to(device)
        F.l1_loss(model(clip, sample_posterior=True).sample, clip).backward()
        optimizer.step()
        optimizer.zero_grad()

    waited = worked = 0.0
    for _epoch in range(2):
        mark = time.perf_counter()
        for number, batch in enumerate(loader):
            wait = time.perf_counter() - mark
            seconds = time_once(lambda b=batch: step(b), device)
            if number:  # the first batch cannot overlap with work
                waited, worked = waited + wait, worked + seconds
            mark = time.perf_counter()
    return {
        "tiny step, s": worked / (2 * len(loader) - 2),
        "fraction of time waiting for data": waited / (waited + worked),
    }
