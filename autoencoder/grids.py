"""Sizes that follow from the config of an `AutoencoderKLVidTwin`: frames, grids and positions in time.

A grid is (rows, columns).
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import FrozenDict

from .tiling import is_whole

Grid = tuple[int, int]


def frame_size(sample_size: int | Sequence[int]) -> Grid:
    """Return (height, width) in pixels of a side or a pair.

    Raises:
        ValueError: if it is neither a positive whole number nor two of them.
    """
    size = (sample_size, sample_size) if is_whole(sample_size) else sample_size
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_whole(side) and side > 0 for side in size):
        raise ValueError(
            f"sample_size must be a positive whole number, or (height, width) of two, not {sample_size!r}."
        )
    return tuple(size)


def feature_grid(config: FrozenDict) -> Grid:
    """Return the grid of a frame's patches."""
    height, width = frame_size(config.sample_size)
    return height // config.patch_size, width // config.patch_size


def feature_frames(config: FrozenDict) -> int:
    """Return the number of a clip's patches along time."""
    return config.num_frames // config.temporal_patch_size


def structure_grid(config: FrozenDict) -> Grid:
    """Return the grid of the structure latent."""
    return _downsample(feature_grid(config), config.structure_downsamples)


def dynamics_grid(config: FrozenDict) -> Grid:
    """Return the numbers of rows and columns of the dynamics latent, which holds averages over the other axis."""
    return _downsample(feature_grid(config), config.dynamics_downsamples)


def _downsample(grid: Grid, times: int) -> Grid:
    """Return the grid after `times` 3x3 convolutions of stride 2 and padding 1."""
    for _ in range(times):
        grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
    return grid
