"""Measures how fast a device multiplies half-precision matrices; CPUs differ by a factor of a hundred."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch.nn import functional as F

CLEARLY_FASTER = 1.5  # ratio of matrix rates from which half precision is worth its rounding
MATRIX_SIZE = 512  # 4096 on other devices than the CPU
REPEATS = 8
SECONDS = 0.25  # after which no product is repeated: a CPU may take this long for one that it emulates


@torch.compiler.assume_constant_result
def matmul_speedup(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Return the rate of matrix products in `dtype` over their rate in float32 on `device`.

    It is measured once per process, in well under a second. 0 where the device cannot multiply in `dtype`.
    """
    device = torch.device(device)
    return _measure_speedup(dtype, device.type, device.index)


def is_clearly_faster(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Return whether `device` multiplies matrices in `dtype` at least 1.5 times as fast as in float32."""
    return matmul_speedup(dtype, device) >= CLEARLY_FASTER


@cache
def _measure_speedup(dtype: torch.dtype, device_type: str, index: int | None) -> float:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    num_threads = torch.get_num_threads()
    # A new thread has neither the caller's autocast nor its dispatch modes, such as fake tensors, and its own number
    # of threads: one, whose time the system counts for itself, whatever else the machine is doing.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        speedup = executor.submit(_compare_rates, dtype, device).result()
    torch.set_num_threads(num_threads)  # for threads to come
    return speedup


def _compare_rates(dtype: torch.dtype, device: torch.device) -> float:
    size = MATRIX_SIZE if device.type == "cpu" else 8 * MATRIX_SIZE
    best = {torch.float32: math.inf, dtype: math.inf}
    try:
        matrices = {key: torch.randn(2, size, size, device=device).to(key) for key in best}
        start = time.perf_counter()
        for _ in range(REPEATS):
            for key, (a, b) in matrices.items():
                best[key] = min(best[key], _time_product(a, b))
            if time.perf_counter() - start > SECONDS:
                break
    except (RuntimeError, NotImplementedError, TypeError):  # no such product on this device
        return 0.0
    return best[torch.float32] / best[dtype]


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    clock = time.thread_time if a.device.type == "cpu" else time.perf_counter
    start = clock()
    with torch.no_grad():
        F.linear(a, b)
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return clock() - start
