"""Clocks, peaks and ceilings: what every part of `speed.py` measures with, and against."""

from __future__ import annotations

import math
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from vidgen.common.precision import resolve_dtype
from vidgen.metrics.flops import clock, matmul_rate

diffusers.utils.logging.set_verbosity_error()  # else each cast of a model warns, of no module at all
Row = dict[str, Any]
REPEATS = {"smoke": 1, "cpu": 5, "paper": 20}  # of what takes milliseconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_of(scale: str) -> torch.device:
    """Where a scale runs: `paper` on the accelerator, all else on the CPU."""
    return torch.accelerator.current_accelerator() if scale == "paper" else torch.device("cpu")


def precisions(scale: str) -> dict[str, torch.dtype]:
    """Precisions to measure by name: fp32, and bf16 unless the scale's device is slow in it; `smoke` takes both."""
    is_slow = scale != "smoke" and resolve_dtype("auto", device_of(scale)) == torch.float32
    return {"fp32": torch.float32} if is_slow else DTYPES


def fast_dtype(scale: str) -> torch.dtype:
    """The precision that the scale's device is fast in: bf16, or fp32 on a CPU without bf16 products."""
    return precisions(scale).get("bf16", torch.float32)


def seconds(run: Callable[[], Any], device: torch.device | str, repeats: int = 5) -> float:
    """Median time after one warm-up."""
    run()
    return statistics.median(once(run, device) for _ in range(repeats))


def once(run: Callable[[], Any], device: torch.device | str) -> float:
    """Time of one call."""
    start = clock(device)
    run()
    return clock(device) - start


def alternating(runs: dict[str, Callable[[], Any]], device: torch.device | str, repeats: int = 5) -> dict[str, float]:
    """Median times of several, taken in turns, so that what slows a machine for a while slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for attempt in range(repeats + 1):
        for name, run in runs.items():
            time_taken = once(run, device)
            if attempt:  # the first is the warm-up
                taken[name].append(time_taken)
    return {name: statistics.median(times) for name, times in taken.items()}


def in_own_process(function: Callable[..., Any], scale: str, *arguments: Any) -> Any:
    """What a module's function of a scale returns in a new process, whose peak memory is its own; here for `smoke`."""
    if scale == "smoke":
        return function(scale, *arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_threads, (torch.get_num_threads(), function, (scale, *arguments)))


def _with_threads(threads: int, function: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


def peak_gib(device: torch.device | str) -> float:
    """Of the accelerator's allocator, or of all that this process has had."""
    if torch.device(device).type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # Not getrusage's: on Linux a new process inherits the peak of the one that started it.
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20


def ceilings(device: torch.device | str, copied: int = 2**28) -> Row:
    """What the device can do: FLOP/s of one large matrix product in either precision, bytes moved by a copy.

    Args:
        copied: bytes of the tensor that is copied.
    """
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    taken = min(once(lambda: target.copy_(source), device) for _ in range(6))
    rates = {f"{name} matmul, GFLOP/s": matmul_rate(device, dtype) / 1e9 for name, dtype in DTYPES.items()}
    return rates | {"copy, GB/s read and written": 2 * copied / taken / 1e9}


def exponent(sizes: list[float], values: list[float]) -> float:
    """The k of values ~ sizes^k, by least squares of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in (sizes, values))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def wall_seconds(run: Callable[[], Any]) -> float:
    """Time of one call by the clock on the wall, whatever threads and processes it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
