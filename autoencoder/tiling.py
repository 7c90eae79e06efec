"""Tiles for clips of any size: their positions, and their weights where they overlap.

A tile has the size of the model's clips; along time it is also called a window. Tiles are a stride apart, and the last
one ends with the clip. An axis shorter than a tile is padded with its last frame, row or column.
"""

from __future__ import annotations

import itertools
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Size = tuple[int, int, int]


@dataclass(frozen=True)
class ClipGeometry:
    """The size of a clip and of its tiles; latents of several tiles keep it.

    Attributes:
        size: (T, H, W) of the clip, in frames and pixels.
        tile: (T, H, W) of a tile, the model's clip.
        stride: (frames, rows, columns) from one tile to the next, at most the size of a tile.

    Raises:
        ValueError: if a size or a stride is not positive, or a stride leaves gaps between tiles.
    """

    size: Size
    tile: Size
    stride: Size

    def __post_init__(self) -> None:
        for name in ("size", "tile", "stride"):
            value = tuple(getattr(self, name))
            if len(value) != 3 or not all(is_whole(n) and n >= 1 for n in value):
                raise ValueError(f"The {name} of a clip's geometry must be three positive numbers, not {value}.")
            object.__setattr__(self, name, tuple(map(int, value)))
        if any(stride > tile for stride, tile in zip(self.stride, self.tile, strict=True)):
            raise ValueError(f"Tiles of {self.tile} at a stride of {self.stride} leave gaps.")

    @property
    def grid(self) -> Size:
        """Numbers of tiles along (T, H, W)."""
        return tuple(len(starts) for starts in self._starts())

    @property
    def num_tiles(self) -> int:
        """Total number of tiles."""
        return torch.Size(self.grid).numel()

    @property
    def padded(self) -> Size:
        """(T, H, W) of the clip after padding every axis to at least a tile."""
        return tuple(max(size, tile) for size, tile in zip(self.size, self.tile, strict=True))

    def tile_starts(self) -> list[Size]:
        """Return (frame, row, column) of each tile's start, row-major, which is the order of tiles in latents."""
        return list(itertools.product(*self._starts()))

    def _starts(self) -> list[list[int]]:
        return [axis_starts(*axis) for axis in zip(self.size, self.tile, self.stride, strict=True)]


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, not counting `True` and `False`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_stride(name: str, value: int, tile: int) -> int:
    """Return the stride; raise a `ValueError` unless it is a whole number from 1 to the size of a tile."""
    if not is_whole(value) or not 1 <= value <= tile:
        raise ValueError(f"{name} must be a whole number between 1 and the size of a tile, {tile}, not {value!r}.")
    return int(value)


def axis_starts(size: int, tile: int, stride: int) -> list[int]:
    """Return the starts of the tiles along an axis: a stride apart, the last one moved back to end with the axis."""
    return [*range(0, size - tile, stride), max(size - tile, 0)]


def ramp(overlap: int, length: int) -> torch.Tensor:
    """Return the weight of the later of two tiles at its positions (length,): rising over `overlap`, then 1."""
    return ((torch.arange(length, dtype=torch.float32) + 1) / (overlap + 1)).clamp(max=1.0)


def axis_weights(starts: list[int], tile: int) -> torch.Tensor:
    """Return the weights of the tiles along an axis at their positions: (tiles, tile), with sum 1 everywhere.

    Every tile covers the previous ones, with a weight that rises over the overlap with the one before. Tiles can thus
    be blended one at a time, and a single tile has weight 1.
    """
    weights = torch.ones(len(starts), tile)
    for i, start in enumerate(starts[1:], start=1):
        rise = ramp(starts[i - 1] + tile - start, tile)
        for j in range(i):  # more than two tiles overlap if the last one was moved back
            shared = starts[j] + tile - start
            if shared > 0:
                weights[j, tile - shared :] *= 1 - rise[:shared]
        weights[i] *= rise
    return weights


def cut(clip: torch.Tensor, geometry: ClipGeometry) -> list[torch.Tensor]:
    """Cut a clip (B, C, T, H, W) into tiles (B, C, *tile), in the order of `geometry.tile_starts()`."""
    missing = [padded - size for size, padded in zip(geometry.size, geometry.padded, strict=True)]
    if any(missing):
        last_axis_first = [n for pad in reversed(missing) for n in (0, pad)]
        clip = nn.functional.pad(clip, last_axis_first, mode="replicate")
    t, h, w = geometry.tile
    return [clip[:, :, f : f + t, r : r + h, c : c + w] for f, r, c in geometry.tile_starts()]


class Blender:
    """Blends decoded tiles to a clip, one at a time in the order of `geometry.tile_starts()`."""

    def __init__(self, geometry: ClipGeometry) -> None:
        self.geometry = geometry
        self._canvas: torch.Tensor | None = None
        starts = geometry._starts()
        weights = [axis_weights(*axis) for axis in zip(starts, geometry.tile, strict=True)]
        self._tiles = list(zip(itertools.product(*starts), itertools.product(*weights), strict=True))
        self._added = 0

    def add(self, tile: torch.Tensor) -> None:
        """Add the next tile (B, C, *tile)."""
        if self._canvas is None:
            # Blend in float32, since in half precision the weights do not add up to 1.
            self._dtype, blend_dtype = tile.dtype, torch.promote_types(tile.dtype, torch.float32)
            self._canvas = tile.new_zeros(*tile.shape[:2], *self.geometry.padded, dtype=blend_dtype)
        (f, r, c), weights = self._tiles[self._added]
        along_t, along_h, along_w = (weight.to(tile.device) for weight in weights)
        weight = along_t[:, None, None] * along_h[:, None] * along_w
        t, h, w = self.geometry.tile
        self._canvas[:, :, f : f + t, r : r + h, c : c + w] += tile * weight
        self._added += 1

    def clip(self) -> torch.Tensor:
        """Return the clip (B, C, T, H, W) in the dtype of the tiles, without the padding."""
        t, h, w = self.geometry.size
        return self._canvas[:, :, :t, :h, :w].to(self._dtype)
