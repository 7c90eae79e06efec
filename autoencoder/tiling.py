"""Clips of any size on a model of one size: where the tiles lie and how much each counts where they overlap.

A tile is a clip of the model's own size; along time it is also called a window. Tiles lie a stride apart, the last one
ends where the clip ends; an axis shorter than a tile is padded by its last frame, row or column.
"""

from __future__ import annotations

import itertools
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Size = tuple[int, int, int]
Place = tuple[int, int, int]


@dataclass(frozen=True)
class ClipGeometry:
    """The size of a clip and the tiles it was cut into; a latent of several tiles carries it.

    Attributes:
        size: (T, H, W) of the clip, in frames and pixels.
        tile: (T, H, W) of a tile: the model's own clip.
        stride: (frames, rows, columns) from one tile to the next, at most the tile's own size.

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
        """Tiles in all."""
        return torch.Size(self.grid).numel()

    @property
    def padded(self) -> Size:
        """(T, H, W) of the clip once no axis is shorter than a tile."""
        return tuple(max(size, tile) for size, tile in zip(self.size, self.tile, strict=True))

    def places(self) -> list[Place]:
        """(frame, row, column) where each tile starts, row-major: the order of a latent's tiles."""
        return list(itertools.product(*self._starts()))

    def _starts(self) -> list[list[int]]:
        return [axis_starts(*axis) for axis in zip(self.size, self.tile, self.stride, strict=True)]


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; `True` and `False`, which Python counts among them, are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_stride(name: str, value: int, tile: int) -> int:
    """The stride; a `ValueError` unless it is a whole number between 1 and the size of a tile."""
    if not is_whole(value) or not 1 <= value <= tile:
        raise ValueError(
            f"{name} must be a whole number between 1 and the size of a tile, {tile}, not {value!r}; larger strides "
            "leave gaps."
        )
    return int(value)


def axis_starts(size: int, tile: int, stride: int) -> list[int]:
    """Where the tiles along an axis start: a stride apart, the last one moved back to end with the axis."""
    return [*range(0, size - tile, stride), max(size - tile, 0)]


def ramp(overlap: int, length: int) -> torch.Tensor:
    """The share of the later of two tiles over its own positions (length,): rising over `overlap` of them, then 1."""
    return ((torch.arange(length, dtype=torch.float32) + 1) / (overlap + 1)).clamp(max=1.0)


def axis_weights(starts: list[int], tile: int) -> torch.Tensor:
    """How much each tile along an axis counts at each of its positions: (tiles, tile); 1 in sum everywhere.

    Every tile is laid over those before it and rises over what it shares with the one before. So tiles can be blended
    as they come, and one tile alone counts exactly 1.
    """
    weights = torch.ones(len(starts), tile)
    for i, start in enumerate(starts[1:], start=1):
        rise = ramp(starts[i - 1] + tile - start, tile)
        for j in range(i):  # more than two tiles overlap where the last one was moved back
            shared = starts[j] + tile - start
            if shared > 0:
                weights[j, tile - shared :] *= 1 - rise[:shared]
        weights[i] *= rise
    return weights


def cut(clip: torch.Tensor, geometry: ClipGeometry) -> list[torch.Tensor]:
    """The tiles (B, C, *tile) of a clip (B, C, T, H, W), in the order of `geometry.places()`."""
    missing = [padded - size for size, padded in zip(geometry.size, geometry.padded, strict=True)]
    if any(missing):
        last_axis_first = [n for pad in reversed(missing) for n in (0, pad)]
        clip = nn.functional.pad(clip, last_axis_first, mode="replicate")
    t, h, w = geometry.tile
    return [clip[:, :, f : f + t, r : r + h, c : c + w] for f, r, c in geometry.places()]


class Blender:
    """Puts decoded tiles together, one at a time and in the order of `geometry.places()`.

    Args:
        geometry: of the clip.
    """

    def __init__(self, geometry: ClipGeometry) -> None:
        self.geometry = geometry
        self._canvas: torch.Tensor | None = None
        starts = geometry._starts()
        weights = [axis_weights(*axis) for axis in zip(starts, geometry.tile, strict=True)]
        self._tiles = list(zip(itertools.product(*starts), itertools.product(*weights), strict=True))
        self._added = 0

    def add(self, tile: torch.Tensor) -> None:
        """The next tile (B, C, *tile)."""
        if self._canvas is None:
            # Weights that add up to 1 in float32 leave seams in half precision.
            self._dtype, blended_in = tile.dtype, torch.promote_types(tile.dtype, torch.float32)
            self._canvas = tile.new_zeros(*tile.shape[:2], *self.geometry.padded, dtype=blended_in)
        (f, r, c), weights = self._tiles[self._added]
        along_t, along_h, along_w = (weight.to(tile.device) for weight in weights)
        weight = along_t[:, None, None] * along_h[:, None] * along_w
        t, h, w = self.geometry.tile
        self._canvas[:, :, f : f + t, r : r + h, c : c + w] += tile * weight
        self._added += 1

    def clip(self) -> torch.Tensor:
        """The clip (B, C, T, H, W), in the tiles' dtype and without what was padded."""
        t, h, w = self.geometry.size
        return self._canvas[:, :, :t, :h, :w].to(self._dtype)
