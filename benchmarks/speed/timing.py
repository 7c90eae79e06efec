"""Clocks, peak memory and limits of the device, for all parts of `benchmarks.speed`."""

from __future__ import annotations

import multiprocessing
import re
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from vidgen.common.precision import resolve_dtype
from vidgen.metrics.flops import clock, matmul_rate

diffusers.utils.logging.set_verbosity_error()  # otherwise it warns at every cast of a model
Row = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_of(scale: str) -> torch.device:
    """The device of a scale: the accelerator for `paper`, otherwise the CPU."""
    return torch.accelerator.current_accelerator() if scale == "paper" else torch.device("cpu")


def precisions(scale: str) -> dict[str, torch.dtype]:
    """Precisions to measure by name: fp32, and bf16 unless the device is slow in it; `smoke` always measures both."""
    is_slow = scale != "smoke" and resolve_dtype("auto", device_of(scale)) == torch.float32
    return {"fp32": torch.float32} if is_slow else DTYPES


def fast_dtype(scale: str) -> torch.dtype:
    """The fast precision of the scale's device: bf16, or fp32 on a CPU without bf16 products."""
    return precisions(scale).get("bf16", torch.float32)


def median_seconds(run: Callable[[], Any], device: torch.device | str, repeats: int = 5) -> float:
    """Median time after one warm-up."""
    run()
    return statistics.median(time_once(run, device) for _ in range(repeats))


def time_once(run: Callable[[], Any], device: torch.device | str) -> float:
    """Time of one call."""
    start = clock(device)
    run()
    return clock(device) - start


def alternating(runs: dict[str, Callable[[], Any]], device: torch.device | str, repeats: int = 5) -> dict[str, float]:
    """Median times of several functions measured in turns, so that other load affects all of them; one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(time_once(run, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def in_own_process(function: Callable[..., Any], scale: str, *arguments: Any) -> Any:
    """Call a module-level function of a scale in a new process, for its peak memory; `smoke` uses this process."""
    if scale == "smoke":
        return function(scale, *arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_call_with_threads, (torch.get_num_threads(), function, (scale, *arguments)))


def _call_with_threads(threads: int, function: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


def peak_gib(device: torch.device | str) -> float:
    """Peak memory of the accelerator's allocator, or of this process, in GiB."""
    if torch.device(device).type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # Not getrusage: on Linux a new process inherits the peak of its parent there.
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20


def measure_limits(device: torch.device | str, copied: int = 2**28) -> Row:
    """FLOP/s of one large matrix product in either precision, and bytes moved by a copy of `copied` bytes."""
    source = torch.empty(copied, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = min(time_once(lambda: target.copy_(source), device) for _ in range(6))
    rates = {f"{name} matmul, GFLOP/s": matmul_rate(device, dtype) / 1e9 for name, dtype in DTYPES.items()}
    return rates | {"copy, GB/s read and written": 2 * copied / seconds / 1e9}
