"""The transformer of the paper's Figure 5, whose cost depends on the number of tokens alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class PseudoDiT(nn.Module):
    """The transformer of Figure 5 of the VidTwin paper (arXiv 2412.17726), on tokens of its width.

    The paper's 12 610 560 parameters are those of six feed-forward layers with biases and two LayerNorms each:
    attention without projections, no embeddings, no conditioning.

    Args:
        num_layers: number of blocks.
        num_heads: attention heads.
        dim: token width D, divisible by the number of heads.
        mlp_dim: width of the feed-forward layers.
        projections: give each attention its four linear layers.
    """

    def __init__(
        self,
        num_layers: int = 6,
        num_heads: int = 8,
        dim: int = 512,
        mlp_dim: int = 2048,
        projections: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(PseudoDiTBlock(num_heads, dim, mlp_dim, projections) for _ in range(num_layers)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.blocks(tokens)


class PseudoDiTBlock(nn.Module):
    """Attention and a feed-forward layer, each with a preceding LayerNorm and a residual connection."""

    def __init__(self, num_heads: int, dim: int, mlp_dim: int, projections: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim) if projections else None
        self.to_out = nn.Linear(dim, dim) if projections else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        normed = self.norm1(x)
        qkv = (normed,) * 3 if self.to_qkv is None else self.to_qkv(normed).chunk(3, dim=-1)
        query, key, value = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in qkv)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def token_grid(sizes: tuple[int, ...], patch_size: tuple[int, ...], crop: bool = False) -> tuple[int, ...]:
    """The number of patches along each axis of a latent.

    A patch longer than an axis covers it. A partial patch at the end of an axis is padded with zeros.

    Args:
        sizes: of the latent, without its channels.
        patch_size: one number per size.
        crop: leave out partial patches instead.
    """
    pairs = [(size, min(size, patch)) for size, patch in zip(sizes, patch_size, strict=True)]
    return tuple(size // patch if crop else math.ceil(size / patch) for size, patch in pairs)
