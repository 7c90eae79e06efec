"""The parts of `speed.py` about clips: reading them, training on them, whole videos, features for FVD."""

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
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.decoders import ClipReader, installed_decoders
from vidgen.data.sprites import write_sprites
from vidgen.data.streams import FrameReader, open_writer
from vidgen.inference import operations as commands
from vidgen.inference import streaming as streams
from vidgen.metrics.flops import matmul_rate
from vidgen.metrics.frechet import FeatureStatistics, choose_num_groups, frechet_distance
from vidgen.metrics.i3d import I3D

from .timing import REPEATS, Row, device_of, in_own_process, once, peak_gib, seconds, wall_seconds

# A minute of video and a tenth of it: frames, and (height, width).
VIDEO = {"smoke": (40, (64, 64)), "cpu": (1500, (360, 640)), "paper": (1500, (720, 1280))}
FPS = 25
TILE = {"smoke": dict(sample_size=64), "cpu": dict(sample_size=256, patch_size=32)}
TILE["paper"] = TILE["cpu"]
# Videos to read: how many, of what (height, width), and the sides of clips cut from them.
DRIFTING = {"smoke": (1, (60, 80), (32,)), "cpu": (12, (240, 320), (64, 224)), "paper": (48, (240, 320), (224,))}
SPRITES_PER_CLASS = {"smoke": 1, "cpu": 8, "paper": 32}
FEATURES = {"smoke": (9, 224, 1, 500), "cpu": (16, 224, 2, 10_000), "paper": (16, 224, 16, 10_000)}


