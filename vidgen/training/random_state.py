"""Isolation of the global random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global generators of Python, NumPy, PyTorch and a CUDA device after the block.

    Validation runs in such a block, so a run's random streams do not depend on whether and how it validates.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
