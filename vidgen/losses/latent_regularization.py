"""Changes to a VAE's latents before decoding that make them easier to diffuse: scale equivariance, nested dropout.

Scale equivariance (EQ-VAE, Kouzelis et al., arXiv 2502.09509, Section 3): a latent that is reduced in size decodes to
the clip reduced in size. As in EQ-VAE, this replaces the ordinary reconstruction of a fraction of the clips, so it
costs no further forward pass.

EQ-VAE decodes the reduced latent on a smaller grid. The grid of a VidTwin is fixed: its position embeddings, and the
layers over positions, queries and frames, have its size, and clips of another size are cut into tiles of this size
or padded to it. So the reduced clip has to fill the frame. Here it is repeated: a clip that is reduced by k along an
axis is shown k times side by side. This is the filling under which both latents of VidTwin are known:

* structure (channel, query, row, column): every query's grid is reduced and repeated along rows and columns;
* dynamics (channel, frame, position): positions are averages of the frame's columns over its height, then of its rows
  over its width. Repetition along one axis leaves averages over this axis unchanged, so the averages of columns are
  reduced and repeated along the width only, and those of rows along the height only. With padding, or with a part of
  the clip enlarged, averages over the new frame would not follow from those over the old one.

Reduction averages k neighboring positions, along the axis continued periodically, so grids need not be multiples of k.
Time is not scaled: the queries of the structure latent are no axis of time, so the structure latent of a clip at
another speed does not follow from that of the clip.

Nested dropout (Rippel et al., arXiv 1402.0915, Section 2; of the channels of a diffused latent, DC-AE 1.5, arXiv
2508.00413): the channels after a random number are set to zero, so that the first channels learn what matters most.
"""

from __future__ import annotations

import torch

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.grids import Grid, dynamics_grid
from autoencoder.video_autoencoder import VideoAutoencoder

from ..common.config import check_config
from ..common.errors import UserError
from .config import VAELossConfig

DRAWS = 5  # uniform random numbers per clip


class LatentRegularization:
    """Changes the latents of some clips, and these clips alike, before they are decoded and compared.

    A fraction `equivariance` of the clips is reduced by factors along height and width. The pair is drawn evenly from
    all pairs of 1 to `equivariance_max_factor`, except for (1, 1). A fraction `nested_dropout` keeps a number of
    channels of each stream that is drawn evenly from 1 to all.

    Args:
        vae: the model.
        config: of the loss.

    Raises:
        UserError: if a value is out of range, or the model's latents are unknown or too small to be reduced.
    """

    def __init__(self, vae: VideoAutoencoder, config: VAELossConfig) -> None:
        check_config(config, "loss")
        self.vae, self.config = vae, config
        self.max_factor = config.equivariance_max_factor
        self.dynamics_sizes = [0, 0]  # positions of columns and of rows
        if config.equivariance:
            rows, columns = vae.structure_shape[-2:]
            if vae.has_dynamics:
                dynamics_rows, dynamics_columns = self._dynamics_grid()
                self.dynamics_sizes = [dynamics_columns, dynamics_rows]
                rows, columns = min(rows, dynamics_rows), min(columns, dynamics_columns)
            if self.max_factor > min(rows, columns):
                raise UserError(
                    f"loss.equivariance_max_factor is {self.max_factor}, but a latent of {rows} x {columns} positions "
                    f"can be reduced by {min(rows, columns)} at most."
                )

    def _dynamics_grid(self) -> Grid:
        """Rows and columns that the positions of the dynamics latent are averages of."""
        if not isinstance(self.vae, AutoencoderKLVidTwin) or self.vae.config.dynamics_pool != "average":
            raise UserError(
                "loss.equivariance needs an autoencoder with one latent, or a VidTwin whose dynamics latent holds "
                "averages of rows and columns (dynamics_pool: average); set loss.equivariance=0 for this model."
            )
        return dynamics_grid(self.vae.config)

    def __call__(
        self, latents: torch.Tensor, video: torch.Tensor, uniform: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change packed latents (B, L) and clips (B, C, T, H, W), by uniform numbers (B, DRAWS) or more in [0, 1)."""
        if uniform is None:
            uniform = torch.rand(len(video), DRAWS, device=video.device)
        reduced, pair, shortened, *lengths = uniform[:, :DRAWS].unbind(1)
        streams = self.vae.unpack(latents)
        if self.config.nested_dropout:
            is_shortened = shortened < self.config.nested_dropout
            parts = zip((streams.structure, streams.dynamics), lengths, strict=True)
            streams = TwinLatents(*(drop_last_channels(part, length, is_shortened) for part, length in parts))
        if self.config.equivariance:
            factors = draw_factors(pair, self.max_factor)
            vertical, horizontal = (torch.where(reduced < self.config.equivariance, f, 1) for f in factors)
            streams = self.reduce_latents(streams, vertical, horizontal)
            video = reduce_axis(reduce_axis(video, vertical, 3, self.max_factor), horizontal, 4, self.max_factor)
        return streams.pack(), video

    def reduce_latents(self, latents: TwinLatents, vertical: torch.Tensor, horizontal: torch.Tensor) -> TwinLatents:
        """Reduce latents of the model by whole factors (B,) along height and width; 1 changes nothing."""
        structure = reduce_axis(latents.structure, vertical, 3, self.max_factor)
        structure = reduce_axis(structure, horizontal, 4, self.max_factor)
        if not self.vae.has_dynamics:
            return TwinLatents(structure, latents.dynamics)
        columns, rows = latents.dynamics.split(self.dynamics_sizes, dim=3)
        columns = reduce_axis(columns, horizontal, 3, self.max_factor)
        rows = reduce_axis(rows, vertical, 3, self.max_factor)
        return TwinLatents(structure, torch.cat([columns, rows], dim=3))


def draw_factors(uniform: torch.Tensor, max_factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors (B,) along height and width from uniform numbers (B,): evenly any pair up to `max_factor` but (1, 1)."""
    pairs = 1 + (uniform * (max_factor**2 - 1)).long()
    return 1 + pairs // max_factor, 1 + pairs % max_factor


def reduce_axis(x: torch.Tensor, factors: torch.Tensor, dim: int, max_factor: int) -> torch.Tensor:
    """Reduce an axis of each row of (B, ...) by its factor (B,), and repeat the result to the old size.

    Every value has the same weight, so the mean along the axis does not change. There is no wait for the device.
    """
    result = x
    for factor in range(2, max_factor + 1):
        repeated = torch.cat([x] * factor, dim)
        reduced = repeated.unflatten(dim, (x.shape[dim], factor)).mean(dim + 1)
        result = torch.where((factors == factor).view(-1, *[1] * (x.ndim - 1)), reduced, result)
    return result


def drop_last_channels(latent: torch.Tensor, uniform: torch.Tensor, is_shortened: torch.Tensor) -> torch.Tensor:
    """Set the last channels of some rows of (B, C, ...) to zero, by uniform numbers (B,) and bool (B,)."""
    channels = latent.shape[1]
    kept = torch.where(is_shortened, 1 + (uniform * channels).long(), channels)
    mask = torch.arange(channels, device=latent.device) < kept[:, None]
    return latent * mask.view(*mask.shape, *[1] * (latent.ndim - 2))
