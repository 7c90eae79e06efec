"""The part of `speed.py` about growth: by what power of its size does a piece of work get longer?"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel
from vidgen.common.errors import run_program
from vidgen.metrics.frechet import FeatureStatistics, choose_num_groups

from .timing import Row, device_of, exponent, seconds

VAE = {"smoke": "tiny-test", "cpu": "tiny", "paper": "released"}
DIT = {"smoke": "tiny-test", "cpu": "S", "paper": "paper"}
SIZES = {"smoke": (1, 2), "cpu": (1, 2, 4, 8), "paper": (1, 2, 4, 8)}
QUERIES = {"smoke": (1, 16), "cpu": (1, 16, 64), "paper": (1, 16, 64, 128)}  # of the structure latent: 49 tokens each
PROCESSES = {"smoke": (), "cpu": (1, 2), "paper": (1, 2)}


def growth(scale: str) -> list[Row]:
    """Times of work of growing size, their fitted exponent, and what it should be."""
    device, sizes = device_of(scale), SIZES[scale]
    thousands = [10_000 * n for n in sizes]
    model = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device).eval()
    channels, frames, side, _ = model.clip_shape
    stride, across = (3 * frames // 4, 3 * side // 4)  # from one tile to the next

    def round_trip(batch: int = 1, windows: int = 1, tiles: int = 1) -> Callable[[], None]:
        size = (frames + (windows - 1) * stride, side, side + (tiles - 1) * across)
        clip = torch.rand(batch, channels, *size, device=device) * 2 - 1
        return torch.no_grad()(lambda: model(clip))

    work: dict[str, tuple[str, dict[int, Callable[[], None]]]] = {
        "clips of a batch: encode and decode": ("1", {n: round_trip(batch=n) for n in sizes}),
        "windows of frames: encode and decode": ("1", {n: round_trip(windows=n) for n in sizes}),
        "tiles of pixels: encode and decode": ("1", {n: round_trip(tiles=n) for n in sizes}),
        "tokens: the DiT's forward pass": ("1 to 2", dict(_denoisers(scale, device))),
        "samples: statistics of their features": ("1", {n: _statistics(n) for n in thousands}),
    }
    rows = []
    for name, (expected, runs) in work.items():
        rows.append(_row(name, {n: seconds(run, device, repeats=3) for n, run in runs.items()}, expected))
    if steps := {n: _training_step(n) for n in PROCESSES[scale]}:
        rows.append(_row("processes on a core each: a training step of a clip each", steps, "0"))
    return rows


def _denoisers(scale: str, device: torch.device) -> list[tuple[int, Callable[[], None]]]:
    """A forward pass without gradients by number of tokens."""
    runs = []
    for queries in QUERIES[scale]:
        model = VidTwinTransformer3DModel.from_preset(DIT[scale], structure_shape=(4, queries, 7, 7)).to(device).eval()
        noise, timestep = torch.randn(1, model.latent_size, device=device), torch.zeros(1, device=device)
        runs.append((sum(model.num_tokens), torch.no_grad()(lambda m=model, x=noise, t=timestep: m(x, t))))
    return runs


def _statistics(samples: int) -> Callable[[], None]:
    features = torch.randn(samples, 400)

    def run() -> None:
        statistics = FeatureStatistics(400, choose_num_groups(400))
        for first in range(0, samples, 50):
            statistics.update(features[first : first + 50], range(first, first + 50))

    return run


def _training_step(processes: int) -> float:
    """Seconds of a step of the tiny VAE under DDP, one thread and one clip a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    taken = context.SimpleQueue()
    torch.multiprocessing.spawn(_train, (processes, port, taken), nprocs=processes)
    return taken.get()


def _train(rank: int, processes: int, port: int, taken: SimpleQueue) -> None:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    world["OMP_NUM_THREADS"] = 1  # else Accelerate gives every process all cores
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)

    def train() -> None:
        accelerator = Accelerator(cpu=True)
        model = AutoencoderKLVidTwin.from_preset("tiny").train()
        clip = torch.rand(1, *model.clip_shape) * 2 - 1
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))

        def step() -> None:
            accelerator.backward(F.l1_loss(model(clip, sample_posterior=True).sample, clip))
            optimizer.step()
            optimizer.zero_grad()

        found = seconds(step, "cpu", repeats=10)
        if accelerator.is_main_process:
            taken.put(found)

    run_program(train)


def _row(name: str, taken: dict[int, float], expected: str) -> Row:
    return {
        "what grows": name,
        "sizes": list(taken),
        "times, s": list(taken.values()),
        "exponent": exponent(list(taken), list(taken.values())),
        "expected": expected,
    }