def video(scale: str) -> list[Row]:
    """`vidgen reconstruct` of a minute of video: against reading, model and writing alone, and its peak memory."""
    frames, size = VIDEO[scale]
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        AutoencoderKLVidTwin.from_preset("tiny", **TILE[scale]).save_pretrained(folder / "model")
        for length in (frames // 10, frames):
            path = folder / f"{length}.mp4"
            _write_drifting(path, length, size)
            rows.append({"frames": length, "size": f"{size[1]} x {size[0]}"})
            rows[-1] |= in_own_process(_reconstruct, scale, folder / "model", path)
        short, long = rows
        alone = in_own_process(_stages_alone, scale, folder / "model", folder / f"{frames}.mp4")
        long |= alone
        long["of the slowest part"] = long["frames/s"] / min(alone.values())
        long["of the short one's peak"] = long["peak, GiB"] / short["peak, GiB"]
    return rows


def _write_drifting(path: Path, frames: int, size: tuple[int, int], seed: int = 0) -> None:
    """A photograph-like texture drifting over the frame."""
    generator, (height, width) = torch.Generator().manual_seed(seed), size
    texture = torch.rand(1, 3, height // 8, width // 8, generator=generator)
    texture = F.interpolate(texture, size=size, mode="bicubic")[0]
    picture = (texture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    with open_writer(path, fps=FPS, width=width, height=height) as writer:
        for i in range(frames):
            writer.write(np.roll(picture, (2 * i, 3 * i), (0, 1))[None])


def _reconstruct(scale: str, model: Path, path: Path) -> Row:
    taken = wall_seconds(lambda: commands.reconstruct(str(path), str(path.with_name("out.mp4")), model=str(model)))
    with FrameReader(path) as reader:
        rate = reader.num_frames / taken
    return {"s": taken, "frames/s": rate, "peak, GiB": peak_gib("cpu")}


def _stages_alone(scale: str, model: Path, path: Path) -> Row:
    """Frames per second of reading, of the model and of writing, each with the machine to itself."""
    vae = AutoencoderKLVidTwin.from_pretrained(model).eval()
    rates: Row = {}
    with FrameReader(path) as reader:
        height, width = reader.height, reader.width
        geometry = streams.video_geometry(vae, reader.num_frames, height, width)
        start = time.perf_counter()
        cut = [window for i, window in enumerate(streams.windows(reader, geometry)) if i < 8]
        rates["reading, frames/s"] = reader.num_frames / (time.perf_counter() - start)
    part = replace(geometry, size=(cut[-1].start + geometry.tile[0], *geometry.size[1:]))
    start = time.perf_counter()
    chunks = list(streams.decode_windows(streams.encode_windows(cut, vae), vae, part))
    # Windows overlap: their frames count once, as they do in the whole video.
    rates["model, frames/s"] = geometry.stride[0] * len(cut) / (time.perf_counter() - start)
    start = time.perf_counter()
    with open_writer(path.with_name("alone.mp4"), fps=FPS, width=width, height=height) as writer:
        for chunk in chunks:
            writer.write(chunk)
    rates["writing, frames/s"] = sum(map(len, chunks)) / (time.perf_counter() - start)
    return rates


def data(scale: str) -> list[Row]:
    """16 frames at 8 fps: decoding alone, each decoder, `ClipDataset`, one worker; a tiny step's wait for data."""
    rows = []
    count, size, sides = DRIFTING[scale]
    with tempfile.TemporaryDirectory() as folder:
        sprites, larger = Path(folder) / "sprites", Path(folder) / "larger"
        write_sprites(sprites, SPRITES_PER_CLASS[scale], seed=0)
        for number in range(count):
            _write_drifting(larger / f"{number}.mp4", 7 * FPS, size, seed=number)
        for name, root, side in (("64 x 64", sprites, 64), *((f"{size[1]} x {size[0]}", larger, s) for s in sides)):
            clips = ClipDataset(root, 16, 8, side, clips_per_video=2)
            rows.append(
                {"videos": name, "clips of side": side, **_clip_rates(clips, epochs=1 if scale == "smoke" else 3)}
            )
        rows[0] |= _data_wait(ClipDataset(sprites, 16, 8, 64, clips_per_video=1 if scale == "smoke" else 4), scale)
    return rows


def _clip_rates(clips: ClipDataset, epochs: int) -> Row:
    """Clips a second, the best of some epochs each, taken in turns; the loader's by the clock, the others' of CPU."""
    loader = DataLoader(
        clips, batch_size=4, num_workers=1, persistent_workers=True, prefetch_factor=4, collate_fn=collate_clips
    )
    starts = [(clips.files[index % len(clips.files)].path, clips[index]["start"]) for index in range(len(clips))]
    ways: dict[str, Callable[[], Any]] = {
        "decoding alone": lambda: [_decode_alone(path, start) for path, start in starts],
        "dataset": lambda: [clips[index] for index in range(len(clips))],
        "loader": lambda: list(loader),
    }
    readers = {f"read by {name}": ClipReader(name) for name in installed_decoders()}
    for way, reader in readers.items():
        ways[way] = lambda r=reader: [r.read(path, start=start, fps=8, num_frames=16) for path, start in starts]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for attempt in range(epochs + 1):
        for way, run in ways.items():
            clock = time.perf_counter if way == "loader" else time.process_time  # which others' load disturbs less
            start = clock()
            run()
            if attempt:  # the first one starts the worker
                times[way].append(clock() - start)
    rates = {way: len(clips) / min(taken) for way, taken in times.items()}
    ratios = {f"{way} / decoding": rates[way] / rates["decoding alone"] for way in ("dataset", "loader")}
    ratios |= {f"{way} / by pyav": rates[way] / rates["read by pyav"] for way in list(readers)[1:]}
    return {f"{way}, clips/s": rate for way, rate in rates.items()} | ratios


def _decode_alone(path: Path, start: float) -> list[np.ndarray]:
    """The plainest way to a clip's frames: seek, decode in order up to the last, convert those wanted."""
    moments, frames, converter = [start + i / 8 for i in range(16)], [], VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
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
    """The share of a tiny VAE's training that waits for the next batch, one worker, batch 4."""
    device = device_of(scale)
    model = AutoencoderKLVidTwin.from_preset("tiny").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(
        clips, batch_size=4, num_workers=1, persistent_workers=True, prefetch_factor=4, collate_fn=collate_clips
    )

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
            taken = once(lambda b=batch: step(b), device)
            if number:  # before the first batch nothing can overlap
                waited, worked = waited + wait, worked + taken
            mark = time.perf_counter()
    return {"tiny step, s": worked / (2 * len(loader) - 2), "data wait": waited / (waited + worked)}


def fvd(scale: str) -> list[Row]:
    """I3D features of clips against the matmul rate, and the Fréchet distance of two sets of features."""
    device = device_of(scale)
    frames, size, batch, samples = FEATURES[scale]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        I3D()(torch.empty(batch, 3, frames, size, size))
    network = I3D().to(device)
    clips = torch.rand(batch, 3, frames, size, size, device=device) * 2 - 1
    taken = seconds(lambda: network(clips), device, REPEATS[scale])
    flops = counter.get_total_flops()
    sets = [torch.randn(samples, 400, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]

    def distance() -> float:
        both = []
        for features in sets:
            statistics = FeatureStatistics(400, choose_num_groups(400))
            for first in range(0, samples, 64):
                part = features[first : first + 64]
                statistics.update(part, range(first, first + len(part)))
            both.append(statistics.merged())
        return frechet_distance(*both)

    return [
        {
            "features, clips/s": batch / taken,
            "TFLOP a clip": flops / batch / 1e12,
            "share of the fp32 matmul rate": flops / taken / matmul_rate(device, torch.float32),
            f"distance of 2 x {samples} x 400, s": seconds(distance, "cpu", REPEATS[scale]),
        }
    ]
