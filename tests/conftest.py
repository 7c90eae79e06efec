"""What all tests share: quiet, offline libraries, where the shared data lies, what is watched in models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch._dynamo.utils import counters

import autoencoder.attention

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips, weights and goldens beside the checkout; tests that need it skip without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no shared data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture
def backends(monkeypatch) -> Iterator[list]:
    """What Diffusers' dispatcher is asked for; the backend active before is active again afterwards."""
    asked = []
    dispatch = autoencoder.attention.dispatch_attention_fn

    def record(*args, backend=None, **kwargs):
        asked.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(autoencoder.attention, "dispatch_attention_fn", record)
    with attention_backend("native"):
        yield asked


@pytest.fixture
def fast_bf16(monkeypatch) -> None:
    """Attention as on a CPU that multiplies bf16 clearly faster than float32, whatever this one does."""
    monkeypatch.setattr(autoencoder.attention, "is_clearly_faster", lambda dtype: dtype == torch.bfloat16)


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Counts the graphs compiled so far."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


LONG_FILES = (
    "vidgen/test_programs.py",
    "vidgen/training/",
    "benchmarks/",
    "test_examples.py",
    "test_docs.py",
    "vidgen/data/",
    "vidgen/app/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that two processes finish at the same time."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((i for i, start in enumerate(LONG_FILES) if path.startswith(start)), len(LONG_FILES))

    items.sort(key=rank)
