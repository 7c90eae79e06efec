"""Fixtures of the benchmarks' tests; each test file has a fresh state of Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from vidgen.losses.lpips import LPIPS

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def _fresh_state() -> Iterator[None]:
    """The state holds one mixed precision for the lifetime of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def lpips_weights(monkeypatch: pytest.MonkeyPatch) -> str:
    """The option for LPIPS weights; without the file, LPIPS gets the same random weights at every call."""

    def build(backbone: str, *_: object) -> LPIPS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LPIPS(backbone)

    weights = SHARED_DATA / "weights" / "squeezenet1_1_features.pth"
    if not weights.exists():
        monkeypatch.setattr(LPIPS, "from_pretrained", build)
    return f"--lpips-weights={weights}"


@pytest.fixture
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder shared by all tests, so that they share trained runs."""
    return tmp_path_factory.getbasetemp() / "benchmarks"
