"""Principal components of the blocks of clips: the best linear code of a given size, a reference without a network."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh

from ..common.errors import UserError
from ..common.io import atomic_write

BLOCKS_AT_ONCE = 1024  # of the covariance, which bounds the memory


class BlockPCA:
    """A linear code of clips: each block is its mean plus its largest principal components.

    Args:
        block: (T, H, W) of a block, in frames and pixels.
        mean: mean block, (D,) with D = C * T * H * W.
        basis: orthonormal principal components by falling variance, (D, K).
    """

    def __init__(self, block: tuple[int, int, int], mean: torch.Tensor, basis: torch.Tensor) -> None:
        self.block, self.mean, self.basis = tuple(block), mean, basis

    @classmethod
    def fit(cls, clips: Iterable[torch.Tensor], block: tuple[int, int, int], components: int) -> BlockPCA:
        """Fit the components to clips; the covariance is accumulated in float64, in O(D^2) memory.

        Args:
            clips: batches (B, C, T, H, W).
            block: (T, H, W), which divides the clips' size.
            components: number K of components to compute.

        Raises:
            UserError: if there is no clip, a size is not a multiple of the block, or K is not between 1 and D.
        """
        count, total, squares = 0, None, None
        for batch in clips:
            for rows in _cut(batch.double().cpu(), block).split(BLOCKS_AT_ONCE):
                if squares is None:
                    total, squares = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
                count += len(rows)
                total += rows.sum(dim=0)
                squares.addmm_(rows.T, rows)
        if squares is None:
            raise UserError("block PCA needs one clip or more.")
        size = len(total)
        if not 1 <= components <= size:
            raise UserError(f"a block of {size} values has 1 to {size} components, not {components}.")
        mean = total / count
        covariance = squares.div_(count).addr_(mean, mean, alpha=-1).numpy()
        if components < size // 8:  # Lanczos iterations are faster for a few of many components
            _, vectors = eigsh(covariance, k=components, v0=mean.new_ones(size).numpy())
        else:
            _, vectors = eigh(covariance, subset_by_index=(size - components, size - 1))
        return cls(block, mean.float(), torch.from_numpy(vectors[:, ::-1].copy()).float())

    def count_values(self, clip_shape: tuple[int, int, int, int], components: int) -> int:
        """Number of values that code a clip (C, T, H, W) with this number of components per block."""
        return components * math.prod(clip_shape[1:]) // math.prod(self.block)

    def reconstruct(self, clips: torch.Tensor, components: int) -> torch.Tensor:
        """Code clips (B, C, T, H, W) with this number of components per block, and decode them.

        Raises:
            UserError: if there are fewer components, or the size of the clips is not a multiple of the block.
        """
        if not 1 <= components <= self.basis.shape[1]:
            raise UserError(f"this transform has 1 to {self.basis.shape[1]} components, not {components}.")
        mean, basis = self.mean.to(clips), self.basis[:, :components].to(clips)
        rows = (_cut(clips, self.block) - mean) @ basis @ basis.T + mean
        return _join(rows, self.block, clips.shape)

    def save(self, path: str | os.PathLike) -> None:
        """Save the transform as a safetensors file."""
        tensors = {"block": torch.tensor(self.block), "mean": self.mean, "basis": self.basis.contiguous()}
        with atomic_write(path) as unfinished:
            save_file(tensors, unfinished)

    @classmethod
    def load(cls, path: str | os.PathLike) -> BlockPCA:
        """Load a file that `save` wrote."""
        tensors = load_file(path)
        return cls(tuple(tensors["block"].tolist()), tensors["mean"], tensors["basis"])


def _cut(clips: torch.Tensor, block: tuple[int, int, int]) -> torch.Tensor:
    """Cut clips (B, C, T, H, W) into blocks (N, D)."""
    if any(size % side for size, side in zip(clips.shape[2:], block, strict=True)):
        raise UserError(f"clips of (T, H, W) = {tuple(clips.shape[2:])} cannot be cut into blocks of {block}.")
    t, h, w = block
    return rearrange(clips, "b c (f t) (y h) (x w) -> (b f y x) (c t h w)", t=t, h=h, w=w)


def _join(rows: torch.Tensor, block: tuple[int, int, int], shape: torch.Size) -> torch.Tensor:
    """Invert `_cut` for clips of a shape (B, C, T, H, W)."""
    (t, h, w), (_, c, frames, height, width) = block, shape
    grid = dict(f=frames // t, y=height // h, x=width // w)
    return rearrange(rows, "(b f y x) (c t h w) -> b c (f t) (y h) (x w)", c=c, t=t, h=h, w=w, **grid)
