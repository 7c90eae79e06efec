"""A linear encoder and decoder around the network of an `AutoencoderKLVidTwin`, fitted to clips before training.

Both are principal components of features with a role for each latent:

* structure: slow frequencies. A cosine basis over time and lapped cosine bases over rows and columns keep the lowest
  frequencies of every cell of the structure latent's grid.
* dynamics: fast frequencies, those over time that structure does not see. A frame is averaged over its height and over
  its width, as in VidTwin; lapped cosine bases of these averages keep the lowest frequencies of every position.

With `linear_path_experts`, a location of the structure latent has several bases (`autoencoder.linear_experts`).

Bases are orthonormal and fixed; the projections to latents and back are trained. Lapped bases (Malvar, "Signal
Processing with Lapped Transforms", 1992) reach half a block into the blocks beside, so decoded blocks have no seams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from diffusers.configuration_utils import FrozenDict
from einops import rearrange
from torch import nn

from .grids import dynamics_grid, frame_size, structure_grid
from .linear_experts import ExpertDecoder, ExpertEncoder, fit_experts

POSTERIOR_STD = 0.1  # initial noise of a latent's value, as an amplitude of its component in clips of [-1, 1]
NETWORK_GAIN = 0.03  # of the network's moments; as a parameter it is trained to 0 before the network has learned


def cosine_basis(count: int, length: int) -> torch.Tensor:
    """Return the `count` lowest frequencies of the orthonormal DCT-II: (count, length)."""
    points = torch.arange(length, dtype=torch.float64) + 0.5
    basis = (torch.arange(count)[:, None] * points * (math.pi / length)).cos() * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis


def lapped_basis(blocks: int, length: int) -> torch.Tensor:
    """Return the lower half of the frequencies of a lapped orthogonal transform: (blocks, block / 2, length).

    It is a DCT-II of every block after an orthogonal filter across each boundary of two blocks (Tran et al.,
    "Lapped transform via time-domain pre- and post-filtering", 2003, Section III).
    """
    block = length // blocks
    half = block // 2
    identity = torch.eye(half, dtype=torch.float64)
    reverse = identity.flip(0)
    butterfly = torch.cat([torch.cat([identity, reverse], 1), torch.cat([reverse, -identity], 1)])
    points = torch.arange(half, dtype=torch.float64) + 0.5
    dct_iv = (points[:, None] * points * (math.pi / half)).cos() * math.sqrt(2 / half)
    rotation = reverse @ cosine_basis(half, half).T @ dct_iv @ reverse
    boundary = butterfly @ torch.block_diag(identity, rotation) @ butterfly / 2
    between = [boundary] * (blocks - 1)
    filters = torch.block_diag(identity, *between, identity)
    dct = torch.block_diag(*[cosine_basis(half, block)] * blocks)
    return (dct @ filters).unflatten(0, (blocks, half))


class LinearFeatures(nn.Module):
    """The fixed bases: clips (B, C, T, H, W) to features and back.

    Attributes:
        structure_features: shape of the features of a location of the structure latent: channels, slow temporal
            frequencies, vertical and horizontal frequencies.
        sizes: number of features of a location of the structure latent, a column and a row of the dynamics latent.

    Raises:
        ValueError: if a grid does not divide the frames into blocks of an even number of pixels.
    """

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        size = height, width = frame_size(config.sample_size)
        for grid in (structure_grid(config), dynamics_grid(config)):
            if any(side % (2 * blocks) for side, blocks in zip(size, grid, strict=True)):
                raise ValueError(
                    f"linear_path needs grids of the latents that divide {height} x {width} pixels into blocks of an "
                    f"even size, not {grid[0]} x {grid[1]}."
                )
        if not 0 < config.linear_path < config.num_frames:
            raise ValueError(f"linear_path must be 0 to {config.num_frames - 1}, not {config.linear_path}.")
        if config.linear_path_experts < 1:
            raise ValueError(f"linear_path_experts must be at least 1, not {config.linear_path_experts}.")
        self.patch_frames = config.temporal_patch_size
        bases = {
            "slow": cosine_basis(config.linear_path, config.num_frames),
            **dict(zip(("rows", "columns"), map(lapped_basis, structure_grid(config), size), strict=True)),
            **dict(zip(("strip_rows", "strip_columns"), map(lapped_basis, dynamics_grid(config), size), strict=True)),
        }
        for name, basis in bases.items():
            self.register_buffer(name, basis.float(), persistent=False)
        channels, frames = config.in_channels, self.patch_frames
        self.structure_features = (channels, config.linear_path, self.rows.shape[1], self.columns.shape[1])
        self.sizes = (
            math.prod(self.structure_features),
            channels * frames * self.strip_columns.shape[1],
            channels * frames * self.strip_rows.shape[1],
        )

    def analyze_structure(self, clip: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, h_S, w_S, features)."""
        slow = torch.einsum("bcthw,kt->bckhw", clip, self.slow.to(clip))
        return torch.einsum("bckhw,rph,sqw->brsckpq", slow, self.rows.to(clip), self.columns.to(clip)).flatten(3)

    def synthesize_structure(self, features: torch.Tensor) -> torch.Tensor:
        """(B, h_S, w_S, features) -> (B, C, T, H, W)."""
        rows, columns, slow = (basis.to(features) for basis in (self.rows, self.columns, self.slow))
        features = features.unflatten(3, self.structure_features)
        return torch.einsum("brsckpq,sqw,rph,kt->bcthw", features, columns, rows, slow)

    def analyze_dynamics(self, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, T, H, W) -> of columns (B, t, w_D, features) and of rows (B, t, h_D, features)."""
        height, width = clip.shape[-2:]
        over_height, over_width = clip.mean(dim=3) * height**0.5, clip.mean(dim=4)
        over_width = (over_width - over_width.mean(dim=3, keepdim=True)) * width**0.5  # columns hold the frame's mean
        return self._analyze_strips(over_height, self.strip_columns), self._analyze_strips(over_width, self.strip_rows)

    def _analyze_strips(self, averages: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """(B, C, T, n) -> (B, t, positions, features)."""
        slow = self.slow.to(averages)
        fast = averages - torch.einsum("bctn,kt,kf->bcfn", averages, slow, slow)
        groups = fast.unflatten(2, (-1, self.patch_frames))
        return torch.einsum("bcgkn,sqn->bgsckq", groups, basis.to(averages)).flatten(3)

    def synthesize_dynamics(self, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Invert `analyze_dynamics`: the sum of both averages, each repeated along its missing axis."""
        over_height = self._synthesize_strips(columns, self.strip_columns)
        over_width = self._synthesize_strips(rows, self.strip_rows)
        height, width = over_width.shape[-1], over_height.shape[-1]
        return over_height[:, :, :, None, :] / height**0.5 + over_width[:, :, :, :, None] / width**0.5

    def _synthesize_strips(self, features: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """(B, t, positions, features) -> (B, C, T, n)."""
        features = features.unflatten(3, (-1, self.patch_frames, basis.shape[1]))
        return torch.einsum("bgsckq,sqn->bcgkn", features, basis.to(features)).flatten(2, 3)


class LinearEncoder(nn.Module):
    """Adds linear means, and initial log-variances, to the moments of the network.

    Raises:
        ValueError: the errors of `LinearFeatures`, or if a latent has more values than features.
    """

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.features = LinearFeatures(config)
        channels, queries, positions = config.dynamics_channels, config.num_queries, dynamics_grid(config)
        values = (config.structure_channels * queries, channels, channels)
        for name, count, size in zip(("structure", "dynamics", "dynamics"), values, self.features.sizes, strict=True):
            if count > size:
                raise ValueError(
                    f"linear_path has {size} features for the {count} values of a location of {name}; reduce the "
                    "latent's channels or queries, or raise linear_path."
                )
        structure, columns, rows = (nn.Linear(size, n) for size, n in zip(self.features.sizes, values, strict=True))
        if config.linear_path_experts > 1:
            structure = ExpertEncoder(self.features.structure_features, values[0], config.linear_path_experts)
        self.structure, self.columns, self.rows = structure, columns, rows
        self.structure_logvar = nn.Parameter(torch.zeros(config.structure_channels, queries, 1, 1))
        self.dynamics_logvar = nn.Parameter(torch.zeros(channels, 1, sum(positions)))

    def forward(
        self, clip: torch.Tensor, structure: torch.Tensor, dynamics: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the moments of both latents.

        Args:
            clip: (B, C, T, H, W).
            structure, dynamics: the network's means and log-variances along channels, (B, 2 d_S, n_q, h_S, w_S) and
                (B, 2 d_D, t, w_D + h_D).
        """
        linear = self.structure(self.features.analyze_structure(clip))
        linear = rearrange(linear, "b h w (q d) -> b d q h w", d=len(self.structure_logvar))
        mean, logvar = (NETWORK_GAIN * structure).chunk(2, dim=1)
        structure = torch.cat([linear + mean, logvar + self.structure_logvar], dim=1)
        columns, rows = self.features.analyze_dynamics(clip)
        linear = torch.cat([self.columns(columns), self.rows(rows)], dim=2).movedim(-1, 1)
        mean, logvar = (NETWORK_GAIN * dynamics).chunk(2, dim=1)
        return structure, torch.cat([linear + mean, logvar + self.dynamics_logvar], dim=1)


class LinearDecoder(nn.Module):
    """Decodes latents linearly to clips. It returns zero before it is fitted or trained."""

    def __init__(self, config: FrozenDict) -> None:
        super().__init__()
        self.features = LinearFeatures(config)
        values = config.structure_channels * config.num_queries, config.dynamics_channels, config.dynamics_channels
        structure, columns, rows = (nn.Linear(n, size) for n, size in zip(values, self.features.sizes, strict=True))
        if config.linear_path_experts > 1:
            structure = ExpertDecoder(values[0], self.features.sizes[0], config.linear_path_experts)
        self.structure, self.columns, self.rows = structure, columns, rows
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, structure: torch.Tensor | None, dynamics: torch.Tensor | None) -> torch.Tensor:
        """Return the sum of the decoded latents (B, C, T, H, W); None leaves a latent out."""
        parts = []
        if structure is not None:
            cells = rearrange(structure, "b d q h w -> b h w (q d)")
            parts.append(self.features.synthesize_structure(self.structure(cells)))
        if dynamics is not None:
            sizes = [len(self.features.strip_columns), len(self.features.strip_rows)]
            columns, rows = dynamics.movedim(1, -1).split(sizes, dim=2)
            parts.append(self.features.synthesize_dynamics(self.columns(columns), self.rows(rows)))
        return sum(parts)


@torch.no_grad()
def fit_linear_path(encoder: LinearEncoder, decoder: LinearDecoder, clips: Iterable[torch.Tensor]) -> None:
    """Set both to the principal components of the clips' features, with latents of unit variance.

    Args:
        clips: batches (B, C, T, H, W) in [-1, 1]; deterministic, given these.

    Raises:
        ValueError: if there are no clips.
    """
    # Sum the features and their products; experts need the features themselves.
    device, sums, locations = encoder.structure_logvar.device, {}, []
    has_experts = isinstance(encoder.structure, ExpertEncoder)
    for batch in clips:
        batch = batch.to(device, torch.float32)
        columns, rows = encoder.features.analyze_dynamics(batch)
        all_features = {"structure": encoder.features.analyze_structure(batch), "columns": columns, "rows": rows}
        if has_experts:
            locations.append(all_features.pop("structure").flatten(0, 2))
        for name, features in all_features.items():
            features = features.flatten(0, 2).cpu().double()
            update = (len(features), features.sum(dim=0), features.T @ features)
            sums[name] = tuple(a + b for a, b in zip(sums[name], update, strict=True)) if name in sums else update
    if not sums:
        raise ValueError("The linear path needs at least one clip to be fitted to.")

    # Project to the components of largest variance, and back.
    stds = {}
    for name, (count, total, products) in sums.items():
        mean = total / count
        variances, components = torch.linalg.eigh(products / count - mean[:, None] * mean)
        n = getattr(encoder, name).out_features
        components = components.flip(1)[:, :n]
        stds[name] = variances.flip(0)[:n].clamp(min=0).sqrt().clamp(min=POSTERIOR_STD)
        set_linear(getattr(encoder, name), components.T / stds[name][:, None], -(mean @ components) / stds[name])
        set_linear(getattr(decoder, name), components * stds[name], mean)
    if has_experts:
        stds["structure"] = fit_experts(encoder.structure, decoder.structure, torch.cat(locations), POSTERIOR_STD)

    # Set the noise of every latent value to the same amplitude in clips.
    logvars = {name: 2 * (POSTERIOR_STD / std).log() for name, std in stds.items()}
    channels, queries = encoder.structure_logvar.shape[:2]
    encoder.structure_logvar.copy_(logvars["structure"].unflatten(0, (queries, channels)).T[:, :, None, None])
    positions = len(encoder.features.strip_columns), len(encoder.features.strip_rows)
    parts = [logvars[name][:, None].expand(-1, n) for name, n in zip(("columns", "rows"), positions, strict=True)]
    encoder.dynamics_logvar.copy_(torch.cat(parts, dim=1)[:, None])


def set_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
