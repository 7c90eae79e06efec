"""Grids of a latent: which axes run over time, height and width of the clip, and power and distances along them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.fft import dct

from autoencoder import TwinLatents
from autoencoder.grids import dynamics_grid
from autoencoder.video_autoencoder import VideoAutoencoder

AXES = ("time", "height", "width")
ORDER = "order"  # an axis without a place in the clip, such as the queries of VidTwin's structure latent


@dataclass(frozen=True)
class LatentGrid:
    """A part of a latent whose positions are on a regular grid.

    Attributes:
        name: of the stream, and of the part where a stream has several.
        stream: "structure" or "dynamics".
        axes: for each axis after the channels one of `AXES`, or `ORDER`.
        shape: number of positions of each axis.
        clip: (T, H, W) of the clips.
        start: first position of the last axis in the stream.
        is_causal: whether the first position in time is that of a single frame.
    """

    name: str
    stream: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    clip: tuple[int, int, int]
    start: int = 0
    is_causal: bool = False

    def select(self, latents: TwinLatents) -> torch.Tensor:
        """The values of this grid, (B, C, *shape)."""
        return getattr(latents, self.stream)[..., self.start : self.start + self.shape[-1]]

    def size(self, axis: str) -> int:
        """Number of positions along an axis; 1 if the grid does not have it."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def stride(self, axis: str) -> int | None:
        """Frames or pixels from one position to the next; None if it is not a whole number, or there is one position.

        The first frame of a causal grid is not counted.
        """
        first = self.is_causal and axis == "time"
        length, positions = self.clip[AXES.index(axis)] - first, self.size(axis) - first
        return length // positions if positions > 1 and length % positions == 0 else None

    def average(self, clips: torch.Tensor) -> torch.Tensor:
        """Average clips (B, C, T, H, W) over the pixels of every position: (B, C, *shape); 1 along `ORDER`."""
        sizes = [self.size(axis) for axis in AXES]
        if self.is_causal:
            first = F.adaptive_avg_pool3d(clips[:, :, :1], [1, *sizes[1:]])
            parts = [F.adaptive_avg_pool3d(clips[:, :, 1:], [sizes[0] - 1, *sizes[1:]])] if sizes[0] > 1 else []
            pooled = torch.cat([first, *parts], dim=2)
        else:
            pooled = F.adaptive_avg_pool3d(clips, sizes)
        return pooled.flatten(2).unflatten(2, [1 if axis == ORDER else self.size(axis) for axis in self.axes])


def list_grids(vae: VideoAutoencoder) -> list[LatentGrid]:
    """The grids of an autoencoder's latent, of clips of its size.

    VidTwin's structure latent has one grid over height and width, for each query; its dynamics latent has two, which
    are averages over height and over width. Latents of the other classes have one grid over time, height and width.
    """
    clip, structure = vae.clip_shape[1:], vae.structure_shape
    if not vae.has_dynamics:
        rule = getattr(vae, "rule", None)  # of an adapter
        is_causal = rule is not None and rule.causal
        return [LatentGrid("latent", "structure", AXES, structure[1:], clip, is_causal=is_causal)]
    grids = [LatentGrid("structure", "structure", (ORDER, "height", "width"), structure[1:], clip)]
    _, frames, positions = vae.dynamics_shape
    if vae.config.dynamics_pool != "average":
        return [*grids, LatentGrid("dynamics", "dynamics", ("time", ORDER), (frames, positions), clip)]
    rows, columns = dynamics_grid(vae.config)
    return [
        *grids,
        LatentGrid("dynamics over width", "dynamics", ("time", "width"), (frames, columns), clip),
        LatentGrid("dynamics over height", "dynamics", ("time", "height"), (frames, rows), clip, start=columns),
    ]


def power_spectrum(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Power of each channel at each frequency along an axis, float64 (C, n).

    The type II cosine transform has no jump at the borders. Frequency k is k / (2 n) cycles per position, and white
    noise of variance 1 has the power 1 at every frequency.

    Args:
        values: (B, C, ...), with the mean that frequency 0 shall not count already subtracted.
        dim: the axis.
    """
    coefficients = torch.from_numpy(dct(values.double().cpu().numpy(), type=2, norm="ortho", axis=dim))
    return coefficients.movedim(dim, -1).movedim(1, 0).flatten(1, -2).square().mean(dim=1)


class Distance:
    """A running squared distance of pairs of latents, relative to their variance, averaged over channels.

    It is 0 for equal latents, 1 for unrelated ones and 2 for opposite ones. The mean of each position is subtracted,
    so a pattern that all clips share does not count.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: torch.Tensor | None = None  # (5, C, positions): of (a - b)^2, a, a^2, b and b^2

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add pairs (B, C, ...)."""
        a, b = (x.double().cpu().flatten(2) for x in (a, b))
        sums = torch.stack([part.sum(dim=0) for part in ((a - b).square(), a, a.square(), b, b.square())])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(a)

    def compute(self, live: torch.Tensor) -> float | None:
        """The distance over the live channels, bool (C,); None without pairs or variance."""
        if self.sums is None:
            return None
        difference, a, a_squares, b, b_squares = self.sums[:, live] / self.count
        difference = (difference - (a - b).square()).sum(dim=1)
        variance = (a_squares - a.square() + b_squares - b.square()).sum(dim=1)
        varies = variance > 1e-12 * (a_squares + b_squares).sum(dim=1)
        ratios = difference[varies].clamp(min=0) / variance[varies]
        return ratios.mean().item() if len(ratios) else None
