"""From encoder features to the two latents and back: the paper's plain bottleneck and a residual one.

The four modules of both, built from the config of an `AutoencoderKLVidTwin`, have the same interfaces (VidTwin, arXiv
2412.17726, Section 3):

    StructureEncoder  (B, D, T, h, w) -> (B, 2 d_S, n_q, h_S, w_S)       mean and log-variance along channels
    DynamicsEncoder   (B, D, T, h, w) -> (B, 2 d_D, T, w_D + h_D)
    StructureDecoder  (B, d_S, n_q, h_S, w_S) -> (B, D, T, h, w)
    DynamicsDecoder   (B, d_D, T, w_D + h_D)  -> (B, D, T, h, w)

T counts positions in time: frames, or groups of `temporal_patch_size` frames.

The residual bottleneck adds non-parametric shortcuts around every layer, as in deep-compression autoencoders (Chen et
al., arXiv 2410.10733): space-to-channel, channel averaging and channel duplication. Trained from scratch, it passes
clips to the decoder from the first step; the plain convolutions output the clip's mean color for hundreds of steps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from einops import rearrange
from torch import nn

from .grids import Grid, dynamics_grid, feature_frames, feature_grid
from .pools import AxisAverages, FoldedQFormer, LocationQFormer, SpatialQFormer, TemporalConv

STRUCTURE_POOLS = ("qformer", "conv")
STRUCTURE_FOLDS = ("batch", "hidden")
DYNAMICS_POOLS = ("average", "qformer")


def qformer_sizes(config: FrozenDict) -> dict[str, Any]:
    return dict(
        context_dim=config.hidden_size,
        num_layers=config.qformer_layers,
        num_heads=config.qformer_heads,
        ffn_dim=config.qformer_ffn_dim,
        dropout=config.qformer_dropout,
    )


def build_temporal_pool(config: FrozenDict) -> nn.Module:
    """Return a module (B, D, T, h, w) -> (B * n_q, query_dim, h, w)."""
    num_queries, query_dim = config.num_queries, config.query_dim
    if config.structure_pool == "conv":
        return TemporalConv(feature_frames(config), num_queries, query_dim, config.hidden_size, config.qformer_ffn_dim)
    if config.structure_fold == "hidden":
        return FoldedQFormer(feature_grid(config), query_dim, num_queries=num_queries, **qformer_sizes(config))
    return LocationQFormer(num_queries, query_dim, **qformer_sizes(config))


def build_spatial_pool(config: FrozenDict) -> tuple[nn.Module, int]:
    """Return a module (B, D, T, h, w) -> (B, D', T, w + h), and D'."""
    if config.dynamics_pool == "average":
        return AxisAverages(), config.hidden_size
    return SpatialQFormer(sum(dynamics_grid(config)), config.query_dim, **qformer_sizes(config)), config.query_dim


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)


def crop_to(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Crop the last two axes to their central window of this grid."""
    rows, columns = grid
    top, left = (x.shape[-2] - rows) // 2, (x.shape[-1] - columns) // 2
    return x[..., top : top + rows, left : left + columns]


def spread_axes(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sum both averages, each repeated along its missing axis: (B, T, w + h, D) -> (B, D, T, h, w)."""
    rows, columns = grid
    over_height, over_width = x.movedim(-1, 1).split([columns, rows], dim=3)
    return over_height[:, :, :, None, :] + over_width[:, :, :, :, None]


# --- the paper's bottleneck ----------------------------------------------------------------------------------------


class StructureEncoder(nn.Module):
    """Q-Former over time, then 3x3 convolutions per query down to mean and log-variance."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.temporal_pool = build_temporal_pool(config)
        self.conv_in = conv3x3(config.query_dim, config.structure_width)
        widths = [config.structure_width * 2**i for i in range(config.structure_downsamples + 1)]
        self.down = nn.ModuleList([conv3x3(a, b, stride=2) for a, b in pairwise(widths)])
        self.conv_out = conv3x3(widths[-1], 2 * config.structure_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(self.temporal_pool(z))
        for conv in self.down:
            x = F.relu(conv(x))
        return rearrange(self.conv_out(x), "(b q) c h w -> b c q h w", b=z.shape[0])


class DynamicsEncoder(nn.Module):
    """Strided 3x3 convolutions per frame, averages over height and width, one shared 3x3 over (time, position)."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        dim = config.hidden_size
        rows, columns = dynamics_grid(config)
        self.axis_sizes = [columns, rows]  # of the averages over height, then over width
        self.down = nn.ModuleList([conv3x3(dim, dim, stride=2) for _ in range(config.dynamics_downsamples)])
        self.spatial_pool, pooled_dim = build_spatial_pool(config)
        self.conv_out = conv3x3(pooled_dim, 2 * config.dynamics_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = rearrange(z, "b d t h w -> (b t) d h w")
        for conv in self.down:
            x = F.relu(conv(x))
        x = self.spatial_pool(rearrange(x, "(b t) d h w -> b d t h w", b=z.shape[0]))
        return torch.cat([self.conv_out(part) for part in x.split(self.axis_sizes, dim=3)], dim=3)


class StructureDecoder(nn.Module):
    """3x3 convolutions and nearest upsampling per query, then to hidden size and from queries to frames."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.grid = feature_grid(config)
        widths = [config.structure_width * 2**i for i in range(config.structure_downsamples, -1, -1)]
        self.conv_in = conv3x3(config.structure_channels, widths[0])
        self.up = nn.ModuleList([conv3x3(a, b) for a, b in pairwise(widths)])
        self.conv_out = conv3x3(widths[-1], config.query_dim)
        self.to_hidden = nn.Linear(config.query_dim, config.hidden_size)
        self.to_frames = nn.Conv1d(config.num_queries, feature_frames(config), kernel_size=1)

    def forward(self, structure: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv_in(rearrange(structure, "b c q h w -> (b q) c h w")))
        for conv in self.up:
            x = F.interpolate(F.relu(conv(x)), scale_factor=2, mode="nearest")
        x = crop_to(self.conv_out(x), self.grid)
        x = rearrange(x, "(b q) c h w -> b q (h w) c", b=structure.shape[0])
        x = F.relu(self.to_hidden(x))
        x = F.relu(self.to_frames(x.flatten(2)))
        return rearrange(x, "b t (h w c) -> b c t h w", h=self.grid[0], w=self.grid[1])


class DynamicsDecoder(nn.Module):
    """An MLP over channels, an MLP over positions, and the missing axis filled by repetition.

    Columns and rows share the MLP over positions in square grids, as in the paper; in others, each axis has its MLP.
    """

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.grid = rows, columns = feature_grid(config)
        self.latent_grid = latent_rows, latent_columns = dynamics_grid(config)
        self.is_square = rows == columns
        self.channels_in = nn.Linear(config.dynamics_channels, config.hidden_size)
        self.channels_out = nn.Linear(config.hidden_size, config.hidden_size)
        self.positions_in = nn.Linear(latent_columns, columns)
        self.positions_out = nn.Linear(columns, columns)
        if not self.is_square:
            self.row_positions_in = nn.Linear(latent_rows, rows)
            self.row_positions_out = nn.Linear(rows, rows)

    def forward(self, dynamics: torch.Tensor) -> torch.Tensor:
        x = self.map_channels(dynamics)
        if self.is_square:
            x = rearrange(x, "b t (side n) d -> b t d side n", side=2)
            x = self.map_positions(x, self.positions_in, self.positions_out)
            x = rearrange(x, "b t d side n -> b t (side n) d")
        else:
            columns, rows = x.transpose(2, 3).split(self.latent_grid[::-1], dim=3)
            columns = self.map_positions(columns, self.positions_in, self.positions_out)
            rows = self.map_positions(rows, self.row_positions_in, self.row_positions_out)
            x = torch.cat([columns, rows], dim=3).transpose(2, 3)
        return spread_axes(x, self.grid)

    def map_channels(self, dynamics: torch.Tensor) -> torch.Tensor:
        """(B, d_D, T, w_D + h_D) -> (B, T, w_D + h_D, D)."""
        return F.relu(self.channels_out(F.relu(self.channels_in(dynamics.movedim(1, -1)))))

    def map_positions(self, x: torch.Tensor, linear_in: nn.Linear, linear_out: nn.Linear) -> torch.Tensor:
        """Map positions of the latent to those of the features, along the last axis."""
        return F.relu(linear_out(F.relu(linear_in(x))))


# --- the residual bottleneck ---------------------------------------------------------------------------------------


def match_channels(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Average groups of channels (dim 1), or repeat channels, to get `channels`; unit variance stays unit variance."""
    in_channels = x.shape[1]
    if in_channels == channels:
        return x
    if in_channels > channels and in_channels % channels == 0:
        group = in_channels // channels
        return x.unflatten(1, (channels, group)).mean(dim=2) * group**0.5
    if channels % in_channels == 0:
        return x.repeat_interleave(channels // in_channels, dim=1)
    # Neither divides the other: resample the channel axis linearly.
    flat = x.flatten(2).transpose(1, 2)
    return F.interpolate(flat, size=channels, mode="linear").transpose(1, 2).reshape(-1, channels, *x.shape[2:])


def resize_axis(x: torch.Tensor, size: int) -> torch.Tensor:
    """Average the last axis of (..., n) down to `size`, or stretch it linearly."""
    flat = x.flatten(0, -2)[:, None]
    if x.shape[-1] >= size:
        flat = F.adaptive_avg_pool1d(flat, size)
    else:
        flat = F.interpolate(flat, size=size, mode="linear")
    return flat.reshape(*x.shape[:-1], size)


class ResidualConv(nn.Module):
    """x -> shortcut(x) + conv(SiLU(GroupNorm(x))); `resample` is "none", "down" (half the grid) or "up" (twice)."""

    def __init__(self, in_channels: int, out_channels: int, resample: str = "none", groups: int = 8) -> None:
        super().__init__()
        self.resample = resample
        self.out_channels = out_channels
        self.norm = nn.GroupNorm(groups if in_channels % groups == 0 else 1, in_channels)
        conv_out = 4 * out_channels if resample == "up" else out_channels
        self.conv = conv3x3(in_channels, conv_out, stride=2 if resample == "down" else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.conv(F.silu(self.norm(x)))
        if self.resample == "up":
            shortcut = match_channels(x, 4 * self.out_channels)
            return F.pixel_shuffle(shortcut + update, 2)
        if self.resample == "down":
            height, width = x.shape[-2:]
            x = F.pixel_unshuffle(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        return match_channels(x, self.out_channels) + update


class ResidualStructureEncoder(nn.Module):
    """The Q-Former and its convolutions as residual branches of averages over time, channels and space."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        self.query_dim = config.query_dim
        self.channels = config.structure_channels
        self.norm = nn.LayerNorm(config.hidden_size)
        self.temporal_pool = build_temporal_pool(config)
        widths = [config.structure_width * 2**i for i in range(config.structure_downsamples + 1)]
        self.conv_in = ResidualConv(config.query_dim, widths[0])
        self.down = nn.ModuleList([ResidualConv(a, b, "down") for a, b in pairwise(widths)])
        self.norm_out = nn.GroupNorm(8, widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * config.structure_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        z = self.norm(z.movedim(1, -1)).movedim(-1, 1)
        over_time = resize_axis(match_channels(z, self.query_dim).movedim(2, -1), self.num_queries)
        x = self.temporal_pool(z) + rearrange(over_time, "b c h w q -> (b q) c h w")
        x = self.conv_in(x)
        for block in self.down:
            x = block(x)
        mean, logvar = self.conv_out(F.silu(self.norm_out(x))).chunk(2, dim=1)
        moments = torch.cat([mean + match_channels(x, self.channels), logvar], dim=1)
        return rearrange(moments, "(b q) c h w -> b c q h w", b=z.shape[0])


class ResidualDynamicsEncoder(nn.Module):
    """Per-frame residual convolutions, averages over both axes, one shared 3x3 over (time, position)."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        dim = config.hidden_size
        rows, columns = dynamics_grid(config)
        self.axis_sizes = [columns, rows]  # of the averages over height, then over width
        self.channels = config.dynamics_channels
        self.norm = nn.LayerNorm(dim)
        self.down = nn.ModuleList([ResidualConv(dim, dim, "down") for _ in range(config.dynamics_downsamples)])
        self.spatial_pool, pooled_dim = build_spatial_pool(config)
        self.conv_out = conv3x3(pooled_dim, 2 * config.dynamics_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = rearrange(self.norm(z.movedim(1, -1)), "b t h w d -> (b t) d h w")
        for block in self.down:
            x = block(x)
        x = self.spatial_pool(rearrange(x, "(b t) d h w -> b d t h w", b=z.shape[0]))
        parts = x.split(self.axis_sizes, dim=3)
        mean, logvar = torch.cat([self.conv_out(part) for part in parts], dim=3).chunk(2, dim=1)
        return torch.cat([mean + match_channels(x, self.channels), logvar], dim=1)


class ResidualStructureDecoder(nn.Module):
    """Residual convolutions and pixel shuffling per query, then to hidden size and from queries to frames."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.grid = feature_grid(config)
        self.hidden_size = config.hidden_size
        self.num_frames = feature_frames(config)
        widths = [config.structure_width * 2**i for i in range(config.structure_downsamples, -1, -1)]
        self.conv_in = conv3x3(config.structure_channels, widths[0])
        self.up = nn.ModuleList([ResidualConv(a, b, "up") for a, b in pairwise(widths)])
        self.conv_out = ResidualConv(widths[-1], config.query_dim)
        self.to_hidden = nn.Linear(config.query_dim, config.hidden_size)
        self.to_frames = nn.Conv1d(config.num_queries, feature_frames(config), kernel_size=1)

    def forward(self, structure: torch.Tensor) -> torch.Tensor:
        batch = structure.shape[0]
        x = rearrange(structure, "b c q h w -> (b q) c h w")
        x = match_channels(x, self.conv_in.out_channels) + self.conv_in(x)
        for block in self.up:
            x = block(x)
        x = rearrange(crop_to(self.conv_out(x), self.grid), "(b q) c h w -> (b q) c (h w)", b=batch)
        x = match_channels(x, self.hidden_size) + self.to_hidden(F.silu(x).transpose(1, 2)).transpose(1, 2)
        x = rearrange(x, "(b q) d s -> b q (s d)", b=batch)
        x = resize_axis(x.transpose(1, 2), self.num_frames).transpose(1, 2) + self.to_frames(F.silu(x))
        return rearrange(x, "b t (h w d) -> b d t h w", h=self.grid[0], w=self.grid[1])


class ResidualDynamicsDecoder(DynamicsDecoder):
    """The MLPs of `DynamicsDecoder` as residual branches of repeated channels and stretched positions."""

    def map_channels(self, dynamics: torch.Tensor) -> torch.Tensor:
        shortcut = match_channels(dynamics, self.channels_in.out_features).movedim(1, -1)
        x = shortcut + self.channels_in(dynamics.movedim(1, -1))
        return x + self.channels_out(F.silu(x))

    def map_positions(self, x: torch.Tensor, linear_in: nn.Linear, linear_out: nn.Linear) -> torch.Tensor:
        x = resize_axis(x, linear_in.out_features) + linear_in(x)
        return x + linear_out(F.silu(x))


# --- a single latent (ablation) ------------------------------------------------------------------------------------
# The structure latent (d, T, h_S, w_S) holds everything: frames are neither pooled over time nor averaged over space.
# The dynamics latent is empty, and its decoder outputs zero.


class SingleEncoder(nn.Module):
    """Strided 3x3 convolutions per frame, of the width of `DynamicsEncoder`'s, down to mean and log-variance."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        dim = config.hidden_size
        self.conv_in = conv3x3(dim, dim)
        self.down = nn.ModuleList([conv3x3(dim, dim, stride=2) for _ in range(config.structure_downsamples)])
        self.conv_out = conv3x3(dim, 2 * config.structure_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv_in(rearrange(z, "b d t h w -> (b t) d h w")))
        for conv in self.down:
            x = F.relu(conv(x))
        return rearrange(self.conv_out(x), "(b t) c h w -> b c t h w", b=z.shape[0])


class SingleDecoder(nn.Module):
    """3x3 convolutions and nearest upsampling per frame."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        dim = config.hidden_size
        self.grid = feature_grid(config)
        self.conv_in = conv3x3(config.structure_channels, dim)
        self.up = nn.ModuleList([conv3x3(dim, dim) for _ in range(config.structure_downsamples)])

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv_in(rearrange(latent, "b c t h w -> (b t) c h w")))
        for conv in self.up:
            x = F.interpolate(F.relu(conv(x)), scale_factor=2, mode="nearest")
        return rearrange(crop_to(x, self.grid), "(b t) d h w -> b d t h w", b=latent.shape[0])


class ResidualSingleEncoder(nn.Module):
    """`SingleEncoder` with residual convolutions."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        dim = config.hidden_size
        self.channels = config.structure_channels
        self.norm = nn.LayerNorm(dim)
        self.conv_in = ResidualConv(dim, dim)
        self.down = nn.ModuleList([ResidualConv(dim, dim, "down") for _ in range(config.structure_downsamples)])
        self.conv_out = conv3x3(dim, 2 * config.structure_channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(rearrange(self.norm(z.movedim(1, -1)), "b t h w d -> (b t) d h w"))
        for block in self.down:
            x = block(x)
        mean, logvar = self.conv_out(x).chunk(2, dim=1)
        moments = torch.cat([mean + match_channels(x, self.channels), logvar], dim=1)
        return rearrange(moments, "(b t) c h w -> b c t h w", b=z.shape[0])


class ResidualSingleDecoder(nn.Module):
    """`SingleDecoder` with residual convolutions."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        dim = config.hidden_size
        self.grid = feature_grid(config)
        self.conv_in = conv3x3(config.structure_channels, dim)
        self.up = nn.ModuleList([ResidualConv(dim, dim, "up") for _ in range(config.structure_downsamples)])

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        x = rearrange(latent, "b c t h w -> (b t) c h w")
        x = match_channels(x, self.conv_in.out_channels) + self.conv_in(x)
        for block in self.up:
            x = block(x)
        return rearrange(crop_to(x, self.grid), "(b t) d h w -> b d t h w", b=latent.shape[0])


class NoDynamicsEncoder(nn.Module):
    """Returns an empty dynamics latent."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.new_empty(z.shape[0], 0, z.shape[2], 0)


class NoDynamicsDecoder(nn.Module):
    """Returns features of zero: there is no dynamics latent to decode."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.hidden_size, self.grid = config.hidden_size, feature_grid(config)

    def forward(self, dynamics: torch.Tensor) -> torch.Tensor:
        batch, _, frames, _ = dynamics.shape
        return dynamics.new_zeros(batch, self.hidden_size, frames, *self.grid)


# The classes of each bottleneck: structure encoder, dynamics encoder, structure decoder, dynamics decoder.
Bottleneck = tuple[type[nn.Module], type[nn.Module], type[nn.Module], type[nn.Module]]
BOTTLENECKS: dict[str, Bottleneck] = {
    "plain": (StructureEncoder, DynamicsEncoder, StructureDecoder, DynamicsDecoder),
    "residual": (
        ResidualStructureEncoder,
        ResidualDynamicsEncoder,
        ResidualStructureDecoder,
        ResidualDynamicsDecoder,
    ),
}
SINGLE_LATENT_BOTTLENECKS: dict[str, Bottleneck] = {
    "plain": (SingleEncoder, NoDynamicsEncoder, SingleDecoder, NoDynamicsDecoder),
    "residual": (ResidualSingleEncoder, NoDynamicsEncoder, ResidualSingleDecoder, NoDynamicsDecoder),
}
