"""Conversion between latents and tokens, and the conditioning vector of each stream."""

from __future__ import annotations

import math

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from autoencoder.blocks import sincos_1d


def patchify(latent: torch.Tensor, patch_size: tuple[int, ...]) -> torch.Tensor:
    """Cut a latent with n axes into row-major patches with the channel innermost.

    Args:
        latent: (B, C, *sizes), with n sizes that the patch sizes divide.
        patch_size: n numbers.

    Returns:
        (B, number of patches, prod(patch_size) * C).
    """
    n = len(patch_size)
    cells = [
        size for total, patch in zip(latent.shape[2:], patch_size, strict=True) for size in (total // patch, patch)
    ]
    latent = latent.reshape(*latent.shape[:2], *cells)  # (B, C, grid, patch, grid, patch, ...)
    latent = latent.permute(0, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1)
    return latent.flatten(1, n).flatten(2)


def unpatchify(tokens: torch.Tensor, patch_size: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Invert `patchify`: (B, number of patches, prod(patch_size) * C) -> (B, *shape), shape = (C, *sizes)."""
    n = len(patch_size)
    grid = [size // patch for size, patch in zip(shape[1:], patch_size, strict=True)]
    tokens = tokens.reshape(tokens.shape[0], *grid, *patch_size, shape[0])
    interleaved = [axis for i in range(1, n + 1) for axis in (i, n + i)]
    return tokens.permute(0, 2 * n + 1, *interleaved).reshape(tokens.shape[0], *shape)


def sincos_positions(grid: tuple[int, ...], dim: int) -> torch.Tensor:
    """Return fixed sin-cos positions of a row-major grid with n axes: (prod(grid), dim), float32.

    Axes have equal, even numbers of channels, in the order of the axes; remaining channels are zero.
    """
    share = dim // len(grid) // 2 * 2
    axes = []
    for i, size in enumerate(grid):
        along = [size if j == i else 1 for j in range(len(grid))]
        axes.append(sincos_1d(size, share).view(*along, share).expand(*grid, share))
    position = torch.cat(axes, dim=-1).flatten(0, -2)
    return nn.functional.pad(position, (0, dim - position.shape[1])).float()


class StreamEmbedding(nn.Module):
    """Embeds one stream's latent to tokens: a linear layer on each patch, plus fixed positions.

    Each stream has such a layer, whose bias is the learned stream embedding.

    Args:
        shape: (C, *sizes) of the latent.
        patch_size: one number per size.
        dim: token width D.
        self_conditioning: whether to concatenate the patches of a second latent of the same shape.
    """

    def __init__(
        self, shape: tuple[int, ...], patch_size: tuple[int, ...], dim: int, self_conditioning: bool = False
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        patch_dim = math.prod(patch_size) * shape[0]
        self.proj = nn.Linear(2 * patch_dim if self_conditioning else patch_dim, dim)
        grid = tuple(size // patch for size, patch in zip(shape[1:], patch_size, strict=True))
        self.register_buffer("position", sincos_positions(grid, dim), persistent=False)

    def forward(self, *latents: torch.Tensor) -> torch.Tensor:
        """(B, C, *sizes), and once more where self-conditioned -> (B, number of patches, D)."""
        patches = torch.cat([patchify(latent, self.patch_size) for latent in latents], dim=-1)
        # In the latents' dtype, so that the residual stream stays float32 under autocast.
        return self.proj(patches) + self.position.to(patches)


class CaptionEmbedding(nn.Module):
    """Projects token embeddings of a text encoder to caption tokens, after a learned token for "no caption".

    Args:
        channels: size C of the token embeddings.
        dim: token width D.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.proj = nn.Sequential(nn.Linear(channels, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.null_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)

    def forward(
        self,
        batch_size: int,
        lengths: tuple[int, int],
        embeddings: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return caption tokens (B, 1 + N, D), and which of them each token attends to, bool (B, 1, S, 1 + N).

        Args:
            batch_size: B.
            lengths: numbers of structure and of dynamics tokens, S in total.
            embeddings: (B, N, C); None: no clip has a caption.
            mask: tokens of the caption, (B, N), or (B, 2, N) with a row for structure and one for dynamics; None:
                all. A row without any token attends to the null token, every other row to its tokens only.
        """
        null = self.null_token.expand(batch_size, -1, -1)
        if embeddings is None:
            return null, null.new_ones(batch_size, 1, sum(lengths), 1, dtype=torch.bool)
        mask = expand_mask(embeddings, mask)
        mask = torch.cat([~mask.any(dim=-1, keepdim=True), mask], dim=-1)
        rows = [mask[:, i : i + 1].expand(-1, length, -1) for i, length in enumerate(lengths)]
        tokens = self.proj(self.norm(embeddings))
        return torch.cat([null.to(tokens.dtype), tokens], dim=1), torch.cat(rows, dim=1)[:, None]


class PooledCaptionEmbedding(nn.Module):
    """A vector per stream of the mean token embedding of its caption (Podell et al., arXiv 2307.01952, Section 2.1).

    Args:
        channels: size C of the token embeddings.
        dim: width D of the vectors.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.proj = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (B, N, C) and their mask as in `CaptionEmbedding` -> (B, 2, D), zero without a caption."""
        weights = expand_mask(embeddings, mask).to(embeddings.dtype)  # (B, 2, N)
        count = weights.sum(dim=-1, keepdim=True)
        mean = weights @ self.norm(embeddings) / count.clamp(min=1)
        return self.proj(mean.to(embeddings.dtype)) * (count > 0)


def expand_mask(embeddings: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the tokens of structure's and of dynamics' caption, bool (B, 2, N).

    Args:
        embeddings: (B, N, C).
        mask: (B, N) or (B, 2, N); None: all tokens.
    """
    if mask is None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    mask = mask.bool()
    return mask[:, None].expand(-1, 2, -1) if mask.ndim == 2 else mask


class TwinConditionEmbedding(nn.Module):
    """A conditioning vector per stream: the sum of embeddings of both noise levels, the stream and the class.

    Args:
        dim: width D of the vectors.
        num_classes: the class table has one more row for "no class"; None: no class table.
    """

    def __init__(self, dim: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, dim)
        self.other_time_proj = nn.Linear(dim, dim, bias=False)
        self.stream_embed = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.class_embed = nn.Embedding(num_classes + 1, dim) if num_classes is not None else None

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """timestep (B, 2) or (B, 1 + R) and class_labels (B,) -> (B, 2, D) or (B, 1 + R, D), structure first."""
        frequencies = self.time_proj(timestep.flatten()).to(dtype)  # computed in float32
        own = self.time_embedder(frequencies).unflatten(0, timestep.shape)
        stream_embed = spread_over_rows(self.stream_embed[None], timestep.shape[1])
        conditioning = own + self.other_time_proj(swap_streams(own)) + stream_embed
        if self.class_embed is not None:
            conditioning = conditioning + self.class_embed(class_labels)[:, None]
        return conditioning


class IntervalEmbedding(nn.Module):
    """A vector per stream of the intervals of a denoising step: its timesteps minus those that it leads to.

    Args:
        dim: width D of the vectors.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.proj = nn.Sequential(nn.Linear(512, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, interval: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """interval (B, 2) or (B, 1 + R) -> (B, 2, D) or (B, 1 + R, D), of each stream and the other one."""
        frequencies = self.time_proj(interval.flatten()).to(dtype).unflatten(0, interval.shape)  # computed in float32
        return self.proj(torch.cat([frequencies, swap_streams(frequencies)], dim=-1))


def spread_over_rows(vectors: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat the vector of dynamics for each row: (B, 2, D) -> (B, length, D), length 2 or 1 + R."""
    if vectors.shape[1] == length:
        return vectors
    return torch.cat([vectors[:, :1], vectors[:, 1:].expand(-1, length - 1, -1)], dim=1)


def swap_streams(vectors: torch.Tensor) -> torch.Tensor:
    """Return for each stream the vector of the other one: for structure, the mean over the rows of dynamics.

    Args:
        vectors: (B, 2, D), or (B, 1 + R, D) with R rows of dynamics; structure first.
    """
    if vectors.shape[1] == 2:
        return vectors.flip(1)
    structure, dynamics = vectors[:, :1], vectors[:, 1:]
    return torch.cat([dynamics.mean(dim=1, keepdim=True), structure.expand_as(dynamics)], dim=1)
