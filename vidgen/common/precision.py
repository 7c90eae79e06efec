"""Numerical precision of training and inference: chosen for the device, or checked against it."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple, TypeVar

import torch
from accelerate.utils import broadcast_object_list

from autoencoder.matmul_speed import CLEARLY_FASTER, matmul_speedup

from .environment import get_process_state
from .errors import UserError

Model = TypeVar("Model")  # a module or a Diffusers pipeline
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PrecisionChoice(NamedTuple):
    """A value of `train.mixed_precision` ("no", "fp16" or "bf16") and the reason for it, as half a sentence."""

    precision: str
    reason: str


def choose_mixed_precision(device: torch.device | str) -> PrecisionChoice:
    """Return the mixed precision that suits a device.

    It is bf16 if the device multiplies bf16 matrices clearly faster than float32, fp16 on CUDA GPUs without bf16, and
    no mixed precision elsewhere. PyTorch knows the support of CUDA GPUs; other devices are measured in under a
    second.
    """
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bf16", f"{name} has bf16 matrix units")
        return PrecisionChoice("fp16", f"{name} has no bf16 matrix units")
    speedup = matmul_speedup(torch.bfloat16, device)
    reason = f"this {_device_name(device)} multiplies bf16 matrices {speedup:.2g} times as fast as float32"
    return PrecisionChoice("bf16" if speedup >= CLEARLY_FASTER else "no", reason)


def resolve_mixed_precision(name: str, device: torch.device | str, saved: str | None = None) -> PrecisionChoice:
    """Return the precision for a value of `train.mixed_precision`, which may be `auto`.

    With `auto`, the precision of the resumed run has priority, so that resuming is exact; then that of `accelerate
    launch --mixed_precision`; then that which suits the device. The reason includes a warning if a precision that was
    set is slow on the device.
    """
    reason = "set by train.mixed_precision"
    if name == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if saved is not None:
            name, reason = saved, "that of the resumed run"
        elif launcher not in ("", "no"):
            name, reason = launcher, "set by accelerate launch"
        else:
            return choose_mixed_precision(device)
    warning = describe_slowness(torch.bfloat16, device) if name == "bf16" else None
    return PrecisionChoice(name, f"{reason}; warning: {warning}" if warning else reason)


def agree_on_mixed_precision(name: str, saved: str | None = None) -> PrecisionChoice:
    """Return the choice of the main process on every process; the main process prints it with its reason.

    Args:
        name: a value of `train.mixed_precision`.
        saved: the precision of the resumed run.
    """
    state = get_process_state()
    choice = None
    if state.is_main_process:
        choice = resolve_mixed_precision(name, state.device, saved)
        print(f"Mixed precision: {choice.precision} ({choice.reason}).", flush=True)
    [choice] = broadcast_object_list([choice])
    return choice


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype for inference by name: `float32`, `bfloat16`, `float16`, or `auto`.

    `auto` is bfloat16 if the device multiplies it clearly faster than float32, else float32. It is never float16, in
    which values beyond 65504 overflow. Prints a warning if half precision was set and is slow.

    Raises:
        UserError: if the name is unknown.
    """
    if name == "auto":
        return torch.bfloat16 if choose_mixed_precision(device).precision == "bf16" else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}; got {name!r}.")
    if warning := describe_slowness(DTYPES[name], device):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return DTYPES[name]


def place_model(model: Model, device: torch.device | str, dtype: str = "auto") -> Model:
    """Move a model or pipeline to a device, in a dtype that `resolve_dtype` takes; print both to stderr."""
    torch_dtype = resolve_dtype(dtype, device)
    print(f"computing on {device} in {str(torch_dtype).removeprefix('torch.')}", file=sys.stderr, flush=True)
    return model.to(device, torch_dtype)


def describe_slowness(dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return half a sentence with the measured ratio where a device multiplies `dtype` more slowly than float32."""
    device = torch.device(device)
    if dtype == torch.float32 or device.type == "cuda":
        return None
    speedup = matmul_speedup(dtype, device)
    if speedup >= 1:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this {_device_name(device)} multiplies {name} matrices at {speedup:.2g} times the rate of float32"


def _device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else f"{device.type} device"
