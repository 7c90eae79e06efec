"""A small set of sprites and the real clips, shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidgen.data.sprites import write_sprites


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
