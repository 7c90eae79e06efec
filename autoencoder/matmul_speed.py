"""Measures the speed of matrix products on a device, in half precision and by oneDNN.

In half precision CPUs differ by a factor of a hundred.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

CLEARLY_FASTER = 1.5  # speedup from which another precision or library is worth its rounding
MATRIX_SIZE = 512  # on a CPU; eight times that on other devices
REPEATS = 8
SECONDS = 0.25  # no more repeats after this time, which one emulated product may take


@torch.compiler.assume_constant_result
def matmul_speedup(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Return the rate of matrix products in `dtype` relative to float32 on `device`; 0 if it does not support them.

    It is measured once per process, in less than a second.
    """
    device = torch.device(device)
    return _measure_speedup(dtype, device.type, device.index)


def is_clearly_faster(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Return whether `device` multiplies matrices in `dtype` at least 1.5 times as fast as in float32."""
    return matmul_speedup(dtype, device) >= CLEARLY_FASTER


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` by oneDNN, for dense tensors on a CPU; without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def is_onednn_faster() -> bool:
    """Return whether oneDNN multiplies float32 matrices on this CPU at least 1.5 times as fast as PyTorch's default.

    It is measured once per process, in milliseconds.
    """
    return _run_in_new_thread(_compare_onednn) >= CLEARLY_FASTER


@cache
def _measure_speedup(dtype: torch.dtype, device_type: str, index: int | None) -> float:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    return _run_in_new_thread(_compare_rates, dtype, device)


def _run_in_new_thread(measure: Callable[..., float], *args: Any) -> float:
    """Run a measurement in a new thread, which has no autocast and no modes, such as fake tensors.

    It computes on one core, so that its CPU time does not depend on the load of the machine.
    """
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        result = executor.submit(measure, *args).result()
    torch.set_num_threads(num_threads)  # for later threads
    return result


def _compare_rates(dtype: torch.dtype, device: torch.device) -> float:
    size = MATRIX_SIZE if device.type == "cpu" else 8 * MATRIX_SIZE
    best = {torch.float32: math.inf, dtype: math.inf}
    try:
        matrices = {key: torch.ones(2, size, size, device=device).to(key) for key in best}  # no random numbers
        start = time.perf_counter()
        for _ in range(REPEATS):
            for key, (a, b) in matrices.items():
                best[key] = min(best[key], _time_product(a, b))
            if time.perf_counter() - start > SECONDS:
                break
    except (RuntimeError, NotImplementedError, TypeError):  # not supported on this device
        return 0.0
    return best[torch.float32] / best[dtype]


def _compare_onednn() -> float:
    a, b = torch.ones(2, MATRIX_SIZE, MATRIX_SIZE)
    products = (F.linear, onednn_linear)
    try:
        default, onednn = zip(*([_time_product(a, b, p) for p in products] for _ in range(REPEATS)), strict=True)
    except (RuntimeError, NotImplementedError, AttributeError):  # PyTorch is built without it
        return 0.0
    return min(default) / min(onednn)


def _time_product(a: torch.Tensor, b: torch.Tensor, product: Callable[..., torch.Tensor] = F.linear) -> float:
    clock = time.thread_time if a.device.type == "cpu" else time.perf_counter
    start = clock()
    with torch.no_grad():
        product(a, b)
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return clock() - start
