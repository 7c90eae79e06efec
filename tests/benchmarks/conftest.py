"""Programs are imported by their names, and each of their test files is a process of its own to Accelerate."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from vidgen.losses.lpips import LPIPS

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
sys.path.insert(0, str(REPOSITORY / "benchmarks"))


@pytest.fixture(scope="module", autouse=True)
def _fresh_state() -> Iterator[None]:
    """Its state holds one mixed precision for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def lpips_weights(monkeypatch: pytest.MonkeyPatch) -> str:
    """The option that names them; where there are none, LPIPS has the same random ones at every call."""

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
    """Shared by all programs' tests, as their runs are."""
    return tmp_path_factory.getbasetemp() / "benchmarks"
