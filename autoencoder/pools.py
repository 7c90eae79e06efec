"""Pooling of features: over time for structure, over space for dynamics; the paper's and its ablations (Table 3).

Pooling over time returns n_q vectors of `query_dim` for every location, (B, D, T, h, w) -> (B * n_q, query_dim, h, w).
Pooling over space returns a vector for every column and row, (B, D, T, h, w) -> (B, D', T, w + h).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .qformer import QFormer


class LocationQFormer(QFormer):
    """A Q-Former over the T vectors of each location, with locations in the batch (the paper)."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        batch, _, _, height, width = z.shape
        queries = super().forward(rearrange(z, "b d t h w -> (b h w) t d"))
        return rearrange(queries, "(b h w) q c -> (b q) c h w", b=batch, h=height, w=width)


class FoldedQFormer(nn.Module):
    """A Q-Former over frames, with locations in the hidden dimension (ablation `structure_fold="hidden"`).

    At full width the folded vectors would have h * w * D values and their layers more parameters than the rest of the
    model, so every location is projected to an eighth of `query_dim`.

    Args:
        grid: (h, w).
        query_dim: output channels.
        context_dim: D.
        qformer: further arguments of `QFormer`.
    """

    def __init__(self, grid: tuple[int, int], query_dim: int, context_dim: int, **qformer: int | float) -> None:
        super().__init__()
        narrow = max(query_dim // 8, 1)
        folded = math.prod(grid) * narrow
        self.grid = grid
        self.narrow = nn.Linear(context_dim, narrow)
        self.qformer = QFormer(dim=query_dim, context_dim=folded, **qformer)
        self.unfold = nn.Linear(query_dim, folded)
        self.widen = nn.Linear(narrow, query_dim)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        frames = self.narrow(rearrange(z, "b d t h w -> b t (h w) d")).flatten(2)
        locations = self.unfold(self.qformer(frames)).unflatten(2, (math.prod(self.grid), -1))
        return rearrange(self.widen(locations), "b q (h w) c -> (b q) c h w", h=self.grid[0])


class TemporalConv(nn.Module):
    """A 3x3 convolution per frame, then an MLP over time (ablation `structure_pool="conv"`).

    Args:
        num_frames: positions T in time.
        num_queries: n_q.
        query_dim: output channels.
        context_dim: D.
        hidden_frames: width of the MLP over time.
    """

    def __init__(
        self, num_frames: int, num_queries: int, query_dim: int, context_dim: int, hidden_frames: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(context_dim, query_dim, kernel_size=3, padding=1)
        self.mlp_in = nn.Linear(num_frames, hidden_frames)
        self.mlp_out = nn.Linear(hidden_frames, num_queries)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        batch = z.shape[0]
        x = F.relu(self.conv(rearrange(z, "b d t h w -> (b t) d h w")))
        x = rearrange(x, "(b t) c h w -> b c h w t", b=batch)
        return rearrange(self.mlp_out(F.relu(self.mlp_in(x))), "b c h w q -> (b q) c h w")


class AxisAverages(nn.Module):
    """Averages of every frame over its height and over its width (the paper)."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z.mean(dim=3), z.mean(dim=4)], dim=3)


class SpatialQFormer(QFormer):
    """A Q-Former of w + h queries over the locations of a frame (ablation `dynamics_pool="qformer"`).

    The queries learn their order, so the decoder can treat them as columns and rows.
    """

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        queries = super().forward(rearrange(z, "b d t h w -> (b t) (h w) d"))
        return rearrange(queries, "(b t) n c -> b c t n", b=z.shape[0])
