"""Fixtures of the data tests: distinct frames, a small set of sprites, the real clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vidgen.data.sprites import render_sprite, sample_factors, write_sprites


@pytest.fixture(scope="session")
def sprites(tmp_path_factory) -> Path:
    """Two clips of each class; read only."""
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 2, seed=0)
    return root


@pytest.fixture(scope="session")
def clips(shared_data) -> Path:
    """Real videos: ucf101/<Class>/*.avi and varied/*.mp4."""
    return shared_data / "clips"


@pytest.fixture(scope="session")
def frames() -> np.ndarray:
    """48 distinct frames."""
    return render_sprite(sample_factors(np.random.default_rng(0), "orbit", num_frames=48))
